"""The latent cache where something is wrong: stale, stopped, damaged, on a full disk, or asked for the impossible."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_cases import Mirrored, assert_same_batches, autoencoder
from PIL import Image

from diffusion.data import latent_build, latent_cache
from diffusion.data.digits import Digits
from diffusion.data.image_folder import ImageFolder
from diffusion.data.images import ImageSet, TensorImages
from diffusion.data.latent_cache import cached
from diffusion.data.shapes import Shapes
from diffusion.data.table import TableWriter

# -- a stale cache -----------------------------------------------------------------------------------------------------

STALE = {
    "weights": ({"seed": 1}, {}, r"autoencoder\.weights was [0-9a-f]{12} and is [0-9a-f]{12}\."),
    "images": ({}, {"content": 1}, r"data\.train\.content was [0-9a-f]{12} and is [0-9a-f]{12}, data\.val\.content"),
    "number": ({}, {"num_train": 31}, r"data\.train\.samples was 30 and is 31"),
    "size": ({}, {"image_size": 16}, r"data\.shape was \[3, 8, 8\] and is \[3, 16, 16\]"),
    "mirrors": ({}, {"flip": False}, r"data\.train\.horizontal_flip was True and is False"),
}


@pytest.mark.parametrize(("model", "data", "message"), STALE.values(), ids=STALE)
@pytest.mark.parametrize("state", ["complete", "begun"])
def test_a_cache_of_something_else_is_refused_with_what_changed(tmp_path, monkeypatch, model, data, message, state):
    if state == "complete":
        cached(Mirrored(), autoencoder(), tmp_path)
    else:
        stop_build(tmp_path, monkeypatch, after=8)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message) as caught:
        cached(Mirrored(**data), autoencoder(**model), tmp_path)
    for advice in ("latent_cache=DIR", "delete this one", "latent_cache=null"):
        assert advice in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shapes_of_another_seed_or_label_are_other_data(tmp_path):
    settings = {"image_size": 8, "num_train": 6, "num_val": 2, "batch_size": 2}
    cached(Shapes(**settings), autoencoder(), tmp_path)
    with pytest.raises(ValueError, match=r"data\.train\.seed was 0 and is 1"):
        cached(Shapes(seed=1, **settings), autoencoder(), tmp_path)
    with pytest.raises(ValueError, match=r"data\.num_classes was 6 and is 36, .*label was shape and is shape_colour"):
        cached(Shapes(label="shape_colour", **settings), autoencoder(), tmp_path)


@pytest.mark.parametrize("change", ["touch", "rename", "caption", "transform"])
def test_a_changed_image_folder_is_noticed(tmp_path, monkeypatch, change):
    def make(label="a"):
        lines = [json.dumps({"file_name": path.name, "caption": label}) for path in sorted(root.glob("*.png"))]
        (root / "metadata.jsonl").write_text("\n".join(lines))
        return ImageFolder(root, image_size=8, batch_size=1, val_fraction=0.3)

    root, cache = tmp_path / "images", tmp_path / "cache"
    root.mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(root / f"{number}.png")
    cached(make(), autoencoder(), cache)
    cached(make(), autoencoder(), cache)
    shutil.copytree(root, tmp_path / "moved", copy_function=shutil.copy2)
    root = tmp_path / "moved"
    cached(make(), autoencoder(), cache)
    if change == "touch":
        os.utime(root / "3.png", (0, 0))
    elif change == "rename":
        (root / "3.png").rename(root / "33.png")
    elif change == "transform":
        monkeypatch.setattr("diffusion.data.image_folder.TRANSFORM", "bicubic")
    with pytest.raises(
        ValueError, match=r"transform was upright.* and is bicubic" if change == "transform" else "content"
    ):
        cached(make("b" if change == "caption" else "a"), autoencoder(), cache)


class Own(ImageSet):
    """A set of somebody's own, which says nothing about itself."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = value

    def __len__(self):
        return 40

    def load(self, indices):
        return {"image": torch.full((len(indices), 3, 8, 8), self.value), "caption": ["x"] * len(indices)}


def test_a_set_of_ones_own_is_known_by_its_samples():
    assert Own(1).description() == Own(1).description() != Own(2).description()
    assert Own(1).description()["class"].endswith("Own")


# -- a build that is stopped -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it, like a signal."""


def stop_build(folder: Path, monkeypatch, *, after: int) -> None:
    """Build with a model that dies in the batch after `after` images; what it had is saved after each batch."""
    model, seen = autoencoder(), 0
    moments = model.moments

    def dying(x):
        nonlocal seen
        seen += len(x)
        if seen > after * 2:  # two sides
            raise Killed
        return moments(x)

    model.moments = dying
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(latent_build, "SECONDS_A_SAVE", 0.0)
        cached(Mirrored(), model, folder, batch_size=4)


@pytest.mark.parametrize("after", [0, 12, 28])
def test_a_killed_build_is_no_cache_and_goes_on_where_it_was(tmp_path, monkeypatch, after):
    whole = tmp_path / "whole"
    cached(Mirrored(), autoencoder(), whole, batch_size=4)
    stop_build(tmp_path / "broken", monkeypatch, after=after)
    assert not (tmp_path / "broken" / "manifest.json").exists()
    with pytest.raises(ValueError):  # half an array is none
        np.load(tmp_path / "broken" / "train-00000.moments.npy", mmap_mode="r")
    with open(tmp_path / "broken" / "train-00000.label.npy", "ab") as file:  # written, but not noted before the end
        file.write(b"x" * 999)
    model, encoded = autoencoder(), []
    moments = model.moments
    model.moments = lambda x: encoded.append(len(x)) or moments(x)
    cached(Mirrored(), model, tmp_path / "broken", batch_size=4)
    assert sum(encoded) == 2 * (30 - after) + 7
    for path in whole.iterdir():
        assert path.read_bytes() == (tmp_path / "broken" / path.name).read_bytes(), path.name


