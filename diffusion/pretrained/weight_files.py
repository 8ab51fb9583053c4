"""Which tensors are in a file of weights, of whatever container, and how is one read without running or copying more?

safetensors, torch.save's files (tensors alone, never unpickled objects), shards with their index, and folders of these.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LONGEST_HEADER = 16_000_000  # bytes; safetensors allows 100 MB, the largest known header has 1 MB
PORTION = 2**22  # elements
MANY_TENSORS = 200_000  # Stable Diffusion XL has 2515
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema|ema|f16)(?=[.-])")
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")


class Entry(NamedTuple):
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFile(Mapping[str, Entry]):
    """What is in a file, by name; the tensors themselves are read one by one.

    metadata: what the file says of itself, as text. extras: what torch.save's files hold beside the weights.
    """

    container = "safetensors"

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, Entry],
        read: Callable[[str, bool], Tensor],
        *,
        portions: Callable[[str, int], Iterator[Tensor]] | None = None,
        metadata: Mapping[str, str] | None = None,
        extras: tuple[str, ...] = (),
    ) -> None:
        self.path, self._entries, self._read = path, dict(entries), read
        self._portions = portions or (lambda name, size: iter(read(name, False).flatten().split(size)))
        self.metadata, self.extras = dict(metadata or {}), extras

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} tensors)"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, *, own: bool = False) -> Tensor:
        """The tensor on the CPU in its own type: the file's mapped memory, which is read when first touched.

        own: in memory of its own where the container allows it, which goes with the tensor: for what is copied or
        written on at once.
        """
        self._entries[name]  # KeyError for an unknown name
        return self._read(name, own)

    def portions(self, name: str, size: int = PORTION) -> Iterator[Tensor]:
        """The tensor's elements in order, flat, at most `size` at a time in memory of their own."""
        self._entries[name]
        yield from self._portions(name, size)


class TorchFile(WeightFile):
    """A file of torch.save."""

    container = "torch"


class Shards(WeightFile):
    """Several files as one."""

    container = "shards"


