"""Packing a folder: the same bytes each time, nothing lost, going on where it was stopped, and leaving others alone."""

import json
import shutil

import pytest
from PIL import Image
from shard_cases import PACKED, data_of, image_folder, jpeg, packed

from diffusion.data import packing
from diffusion.data.pack import main
from diffusion.data.packing import pack
from diffusion.data.shard_index import load_index


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    root = image_folder(tmp_path / "images", captions=True)
    first = bytes_of(packed(root, tmp_path / "a"))
    shutil.copytree(root, tmp_path / "moved", copy_function=shutil.copy2)
    assert bytes_of(packed(tmp_path / "moved", tmp_path / "b")) == first
    assert [name for name in first if name.endswith(".tar")] == ["000000.tar", "000001.tar", "000002.tar"]
    manifest = json.loads(first["manifest.json"])
    assert (manifest["num_samples"], manifest["classes"], manifest["captions"]) == (24, ["cat", "dog"], 24)
    assert [shard["samples"] for shard in manifest["shards"]] == [10, 10, 4]
    assert (
        json.loads((packed(root, tmp_path / "c", shuffle=False) / "manifest.json").read_text())["hash"]
        != manifest["hash"]
    )


def test_classes_are_mixed_unless_asked_otherwise(tmp_path):
    root = image_folder(tmp_path / "images")
    mixed, plain = packed(root, tmp_path / "a"), packed(root, tmp_path / "b", shuffle=False)
    assert len(set(load_index(mixed / "000000.tar", check=True).labels)) == 2
    assert set(load_index(plain / "000000.tar", check=True).labels) == {"0"}


def test_files_are_copied_as_they_are_or_resized(tmp_path):
    root = image_folder(tmp_path / "images")
    index = load_index(packed(root, tmp_path / "a") / "000000.tar", check=True)
    begin, size = index.images[0]
    name = index.keys[0].split("_", 1)[1]
    kind, stem = name.split("_", 1)
    assert (
        index.path.read_bytes()[begin : begin + size]
        == (root / kind / f"{stem.removesuffix('_v1')}.v1.png").read_bytes()
    )
    index = load_index(packed(root, tmp_path / "b", image_size=4, channels=1) / "000000.tar", check=True)
    begin, size = index.images[0]
    (tmp_path / "one.png").write_bytes(index.path.read_bytes()[begin : begin + size])
    with Image.open(tmp_path / "one.png") as image:
        assert image.size == (4, 4) and image.mode == "L"


def test_a_stopped_packing_goes_on(tmp_path, monkeypatch):
    root = image_folder(tmp_path / "images")
    whole = bytes_of(packed(root, tmp_path / "whole"))
    sample, count = packing.sample, iter(range(100))

    def dying(*args):
        if next(count) == 15:
            raise KeyboardInterrupt
        return sample(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "sample", dying)
        packed(root, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["000000.tar"]
    assert not (tmp_path / "out" / "manifest.json").exists()
    made = []
    monkeypatch.setattr(packing, "sample", lambda *args: made.append(args) or sample(*args))
    assert bytes_of(packed(root, tmp_path / "out")) == whole and len(made) == 14
    packed(root, tmp_path / "out")
    assert len(made) == 14  # complete: nothing to do


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    root, out = image_folder(tmp_path / "images"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"out is not empty: it has thesis\.tex; name a folder that is new or empty"):
        packed(root, out)
    packed(root, tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds shards of something else: shard_size was 10 and is 5; name another"):
        packed(root, tmp_path / "a", shard_size=5)
    (root / "cat" / "new.jpg").write_bytes(jpeg(0))
    with pytest.raises(ValueError, match=r"something else: samples was 24 and is 25, content was .*\.\.\. and is"):
        packed(root, tmp_path / "a")


def test_broken_images_are_left_out_and_named(tmp_path):
    root = image_folder(tmp_path / "images")
    (root / "cat" / "bad.jpg").write_bytes(jpeg(0)[:500])
    manifest = pack(root, tmp_path / "a", PACKED)
    assert manifest["num_samples"] == 24 and list(manifest["left_out"]) == ["cat/bad.jpg"]
    with pytest.raises(ValueError, match=r"1 samples cannot be used, and data\.max_broken=0: cat/bad\.jpg"):
        pack(root, tmp_path / "b", PACKED | {"max_broken": 0})


def test_the_command_packs_and_says_how_to_train(tmp_path, capsys):
    root = image_folder(tmp_path / "images")
    main([str(root), str(tmp_path / "out"), "shard_size=10"])
    said = capsys.readouterr().out
    assert "holds 24 samples in 3 shards" in said and f"data.shards={tmp_path}/out data.num_classes=2" in said
    assert data_of(tmp_path / "out", num_classes=2).fingerprint()["num_samples"] == 24


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images"], r"expected two folders, ROOT and OUT, got \['images'\]"),
        (["images", "out", "size=3"], "'size=3' is no setting; the settings are shard_size=, image_size="),
        (["images", "out", "shard_size=0"], "shard_size=0; it must be at least 1"),
        (["images", "out", "channels=2"], r"channels=2; choose 1 \(grey\) or 3"),
        (["images", "images/out"], "lies in images, whose images are packed"),
        (["nothing", "out"], "there is no such folder"),
    ],
)
def test_what_cannot_be_packed_is_refused(tmp_path, monkeypatch, words, message):
    image_folder(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main(words)
    assert not (tmp_path / "out").exists()
