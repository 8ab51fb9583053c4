"""Is a picture that was made again the same, and if not, by how much and for what reasons?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion.sample_parts import changes


class Difference(NamedTuple):
    """How two pictures differ: the largest difference of a value of 0 to 255, and how many of the values differ."""

    largest: int
    differing: int
    values: int

    def __str__(self) -> str:
        if self.largest == 0:
            return f"identical: largest pixel difference 0 in {self.values} values"
        return f"largest pixel difference {self.largest} of 255, in {self.differing} of {self.values} values"


def check_verify(config: Mapping[str, Any]) -> None:
    """Raise ValueError where there is nothing to compare with, or nothing to compare."""
    if config["verify"] and config["from"] is None:
        raise ValueError("verify=true compares what is drawn with a picture; add from=PICTURE.png")
    if config["verify"] and config["samples"] is not None:
        raise ValueError(f"verify=true draws a picture again; leave out samples={config['samples']}")


def verified(picture: str, folder: Path) -> int:
    """Print how the first sample in a folder differs from the picture that it remakes; return the exit status."""
    path = Path(picture).expanduser()
    with np.load(folder / "samples.npz") as samples:
        found = difference(path, samples["arr_0"][0])
    print(f"{path}: {found}")
    return int(found.largest > 0)


def check_comparable(config: Mapping[str, Any], shape: Sequence[int]) -> None:
    """Raise ValueError, before anything is drawn, where images of `shape` (C, H, W) cannot be the picture again."""
    if config.get("verify"):
        with Image.open(Path(config["from"]).expanduser()) as opened:
            _check_shape(config["from"], opened, (*shape[1:], shape[0]))


def _check_shape(picture: str | Path, opened: Image.Image, shape: Sequence[int]) -> None:
    found = (opened.height, opened.width, len(opened.getbands()))
    if found != tuple(shape):
        sizes = ["{1}x{0} with {2} channels".format(*size) for size in (found, shape)]
        raise ValueError(f"{picture} is {sizes[0]}, but what is to be drawn is {sizes[1]}: they cannot be compared")


def difference(picture: str | Path, image: np.ndarray) -> Difference:
    """Compare a picture file with uint8 (H, W, C). Raises ValueError for one of another size or number of channels."""
    with Image.open(picture) as opened:
        _check_shape(picture, opened, image.shape)
        before = np.asarray(opened).reshape(image.shape)
    apart = np.abs(before.astype(int) - image)
    return Difference(int(apart.max()), int((apart > 0).sum()), apart.size)


def unlike(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what a picture was made with and is not made with now, by dotted names; of files their hashes count."""
    own = {"seed", "label", "prompt", "number", "batch", "pad_to"} | {name for name in before if _is_file(name, before)}
    kept = [name for name in before if name not in own]
    return list(changes({name: before[name] for name in kept}, {name: now.get(name) for name in kept}))


def _is_file(name: str, before: Mapping[str, Any]) -> bool:
    return f"{name}_sha256" in before
