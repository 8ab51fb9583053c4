"""How does a run train on latents without encoding an image twice? Its datamodule serves them from a folder.

Rows hold mean and log-variance before scaling, for an image and, where the data mirror, for its mirror, and all other
entries of the batches. The folder says what it was made from, and is refused when that has changed.
"""

import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.checkpoint import weights_hash
from diffusion.data.base import ImageData
from diffusion.data.images import ImageSet, KeyedSet
from diffusion.data.latent_build import LOCK, MANIFEST, LatentBuild, exists, read, refuse_other
from diffusion.data.table import TEXT, Column, Table
from diffusion.latents import NO_NOISE

PIXELS_A_BATCH = 2**20  # encoded at once: 16 images of 256x256


class LatentSet(KeyedSet):
    """What an autoencoder said of an `ImageSet`: "moments" (B, 2C, h, w) float32, unscaled, in place of "image"."""

    def __init__(
        self, table: Table, *, deterministic: bool = False, seed: int = 0, horizontal_flip: bool = False
    ) -> None:
        super().__init__(seed=seed, horizontal_flip=horizontal_flip)
        self.table, self.deterministic = table, deterministic

    def __len__(self) -> int:
        return len(self.table)

    def samples(self, indices: Sequence[int], mirrored: Tensor | None = None) -> dict[str, Any]:
        """Return "moments" (B, 2C, h, w) float32, of mirrored images where `mirrored` (B,) says so, and the rest."""
        rows = np.asarray(indices)
        side = 0 if mirrored is None else mirrored.numpy().astype(np.int64)
        batch: dict[str, Any] = {}
        for name, column in self.table.columns.items():
            if name == "moments":
                moments = torch.from_numpy(self.table.array(name)[rows, side]).float()
                if self.deterministic:
                    moments = torch.cat([moments, torch.full_like(moments, NO_NOISE)], dim=1)
                batch[name] = moments
            elif column.dtype == TEXT:
                batch[name] = self.table.texts(name, indices)
            else:
                batch[name] = torch.from_numpy(self.table.array(name)[rows])
        return batch


def cached(
    data: ImageData,
    autoencoder: nn.Module,
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    precision: torch.dtype | None = None,
) -> ImageData:
    """Let `data` give "moments" from `folder` in place of "image", and return it; fill the folder first if need be.

    Order, mirrors, labels, captions and the place where a run goes on stay what they are. Any number of processes may
    call this at once, such as the ranks of a run: one fills the folder and the others wait for it. `device` (None: an
    accelerator where there is one), `batch_size` (None: about a megapixel) and `precision` are how images are encoded;
    `dtype` is how a new cache is stored, "float32" or "float16" at half the size; None means float32, or what has been
    begun.

    Raises ValueError where the folder holds the latents of another autoencoder or of other data, naming every
    difference, and OSError where it cannot be written; what was written before is kept.
    """
    if not isinstance(data, ImageData):
        raise ValueError(
            f"a latent cache needs a datamodule derived from diffusion.data.ImageData, got {type(data).__name__}; "
            "set latent_cache=null to encode in each step"
        )
    if getattr(data, "random_crop", False):
        raise ValueError(
            "data.random_crop=true shows other pixels in each epoch, and a latent cache keeps one view of each image; "
            "set data.random_crop=false, or latent_cache=null to encode in each step"
        )
    folder = Path(folder).expanduser()
    # A cache that is complete is only read; one process at a time looks what else there is, and prepares the data.
    with nullcontext() if exists(folder / MANIFEST) else _locked(folder):
        data.prepare_data()
        data.setup("fit")
        sets = {"train": data.train_set, "val": data.val_set}
        made_from = origin(data, autoencoder)
        if not exists(folder / MANIFEST):
            device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
            pixels = data.shape[-1] * data.shape[-2]
            batch_size = batch_size or min(1024, max(1, PIXELS_A_BATCH // pixels))
            build = LatentBuild(folder, sets, autoencoder, made_from, dtype)
            build.run(device, batch_size=batch_size, precision=precision, num_workers=data.num_workers)
    manifest = read(folder / MANIFEST)
    refuse_other(folder, manifest["made_from"], made_from)
    data.serve(**{name: _latent_set(folder, manifest, name, images) for name, images in sets.items()})
    return data


def origin(data: ImageData, autoencoder: nn.Module) -> dict[str, Any]:
    """Say in plain data what latents are made from: {dotted name: value}. They are stale when one of these changes."""
    found = {
        "autoencoder.class": type(autoencoder).__name__,
        "autoencoder.weights": weights_hash(autoencoder),
        "data.shape": list(data.shape),
        "data.num_classes": data.num_classes,
    }
    for name, images in (("train", data.train_set), ("val", data.val_set)):
        found |= {f"data.{name}.{key}": value for key, value in images.description().items()}
    return json.loads(json.dumps(found))


def _latent_set(folder: Path, manifest: Mapping[str, Any], name: str, images: ImageSet) -> LatentSet:
    columns = {key: Column(dtype, tuple(shape)) for key, (dtype, shape) in manifest["columns"][name].items()}
    table = Table(folder, name, manifest["rows"][name], columns)
    table.check()
    return LatentSet(
        table, deterministic=manifest["deterministic"], seed=images.seed, horizontal_flip=images.horizontal_flip
    )


# ---------------------------------------------------------------------------------------------------------------------
# one process at a time


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time in; a killed one leaves no lock. Windows, which has other locks, does without."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "w")  # noqa: SIM115 (closing it unlocks)
    except OSError as error:
        raise OSError(
            error.errno or errno.EIO,
            f"cannot write the latent cache {folder}: {error.strerror}; name a folder that can be written: "
            "latent_cache=DIR",
        ) from error
    with file:
        if os.name == "posix":
            _lock(file, folder)
        yield


def _lock(file: Any, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process, which fills the latent cache {folder}", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot fill the latent cache {folder}: its file system has no locks ({error.strerror}); fill it on "
            "another disk and move it here, reading needs none",
        ) from error
