"""Your own images: class folders, a `metadata.jsonl` with captions and labels, or just a folder.

Every image is resized to its shorter side and cut to the centre square, or in training to random squares; what cannot
be read is named, and left out.
"""

import math
import random
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image, ImageOps
from torch import Tensor

from diffusion.data.base import ImageData
from diffusion.data.images import BROKEN, ImageSet, digest
from diffusion.data.listing import UNREADABLE, Entry, class_names, decode, entries, mark, some, unreadable
from diffusion.randomness import fold

MODES = {1: "L", 3: "RGB"}
# What `read_image` does to a file, for those who keep what they made of its answer: say so here when it changes.
TRANSFORM = "upright, on white, shorter side resized by Lanczos, centre cut out"


LARGEST_ZOOM = 1.25  # of random crops, as guided-diffusion's: the most that the shorter side is larger than the crop


def read_image(path: Path, *, channels: int, image_size: int, crop: int | None = None) -> Tensor:
    """Read as (channels, image_size, image_size) uint8: upright, on white, shorter side resized, centre cut out.

    `crop` is the seed of a random crop in place of the one at the centre.
    """
    return fitted(decode(path), channels=channels, image_size=image_size, crop=crop)


def fitted(image: Image.Image, *, channels: int, image_size: int, crop: int | None = None) -> Tensor:
    """Make a picture (channels, image_size, image_size) uint8, as `read_image` does."""
    image = flattened(image, channels)
    image = squared(image, image_size) if crop is None else cropped(image, image_size, random.Random(crop))
    pixels = np.array(image).reshape(image_size, image_size, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def flattened(image: Image.Image, channels: int) -> Image.Image:
    """Make 8 bits a channel of any image, grey for 1 channel and RGB for 3; what is transparent lies on white."""
    if image.mode.startswith("I"):  # 16 bits: Pillow would cut values off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def squared(image: Image.Image, image_size: int) -> Image.Image:
    """Resize the shorter side to `image_size` and cut the centre out; an image of that size stays as it is.

    Lanczos with its support widened to the scale (Pillow's own way), so that large photographs do not alias.
    """
    return ImageOps.fit(image, (image_size, image_size), method=Image.Resampling.LANCZOS)


def cropped(image: Image.Image, image_size: int, draw: random.Random) -> Image.Image:
    """Resize the shorter side to between `image_size` and `LARGEST_ZOOM` times that, and cut out a square anywhere.

    As guided-diffusion augments for its classifiers; here in one step, of the square's own pixels.
    """
    scale = min(image.size) / draw.randint(image_size, math.ceil(image_size * LARGEST_ZOOM))
    side = scale * image_size
    left, top = (draw.uniform(0, max(0.0, size - side)) for size in image.size)
    box = (left, top, min(left + side, image.width), min(top + side, image.height))
    return image.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box)


