"""How are many tensors written to one safetensors file while only a few of them are in memory?

The header needs names, shapes and types alone, so it is written first and every tensor then goes to its place.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from diffusion.files import atomic_write
from diffusion.pretrained.weight_files import DTYPES, PORTION

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNED = 64  # bytes


class Slot(NamedTuple):
    """Shape and type of a tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_stream(
    path: str | Path,
    slots: Mapping[str, Slot],
    tensors: Iterable[tuple[str, Iterable[Tensor]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors`, in any order, each in portions and cast to its slot's type, as one safetensors file, atomically.

    Raises ValueError where they are not those of `slots`. Tensors whose bytes are a multiple of 64 lie first and so at
    such multiples, which processors read fastest when the file is mapped; the others follow, wider types first.
    """
    names = sorted(slots, key=lambda name: (slots[name].nbytes % ALIGNED > 0, -slots[name].dtype.itemsize, name))
    offsets, at = {}, 0
    for name in names:
        offsets[name] = at
        at += slots[name].nbytes
    header = _header(names, slots, offsets, metadata or {})
    with atomic_write(path) as partial, open(partial, "wb") as file:
        file.write(header)
        file.truncate(len(header) + at)
        waiting = set(slots)
        for name, portions in tensors:
            if name not in waiting:
                raise ValueError(f"{name} was not announced, or came twice")
            waiting.remove(name)
            file.seek(len(header) + offsets[name])
            if (written := _write(file, portions, slots[name].dtype)) != slots[name].nbytes:
                raise ValueError(f"{name} came with {written} bytes, but {slots[name].nbytes} were announced")
        if waiting:
            raise ValueError(f"{len(waiting)} tensors never came, such as {min(waiting)}")


def _header(
    names: list[str], slots: Mapping[str, Slot], offsets: Mapping[str, int], metadata: Mapping[str, str]
) -> bytes:
    entries = {"__metadata__": dict(metadata)} if metadata else {}
    for name in names:
        begin = offsets[name]
        shape, dtype = slots[name]
        entries[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, begin + slots[name].nbytes],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, portions: Iterable[Tensor], dtype: torch.dtype) -> int:
    written = 0
    for portion in portions:
        flat = portion.detach().cpu().contiguous().flatten()
        for part in [flat] if flat.dtype == dtype else flat.split(PORTION):
            if part.numel():
                written += file.write(part.to(dtype).view(torch.uint8).numpy().data)
    return written
