"""Indexed shards: what is in them, in which order, and what happens to samples and files that are broken."""

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shard_cases import colours, data_of, image_folder, jpeg, packed, png, shards_of, write_tar
from training_cases import tiny
from webdataset import WebDataset

from diffusion.conditioning import TextConditioner
from diffusion.data import shard_index
from diffusion.data.image_folder import ImageFolder
from diffusion.data.shard_index import index_path, indexes
from diffusion.models.text import TextTransformer
from diffusion.run_folder import read_record
from diffusion.training.metrics import read_rows
from diffusion.training.run import train

# -- what is in them ---------------------------------------------------------------------------------------------------


def test_every_sample_is_read_with_its_own_label_and_caption(tmp_path):
    shards_of(tmp_path, 35)
    data = data_of(tmp_path, num_classes=3)
    loader = data.train_dataloader()
    seen = []
    for batch in loader:
        assert batch["image"].shape == (4, 3, 6, 6) and batch["image"].dtype == torch.float32
        shown = colours(batch)
        assert batch["label"].tolist() == [number % 3 for number in shown]
        assert batch["caption"] == [f"picture {number}" for number in shown]
        seen += shown
    held = [number for batch in data.val_dataloader() for number in colours(batch)]
    assert len(set(seen)) == len(seen) == len(loader) * 4
    assert not set(seen) & set(held) and len(data.train_set) + len(data.val_set) == 35
    assert data.class_names == ("0", "1", "2")


def test_the_index_finds_what_webdataset_reads(tmp_path):
    paths = shards_of(tmp_path, 23)
    theirs = [
        (sample["__key__"], sample["png"], sample["txt"], sample["cls"])
        for sample in WebDataset([str(path) for path in paths], shardshuffle=False)
    ]
    ours = []
    for index in indexes(paths, check=False):
        data = index.path.read_bytes()
        for key, (begin, size), (at, length), label in zip(
            index.keys, index.images, index.captions, index.labels, strict=True
        ):
            ours.append((key, data[begin : begin + size], data[at : at + length], label.encode()))
    assert ours == theirs


@pytest.mark.parametrize("captions", [False, True])
def test_a_packed_folder_gives_the_samples_of_the_folder(tmp_path, captions):
    root = image_folder(tmp_path / "images", captions=captions)
    how = {"image_size": 6, "batch_size": 4, "num_classes": 2}
    folder = ImageFolder(root, **how)
    data = data_of(packed(root, tmp_path / "out"), **how)
    assert data.class_names == folder.class_names == ("cat", "dog")

    def samples(data):
        data.setup()
        found = set()
        for images in (data.train_set, data.val_set):
            for index in range(len(images)):
                sample = images[index]
                found.add((sample["image"].numpy().tobytes(), int(sample["label"]), sample.get("caption")))
        return found

    assert samples(data) == samples(folder) and len(samples(folder)) == 24


def test_fields_of_json_are_captions_and_labels(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {
            f"{n}": {"json": json.dumps({"text": f"T{n}", "label": name}).encode(), "webp.png": b"no", "png": png(n)}
            for n, name in enumerate(("dog", "cat", "dog", "cat"))
        },
    )
    data = data_of(tmp_path, num_classes=2, batch_size=1, val_fraction=0.3)
    data.setup()
    assert data.class_names == ("cat", "dog")
    for images in (data.train_set, data.val_set):
        for index in range(len(images)):
            number = colours({"image": images[index]["image"][None]})[0]
            assert images[index]["caption"] == f"T{number}" and images[index]["label"] == (number + 1) % 2


def test_shards_are_named_by_folders_patterns_braces_and_lists(tmp_path):
    shards_of(tmp_path, 40)
    whole = data_of(tmp_path).urls
    assert len(whole) == 4
    assert data_of(f"{tmp_path}/*.tar").urls == whole
    assert data_of(f"{tmp_path}/{{000..003}}.tar").urls == whole
    assert data_of([f"{tmp_path}/000.tar", f"{tmp_path}/00[1-3].tar"]).urls == whole
    data = data_of(tmp_path, val_shards=f"{tmp_path}/003.tar")
    data.setup()
    assert data.urls == whole[:3] and (len(data.train_set), len(data.val_set)) == (30, 10)


