"""Which images does a run see, and in which order?

Lightning datamodules over one base, `base.ImageData`; every batch is a function of (seed, epoch, position).
The names below are loaded on first use: importing this package costs nothing.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "CIFAR10": "torchvision_sets",
    "Digits": "digits",
    "EpochBatches": "batches",
    "EpochLoader": "batches",
    "FashionMNIST": "torchvision_sets",
    "ImageData": "base",
    "ImageFolder": "image_folder",
    "ImageSet": "images",
    "KeyedSet": "images",
    "LatentSet": "latent_cache",
    "Latents": "latents",
    "MNIST": "torchvision_sets",
    "ShapeImages": "shapes",
    "Shapes": "shapes",
    "ShardImages": "shards",
    "Shards": "shards",
    "TensorImages": "images",
    "cached": "latent_cache",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
