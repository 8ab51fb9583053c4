"""Which images does a folder hold, with which labels and captions, and which of them can be read?

Three layouts: a `metadata.jsonl`, one folder a class, or just images. Reading every image once, before training, keeps
one truncated file from ending a run after hours.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps
from rich.progress import track

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
METADATA = "metadata.jsonl"
CACHE = ".diffusion_scan.json"
# What Pillow raises for files that are not, or not wholly, an image; a bomb is one too large to be honest.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class Entry(NamedTuple):
    """One image: `name` is its path below the root, with forward slashes."""

    name: str
    class_name: str | None = None
    caption: str | None = None


def entries(root: Path) -> list[Entry]:
    """List a folder by its `metadata.jsonl`, or else by its class folders, or else flat; sorted by name."""
    if not root.is_dir():
        raise ValueError(f"data.root is {str(root)!r}, but there is no such folder (seen from {Path.cwd()})")
    if (root / METADATA).is_file():
        found = list(described(root))
    else:
        found = [Entry(name, name.split("/")[0] if "/" in name else None) for name in image_names(root)]
    if not found:
        raise ValueError(
            f"no images in {root.absolute()}: looked for {', '.join(SUFFIXES)} in it and in all folders below, "
            f"and for a {METADATA} in it"
        )
    return sorted(found)


def image_names(root: Path) -> Iterator[str]:
    """Yield the images in a folder and below, without what is hidden."""
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def described(root: Path) -> Iterator[Entry]:
    """Read lines {"file_name": ..., "caption" or "text": ..., "label": name or number}; only file_name is required.

    Without "label", the folder that a file lies in is its class.
    """
    missing = []
    for number, line in enumerate((root / METADATA).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            name = Path(fields["file_name"]).as_posix()
            caption = fields.get("caption", fields.get("text"))
            if not isinstance(caption, str | None):
                raise TypeError("a caption is text")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{root / METADATA}, line {number}: expected {{"file_name": "...", "caption": "...", "label": ...}}, '
                f"one object a line, got {line[:100]!r}"
            ) from error
        label = fields.get("label", name.split("/")[0] if "/" in name else None)
        if not (root / name).is_file():
            missing.append(name)
        yield Entry(name, None if label is None else str(label), caption)
    if missing:
        raise ValueError(
            f"{root / METADATA} names {len(missing)} files that do not exist in {root.absolute()}: "
            + some(missing)
            + "; file_name is relative to that folder"
        )


def class_names(found: Iterable[Entry]) -> tuple[str, ...]:
    """Sort the names that occur; numbers by value."""
    return in_order({entry.class_name for entry in found if entry.class_name is not None})


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort names of classes; numbers by value."""
    return tuple(sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)))


def unreadable(root: Path, names: list[str]) -> dict[str, str]:
    """Decode every image in full, in parallel, and return {name: reason} of those that fail.

    What was seen is kept in a hidden file of the root, where that is writable: only new or changed images are read.
    """
    cache = load_cache(root)
    marks = {name: mark(root / name) for name in names}
    new = [name for name in names if cache.get(name, [None])[0] != marks[name]]
    if new:
        with ThreadPoolExecutor() as pool:
            reasons = pool.map(lambda name: failure(root / name), new)
            watched = track(
                reasons, f"checking {len(new)} images", total=len(new), transient=True, disable=len(new) < 1000
            )
            cache |= {name: [marks[name], reason] for name, reason in zip(new, watched, strict=True)}
        save_cache(root, cache)
    return {name: cache[name][1] for name in names if cache[name][1] is not None}


def mark(path: Path) -> str:
    """What changes when a file does."""
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"


def decode(path: Path) -> Image.Image:
    """Read an image in full and turn it upright, as its camera noted."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image)


def failure(path: Path) -> str | None:
    """Why an image cannot be read, or None."""
    try:
        decode(path)
    except UNREADABLE as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_cache(root: Path) -> dict[str, list[str | None]]:
    try:
        return json.loads((root / CACHE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or cut short: read the images again
        return {}


def save_cache(root: Path, cache: dict[str, list[str | None]]) -> None:
    """Replace the cache file whole; a folder that may not be written to is scanned each time."""
    partial = root / f"{CACHE}.{os.getpid()}"
    try:
        partial.write_text(json.dumps(cache), encoding="utf-8")
        partial.replace(root / CACHE)
    except OSError:
        partial.unlink(missing_ok=True)


def some(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