def test_workers_and_ranks_share_an_epoch_without_a_sample_twice(tmp_path):
    shards_of(tmp_path, 33)
    plain = [batch["index"].tolist() for batch in data_of(tmp_path).train_dataloader()]
    assert [batch["index"].tolist() for batch in data_of(tmp_path, num_workers=2).train_dataloader()] == plain
    ranks = []
    for rank in range(2):
        data = data_of(tmp_path, batch_size=2)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, overfit_batches=0.0)
        ranks.append([batch["index"].tolist() for batch in data.train_dataloader()])
    assert [first + second for first, second in zip(*ranks, strict=True)] == plain
    assert len({index for batch in plain for index in batch}) == 4 * len(plain)


def test_the_fingerprint_is_that_of_the_samples(tmp_path):
    shards_of(tmp_path / "a", 30)
    first = data_of(tmp_path / "a", num_classes=3).fingerprint()
    assert first["name"] == "Shards" and first["num_samples"] == 30
    (tmp_path / "a").rename(tmp_path / "b")
    moved = data_of(tmp_path / "b", num_classes=3, batch_size=2, num_workers=2, seed=5).fingerprint()
    assert moved == first
    assert data_of(tmp_path / "b", num_classes=3, image_size=8).fingerprint()["hash"] != first["hash"]
    assert data_of(tmp_path / "b").fingerprint()["hash"] != first["hash"]  # no labels
    write_tar(tmp_path / "b" / "000.tar", {f"s{n:04d}": {"png": png(n), "cls": b"1"} for n in range(10)})
    assert data_of(tmp_path / "b", num_classes=3).fingerprint()["hash"] != first["hash"]


# -- the index ---------------------------------------------------------------------------------------------------------


def test_an_index_is_kept_and_renewed_with_its_shard(tmp_path, monkeypatch):
    (path,) = shards_of(tmp_path, 5)
    indexes([path], check=False)
    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "build_index", None)
        assert indexes([path], check=False)[0].keys == [f"s{n:04d}" for n in range(5)]
    built, build = [], shard_index.build_index
    monkeypatch.setattr(shard_index, "build_index", lambda *args, **how: built.append(args) or build(*args, **how))
    assert indexes([path], check=True)[0].checked and len(built) == 1  # nobody had decoded the images
    indexes([path], check=True)
    assert len(built) == 1
    shards_of(tmp_path, 7)
    assert len(indexes([path], check=True)[0].keys) == 7 and len(built) == 2
    index_path(path).write_text('{"cut short')
    assert len(indexes([path], check=True)[0].keys) == 7 and len(built) == 3
    size = path.stat().st_size
    write_tar(path, {f"t{n:04d}": {"png": png(n), "txt": b"another", "cls": b"0"} for n in range(7)})
    assert path.stat().st_size == size
    os.utime(path, ns=(0, index_path(path).stat().st_mtime_ns + 1))  # newer than its index, by as little as can be
    assert indexes([path], check=True)[0].keys[0] == "t0000" and len(built) == 4


def test_a_folder_that_cannot_be_written_is_indexed_in_memory(tmp_path, monkeypatch):
    (path,) = shards_of(tmp_path, 5)
    monkeypatch.setattr(shard_index, "atomic_write", lambda path: (tmp_path / "none" / "at all").open("w"))
    assert len(indexes([path], check=False)[0].keys) == 5 and not index_path(path).exists()


# -- what is broken ----------------------------------------------------------------------------------------------------


