"""Where in its tar file does each sample of a shard lie, so that any of them can be read directly?

An index is a small JSON file beside its shard, written by `diffusion.data.pack` or on first use. A shard is a plain tar
file in webdataset's layout: files that share a name up to its first dot are one sample.
"""

import contextlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion.checkpoint import atomic_write
from diffusion.data.listing import SUFFIXES, UNREADABLE, decode
from diffusion.progress import WorkBar

FORMAT = "diffusion-shard-index"
FORMAT_VERSION = 1
SUFFIX = ".index.json"
IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
CAPTION, LABEL, FIELDS = "txt", "cls", "json"  # the extensions that are read beside images
BLOCK = 512  # bytes of a tar header


class Place(NamedTuple):
    """Where a file's bytes lie in its shard."""

    offset: int
    size: int


class ShardIndex(NamedTuple):
    """The samples of one shard in their order: names, labels as they are written, and places.

    `faults` names the samples that have no place here, with the reason. `checked`: every image has been decoded.
    """

    path: Path
    keys: list[str]
    images: np.ndarray  # (N, 2) int64, offset and size
    captions: np.ndarray  # (N, 2) int64; size -1: none
    in_json: np.ndarray  # (N,) bool: the caption is a field of the file there
    labels: list[str | None]
    faults: dict[str, str]
    checked: bool


def read_fields(fields: Mapping[str, bytes]) -> tuple[str | None, str | None]:
    """Return label and caption of a sample's files by extension. Raises ValueError that says what is wrong with them.

    `.txt` is a caption, `.cls` a label, and `.json` an object that may have "caption" or "text", and "label" or "cls".
    """
    described: Any = {}
    if FIELDS in fields:
        try:
            described = json.loads(fields[FIELDS])
        except ValueError as error:
            raise ValueError(f"its json is wrong: {error}") from error
        if not isinstance(described, dict):
            raise ValueError("its json is no object")
    caption = described.get("caption", described.get("text"))
    label = described.get("label", described.get("cls"))
    if not isinstance(caption, str | None):
        raise ValueError(f"the caption in its json is no text but {type(caption).__name__}")
    if not isinstance(label, str | int | None):
        raise ValueError(f"the label in its json is no number or name but {type(label).__name__}")
    caption = _text(fields, CAPTION, caption)
    label = _text(fields, LABEL, None if label is None else str(label))
    return label, caption


def _text(fields: Mapping[str, bytes], extension: str, otherwise: str | None) -> str | None:
    if extension not in fields:
        return otherwise
    try:
        return fields[extension].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"its {extension} is no text: {error}") from error


def image_extension(extensions: Sequence[str]) -> str:
    """Return the extension of a sample's image, its first one. Raises ValueError for a sample without."""
    found = next((extension for extension in extensions if extension in IMAGES), None)
    if found is None:
        raise ValueError(f"it has no image, but {', '.join(f'.{extension}' for extension in extensions)}")
    return found


def decode_bytes(data: bytes) -> Image.Image:
    """Read an image in full and turn it upright. Raises one of `UNREADABLE`."""
    return decode(io.BytesIO(data))


# ---------------------------------------------------------------------------------------------------------------------
# building


def members(path: Path) -> Iterator[tuple[str, dict[str, Place]]]:
    """Yield each sample's key with the places of its files by extension. Raises ValueError for a damaged shard."""
    from webdataset.tariterators import base_plus_ext  # imports torch's loaders and more

    end, key, places = 0, None, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                prefix, extension = base_plus_ext(member.name)
                if not member.isreg() or prefix is None or member.name.startswith("__"):
                    continue
                if key is not None and prefix != key:
                    yield key, places
                    places = {}
                key = prefix
                places.setdefault(extension.lower(), Place(member.offset_data, member.size))
        with open(path, "rb") as file:
            file.seek(end)
            whole = file.read(BLOCK) == bytes(BLOCK)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(damaged(path, error, key)) from error
    if not whole:
        raise ValueError(damaged(path, "its end is missing", key))
    if key is not None:
        yield key, places