class EncodedImages(ImageSet):
    """Pictures decoded when they are asked for; one that has become unreadable is replaced by the next one.

    A subclass names them and opens them, and sets `labels`, one a picture, and `captioned`.
    """

    labels: Sequence[int] | None = None
    captioned: bool = False

    def __init__(
        self,
        *,
        channels: int,
        image_size: int,
        seed: int = 0,
        horizontal_flip: bool = False,
        random_crop: bool = False,
    ) -> None:
        super().__init__(seed=seed, horizontal_flip=horizontal_flip)
        self.channels, self.image_size, self.random_crop = channels, image_size, random_crop
        self.lost: set[str] = set()  # names reported so far, by this process

    @abstractmethod
    def name(self, index: int) -> str:
        """Say where a picture lies."""

    @abstractmethod
    def picture(self, index: int) -> Image.Image:
        """Decode a picture in full. Raises one of `UNREADABLE`."""

    @abstractmethod
    def caption(self, index: int) -> str:
        """Return a picture's caption; "" where it has none."""

    def drawn(self, keys: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the seeds of the random crops, where there are to be some."""
        return {"crops": [fold(self.seed, "crop", *key) for key in keys]} if self.random_crop else {}

    def load(self, indices: Sequence[int], crops: Sequence[int] | None = None) -> dict[str, Any]:
        """Read images (B, C, H, W) uint8 with what is known of them; one that cannot be read gives way to the next.

        "broken" is there when one was found that has not been named before: pairs of name and reason.
        """
        crops = [None] * len(indices) if crops is None else crops
        broken: list[tuple[str, str]] = []
        images, kept = zip(*(self._readable(*pair, broken) for pair in zip(indices, crops, strict=True)), strict=True)
        batch: dict[str, Any] = {"image": torch.stack(images)}
        if self.labels is not None:
            batch["label"] = torch.tensor([int(self.labels[index]) for index in kept])
        if self.captioned:
            batch["caption"] = [self.caption(index) for index in kept]
        return batch | ({BROKEN: broken} if broken else {})

    def _readable(self, index: int, crop: int | None, broken: list[tuple[str, str]]) -> tuple[Tensor, int]:
        """Read this image, or else the next one that can be read; return it with its index."""
        for index in ((index + step) % len(self) for step in range(len(self))):
            try:
                picture = self.picture(index)
                image = fitted(picture, channels=self.channels, image_size=self.image_size, crop=crop)
            except UNREADABLE as error:
                name = self.name(index)
                if name not in self.lost:
                    self.lost.add(name)
                    broken.append((name, str(error)))
                    warnings.warn(
                        f"{name} can no longer be read ({error}); the next image takes its place "
                        f"({len(self.lost)} such so far)",
                        stacklevel=2,
                    )
            else:
                return image, index
        raise ValueError(f"none of the {len(self)} images around {self.name(0)} can be read any more")

    def description(self) -> dict[str, Any]:
        return super().description() | {"transform": TRANSFORM}


class FolderImages(EncodedImages):
    """Images that lie in a folder."""

    def __init__(self, root: Path, found: Sequence[Entry], classes: Sequence[str] | None, **how: Any) -> None:
        super().__init__(**how)
        self.root, self.entries = root, tuple(found)
        self.labels = None if classes is None else [classes.index(entry.class_name) for entry in found]
        self.captioned = any(entry.caption is not None for entry in found)

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return str(self.root / self.entries[index].name)

    def picture(self, index: int) -> Image.Image:
        return decode(self.root / self.entries[index].name)

    def caption(self, index: int) -> str:
        return self.entries[index].caption or ""

    def content(self) -> str:
        """Hash every file's name, size and time of change, its label and its caption, wherever the folder lies."""
        labels = self.labels or [None] * len(self)
        return digest(
            (entry.name, mark(self.root / entry.name), label, entry.caption)
            for entry, label in zip(self.entries, labels, strict=True)
        )


class ImageFolder(ImageData):
    """Images of any size below `root`, resized and cut to `image_size`.

    - `root/metadata.jsonl` with lines {"file_name": ..., "caption" or "text": ..., "label": name or number};
    - or `root/CLASS/...`: the folders' names, sorted, are the classes 0, 1, ...;
    - or images anywhere below `root`.

    Classes are numbered in the order of their names; names that are numbers below `num_classes` keep those.

    `num_classes=None` trains without labels, whatever the folders. A `val_root` of the same layout serves validation;
    without it, `val_fraction` of the images are set aside by a hash of their names, so that adding images moves none.
    Unreadable images are left out, with a warning that counts and names them (`skipped` keeps {name: reason}).
    `random_crop` shows training images larger, by up to `LARGEST_ZOOM`, and another part of them in each epoch.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int,
        channels: int = 3,
        num_classes: int | None = None,
        val_root: str | Path | None = None,
        val_fraction: float = 0.02,
        horizontal_flip: bool = False,
        random_crop: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int = 0,
    ) -> None:
        if channels not in MODES:
            raise ValueError(f"data.channels is {channels}; image files are read as 1 (grey) or 3 (RGB)")
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction is {val_fraction}; it must be above 0 and below 1")
        super().__init__(
            channels=channels,
            image_size=image_size,
            num_classes=num_classes,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            seed=seed,
        )
        self.root = Path(root).expanduser()
        self.val_root = None if val_root is None else Path(val_root).expanduser()
        self.val_fraction = val_fraction
        self.horizontal_flip, self.random_crop = horizontal_flip, random_crop
        self.skipped: dict[str, str] = {}
        if num_classes is not None:
            self.class_names = self._classes()

    @cached_property
    def _entries(self) -> list[Entry]:
        return entries(self.root)

    def _classes(self) -> tuple[str, ...]:
        """Name the classes, which must be as many as `num_classes` and cover every image."""
        names = class_names(self._entries)
        numbers = tuple(str(number) for number in range(self.num_classes))
        if names and set(names) <= set(numbers):
            names = numbers  # class numbers, of which some may be missing here
        if len(names) != self.num_classes:
            found = f"{len(names)} classes ({some(list(names))})" if names else "no class folders and no labels"
            fix = f"data.num_classes={len(names)}" if names else "data.num_classes=null (no labels)"
            raise ValueError(f"data.num_classes is {self.num_classes}, but {self.root} has {found}; set {fix}")
        self._check_labelled(self._entries, self.root, names)
        return names

    def _check_labelled(self, found: Sequence[Entry], root: Path, names: Sequence[str]) -> None:
        strays = [entry.name for entry in found if entry.class_name not in names]
        if strays:
            raise ValueError(
                f"{len(strays)} images in {root} belong to none of the {len(names)} classes: {some(strays)}; "
                "move them into class folders, or set data.num_classes=null to train without labels"
            )

    def prepare_data(self) -> None:
        """Read every image once, on one process of a node, so that the others find the result."""
        for root in (self.root, self.val_root):
            if root is not None:
                unreadable(root, [entry.name for entry in entries(root)])

    def setup(self, stage: str | None = None) -> None:
        """Split the files, or take `val_root`'s to validate. Raises ValueError where a side is left without images."""
        if self.train_set is not None:
            return
        found = self._without_unreadable(self.root, self._entries)
        if self.val_root is not None:
            train, val = found, self._without_unreadable(self.val_root, entries(self.val_root))
            if self.class_names is not None:
                self._check_labelled(val, self.val_root, self.class_names)
        else:
            train, val = self._split(found)
        augmented = {"horizontal_flip": self.horizontal_flip, "random_crop": self.random_crop}
        self.train_set = self._dataset(self.root, train, **augmented)
        self.val_set = self._dataset(self.val_root or self.root, val)
        classes = class_names(found)
        if self.num_classes is None and classes:
            rank_zero_info(
                f"{self.root} has {len(classes)} classes, which are not used; "
                f"set data.num_classes={len(classes)} to train on labels"
            )

    def _dataset(self, root: Path, found: Sequence[Entry], **augmented: bool) -> FolderImages:
        return FolderImages(
            root,
            found,
            self.class_names,
            channels=self.channels,
            image_size=self.image_size,
            seed=self.seed,
            **augmented,
        )

    def _without_unreadable(self, root: Path, found: list[Entry]) -> list[Entry]:
        bad = unreadable(root, [entry.name for entry in found])
        self.skipped |= bad
        kept = [entry for entry in found if entry.name not in bad]
        if not kept:
            raise ValueError(f"none of the {len(found)} images in {root} can be read: {some(list(bad))}")
        if bad:
            reasons = some([f"{name} ({reason})" for name, reason in bad.items()])
            rank_zero_warn(f"{len(bad)} of {len(found)} images in {root} cannot be read and are left out: {reasons}")
        return kept

    def _split(self, found: list[Entry]) -> tuple[list[Entry], list[Entry]]:
        """Set aside the names whose hash is small; at least one, if there are two."""
        place = {entry.name: fold(0, "validation", entry.name) / 2**63 for entry in found}
        bound = max(self.val_fraction, min(place.values()))
        train = [entry for entry in found if place[entry.name] > bound]
        val = [entry for entry in found if place[entry.name] <= bound]
        if not train:
            raise ValueError(
                f"{len(found)} images in {self.root} leave none to train on beside "
                f"data.val_fraction={self.val_fraction}; add images, lower it, or set data.val_root"
            )
        return train, val
