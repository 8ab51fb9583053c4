"""MNIST, Fashion-MNIST and CIFAR-10 through torchvision, downloaded once, held in memory.

Training is each set's training half, validation its test half. torchvision (two seconds to import) is loaded on use.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.data.base import ImageData
from diffusion.data.images import TensorImages


class TorchvisionData(ImageData):
    """One of torchvision's sets, named by the class. `image_size` above the set's own adds a black frame, where that is
    what the images' border is (28x28 to 32x32, so that a network can halve it five times).

    `download=True` fetches missing files into `root`; without a network the error says which file goes where.
    """

    own_channels: ClassVar[int]
    own_size: ClassVar[int]
    names: ClassVar[tuple[str, ...]]
    black_border: ClassVar[bool]

    def __init__(
        self,
        root: str | Path = ".datasets",
        *,
        channels: int | None = None,
        image_size: int | None = None,
        num_classes: int | None = None,
        download: bool = True,
        horizontal_flip: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int = 0,
    ) -> None:
        name = type(self).__name__
        for key, value, fact in (
            ("channels", channels, self.own_channels),
            ("num_classes", num_classes, len(self.names)),
        ):
            if value not in (None, fact):
                raise ValueError(f"data.{key} is {value}, but {name} has {fact}; set data.{key}={fact}")
        if image_size is None:
            image_size = self.own_size
        if image_size < self.own_size or (image_size > self.own_size and not self.black_border):
            allowed = f"{self.own_size}" + (" or more (a black frame is added)" if self.black_border else "")
            raise ValueError(
                f"data.image_size is {image_size}, but {name} is {self.own_size}x{self.own_size}; allowed: {allowed}. "
                "To resize, save the images to a folder and use data=image_folder"
            )
        super().__init__(
            channels=self.own_channels,
            image_size=image_size,
            num_classes=len(self.names),
            class_names=self.names,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            seed=seed,
        )
        self.root = Path(root).expanduser()
        self.download, self.horizontal_flip = download, horizontal_flip

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls this on one process of a node."""
        if self.download:
            for train in (True, False):
                self._open(train=train, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Read the set's own training and test images."""
        if self.train_set is not None:
            return
        images, labels = self._load(train=True)
        self.train_set = TensorImages(images, labels, seed=self.seed, horizontal_flip=self.horizontal_flip)
        self.val_set = TensorImages(*self._load(train=False), seed=self.seed)

    def _open(self, *, train: bool, download: bool = False) -> Any:
        from torchvision import datasets

        source = getattr(datasets, type(self).__name__)
        try:
            return source(str(self.root), train=train, download=download)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:  # the last two: a damaged file
            tried = "could not be downloaded" if download else "is not there or damaged"
            raise ValueError(
                f"{type(self).__name__} {tried} ({error}). Get these files where there is a network:\n"
                + "".join(f"  {url}\n" for url in _addresses(source))
                + f"and put them, packed as they are, into {self._folder(source).absolute()}, "
                "then run again with data.download=true, which unpacks and checks them. "
                "data.root (or the environment's DIFFUSION_DATA) names another folder"
            ) from error

    def _folder(self, source: type) -> Path:
        return self.root / type(self).__name__ / "raw" if hasattr(source, "mirrors") else self.root

    def _load(self, *, train: bool) -> tuple[Tensor, Tensor]:
        data = self._open(train=train)
        images = torch.as_tensor(data.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        frame = self.image_size - self.own_size
        before, after = frame // 2, frame - frame // 2
        images = F.pad(images, (before, after, before, after)).contiguous()
        return images, torch.as_tensor(data.targets, dtype=torch.int64)


def _addresses(source: type) -> list[str]:
    """Where torchvision itself would get the files from."""
    if hasattr(source, "mirrors"):
        return [source.mirrors[0] + name for name, _ in source.resources]
    return [source.url]


class MNIST(TorchvisionData):
    """70,000 handwritten digits, 28x28 grey (LeCun et al. 1998)."""

    own_channels, own_size, black_border = 1, 28, True
    names = tuple(str(digit) for digit in range(10))


class FashionMNIST(TorchvisionData):
    """70,000 pieces of clothing, 28x28 grey (Xiao et al. 2017)."""

    own_channels, own_size, black_border = 1, 28, True
    names = (
        "t-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    )


class CIFAR10(TorchvisionData):
    """60,000 photographs, 32x32 RGB (Krizhevsky 2009)."""

    own_channels, own_size, black_border = 3, 32, False
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
