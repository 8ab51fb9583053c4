"""How does a dataset turn (epoch, index) keys into one training batch?

Values become [-1, 1] and mirrors are drawn here and nowhere else. Whole batches are fetched at once, which spares an
in-memory set one Python call and one small tensor a sample.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusion.randomness import fold


class ImageSet(Dataset, ABC):
    """Images with, perhaps, labels and captions; samples are addressed by (epoch, index).

    A subclass loads integer images 0..`levels`; `levels` maps to 1 and 0 to -1, both exactly. Whether a sample is
    mirrored is a function of (seed, epoch, index).
    """

    levels: int = 255

    def __init__(self, *, seed: int = 0, horizontal_flip: bool = False) -> None:
        self.seed = seed
        self.horizontal_flip = horizontal_flip

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return "image" (B, C, H, W) integers 0..`levels` and, where there are any, "label" (B,) and "caption"."""

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> dict[str, Any]:
        indices = [index for _, index in keys]
        batch = self.load(indices)
        image = batch["image"].float().div_(self.levels / 2).sub_(1)
        if self.horizontal_flip:
            mirrored = torch.tensor([bool(fold(self.seed, "flip", *key) & 1) for key in keys])
            image = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
        return {**batch, "image": image, "index": torch.tensor(indices)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample as epoch 0 shows it: the batch's entries without their first axis."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {name: value[0] for name, value in self.__getitems__([(0, index % len(self))]).items()}


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
        chosen = torch.as_tensor(indices)
        return {"image": self.images[chosen], "label": self.labels[chosen]}