def damaged(shard: Path | str, reason: object, last: str | None = None) -> str:
    """Say that a shard cannot be read on, where, and what to do."""
    after = "" if last is None else f" after the sample {last}"
    return f"the shard {shard} is cut short or no tar file{after} ({reason}); copy or pack it again, or leave it out"


def build_index(path: Path, *, check: bool) -> ShardIndex:
    """Read a shard's headers and small files, and with `check` decode every image, in parallel."""
    keys, images, captions, in_json, labels, faults = [], [], [], [], [], {}
    with open(path, "rb") as file:
        for key, places in members(path):
            try:
                image = places[image_extension(list(places))]
                small = {name: _bytes(file, places[name]) for name in (CAPTION, LABEL, FIELDS) if name in places}
                label, caption = read_fields(small)
            except ValueError as error:
                faults[key] = str(error)
                continue
            holder = CAPTION if CAPTION in places else FIELDS
            keys.append(key)
            images.append(image)
            captions.append((0, -1) if caption is None else places[holder])
            in_json.append(holder == FIELDS)
            labels.append(label)
    if check:
        faults |= _undecodable(path, keys, images)
    keep = [number for number, key in enumerate(keys) if key not in faults]
    rows = np.array([(*images[n], *captions[n]) for n in keep], np.int64).reshape(-1, 4)
    return ShardIndex(
        path,
        [keys[n] for n in keep],
        rows[:, :2],
        rows[:, 2:],
        np.array([in_json[n] for n in keep], bool),
        [labels[n] for n in keep],
        faults,
        check,
    )


def _bytes(file: io.BufferedIOBase, place: Place) -> bytes:
    file.seek(place.offset)
    return file.read(place.size)


def _undecodable(path: Path, keys: Sequence[str], images: Sequence[Place]) -> dict[str, str]:
    def failure(place: Place) -> str | None:
        try:
            with open(path, "rb") as file:
                decode_bytes(_bytes(file, place))
        except UNREADABLE as error:
            return f"{type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor() as pool:
        reasons = pool.map(failure, images)
        return {key: reason for key, reason in zip(keys, reasons, strict=True) if reason is not None}


# ---------------------------------------------------------------------------------------------------------------------
# keeping


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + SUFFIX)


def save_index(index: ShardIndex) -> None:
    """Write an index beside its shard."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bytes": index.path.stat().st_size,
        "checked": index.checked,
        "keys": index.keys,
        "labels": index.labels,
        "images": index.images.tolist(),
        "captions": index.captions.tolist(),
        "in_json": index.in_json.astype(int).tolist(),
        "faults": index.faults,
    }
    with atomic_write(index_path(index.path)) as partial:
        partial.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def load_index(shard: Path, *, check: bool) -> ShardIndex | None:
    """Read the index beside a shard; None where there is none that is whole, as new as the shard, and good enough."""
    path = index_path(shard)
    try:
        status = shard.stat()
        if path.stat().st_mtime_ns < status.st_mtime_ns:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        known = (content["format"], content["format_version"], content["bytes"])
        if known != (FORMAT, FORMAT_VERSION, status.st_size) or (check and not content["checked"]):
            return None
        return ShardIndex(
            shard,
            content["keys"],
            np.array(content["images"], np.int64).reshape(-1, 2),
            np.array(content["captions"], np.int64).reshape(-1, 2),
            np.array(content["in_json"], bool),
            content["labels"],
            content["faults"],
            content["checked"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def indexes(shards: Sequence[Path], *, check: bool) -> list[ShardIndex]:
    """Return every shard's index; what is missing is built and, where the folder can be written, kept."""
    found = {shard: load_index(shard, check=check) for shard in shards}
    missing = [shard for shard, index in found.items() if index is None]
    if missing:
        with WorkBar(len(missing), doing="indexing", done="indexed", unit="shards") as bar:
            for shard in missing:
                found[shard] = build_index(shard, check=check)
                with contextlib.suppress(OSError):  # a folder that may only be read is indexed each time
                    save_index(found[shard])
                bar.advance(1)
    return list(found.values())
