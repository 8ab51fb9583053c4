"""Which images is each sample conditioned on, or does it start from? Pictures, or the samples of an earlier model.

A small image for a model that enlarges is taken as it is; one of the training images' size is reduced as in training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusion.data.image_folder import fitted, flattened
from diffusion.data.listing import UNREADABLE, decode
from diffusion.evaluation.reference import open_images
from diffusion.files import numbered
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
            pictures, told = _opened("condition_image", path, wanted)
            images += [_sized(picture, shape, low_size) for picture in pictures]
            labels += told
    if not images:
        raise ValueError("condition_image is an empty list; give at least one FILE")
    known = None if None in labels else [labels[i % len(labels)] for i in range(num_samples)]
    return Given([images[i % len(images)] for i in range(num_samples)], known)


def _opened(name: str, path: str | Path | Image.Image, wanted: int) -> tuple[list[Image.Image], list[int | None]]:
    """Return at most `wanted` pictures of a file, folder or image, and a label for each, None where it is not told.

    `name` is the setting that names the path. FILE#NUMBER is one image of a file or folder of many; after the last
    comes the first again.
    """
    if isinstance(path, Image.Image):
        return [path], [None]
    path, only = numbered(path)
    if path.suffix != ".npz" and not path.is_dir():
        try:
            return [decode(path)], [None]
        except UNREADABLE as error:
            raise ValueError(f"{name}={path} cannot be read as an image ({error})") from error
    stored = open_images(path)
    first, wanted = (0, wanted) if only is None else (only % stored.count, only % stored.count + 1)
    pictures: list[Image.Image] = []
    for batch in stored.read(256):
        pictures += map(to_pil, batch[: wanted - len(pictures)])
        if len(pictures) == wanted:
            break
    labels = _labels(path / "samples.npz" if path.is_dir() else path, stored.count)
    return pictures[first:], labels[first : len(pictures)]


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


# ---------------------------------------------------------------------------------------------------------------------
# pictures to start from

ONE = (str, Path, Image.Image)
LARGEST = 4  # times the pixels that a model was trained on, for a picture whose size nobody asked for


def picture_size(paths: str | Sequence[str], trained: Sequence[int], unit: int) -> tuple[int, int]:
    """Return the size (H, W) to draw the first picture at: its own, to the nearest multiple of `unit`.

    `trained` (H, W) is what the model draws by itself. Raises ValueError for a picture far beyond that.
    """
    picture = _pictures("image", paths, 1)[0]
    width, height = (max(unit, round(side / unit) * unit) for side in picture.size)
    if height * width > LARGEST * trained[0] * trained[1]:
        scale = (trained[0] * trained[1] / (height * width)) ** 0.5
        tall, wide = (max(unit, round(side * scale / unit) * unit) for side in (height, width))
        raise ValueError(
            f"the picture is {picture.width}x{picture.height}, and the model was trained on {trained[1]}x{trained[0]}; "
            f"say how large it is to be: height={tall} width={wide}, for example"
        )
    return height, width


def choose_pictures(
    images: str | Sequence[str], masks: str | Sequence[str] | None, num_samples: int, shape: Sequence[int]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return a picture, bytes (C, H, W), and a mask, float (1, H, W) of 0 and 1, for each sample; given ones repeat.

    A picture of another size than `shape` (C, H, W) is resized and its centre cut out, its mask alike. Raises
    ValueError for a file that cannot be read and for a mask of another size than its picture.
    """
    pictures = _pictures("image", images, num_samples)
    ours = [_cut(picture, shape, Image.Resampling.LANCZOS) for picture in pictures]
    chosen = [ours[i % len(ours)] for i in range(num_samples)]
    if masks is None:
        return chosen, None
    drawn = _pictures("mask", masks, num_samples)
    for i in range(max(len(pictures), len(drawn))):
        picture, mask = pictures[i % len(pictures)], drawn[i % len(drawn)]
        if picture.size != mask.size:
            raise ValueError(
                f"mask {i} is {mask.width}x{mask.height}, but its image {picture.width}x{picture.height}; "
                "make them equally large"
            )
    kept = [(_cut(mask, (1, *shape[1:]), Image.Resampling.NEAREST) >= 128).float() for mask in drawn]
    return chosen, [kept[i % len(kept)] for i in range(num_samples)]


def _pictures(name: str, paths: str | Sequence[str], wanted: int) -> list[Image.Image]:
    """Return at most `wanted` pictures, at least one, of the files and folders that the setting `name` gives."""
    found: list[Image.Image] = []
    for path in [paths] if isinstance(paths, ONE) else paths:
        if len(found) < wanted:
            found += _opened(name, path, wanted - len(found))[0]
    if not found:
        raise ValueError(f"{name} is an empty list; give at least one FILE")
    return found


def _cut(picture: Image.Image, shape: Sequence[int], kernel: Image.Resampling) -> Tensor:
    """Return a picture as bytes (C, H, W) of this shape, undistorted; one of that size stays as it is."""
    channels, height, width = shape
    fit = ImageOps.fit(flattened(picture, channels), (width, height), method=kernel)
    return torch.from_numpy(np.array(fit).reshape(height, width, channels)).permute(2, 0, 1).contiguous()
