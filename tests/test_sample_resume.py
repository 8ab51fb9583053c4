"""A run that was stopped ends as if it had not been, and goes on with nothing that it was not begun with."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from process_cases import last_words, words
from tiny import names_in, run, save_tiny

import diffusion.generate
import diffusion.sample_folder
from diffusion.images import grid, read_text, save_npz
from diffusion.sample_parts import Parts, changes

FINISHED = ["config.yaml", "grid.png", "images", "record.yaml", "samples.npz"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture
def one_commit(monkeypatch):
    """The pictures of two runs of a test say the same commit, whatever is committed between them."""
    monkeypatch.setattr(diffusion.sample_folder, "git_commit", lambda: "0" * 40)


class Crash(BaseException):
    """As sudden as a kill, for this process."""


def crash_at(monkeypatch, name, call):
    """Let a function of sample_folder crash when it is called for the `call`th time."""
    if name.startswith("Parts."):
        home, name = Parts, name.removeprefix("Parts.")
    else:
        home = diffusion.sample_folder
    original, calls = getattr(home, name), []

    def crashing(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise Crash
        return original(*args, **kwargs)

    monkeypatch.setattr(home, name, crashing)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("Parts.begin", 1),
        ("save_pictures", 1),
        ("save_pictures", 3),
        ("Parts.save", 1),
        ("Parts.save", 2),
        ("save_png", 7),
        ("grid", 1),
        ("save_npz", 1),
        ("Parts.remove", 1),
    ],
)
def test_whatever_stops_a_run_the_same_command_ends_it(
    checkpoint, tmp_path, monkeypatch, capsys, one_commit, name, call
):
    arguments = ["num_samples=20", "batch_size=4", "pad_to=4"]
    assert run("sample", words(checkpoint, tmp_path / "whole", *arguments), monkeypatch, capsys)[0] == 0
    with monkeypatch.context() as patch:
        crash_at(patch, name, call)
        with pytest.raises(Crash):
            run("sample", words(checkpoint, tmp_path / "out", *arguments), monkeypatch, capsys)
    assert not (tmp_path / "out" / "samples.npz").exists() or name == "Parts.remove"
    done = len(list((tmp_path / "out" / "parts").glob("[0-9]*.npy")))
    status, _, err = run("sample", words(checkpoint, tmp_path / "out", *arguments), monkeypatch, capsys)
    assert status == 0, err
    assert ("going on after" in err) == (name != "Parts.begin")
    if done:
        assert f"going on after {4 * done} of 20 samples" in err
    whole_run, ours = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).rglob("*.[np][np][zg]")}
        for folder in ("whole", "out")
    )
    assert len(ours) == 22 and ours == whole_run
    assert names_in(tmp_path / "out") == FINISHED


def test_what_is_left_by_a_kill_at_the_very_end_is_taken_away(checkpoint, tmp_path, monkeypatch, capsys):
    line = words(checkpoint, tmp_path / "out", "num_samples=20", "batch_size=4", "pad_to=4")

    def half(folder, **how):
        next(folder.glob("*.npy")).unlink()
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", half)
        with pytest.raises(Crash):
            run("sample", line, monkeypatch, capsys)
    assert len(list((tmp_path / "out" / "parts").glob("*.npy"))) == 4
    status, _, err = run("sample", line, monkeypatch, capsys)
    assert status == 2 and "already holds samples" in err
    assert names_in(tmp_path / "out") == FINISHED


def stop_half_way(checkpoint, out_dir, monkeypatch, capsys, *arguments):
    with monkeypatch.context() as patch:
        crash_at(patch, "Parts.save", 3)
        with pytest.raises(Crash):
            run("sample", words(checkpoint, out_dir, *arguments), monkeypatch, capsys)


def test_finished_batches_are_not_drawn_again(checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["num_samples=20", "batch_size=4", "pad_to=4"]
    stop_half_way(checkpoint, tmp_path / "out", monkeypatch, capsys, *arguments)
    drawn = []
    draw = diffusion.generate.generate
    counting = lambda *args, seeds, **how: drawn.extend(seeds) or draw(*args, seeds=seeds, **how)  # noqa: E731
    monkeypatch.setattr(diffusion.generate, "generate", counting)
    assert run("sample", words(checkpoint, tmp_path / "out", *arguments), monkeypatch, capsys)[0] == 0
    assert drawn == list(range(8, 20))


def test_a_changed_setting_is_refused_by_its_name_and_costs_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["num_samples=20", "batch_size=4", "pad_to=4"]
    stop_half_way(checkpoint, tmp_path / "out", monkeypatch, capsys, *arguments)
    (tmp_path / "other").mkdir()
    other = save_tiny(tmp_path / "other" / "model.safetensors", channels=8)
    for change, said in (
        (["sampler.num_steps=4"], "sampler.num_steps was 3 and is 4"),
        (["guidance.guidance_scale=3"], "guidance.guidance_scale was 2.0 and is 3"),
        (["guidance=none"], "guidance._target_ was diffusion.guidance.ClassifierFreeGuidance and is"),
        (["seed=1"], "seed was 0 and is 1"),
        (["labels=[3]"], "labels was null and is [3]"),
        (["num_samples=24"], "num_samples was 20 and is 24"),
        (["batch_size=8"], "batch_size was 4 and is 8"),
        (["dtype=float64"], "dtype was float32 and is float64"),
        (["save_images=false"], "save_images was True and is False"),
        ([f"checkpoint={other}"], "checkpoint_sha256 was "),
        (["seed=1", "labels=[3]"], "seed was 0 and is 1, labels was null and is [3]"),
    ):
        line = last_words(*words(checkpoint, tmp_path / "out"), *arguments, *change)
        status, _, err = run("sample", line, monkeypatch, capsys)
        assert status == 2 and said in err and len(err.splitlines()) == 1, err
        assert "8 samples of an unfinished run with other settings" in err and "overwrite=true" in err
    moved = checkpoint.rename(checkpoint.with_name("moved.safetensors"))
    try:
        line = last_words(*words(moved, tmp_path / "out"), *arguments, "batch_size=3")
        status, _, err = run("sample", line, monkeypatch, capsys)
        assert status == 0 and "going on after 8 of 20" in err, err  # 3 is 4 in steps of pad_to; a path is no setting
    finally:
        moved.rename(checkpoint)


def test_overwrite_begins_anew_but_goes_on_with_its_own_batches(checkpoint, tmp_path, monkeypatch, capsys, one_commit):
    arguments = ["num_samples=20", "batch_size=4", "pad_to=4"]
    assert run("sample", words(checkpoint, tmp_path / "out", *arguments), monkeypatch, capsys)[0] == 0
    before = (tmp_path / "out" / "samples.npz").read_bytes()
    status, _, err = run("sample", words(checkpoint, tmp_path / "out", *arguments), monkeypatch, capsys)
    assert status == 2 and "already holds samples; choose another out_dir, or overwrite=true" in err
    fewer = ["num_samples=12", "batch_size=4", "pad_to=4", "seed=1", "overwrite=true"]
    stop_half_way(checkpoint, tmp_path / "out", monkeypatch, capsys, *fewer)
    assert (tmp_path / "out" / "samples.npz").read_bytes() == before  # until there is something to replace it
    status, _, err = run("sample", words(checkpoint, tmp_path / "out", *fewer), monkeypatch, capsys)
    assert status == 0 and "going on after 8 of 12 samples" in err
    assert len(list((tmp_path / "out" / "images").iterdir())) == 12
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (12, 8, 8, 1)
    assert read_text(tmp_path / "out" / "images" / "000000.png")["seed"] == 1


def test_another_version_of_the_code_goes_on_and_says_so(checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["num_samples=20", "batch_size=4", "pad_to=4"]
    monkeypatch.setattr(diffusion.sample_folder, "git_commit", lambda: "aaa")
    stop_half_way(checkpoint, tmp_path / "out", monkeypatch, capsys, *arguments)
    monkeypatch.setattr(diffusion.sample_folder, "git_commit", lambda: "bbb")
    status, _, err = run("sample", words(checkpoint, tmp_path / "out", *arguments), monkeypatch, capsys)
    assert status == 0 and "git_commit was aaa and is bbb" in err


def test_a_damaged_part_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["num_samples=20", "batch_size=4", "pad_to=4"]
    stop_half_way(checkpoint, tmp_path / "out", monkeypatch, capsys, *arguments)
    (tmp_path / "out" / "parts" / "00000004.npy").write_bytes(b"no array")
    status, _, err = run("sample", words(checkpoint, tmp_path / "out", *arguments), monkeypatch, capsys)
    assert status == 2 and "00000004.npy is damaged" in err and "delete it and run again" in err
    (tmp_path / "out" / "parts" / "00000004.npy").unlink()
    assert run("sample", words(checkpoint, tmp_path / "out", *arguments), monkeypatch, capsys)[0] == 0


def test_a_disk_that_is_too_small_is_found_before_the_first_step(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**6))
    line = words(checkpoint, tmp_path / "out", "num_samples=10000", "batch_size=4")
    status, _, err = run("sample", line, monkeypatch, capsys)
    assert status == 2 and "the samples need 0.00 GB more while they are made" in err and "choose an out_dir" in err


def test_pictures_may_be_left_out_and_the_grid_shows_a_hundred(checkpoint, tmp_path, monkeypatch, capsys):
    for name, more in (("all", []), ("first", ["save_images=false"])):
        count = 100 if name == "all" else 130
        line = last_words(*words(checkpoint, tmp_path / name), f"num_samples={count}", "sampler.num_steps=1", *more)
        status, _, err = run("sample", line, monkeypatch, capsys)
        assert status == 0, err
    assert not (tmp_path / "first" / "images").exists()
    sheets = [np.asarray(Image.open(tmp_path / name / "grid.png")) for name in ("all", "first")]
    assert np.array_equal(*sheets)
    images = np.load(tmp_path / "all" / "samples.npz")["arr_0"]
    assert np.array_equal(sheets[0], np.asarray(grid(images, 10, captions=[*map(str, range(10)), *[""] * 90])))
    assert np.load(tmp_path / "first" / "samples.npz")["arr_0"].shape[0] == 130


def test_changes_are_told_by_their_dotted_names():
    old, new = {"a": {"b": 1, "c": 2}, "d": "x" * 64}, {"a": {"b": 1, "c": None}, "e": 3}
    assert list(changes(old, new)) == ["a.c was 2 and is null", "e was null and is 3", "d was xxxxxxxxxxxx and is null"]
    assert not list(changes(old, json.loads(json.dumps(old))))


def test_arrays_written_block_by_block_have_the_bytes_of_numpys_own(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(10)
    np.savez(tmp_path / "numpy.npz", images, labels)
    save_npz(tmp_path / "blocks.npz", (images[i : i + 3] for i in range(0, 10, 3)), labels, count=10)
    assert (tmp_path / "blocks.npz").read_bytes() == (tmp_path / "numpy.npz").read_bytes()
    with pytest.raises(ValueError, match=r"11 images were announced for .*, and 10 came"):
        save_npz(tmp_path / "other.npz", iter([images]), count=11)
    assert not (tmp_path / "other.npz").exists()


def test_too_little_memory_says_what_to_change_and_does_not_bind(checkpoint, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(diffusion.generate, "generate", full)
        line = words(checkpoint, tmp_path / "out", "num_samples=20", "batch_size=16")
        status, _, err = run("sample", line, monkeypatch, capsys)
    assert status == 2 and "too little memory for batches of 16; choose a smaller batch_size" in err
    line = words(checkpoint, tmp_path / "out", "num_samples=20", "batch_size=4", "pad_to=4")
    assert run("sample", line, monkeypatch, capsys)[0] == 0
