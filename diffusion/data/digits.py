"""scikit-learn's handwritten digits: 1,797 real images, 8x8, that need no download.

The smallest honest task: train and validation are (nearly) different writers.
"""

import torch

from diffusion.data.base import ImageData
from diffusion.data.images import TensorImages

NUM_TRAIN = 1200


class Digits(ImageData):
    """Pixels 0..16 become x / 8 - 1, exactly invertible; train is the first 1,200 images, validation the last 597.

    The images come writer by writer (13 of them, says the UCI description): the labels repeat one sequence, which
    begins 0..9, 0..9 at positions 0, 130, 256, 386, ..., 1029, 1157, 1287, 1415, 1667, every 122 to 130 images. So this
    cut splits one of the 14 sequences (1157 to 1286: 43 images before it, 87 after) and separates all others; a random
    split would put every writer on both sides. All ten classes have 117 to 123 images in train, 55 to 62 in validation.
    No mirrors: a mirrored digit is no digit.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        image_size: int = 8,
        num_classes: int = 10,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int = 0,
    ) -> None:
        fixed = {"channels": (channels, 1), "image_size": (image_size, 8), "num_classes": (num_classes, 10)}
        for name, (value, fact) in fixed.items():
            if value != fact:
                raise ValueError(f"data.{name} is {value}, but the digits have {fact}; set data.{name}={fact}")
        super().__init__(
            channels=channels,
            image_size=image_size,
            num_classes=num_classes,
            class_names=[str(digit) for digit in range(10)],
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            seed=seed,
        )

    def setup(self, stage: str | None = None) -> None:
        """Read the digits: the first 1,200 train, the 597 others validate."""
        if self.train_set is not None:
            return
        from sklearn.datasets import load_digits  # scipy and all: not at import

        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target).long()
        self.train_set = TensorImages(images[:NUM_TRAIN], labels[:NUM_TRAIN], levels=16, seed=self.seed)
        self.val_set = TensorImages(images[NUM_TRAIN:], labels[NUM_TRAIN:], levels=16, seed=self.seed)
