"""Where is the file that a picture was made with, when its path says nothing here? By name and by hash.

A1111 names a model by its file's stem and ten digits of its SHA-256, earlier by eight of a part's. No torch here.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from diffusion.files import file_hash, files_hash, path_hash

HOME = Path("checkpoints")  # where published files are dropped
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
OLD_HASH = 8  # digits


def find_file(name: str, *, near: Path, sha256: str | None = None) -> Path | None:
    """Return the file of this path, or one of its name in checkpoints/ or beside the picture; None if there is none.

    Of several the one with the right SHA-256 is taken, and a moved one only with the right one, where it is known.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    found = [place for place in (*_below(HOME), *sorted(near.glob("*"))) if place.name == path.name]
    if sha256 is None:
        return found[0] if found else None
    return next((place for place in found if sha256 in (path_hash(place), files_hash([place]))), None)


def find_model(name: str | None, short_hash: str | None, picture: Path) -> Path:
    """Return the model that a foreign picture names, or else the one with its hash.

    Raises ValueError where checkpoints/ holds neither.
    """
    files = [place for place in _below(HOME) if place.suffix in SUFFIXES]
    bare = Path((name or "").replace("\\", "/")).name
    stem = bare.removesuffix(Path(bare).suffix) if Path(bare).suffix in SUFFIXES else bare
    named = [place for place in files if stem and place.stem == stem]
    fitting = [place for place in named if short_hash and _has(place, short_hash)]
    if named and not fitting and short_hash:
        print(f"{named[0]} has the name of the picture's model, but not its hash {short_hash}", file=sys.stderr)
    if not named and short_hash and files:
        print(f"looking for the model with the hash {short_hash} among {len(files)} files of {HOME}/", file=sys.stderr)
        fitting = [place for place in files if _has(place, short_hash)]
    if not fitting and not named:
        what = f"the model {name!r}" if name else "a model that it does not name"
        hashed = f" (hash {short_hash})" if short_hash else ""
        raise ValueError(f"from={picture} was made with {what}{hashed}, which is not in {HOME}/; add checkpoint=FILE")
    return (fitting or named)[0]


def _below(folder: Path) -> Iterator[Path]:
    return iter(sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [])


def _has(path: Path, short_hash: str) -> bool:
    """Say whether a file has a hash that A1111 has written."""
    if len(short_hash) == OLD_HASH:
        with open(path, "rb") as file:
            file.seek(0x100000, os.SEEK_SET)
            return hashlib.sha256(file.read(0x10000)).hexdigest()[:OLD_HASH] == short_hash
    return len(short_hash) > OLD_HASH and file_hash(path).startswith(short_hash.lower())
