"""How does an image folder become shards, the same bytes each time, and go on where it was stopped?

A plan comes first, which says what is packed; then shards, each whole or not there; the manifest comes last.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.checkpoint import atomic_write
from diffusion.data.broken import BrokenSamples
from diffusion.data.image_folder import TRANSFORM, flattened, squared
from diffusion.data.images import digest
from diffusion.data.listing import Entry, class_names, decode, entries, mark, some, unreadable
from diffusion.data.manifest import FORMAT, FORMAT_VERSION, MANIFEST
from diffusion.data.shard_index import build_index, load_index, save_index
from diffusion.progress import WorkBar
from diffusion.randomness import fold

PLAN = "pack.json"  # what is being packed; is there from the first shard on
LONGEST_STEM = 60  # characters of a file's name that are kept in its key


def pack(root: Path, out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Pack `root` into `out` and return the manifest. Raises ValueError for an `out` that holds something else."""
    found, broken = listed(root, settings["max_broken"])
    classes = class_names(found) if all(entry.class_name is not None for entry in found) else ()
    if settings["shuffle"]:
        found = sorted(found, key=lambda entry: fold(0, "pack", entry.name))
    plan = {**settings, "samples": len(found), "classes": list(classes), "content": content(root, found)}
    begin(out, plan)
    size = settings["shard_size"]
    parts = [range(start, min(start + size, len(found))) for start in range(0, len(found), size)]
    shards = []
    with WorkBar(len(found), doing="packing", done="packed") as bar:
        for number, part in enumerate(parts):
            path = out / f"{number:06d}.tar"
            index = load_index(path, check=True)
            if index is None or len(index.keys) != len(part):
                write_shard(path, root, found, part, classes, settings)
            shards.append({"name": path.name, "samples": len(part), "sha256": file_hash(path)})
            bar.advance(len(part))
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "num_samples": len(found),
        "classes": list(classes) or None,
        "captions": sum(entry.caption is not None for entry in found),
        "image_size": settings["image_size"] or None,
        "left_out": broken,
        "hash": digest([shards, plan["classes"]]),
        "shards": shards,
    }
    with atomic_write(out / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


def listed(root: Path, max_broken: int) -> tuple[list[Entry], dict[str, str]]:
    """List the images of a folder that can be read, and {name: reason} of the others."""
    found = entries(root)
    bad = unreadable(root, [entry.name for entry in found])
    BrokenSamples(max_broken).note(bad)
    found = [entry for entry in found if entry.name not in bad]
    if not found:
        raise ValueError(f"none of the {len(bad)} images in {root} can be read: {some(list(bad))}")
    return found, bad


def content(root: Path, found: Sequence[Entry]) -> str:
    """Hash what is packed, in its order, and how."""
    return digest([TRANSFORM, *((*entry, mark(root / entry.name)) for entry in found)])


def begin(out: Path, plan: Mapping[str, Any]) -> None:
    """Make the folder, or see that it holds a part of the same work; ValueError for anything else."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / PLAN).is_file():
        before = json.loads((out / PLAN).read_text(encoding="utf-8"))
        changed = [key for key in plan if before.get(key) != plan[key]]
        if changed:
            told = [f"{key} was {_short(before.get(key))} and is {_short(plan[key])}" for key in changed]
            raise ValueError(
                f"{out} holds shards of something else: {some(told)}; name another folder, or delete this one"
            )
        return
    if others := sorted(path.name for path in out.iterdir()):
        raise ValueError(f"{out} is not empty: it has {some(others)}; name a folder that is new or empty")
    with atomic_write(out / PLAN) as partial:
        partial.write_text(json.dumps(plan), encoding="utf-8")


def write_shard(
    path: Path, root: Path, found: Sequence[Entry], part: range, classes: Sequence[str], settings: Mapping[str, Any]
) -> None:
    """Write one shard and its index; the shard has its name only when it is whole."""
    from webdataset import TarWriter

    with atomic_write(path) as partial, open(partial, "wb") as file:
        with TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for number in part:
                tar.write(sample(root, found[number], number, classes, settings))
        file.flush()
        os.fsync(file.fileno())
    index = build_index(path, check=True)
    if index.faults or len(index.keys) != len(part):
        raise ValueError(
            f"{path} holds {len(index.keys)} usable samples of {len(part)}: "
            f"{some([f'{key} ({reason})' for key, reason in index.faults.items()])}; an image of {root} has changed "
            "while it was packed: run the command again"
        )
    save_index(index)


def sample(
    root: Path, entry: Entry, number: int, classes: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one sample's files by extension, and its key: its number and the name that it had."""
    stem, _, extension = entry.name.rpartition(".")
    name = re.sub(r"[^\w-]+", "_", stem, flags=re.ASCII)[-LONGEST_STEM:]
    if settings["image_size"]:
        image = squared(flattened(decode(root / entry.name), settings["channels"]), settings["image_size"])
        extension, data = "png", png(image)
    else:
        data = (root / entry.name).read_bytes()
    files: dict[str, Any] = {"__key__": f"{number:08d}_{name}", extension.lower(): data}
    if classes:
        files["cls"] = str(classes.index(entry.class_name)).encode()
    if entry.caption is not None:
        files["txt"] = entry.caption.encode("utf-8", "replace")
    return files


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