def broken_shard(folder: Path) -> Path:
    whole = {f"good{n}": {"jpg": jpeg(n), "txt": b"fine", "cls": b"1"} for n in range(8)}
    return write_tar(
        folder / "a.tar",
        whole
        | {
            "truncated": {"jpg": jpeg(9)[:700], "txt": b"x", "cls": b"0"},
            "wrong": {"jpg": jpeg(10), "json": b'{"caption": ', "cls": b"0"},
            "number": {"jpg": jpeg(11), "json": b'{"caption": 7}', "cls": b"0"},
            "imageless": {"txt": b"x", "cls": b"0"},
            "mute": {"jpg": jpeg(12), "cls": b"0"},
            "far": {"jpg": jpeg(13), "txt": b"x", "cls": b"12"},
            "unlabelled": {"jpg": jpeg(14), "txt": b"x"},
            "latin": {"jpg": jpeg(15), "txt": b"\xff\xfe\xfa", "cls": b"0"},
        },
    )


REASONS = {
    "truncated": "truncated",
    "wrong": "its json is wrong",
    "number": "the caption in its json is no text but int",
    "imageless": "it has no image, but .txt, .cls",
    "mute": "it has no caption",
    "far": "its label '12' is outside of 0 to 1",
    "unlabelled": "it has no label",
    "latin": "its txt is no text",
}


def test_broken_samples_are_left_out_named_and_counted(tmp_path):
    path = broken_shard(tmp_path)
    data = data_of(tmp_path, num_classes=2, captions=True, batch_size=1)
    with pytest.warns(UserWarning, match=r"8 samples cannot be used and are left out: .*; data.max_broken=100 may be"):
        data.setup()
    assert len(data.train_set) + len(data.val_set) == 8
    assert data.broken.reasons.keys() == {f"{path}: {key}" for key in REASONS}
    for key, reason in REASONS.items():
        assert reason in data.broken.reasons[f"{path}: {key}"], key


def test_too_many_broken_samples_end_the_run_with_one_error(tmp_path):
    broken_shard(tmp_path)
    with pytest.raises(ValueError, match=r"^8 samples cannot be used, and data\.max_broken=7: .*truncated.*raise data"):
        data_of(tmp_path, num_classes=2, captions=True, max_broken=7).setup()
    with pytest.raises(ValueError, match=r"data\.max_broken is -1"):
        data_of(tmp_path, max_broken=-1)


def test_what_nobody_needs_may_be_missing(tmp_path):
    broken_shard(tmp_path)
    with pytest.warns(UserWarning, match="5 samples cannot"):
        data_of(tmp_path, batch_size=1).setup()


def test_an_unchecked_image_that_is_broken_gives_way_and_is_counted_by_the_loader(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{n}": {"jpg": jpeg(n) if n else jpeg(n)[:700]} for n in range(9)})
    with pytest.warns(UserWarning, match=r"a\.tar: 0 can no longer be read .* the next image takes its place"):
        data = data_of(tmp_path, check_images=False, batch_size=1, val_fraction=0.2)
        data.setup()
        list(data.train_dataloader())
        list(data.val_dataloader())
    assert list(data.broken.reasons) == [f"{tmp_path}/a.tar: 0"]
    data = data_of(tmp_path, check_images=False, batch_size=1, val_fraction=0.2, max_broken=0)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"1 samples cannot be used"):
        warnings.simplefilter("ignore")
        data.setup()
        list(data.train_dataloader())
        list(data.val_dataloader())


