"""300 damaged files: each is one clear error, nothing in them runs, and none is half-loaded.

The file is a tiny Stable Diffusion 1 in CompVis' layout, damaged as downloads, editors and attackers do it. Their
number is part of the test.
"""

import codecs
import functools
import importlib
import itertools
import json
import os
import pickle
import random
import resource
import runpy
import shutil
import struct
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from diffusion.checkpoint import load_model
from diffusion.pretrained import compvis, compvis_autoencoder, transformers

UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1, 2],
    "num_heads": 8,
    "legacy": False,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 24,
}
CODER = {"ch": 32, "out_ch": 3, "in_channels": 3, "resolution": 16, "num_res_blocks": 1, "attn_resolutions": []}
VAE = {"embed_dim": 4, "ddconfig": {**CODER, "z_channels": 4, "ch_mult": [1, 2]}}
TEXT = {"vocab_size": 99, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
MEMORY = 500_000_000  # bytes more than before, for all of a kind
COUNTS = {
    "truncated": 40,
    "flipped header bytes": 80,
    "wrong shapes": 40,
    "swapped types": 30,
    "missing keys": 25,
    "extra keys": 20,
    "huge headers": 15,
    "pickles in disguise": 10,
    "malicious reduce": 20,
    "damaged zips": 20,
}


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tables = {
        "model.diffusion_model.": compvis.unet_table(UNET),
        "first_stage_model.": compvis_autoencoder.autoencoder_table(VAE),
        "cond_stage_model.transformer.": transformers.text_table(TEXT),
    }
    shapes = {prefix + name: s for prefix, table in tables.items() for name, s in table.foreign_shapes.items()}
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@functools.cache
def whole() -> bytes:
    return save(weights())


def header() -> dict:
    length = int.from_bytes(whole()[:8], "little")
    return json.loads(whole()[8 : 8 + length])


def with_header(changed: dict, data: bytes | None = None) -> bytes:
    length = int.from_bytes(whole()[:8], "little")
    text = json.dumps(changed).encode()
    return struct.pack("<Q", len(text)) + text + (whole()[8 + length :] if data is None else data)


def truncated(draws):
    """Anywhere: within the length, the header, the data, or by one byte."""
    size, length = len(whole()), int.from_bytes(whole()[:8], "little")
    ends = [0, 1, 7, 8, 9, size - 1, size - 2, size - 4, length, length + 7, length + 8]
    ends += [draws.randrange(size) for _ in range(COUNTS["truncated"] - len(ends))]
    yield from (("model.safetensors", whole()[:end]) for end in ends)


def flipped(draws):
    """One bit of the header, or of its length."""
    length = int.from_bytes(whole()[:8], "little")
    for number in range(COUNTS["flipped header bytes"]):
        data = bytearray(whole())
        at = number if number < 8 else draws.randrange(8, 8 + len(whole()[8 : 8 + length].rstrip()))
        data[at] ^= 1 << draws.randrange(8)
        yield ("model.safetensors", bytes(data))


def misshaped(draws):
    """Sides exchanged, joined or parted, so that every byte is still accounted for."""
    odd = [name for name, entry in header().items() if len(entry["shape"]) > 1 and len(set(entry["shape"][:2])) > 1]
    for name in draws.sample(odd, COUNTS["wrong shapes"] // 2):
        changed = header()
        shape = changed[name]["shape"]
        changed[name]["shape"] = [shape[1], shape[0], *shape[2:]]
        yield ("model.safetensors", with_header(changed))
    for name in draws.sample(sorted(header()), COUNTS["wrong shapes"] // 2):
        changed = header()
        size = torch.Size(changed[name]["shape"]).numel()
        changed[name]["shape"] = draws.choice([[1, size], [size, 1, 1], [1] * 9 + [size], [size // 2, 2, 1]])
        yield ("model.safetensors", with_header(changed))


def mistyped(draws):
    """Integers where weights should be, and types of another size with or without shapes to match."""
    for name in draws.sample(sorted(header()), COUNTS["swapped types"]):
        changed = header()
        entry = changed[name]
        entry["dtype"] = draws.choice(["I32", "U32", "F16", "F64", "BOOL", "U8", "F4", "C64", ""])
        if entry["dtype"] == "F16":
            entry["shape"] = [*entry["shape"][:-1], 2 * entry["shape"][-1]]
        yield ("model.safetensors", with_header(changed))


def lacking(draws):
    for name in draws.sample(sorted(weights()), COUNTS["missing keys"]):
        yield ("model.safetensors", save({key: t for key, t in weights().items() if key != name}))


def extra(draws):
    for number in range(COUNTS["extra keys"]):
        near = draws.choice(sorted(weights()))
        name = [f"stray.{number}", f"{near}.old", f"{near}2", f"model.diffusion_model.more.{number}.weight"][number % 4]
        yield ("model.safetensors", save({**weights(), name: torch.zeros(3)}))


def huge(draws):
    lengths = [2**63, 2**64 - 1, 2**40, 2**31, 2**32 + 5, 100_000_000, 99_999_999, len(whole()), len(whole()) - 7]
    lengths += [draws.randrange(len(whole()), 2**48) for _ in range(COUNTS["huge headers"] - len(lengths))]
    yield from (("model.safetensors", struct.pack("<Q", length) + whole()[8:]) for length in lengths)


def saved(content, *, zipped: bool = True) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        return path.read_bytes()


def disguised(draws):
    plain = {name: tensor.tolist() for name, tensor in list(weights().items())[:2]}
    files = [pickle.dumps(plain, protocol=protocol) for protocol in range(6)]
    files += [
        saved(weights()),
        saved(weights(), zipped=False),
        saved({"state_dict": weights()}),
        saved(Evil(CALLS[0])),
    ]
    return [("model.safetensors", data) for data in files]


MARKER = Path(tempfile.gettempdir()) / "diffusion_damaged_file_was_run"
CALLS = (  # what reading the file would call, and with what
    (os.system, f"touch {MARKER}"),
    (os.popen, f"touch {MARKER}"),
    (os.mkdir, str(MARKER)),
    (os.open, str(MARKER), os.O_CREAT),
    (subprocess.Popen, ["touch", str(MARKER)]),
    (subprocess.check_output, ["touch", str(MARKER)]),
    (subprocess.getoutput, f"touch {MARKER}"),
    (eval, f"open({str(MARKER)!r}, 'w')"),
    (exec, f"open({str(MARKER)!r}, 'w')"),
    (open, str(MARKER), "w"),
    (codecs.open, str(MARKER), "w"),
    (getattr, "", "join"),
    (__import__, "antigravity"),
    (importlib.import_module, "antigravity"),
    (runpy.run_path, str(MARKER)),
    (shutil.copy, __file__, str(MARKER)),
    (torch.load, str(MARKER)),
    (torch.hub.load, "owner/repository", "model"),
    (functools.partial, print, 1),
    (tempfile.mkdtemp, "", "x", str(MARKER.parent)),
)


class Evil:
    """Pickles as a call."""

    def __init__(self, call: tuple) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def malicious(draws):
    """Beside the weights, among them, in place of one, or as a key; in a zip or not."""
    for number, call in enumerate(CALLS):
        evil, name = Evil(call), next(iter(weights()))
        content = [
            {"state_dict": weights(), "callbacks": evil},
            {"state_dict": {**weights(), "extra": evil}},
            {**weights(), name: evil},
            {"state_dict": weights(), "optimizer_states": [{"state": evil}]},
        ][number % 4]
        yield ("model.ckpt", saved(content, zipped=number % 3 > 0))


def torn(draws):
    """Zips cut off, with flipped bytes in their pickle, compressed, or with tensors that claim more than there is."""
    data = saved({"state_dict": weights()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(data)
        with zipfile.ZipFile(path) as archive:
            info = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
            at = data.index(archive.read(info))
    files = [data[: draws.randrange(1, len(data))] for _ in range(8)]
    for _ in range(9):
        changed = bytearray(data)
        changed[at + draws.randrange(info.file_size)] ^= 1 << draws.randrange(8)
        files.append(bytes(changed))
    name = next(iter(weights()))
    files += [saved({**weights(), name: torch.zeros(1).expand(1 << 40)}), compressed(data), saved([1, 2, 3])]
    return [("model.ckpt", file) for file in files]


def compressed(data: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a", Path(folder) / "b"
        source.write_bytes(data)
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
            for info in old.infolist():
                new.writestr(info.filename, old.read(info))
        return target.read_bytes()


KINDS = {
    "truncated": truncated,
    "flipped header bytes": flipped,
    "wrong shapes": misshaped,
    "swapped types": mistyped,
    "missing keys": lacking,
    "extra keys": extra,
    "huge headers": huge,
    "pickles in disguise": disguised,
    "malicious reduce": malicious,
    "damaged zips": torn,
}


def test_the_whole_file_is_a_model():
    with tempfile.TemporaryDirectory() as folder:
        for name, data in (("model.safetensors", whole()), ("model.ckpt", saved({"state_dict": weights()}))):
            (path := Path(folder) / name).write_bytes(data)
            assert load_model(path).net.in_channels == 4


def test_there_are_300_damaged_files():
    assert sum(COUNTS.values()) == 300 and KINDS.keys() == COUNTS.keys() and len(CALLS) == COUNTS["malicious reduce"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_one_clear_error_and_nothing_in_them_runs(kind, tmp_path):
    MARKER.unlink(missing_ok=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    number = -1
    for number, (name, data) in enumerate(KINDS[kind](random.Random(kind))):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(data)
        with pytest.raises(ValueError) as raised:
            load_model(path)
        first, *rest = str(raised.value).splitlines()
        assert str(path) in first and len(first) < 700, first
        assert all(line.startswith("  ") for line in rest), str(raised.value)
        shutil.rmtree(path.parent)
    assert number + 1 == COUNTS[kind]
    assert not MARKER.exists(), "something in a file was run"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY


@pytest.mark.parametrize("kind", ["missing keys", "extra keys"])
def test_keys_that_differ_are_listed_by_name(kind, tmp_path):
    for name, data in itertools.islice(KINDS[kind](random.Random(kind)), 8):
        (path := tmp_path / name).write_bytes(data)
        length = int.from_bytes(data[:8], "little")
        there = set(json.loads(data[8 : 8 + length])) - {"__metadata__"}
        (different,) = there ^ set(weights())
        with pytest.raises(ValueError) as raised:
            load_model(path)
        assert different in str(raised.value) or different.removeprefix("model.diffusion_model.") in str(raised.value)
