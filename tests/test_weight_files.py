"""Files of weights: every container gives the same tensors, mapped and not copied, and refuses what is not one."""

import json
import struct
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion.pretrained.torch_files import HARMLESS_GLOBALS
from diffusion.pretrained.weight_files import Entry, find_weights, open_weights, variant_of

WEIGHTS = {
    "a.weight": torch.arange(12.0).view(3, 4).half(),
    "b": torch.arange(5),
    "c": torch.randn(2, 3, 4, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
}


def same(file, weights=WEIGHTS):
    assert set(file) == set(weights) and len(file) == len(weights)
    for name, tensor in weights.items():
        assert file[name] == Entry(tuple(tensor.shape), tensor.dtype)
        for own in (False, True):
            assert torch.equal(file.read(name, own=own), tensor)


def save(kind, path):
    if kind == "safetensors":
        save_file(WEIGHTS, path / "x.safetensors", metadata={"of": "mine"})
        return path / "x.safetensors"
    zipped = kind != "legacy"
    content = {
        "nested": {"state_dict": WEIGHTS, "global_step": 7, "optimizer_states": [{}], "epoch": 2},
        "parameters": {name: torch.nn.Parameter(t, requires_grad=False) for name, t in WEIGHTS.items()},
    }.get(kind, WEIGHTS)
    torch.save(content, path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    return path / "x.ckpt"


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "nested", "parameters"])
def test_every_container_gives_the_same_tensors(kind, tmp_path):
    file = open_weights(save(kind, tmp_path))
    same(file)
    assert file.container == ("safetensors" if kind == "safetensors" else "torch")
    with pytest.raises(KeyError):
        file.read("no such name")
    if kind == "safetensors":
        assert file.metadata == {"of": "mine"}
    if kind == "nested":
        assert file.metadata == {"global_step": "7", "epoch": "2"} and file.extras == ("optimizer_states",)


def test_tensors_are_the_files_mapped_memory(tmp_path):
    file = open_weights(save("safetensors", tmp_path))
    first, again = file.read("a.weight"), file.read("c")
    assert first.untyped_storage().data_ptr() == again.untyped_storage().data_ptr()
    first.fill_(0)  # a private mapping: the file stays as it is
    assert torch.equal(open_weights(file.path).read("a.weight"), WEIGHTS["a.weight"])


def test_tensors_at_odd_addresses_are_read(tmp_path):
    header = {"x": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    header["y"] = {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]}
    text = json.dumps(header).encode()
    values = torch.tensor([1.5, -2.0])
    data = bytes([1, 2, 3]) + values.numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert torch.equal(open_weights(tmp_path / "x.safetensors").read("y"), values)


def split(path, *, stem="model", variant=""):
    """The weights in two shards with their index."""
    names, places = list(WEIGHTS), {}
    dotted = f".{variant}" if variant else ""
    for number, part in enumerate((names[:2], names[2:])):
        file = f"{stem}{dotted}-0000{number + 1}-of-00002.safetensors"
        save_file({name: WEIGHTS[name] for name in part}, path / file)
        places |= dict.fromkeys(part, file)
    index = path / f"{stem}.safetensors.index{dotted}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_are_one_file(variant, tmp_path):
    index = split(tmp_path, variant=variant)
    for path in (index, tmp_path):
        file = open_weights(path)
        same(file)
        assert file.container == "shards"


def change(path, what):
    index = json.loads(path.read_text())
    places = index["weight_map"]
    first = next(iter(places))
    match what:
        case "lacks the shard":
            (path.parent / places[first]).unlink()
        case "not in its folder":
            places[first] = "../elsewhere.safetensors"
        case "do not hold":
            places["stray"] = places[first]
        case "does not name":
            del places[first]
        case "no weight_map":
            index = {"weight_map": []}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "what", ["lacks the shard", "not in its folder", "do not hold", "does not name", "no weight_map"]
)
def test_an_index_and_shards_that_differ_are_an_error(what, tmp_path):
    index = split(tmp_path)
    change(index, what)
    with pytest.raises(ValueError, match=what) as error:
        open_weights(index)
    assert str(tmp_path) in str(error.value)