DAMAGE = {
    "in a file": lambda path: os.truncate(path, 4000),
    "in a header": lambda path: os.truncate(path, 1024 * 3 + 100),
    "empty": lambda path: os.truncate(path, 0),
    "a web page": lambda path: path.write_text("<html>404</html>" * 100),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_named(tmp_path, damage):
    path = shards_of(tmp_path, 20)[1]
    damage(path)
    with pytest.raises(ValueError, match=rf"the shard {path} is cut short or no tar file.*copy or pack it again"):
        data_of(tmp_path).setup()


def test_a_shard_cut_between_two_samples_is_damaged(tmp_path):
    (path,) = shards_of(tmp_path, 10)
    index = indexes([path], check=False)[0]
    end = int(index.images[5, 0]) - 512  # where the sixth sample's first file begins
    index_path(path).unlink()
    os.truncate(path, end)
    with pytest.raises(
        ValueError, match=r"000\.tar is cut short or no tar file after the sample s0004 \(its end is mis"
    ):
        data_of(tmp_path).setup()


def test_a_run_logs_how_many_were_left_out(tmp_path):
    broken_shard(tmp_path / "shards")
    node = {"_target_": "diffusion.data.shards.Shards", "shards": str(tmp_path / "shards"), "captions": True}
    node |= {"image_size": 8, "channels": 1, "num_classes": 10, "batch_size": 2}
    with pytest.warns(UserWarning, match="8 samples cannot be used"):
        train(tiny(tmp_path / "run", data=node, callbacks__samples=None, trainer__max_steps=2))
    assert read_rows(tmp_path / "run" / "metrics.csv")[0]["data/broken_samples"] == "8"
    record = read_record(tmp_path / "run")["data"]
    assert (record["name"], record["num_samples"]) == ("Shards", 8)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_list_that_matches_nothing_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for shards in (tmp_path / "none", tmp_path / "empty", tmp_path / "*.tar", str(tmp_path / "{000..002}.tar"), []):
        with pytest.raises(ValueError, match=r"^data\.shards matches nothing: .*give a folder of \.tar files"):
            data_of(shards)
    shards_of(tmp_path, 10)
    with pytest.raises(ValueError, match=r"data\.shards matches nothing: .*009\.tar"):
        data_of([f"{tmp_path}/000.tar", f"{tmp_path}/009.tar"])
    with pytest.raises(ValueError, match=r"data\.val_shards matches nothing"):
        data_of(tmp_path, val_shards="elsewhere")


def test_wrong_numbers_of_classes_are_refused(tmp_path):
    shards_of(tmp_path, 20)
    with pytest.raises(
        ValueError, match=r"data\.num_classes is 5, but .* has 2 classes \(cat, dog\); set data\.num_cl"
    ):
        data_of(packed(image_folder(tmp_path / "images"), tmp_path / "out"), num_classes=5)
    write_tar(tmp_path / "bare" / "a.tar", {f"{n}": {"png": png(n)} for n in range(9)})
    with pytest.raises(ValueError, match=r"has no labels; set data\.num_classes=null"):
        data_of(tmp_path / "bare", num_classes=2)
    with pytest.raises(ValueError, match=r"6 samples cannot be used, .*label '2' is outside of 0 to 1"):
        data_of(tmp_path, num_classes=2, max_broken=5).setup()


def test_captions_that_a_model_is_told_must_be_there(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{n}": {"png": png(n)} for n in range(9)})
    batch = next(iter(data_of(tmp_path).train_dataloader()))
    text = TextConditioner(TextTransformer(vocab_size=64, channels=8, num_layers=1, num_heads=1, max_length=8))
    with pytest.raises(ValueError, match=r"conditioned on `caption`, but the data give only image, index"):
        text.prepare_batch(batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 2}, r"data\.channels is 2"),
        ({"val_fraction": 1.0}, r"data\.val_fraction is 1"),
        ({"reading": "fast"}, r"data\.reading is 'fast'; choose auto, indexed, stream"),
        ({"shuffle_buffer": 0}, r"data\.shuffle_buffer=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, message):
    shards_of(tmp_path, 3)
    with pytest.raises(ValueError, match=message):
        data_of(tmp_path, **settings)


def test_one_sample_cannot_train_and_validate(tmp_path):
    shards_of(tmp_path, 1)
    with pytest.raises(ValueError, match=r"1 usable samples leave none for training"):
        data_of(tmp_path).setup()


def test_only_plain_files_are_indexed(tmp_path):
    with pytest.raises(ValueError, match=r"data\.reading=indexed needs plain \.tar files on this disk, and http"):
        data_of("http://localhost/{0..2}.tar", reading="indexed")
