"""Do tar shards feed training at least as fast as the image folder that they were packed from?

    python benchmarks/shards.py [images] [rounds]               # target: at least 1 times the images a second

The same JPEG files (noise under a blur, 256x256, about 15 KB each) from the disk's cache, resized to 128x128 in batches
of 32, a whole epoch through each datamodule's own training loader, in turn: the folder's, that of its shards read at
random, and that of its shards read as a stream, without workers and with two.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import interleaved, report
from PIL import Image, ImageFilter

from diffusion.data.image_folder import ImageFolder
from diffusion.data.packing import pack
from diffusion.data.shards import Shards

SIDE, IMAGE_SIZE, BATCH_SIZE = 256, 128, 32
SHARD_SIZE = 100


def write_images(root: Path, number: int) -> None:
    """Write pictures of two classes that take as long to decode as photographs."""
    source = np.random.default_rng(0)
    for index in range(number):
        folder = root / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = source.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))
        image.save(folder / f"{index:05d}.jpg", quality=90)


def epoch_of(data: Any) -> tuple[Callable[[], None], int]:
    """Return a function that reads an epoch through the training loader, and the images of an epoch."""
    loader = data.train_dataloader()

    def read() -> None:
        for _ in loader:
            pass

    return read, len(loader) * BATCH_SIZE


def main(images: int = 800, rounds: int = 5) -> None:
    torch.set_num_threads(1)
    rows: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        root, out = Path(name) / "images", Path(name) / "shards"
        write_images(root, images)
        settings = {"shard_size": SHARD_SIZE, "image_size": 0, "channels": 3, "shuffle": True, "max_broken": 0}
        pack(root, out, settings)
        for num_workers in (0, 2):
            how = {"image_size": IMAGE_SIZE, "num_classes": 2, "batch_size": BATCH_SIZE, "num_workers": num_workers}
            sets = {
                "image folder": ImageFolder(root, **how),
                "shards, indexed": Shards(str(out), **how),
                "shards, streamed": Shards(str(out), **how, reading="stream", shuffle_buffer=200),
            }
            epochs = {name: epoch_of(data) for name, data in sets.items()}
            times = interleaved({name: read for name, (read, _) in epochs.items()}, rounds=rounds)
            speeds = {name: count / times[name] for name, (_, count) in epochs.items()}
            for what, speed in speeds.items():
                ratio = speed / speeds["image folder"]
                rows[f"{what}, {num_workers} workers"] = f"{speed:7.1f} images/s   {ratio:.3f} x folder"
    report(f"Feeding {SIDE}x{SIDE} JPEG at {IMAGE_SIZE}x{IMAGE_SIZE}, medians of {rounds} rounds in turn", rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