def open_weights(path: str | Path, *, variant: str | None = None) -> WeightFile:
    """Open a file, an index of shards, or a folder that holds the weights of one model.

    variant: "fp16", "ema" and the like, of a folder's files; None takes the file without one, or else the only one
    there. Raises FileNotFoundError, or ValueError for what is damaged, no file of weights, or more than tensors.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = find_weights(path, variant=variant)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}{_neighbours(path)}")
    if not path.is_file():
        raise ValueError(f"{path} is no file of weights; give a .safetensors or .ckpt file, or a folder of them")
    if path.suffix == ".json":
        return _open_shards(path)
    with open(path, "rb") as file:
        start = file.read(512)
    if is_safetensors(start):
        return open_safetensors(path)
    if path.suffix in PICKLES and (start.startswith(b"PK\x03\x04") or start[:1] == b"\x80"):
        from diffusion.pretrained.torch_files import read_torch_file

        state, metadata, extras = read_torch_file(path)
        entries = {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        return TorchFile(path, entries, lambda name, _: state[name], metadata=metadata, extras=extras)
    raise ValueError(f"{path} is no file of weights: {_looks_like(start, path)}")


def is_safetensors(start: bytes) -> bool:
    """Whether the first bytes of a file, at least nine, begin a header of safetensors."""
    return start[8:9] == b"{"


def _looks_like(start: bytes, path: Path) -> str:
    if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80":
        return (
            f"it is a pickle under the name of a {path.suffix or 'nameless'} file, which is never what it should be; "
            "take another copy. A file of torch.save ends in .ckpt, .pt, .pth or .bin"
        )
    other = "its first bytes are no header of safetensors and none of torch.save; take another copy"
    return what_else(start, path.stat().st_size) or other


def what_else(start: bytes, size: int) -> str | None:
    """What a file that holds no weights is, by its first bytes and its size, and what to do; None: unknown."""
    if size == 0:
        return "it is empty; a download or copy did not finish"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "it looks like a web page, so a download was answered by an error page; download it again"
    if size < 8:
        return f"it has only {size} bytes; a download or copy did not finish"
    return None


def _neighbours(path: Path) -> str:
    folder = next((p for p in path.parents if p.is_dir()), Path())
    found = sorted(str(p) for p in folder.iterdir() if p.suffix in (".safetensors", *PICKLES))[:4]
    return f"; did you mean {' or '.join(found)}?" if found else ""


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def open_safetensors(path: Path) -> WeightFile:
    """Open a file whose first bytes are a header of safetensors; ValueError for what is damaged."""
    size = path.stat().st_size
    header, start = _header(path, size)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or len(header) > MANY_TENSORS:
        raise ValueError(f"the header of {path} is damaged ({len(header)} entries); take another copy of the file")
    places = {name: _place(path, name, entry) for name, entry in header.items()}
    _check_extent(path, places, size - start)
    mapped: list[torch.UntypedStorage] = []

    def read(name: str, own: bool) -> Tensor:
        entry, begin, end = places[name]
        if begin == end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if own:
            return _copied(path, start + begin, entry)
        if not mapped:
            mapped.append(torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size))
        data = torch.empty(0, dtype=torch.uint8).set_(mapped[0], start + begin, (end - begin,))
        if (start + begin) % entry.dtype.itemsize:
            data = data.clone()  # no type can be laid over an odd address
        return data.view(entry.dtype).view(entry.shape)

    def portions(name: str, size: int) -> Iterator[Tensor]:
        entry, begin, _ = places[name]
        for first in range(0, torch.Size(entry.shape).numel(), size):
            count = min(size, torch.Size(entry.shape).numel() - first)
            yield _copied(path, start + begin + first * entry.dtype.itemsize, Entry((count,), entry.dtype))

    entries = {name: place[0] for name, place in places.items()}
    plain = {str(key): str(value) for key, value in metadata.items()}
    return WeightFile(path, entries, read, portions=portions, metadata=plain)


def _copied(path: Path, begin: int, entry: Entry) -> Tensor:
    """A tensor read into memory of its own: by one read, faster than page by page through a mapping."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    place = memoryview(tensor.flatten().view(torch.uint8).numpy())
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        done = 0
        while done < len(place):  # one call reads 2 GB at most
            if not (count := file.readinto(place[done:])):
                raise ValueError(f"{path} ended {len(place) - done} bytes early while it was read; copy it again")
            done += count
    return tensor


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header's JSON, and where the data start."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER or 8 + length > size:
            raise ValueError(
                f"{path} is truncated or damaged: its header claims {length} bytes, the file has {size}; copy it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the header of {path} is damaged ({type(error).__name__}: {str(error)[:80]}); take another copy of it"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"the header of {path} is damaged (no mapping); take another copy of the file")
    return header, 8 + length


def _place(path: Path, name: str, entry: Any) -> tuple[Entry, int, int]:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"the header of {path} is damaged at {name[:80]!r} ({type(error).__name__}: {str(error)[:60]}); "
            "take another copy of the file"
        ) from error
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{path} holds {name[:80]!r} as {kind!r}, which is none of {', '.join(DTYPES)}")
    size = DTYPES[kind].itemsize
    for number in shape if whole else ():
        size *= number
    if not whole or len(shape) > 8 or size != end - begin:
        raise ValueError(
            f"the header of {path} is damaged at {name[:80]!r}: {kind} {str(list(shape))[:60]} is not "
            f"what lies at bytes {begin} to {end}; take another copy of the file"
        )
    return Entry(shape, DTYPES[kind]), begin, end


def _check_extent(path: Path, places: Mapping[str, tuple[Entry, int, int]], available: int) -> None:
    """Raise ValueError unless the tensors follow one another without gaps to the file's end."""
    at = 0
    for name, (_, begin, end) in sorted(places.items(), key=lambda item: item[1][1:]):
        if begin != at:
            raise ValueError(
                f"the header of {path} is damaged: {name[:80]!r} starts at byte {begin} of the data, not at {at}; "
                "take another copy of the file"
            )
        at = end
    if at != available:
        what = "truncated" if at > available else "longer than its header says"
        raise ValueError(f"{path} is {what}: its tensors take {at} bytes, and it has {available}; copy it again")


# ---------------------------------------------------------------------------------------------------------------------
# shards and folders


