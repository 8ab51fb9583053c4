"""Which images is each sample conditioned on? Pictures, or the samples of an earlier model together with their labels.

A small image for a model that enlarges is taken as it is; one of the training images' size is reduced as in training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from diffusion.data.image_folder import fitted
from diffusion.data.listing import UNREADABLE, decode
from diffusion.evaluation.reference import open_images
from diffusion.images import to_pil


class Given(NamedTuple):
    """Images, uint8 (C, H, W), and their classes where the files tell them."""

    images: list[Tensor]
    labels: list[int] | None


def choose_images(
    paths: str | Sequence[str], num_samples: int, shape: Sequence[int], low_size: Sequence[int] | None = None
) -> Given:
    """Return an image for each sample, and its label where all files tell them; the given ones repeat.

    A file is a picture, an .npz of samples (arr_0 uint8 (N, H, W, C), arr_1 labels) or a folder of either. Images come
    at the training images' `shape` (C, H, W), or at `low_size` (H, W), where a model takes those, if they are smaller.
    Raises ValueError for a file that cannot be read.
    """
    images: list[Tensor] = []
    labels: list[int | None] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        wanted = num_samples - len(images)
        if wanted > 0:
            pictures, told = _opened(Path(path).expanduser(), wanted)
            images += [_sized(picture, shape, low_size) for picture in pictures]
            labels += told
    if not images:
        raise ValueError("condition_image is an empty list; give at least one FILE")
    known = None if None in labels else [labels[i % len(labels)] for i in range(num_samples)]
    return Given([images[i % len(images)] for i in range(num_samples)], known)


def _opened(path: Path, wanted: int) -> tuple[list[Image.Image], list[int | None]]:
    """Return at most `wanted` pictures of a file or folder, and a label for each, None where it is not told."""
    if path.suffix != ".npz" and not path.is_dir():
        try:
            return [decode(path)], [None]
        except UNREADABLE as error:
            raise ValueError(f"condition_image={path} cannot be read as an image ({error})") from error
    stored = open_images(path)
    pictures: list[Image.Image] = []
    for batch in stored.read(256):
        pictures += map(to_pil, batch[: wanted - len(pictures)])
        if len(pictures) == wanted:
            break
    return pictures, _labels(path / "samples.npz" if path.is_dir() else path, stored.count)[: len(pictures)]


def _labels(path: Path, count: int) -> list[int | None]:
    """Return arr_1 of an .npz file, or None for each of its images where there is none."""
    if not path.is_file():
        return [None] * count
    with np.load(path, allow_pickle=False) as file:
        if "arr_1" not in file:
            return [None] * count
        labels = file["arr_1"]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"arr_1 of {path} must hold a label, a whole number, for each of its {count} images")
    return labels.tolist()


def _sized(picture: Image.Image, shape: Sequence[int], low_size: Sequence[int] | None) -> Tensor:
    """Return an image, uint8 (C, H, W), of the training images' size, or of `low_size` if it is smaller."""
    small = low_size is not None and min(picture.size) < shape[1]
    return fitted(picture, channels=shape[0], image_size=low_size[0] if small else shape[1])