def test_a_build_in_another_dtype_does_not_go_on(tmp_path, monkeypatch):
    stop_build(tmp_path, monkeypatch, after=8)
    with pytest.raises(ValueError, match="dtype was float32 and is float16"):
        cached(Mirrored(), autoencoder(), tmp_path, dtype="float16")


def test_an_interrupted_build_says_what_it_keeps(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        interrupted(tmp_path)
    assert stop.value.code == 130
    assert f"the latents of 8 of 37 images are kept in {tmp_path}" in capsys.readouterr().err


def interrupted(folder: Path) -> None:
    model, calls = autoencoder(), iter(range(100))
    moments = model.moments

    def stopping(x):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return moments(x)

    model.moments = stopping
    cached(Mirrored(), model, folder, batch_size=4)


def slow_build(folder: str) -> None:
    """In a process of its own: a build that takes longer than the test waits."""
    latent_build.SECONDS_A_SAVE = 0.0
    model = autoencoder()
    moments = model.moments
    model.moments = lambda x: time.sleep(0.1) or moments(x)
    cached(Mirrored(), model, folder, batch_size=4)


def test_a_build_killed_by_a_signal_leaves_no_lock(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=slow_build, args=(str(tmp_path),))
    process.start()
    while not (tmp_path / "progress.json").exists() or '"train": 0' in (tmp_path / "progress.json").read_text():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    model = autoencoder()
    data = cached(Mirrored(), model, tmp_path, batch_size=4)
    assert_same_batches(data.train_dataloader(), Mirrored().train_dataloader(), model)


def build_and_count(folder: str, encoded) -> None:
    model = autoencoder()
    moments = model.moments
    model.moments = lambda x: encoded.put(len(x)) or time.sleep(0.02) or moments(x)
    data = cached(Mirrored(), model, folder, batch_size=4)
    assert len(next(iter(data.train_dataloader()))["moments"]) == 4


def test_processes_that_start_together_fill_one_folder_once(tmp_path):
    context = multiprocessing.get_context("fork")
    encoded = context.Queue()
    ranks = [context.Process(target=build_and_count, args=(str(tmp_path), encoded)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert sum(encoded.get() for _ in range(8 * 2 + 2)) == 2 * 30 + 7 and encoded.empty()


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_says_what_is_kept(tmp_path, monkeypatch):
    write = TableWriter.append

    def full(self, rows):
        if self.done >= 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, rows)

    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(latent_build, "SECONDS_A_SAVE", 0.0)
        patch.setattr(TableWriter, "append", full)
        cached(Mirrored(), autoencoder(), tmp_path, batch_size=4)
    assert caught.value.errno == errno.ENOSPC
    assert f"cannot write the latent cache {tmp_path}: No space left on device; the latents of 8 of 37" in str(
        caught.value
    )
    cached(Mirrored(), autoencoder(), tmp_path)


def test_a_disk_that_is_too_small_is_seen_before_the_first_image(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_build.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"needs 0\.02 GB more, but .* has 0\.00 GB free; name a folder on another disk"):
        cached(Mirrored(num_train=40_000), autoencoder(), tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write the latent cache .*file/cache: Not a directory; name a folder"):
        cached(Mirrored(), autoencoder(), tmp_path / "file" / "cache")


def test_a_complete_cache_is_read_without_writing(tmp_path, monkeypatch):
    """What a folder that may only be read needs; permissions themselves do not stop root."""
    cached(Mirrored(), autoencoder(), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.iterdir())}
    monkeypatch.setattr(latent_cache, "_locked", None)
    monkeypatch.setattr(latent_cache, "LatentBuild", None)
    cached(Mirrored(), autoencoder(), tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.iterdir())} == before


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds no latent cache, but thesis\.tex; name an empty folder"):
        cached(Mirrored(), autoencoder(), tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: os.truncate(folder / "train-00000.moments.npy", 5000),
            r"train-00000\.moments\.npy is missing or damaged",
        ),
        (lambda folder: (folder / "val-00000.label.npy").unlink(), r"val-00000\.label\.npy is missing or damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "is not that of a latent cache"),
        (lambda folder: edit(folder, format_version=9), "has format 9, this package reads 2; update it"),
    ],
    ids=["truncated", "missing", "no json", "foreign", "newer"],
)
def test_a_damaged_cache_is_refused(tmp_path, damage, message):
    cached(Mirrored(), autoencoder(), tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        cached(Mirrored(), autoencoder(), tmp_path)


def edit(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_data_and_autoencoder_must_fit(tmp_path):
    with pytest.raises(ValueError, match="takes images of 1 channels"):
        cached(Mirrored(), autoencoder(in_channels=1), tmp_path / "a")
    with pytest.raises(ValueError, match=r"H=9 is not a multiple of 2.*8 or 10"):
        cached(Mirrored(image_size=9), autoencoder(), tmp_path / "b")
    with pytest.raises(ValueError, match=r"derived from diffusion\.data\.ImageData, got list"):
        cached([1, 2], autoencoder(), tmp_path / "c")


class Strange(TensorImages):
    def load(self, indices):
        return super().load(indices) | {"box": [(0, 1)] * len(indices)}


def test_an_entry_that_cannot_be_kept_is_named(tmp_path):
    data = Digits()
    data.setup()
    data.train_set = Strange(data.train_set.images, data.train_set.labels)
    with pytest.raises(ValueError, match="the batches' 'box' can be no part of a latent cache"):
        cached(data, autoencoder(in_channels=1), tmp_path)