def _open_shards(path: Path) -> Shards:
    names = _read_index(path)
    files = {}
    for file in dict.fromkeys(names.values()):
        if Path(file).name != file or file in (".", ".."):
            raise ValueError(f"{path} names the shard {file!r}, which is not in its folder; take another copy")
        if not (path.parent / file).is_file():
            raise ValueError(f"{path.parent} lacks the shard {file} that {path.name} names; download it, too")
        files[file] = open_weights(path.parent / file)
    if absent := [name for name, file in names.items() if name not in files[file]]:
        raise ValueError(
            f"{path} names {len(absent)} tensors that its shards do not hold, such as {absent[0][:80]}; "
            "take the index and the shards of one upload"
        )
    stray = [name for file, weights in files.items() for name in weights if names.get(name) != file]
    if stray:
        raise ValueError(
            f"the shards of {path} hold {len(stray)} tensors that it does not name, such as {stray[0][:80]}; "
            "take the index and the shards of one upload"
        )
    entries = {name: files[file][name] for name, file in names.items()}
    first = next(iter(files.values()), None)
    metadata = {} if first is None else first.metadata
    return Shards(
        path,
        entries,
        lambda name, own: files[names[name]].read(name, own=own),
        portions=lambda name, size: files[names[name]].portions(name, size),
        metadata=metadata,
    )


def _read_index(path: Path) -> dict[str, str]:
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()) or not names:
        raise ValueError(f"{path} is no index of shards: it has no weight_map of names to files")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; ValueError for anything else, also for a file that is too large to be a config."""
    try:
        text = path.read_text("utf-8") if path.stat().st_size <= LONGEST_HEADER else ""
        found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({str(error)[:80]}); take another copy of it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no mapping; take another copy of it")
    return found


def find_weights(folder: Path, *, variant: str | None = None) -> Path:
    """The file of a folder that holds its model's weights, or their index: safetensors before torch.save's."""
    files = [p for p in sorted(folder.iterdir()) if p.is_file()]
    for kind in ("safetensors", "torch"):
        if found := [p for p in files if _is_weights(p, kind)]:
            return _of_variant(folder, found, variant)
    if shards := [p for p in files if SHARD.search(p.name)]:
        raise ValueError(f"{folder} has shards such as {shards[0].name}, but not their index (*.index.json)")
    inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    raise ValueError(f"{folder} holds no weights (*.safetensors, *.bin); it has {inside}")


def _is_weights(path: Path, kind: str) -> bool:
    """Whether a file is a whole model's: an index of shards, or a file that is no shard."""
    if path.suffix == ".json":
        return ".index." in path.name and (".safetensors" in path.name) == (kind == "safetensors")
    endings = (".safetensors",) if kind == "safetensors" else PICKLES
    return path.suffix in endings and not SHARD.search(path.name)


def variant_of(name: str) -> str | None:
    """ "fp16" of diffusion_pytorch_model.fp16.safetensors; None where a file's name tells none."""
    found = VARIANT.search(name)
    return found.group(1) if found else None


def _of_variant(folder: Path, files: list[Path], variant: str | None) -> Path:
    wanted = [p for p in files if variant_of(p.name) == variant]
    if not wanted and variant is None:
        wanted = [p for p in files if variant_of(p.name) not in ("ema", "non_ema")] or files
        rank = {"fp32": 0, "bf16": 1, "fp16": 2, "f16": 2}
        wanted = sorted(wanted, key=lambda p: rank.get(variant_of(p.name) or "", 3))
        wanted = [p for p in wanted if variant_of(p.name) == variant_of(wanted[0].name)]
    known = [p for p in wanted if p.name.startswith(("diffusion_pytorch_model", "model.", "pytorch_model"))]
    chosen = known or wanted
    if len(chosen) > 1 and any(p.suffix == ".json" for p in chosen):
        chosen = [p for p in chosen if p.suffix != ".json"]  # a whole file beside the index of its shards
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(p.name for p in files[:8])
    if not chosen:
        raise ValueError(f"{folder} has no weights of variant {variant!r}; it has {names}")
    raise ValueError(f"{folder} holds the weights of several models ({names}); name one of the files")
