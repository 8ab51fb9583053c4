"""How does a dataset turn (epoch, index) keys into one training batch?

Values become [-1, 1] and mirrors are drawn here and nowhere else. Whole batches are fetched at once, which spares an
in-memory set one Python call and one small tensor a sample.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusion.randomness import fold

NUM_LOOKED_AT = 16  # images of a set that `ImageSet.content` loads
BROKEN = "broken"  # the entry of a batch that names samples found to be broken; the loader takes it out


class KeyedSet(Dataset, ABC):
    """Samples addressed by (epoch, index); whether one is mirrored is a function of (seed, epoch, index)."""

    def __init__(self, *, seed: int = 0, horizontal_flip: bool = False) -> None:
        self.seed = seed
        self.horizontal_flip = horizontal_flip

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def samples(self, indices: Sequence[int], mirrored: Tensor | None = None) -> dict[str, Any]:
        """Return the entries of one batch; those where `mirrored` (B,) bool is true as in a mirror."""

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> dict[str, Any]:
        indices = [index for _, index in keys]
        mirrored = None
        if self.horizontal_flip:
            mirrored = torch.tensor([bool(fold(self.seed, "flip", *key) & 1) for key in keys])
        return {**self.samples(indices, mirrored, **self.drawn(keys)), "index": torch.tensor(indices)}

    def drawn(self, keys: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return further arguments of `samples` that are functions of (seed, epoch, index); there are none here."""
        return {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample as epoch 0 shows it: the batch's entries without their first axis."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {name: value[0] for name, value in self.__getitems__([(0, index % len(self))]).items()}


class ImageSet(KeyedSet):
    """Images with, perhaps, labels and captions.

    A subclass loads integer images 0..`levels`; `levels` maps to 1 and 0 to -1, both exactly.
    """

    levels: int = 255

    @abstractmethod
    def load(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return "image" (B, C, H, W) integers 0..`levels` and, where there are any, "label" (B,) and "caption"."""

    def samples(self, indices: Sequence[int], mirrored: Tensor | None = None, **how: Any) -> dict[str, Any]:
        """Return what `load` gives with "image" in [-1, 1], mirrored where `mirrored` (B,) says so."""
        batch = self.load(indices, **how)
        return {**batch, "image": as_floats(batch["image"], mirrored, self.levels)}

    def description(self) -> dict[str, Any]:
        """Say in plain data what the samples are, whatever their order: what was made from them asks whether they are
        still the same. A subclass adds the settings by whose names people know a difference."""
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "samples": len(self),
            "levels": self.levels,
            "horizontal_flip": self.horizontal_flip,
            "content": self.content(),
        }

    def content(self) -> str:
        """Return a hash of the samples: here of 16 of them, evenly spaced. A subclass that can afford it hashes all."""
        chosen = [number * len(self) // NUM_LOOKED_AT for number in range(min(NUM_LOOKED_AT, len(self)))]
        return digest(value for _, value in sorted(self.load(chosen).items()))


def as_floats(image: Tensor, mirrored: Tensor | None = None, levels: int = 255) -> Tensor:
    """Map integers 0..`levels` (B, C, H, W) to [-1, 1], those where `mirrored` (B,) says so as in a mirror."""
    image = image.float().div_(levels / 2).sub_(1)
    return image if mirrored is None else torch.where(mirrored[:, None, None, None], image.flip(-1), image)


def digest(values: Iterable[Any]) -> str:
    """Return the SHA-256 of tensors (type, shape and bytes), bytes, and whatever else has a faithful `repr`."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.contiguous().numpy())
        elif isinstance(value, bytes):
            found.update(f"bytes {len(value)} ".encode())
            found.update(value)
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


class TensorImages(ImageSet):
    """Images held in memory: (N, C, H, W) uint8 of 0..`levels`, labels (N,) int64."""

    def __init__(
        self, images: Tensor, labels: Tensor, *, levels: int = 255, seed: int = 0, horizontal_flip: bool = False
    ) -> None:
        super().__init__(seed=seed, horizontal_flip=horizontal_flip)
        self.images, self.labels, self.levels = images, labels, levels

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: Sequence[int]) -> dict[str, Any]:
        """Pick images and labels."""
        chosen = torch.as_tensor(indices)
        return {"image": self.images[chosen], "label": self.labels[chosen]}

    def content(self) -> str:
        """Hash every image and label."""
        return digest([self.images, self.labels])