def test_shards_without_their_index_are_an_error(tmp_path):
    split(tmp_path).unlink()
    with pytest.raises(ValueError, match="not their index"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        (["model.safetensors"], None, "model.safetensors"),
        (["model.fp16.safetensors"], None, "model.fp16.safetensors"),
        (["model.fp16.safetensors", "model.safetensors"], None, "model.safetensors"),
        (["model.fp16.safetensors", "model.safetensors"], "fp16", "model.fp16.safetensors"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], None, "model.bf16.safetensors"),
        (["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.safetensors"], None,
         "diffusion_pytorch_model.safetensors"),
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"], None,
         "diffusion_pytorch_model.safetensors"),
        (["pytorch_model.bin"], None, "pytorch_model.bin"),
        (["model.safetensors", "other.safetensors"], None, "model.safetensors"),
        (["mine.safetensors"], None, "mine.safetensors"),
    ],
)  # fmt: skip
def test_a_folders_weights_are_found(names, variant, expected, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert find_weights(tmp_path, variant=variant).name == expected


def test_a_folder_without_one_models_weights_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no weights"):
        find_weights(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"several models \(a.safetensors, b.safetensors\)"):
        find_weights(tmp_path)
    with pytest.raises(ValueError, match="no weights of variant 'fp16'"):
        find_weights(tmp_path, variant="fp16")


def test_variants_are_read_from_names():
    names = {"model.fp16.safetensors": "fp16", "x.non_ema.bin": "non_ema", "model.safetensors": None, "fp16.bin": None}
    assert {name: variant_of(name) for name in names} == names


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.safetensors", b"", "it is empty"),
        ("x.safetensors", b"PK\x03\x04" + b"0" * 50, "a pickle under the name of a .safetensors"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("x.ckpt", b"<!DOCTYPE html><html>", "web page"),
        ("x.ckpt", b"abc", "only 3 bytes"),
        ("x.ckpt", b"\x00" * 64, "no header"),
        ("x.ckpt", b"\x80\x02}q\x00.", "cannot be read"),
        ("x.bin", b"PK\x03\x04" + b"0" * 50, "cannot be read|damaged"),
        ("x.png", b"\x80\x02}q\x00.", "a pickle under the name of a .png"),
        ("x.safetensors", struct.pack("<Q", 2) + b"{}" + b"0", "longer than its header says"),
        ("x.safetensors", struct.pack("<Q", 6) + b'{"a":1', "damaged"),
        ("x.safetensors", struct.pack("<Q", 7) + b'{"a":1}', "damaged at 'a'"),
    ],
)
def test_what_is_no_file_of_weights_says_what_it_looks_like(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        open_weights(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_tensors_that_overlap_or_leave_gaps_are_refused(tmp_path):
    for first, second in (([0, 4], [8, 12]), ([0, 4], [0, 4])):
        header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": first}}
        header["b"] = {"dtype": "F32", "shape": [1], "data_offsets": second}
        text = json.dumps(header).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(second[1]))
        with pytest.raises(ValueError, match="starts at byte"):
            open_weights(tmp_path / "x.safetensors")


def test_tensors_larger_than_their_bytes_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="'a' as no plain tensor"):
        open_weights(tmp_path / "x.ckpt")


def test_a_file_that_is_not_there_names_its_neighbours(tmp_path):
    save("safetensors", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*x\.safetensors"):
        open_weights(tmp_path / "y.safetensors")


def fake(module, name):
    """A class of a framework that is not installed, importable while the file is written."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    made = type(name, (dict,) if name == "AttributeDict" else (), {"__module__": module})
    setattr(sys.modules[module], name, made)
    return made


def test_classes_of_training_frameworks_become_inert(tmp_path, monkeypatch):
    before = set(sys.modules)
    callback = fake("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    settings = fake("pytorch_lightning.utilities.parsing", "AttributeDict")
    content = {
        "state_dict": WEIGHTS,
        "callbacks": {callback: {"best": np.float64(1.0)}},
        "hyper_parameters": settings(lr=1e-4),
    }
    torch.save(content | {"made": callback()}, tmp_path / "x.ckpt")
    for name in set(sys.modules) - before:
        del sys.modules[name]
    file = open_weights(tmp_path / "x.ckpt")
    same(file)
    assert file.extras == ("callbacks", "hyper_parameters", "made")
    assert not any("pytorch_lightning" in name for name in sys.modules)


def test_the_list_of_harmless_names_holds_nothing_that_reads_writes_or_runs():
    modules = {name.split(".")[0] for name in HARMLESS_GLOBALS}
    assert not modules & {"os", "sys", "posix", "nt", "subprocess", "builtins", "shutil", "importlib", "runpy", "io"}
