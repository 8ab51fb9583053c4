"""Published files without their numbers: names, shapes and types of full-size models, as open files and on disk.

`header_only` is such a file in memory; `write_header` writes one whose data are a hole in the disk.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from golden_cases import key_list

from diffusion.pretrained.weight_files import Entry, WeightFile

KINDS = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32"}
Shapes = Mapping[str, tuple[int, ...]]


def full_size(name: str, delta: str | None = None) -> dict[str, Entry]:
    """One of the golden lists, with the tensors of another one in place of its own."""
    rows = key_list(name) | (key_list(delta) if delta else {})
    return {key: Entry(tuple(row[:-1]), getattr(torch, row[-1])) for key, row in rows.items()}


def part_of(entries: Mapping[str, Entry], folder: str) -> dict[str, Entry]:
    """The tensors of one folder of a list in diffusers' layout."""
    return {key.removeprefix(f"{folder}/"): e for key, e in entries.items() if key.startswith(f"{folder}/")}


def of_shapes(shapes: Shapes, prefix: str = "") -> dict[str, Entry]:
    return {prefix + name: Entry(tuple(shape), torch.float32) for name, shape in shapes.items()}


def header_only(
    entries: Mapping[str, Entry],
    name: str = "model.safetensors",
    *,
    metadata: Mapping[str, str] | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
) -> WeightFile:
    """An open file whose tensors cannot be read, but for `values`."""
    return WeightFile(Path(name), entries, lambda name, own: (values or {})[name], metadata=metadata)


def write_header(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file whose data are zeros that the disk does not hold."""
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, entry in entries.items():
        size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
        header[name] = {"dtype": KINDS[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path
