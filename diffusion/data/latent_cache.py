"""How does a run train on latents without encoding an image twice? Its datamodule serves them from a folder.

Rows hold mean and log-variance before scaling, for an image and, where the data mirror, for its mirror; what a frozen
text encoder says of its caption; and all other entries of the batches. The folder says what it was made from, and is
refused when that has changed.
"""

import errno
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.checkpoint import weights_hash
from diffusion.conditioner import Conditioner
from diffusion.data.base import ImageData
from diffusion.data.images import ImageSet, KeyedSet, digest
from diffusion.data.latent_build import LOCK, MANIFEST, LatentBuild, exists, read, refuse_other
from diffusion.data.table import TEXT, Column, ShardedTable
from diffusion.latents import NO_NOISE

PIXELS_A_BATCH = 2**20  # encoded at once: 16 images of 256x256


class LatentSet(KeyedSet):
    """What frozen networks said of an `ImageSet`: "moments" (B, 2C, h, w) float32, unscaled, in place of "image".

    Answers to captions are "condition.context" (B, L, D) and the like; those of `leave_out` are not read.
    """

    def __init__(
        self,
        table: ShardedTable,
        *,
        deterministic: bool = False,
        seed: int = 0,
        horizontal_flip: bool = False,
        leave_out: Collection[str] = (),
    ) -> None:
        super().__init__(seed=seed, horizontal_flip=horizontal_flip)
        self.table, self.deterministic, self.leave_out = table, deterministic, frozenset(leave_out)

    def __len__(self) -> int:
        return len(self.table)

    def samples(self, indices: Sequence[int], mirrored: Tensor | None = None) -> dict[str, Any]:
        """Return "moments" (B, 2C, h, w) float32, of mirrored images where `mirrored` (B,) says so, and the rest."""
        rows = np.asarray(indices)
        side = np.zeros_like(rows) if mirrored is None else mirrored.numpy().astype(np.int64)
        batch: dict[str, Any] = {}
        for name, column in self.table.columns.items():
            if name in self.leave_out:
                continue
            if name == "moments":
                moments = torch.from_numpy(self.table.take(name, rows, side)).float()
                if self.deterministic:
                    moments = torch.cat([moments, torch.full_like(moments, NO_NOISE)], dim=1)
                batch[name] = moments
            elif column.dtype == TEXT:
                batch[name] = self.table.texts(name, rows)
            else:
                values = torch.from_numpy(self.table.take(name, rows))
                batch[name] = values.float() if values.is_floating_point() else values
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
    conditioner: Conditioner | None = None,
    settings: Mapping[str, Any] | None = None,
) -> ImageData:
    """Let `data` give "moments" from `folder` in place of "image", and return it; fill the folder first if need be.

    A `conditioner` (frozen, of captions) is asked once, too. `settings` of the data are noted in a new cache.

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
        if not all(isinstance(images, ImageSet) for images in sets.values()):
            raise ValueError(
                "shards that are read as a stream cannot be cached: any image must be at hand; copy them to this disk, "
                "or set latent_cache=null"
            )
        made_from = origin(data, autoencoder) | condition_origin(conditioner)
        if not exists(folder / MANIFEST):
            device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
            pixels = data.shape[-1] * data.shape[-2]
            batch_size = batch_size or min(1024, max(1, PIXELS_A_BATCH // pixels))
            about = {"facts": facts_of(data), "settings": dict(settings or {})}
            build = LatentBuild(folder, sets, autoencoder, made_from, dtype, conditioner=conditioner, about=about)
            build.run(device, batch_size=batch_size, precision=precision, num_workers=data.num_workers)
    manifest = read(folder / MANIFEST)
    refuse_other(folder, manifest["made_from"], made_from)
    data.serve(**{name: latent_set(folder, manifest, name, seed=images.seed) for name, images in sets.items()})
    return data


def origin(data: ImageData, autoencoder: nn.Module) -> dict[str, Any]:
    """Say in plain data what latents are made from: {dotted name: value}. They are stale when one of these changes."""
    found = autoencoder_origin(autoencoder) | {"data.shape": list(data.shape), "data.num_classes": data.num_classes}
    for name, images in (("train", data.train_set), ("val", data.val_set)):
        found |= {f"data.{name}.{key}": value for key, value in images.description().items()}
    return json.loads(json.dumps(found))


def autoencoder_origin(autoencoder: nn.Module) -> dict[str, Any]:
    """Name an autoencoder by its class and its weights; how its latents are scaled concerns nobody here."""
    return {"autoencoder.class": type(autoencoder).__name__, "autoencoder.weights": weights_hash(autoencoder)}


def condition_origin(conditioner: Conditioner | None) -> dict[str, Any]:
    """Name a conditioner by its class, its weights and every plain setting of its parts; {} for none."""
    if conditioner is None:
        return {}
    return {
        "conditioner.class": type(conditioner).__name__,
        "conditioner.weights": weights_hash(conditioner),
        "conditioner.settings": digest(sorted(plain_settings(conditioner).items())),
    }


def plain_settings(module: nn.Module) -> dict[str, Any]:
    """Return the numbers and words that a module and its parts, tokenizers included, were built with."""
    owners: dict[str, Any] = dict(module.named_modules())
    owners |= {f"{name}.tokenizer": part.tokenizer for name, part in owners.items() if hasattr(part, "tokenizer")}
    return {
        f"{name}.{key}": value
        for name, part in owners.items()
        for key, value in vars(part).items()
        if isinstance(value, bool | int | float | str) and key not in ("training", "frozen")
    }


def facts_of(data: ImageData) -> dict[str, Any]:
    """Say in plain data what a run asks of its datamodule before it sees a batch, and which sides are mirrored."""
    sets = {"train": data.train_set, "val": data.val_set}
    return {
        "shape": list(data.shape),
        "num_classes": data.num_classes,
        "class_names": None if data.class_names is None else list(data.class_names),
        "horizontal_flip": {name: images.horizontal_flip for name, images in sets.items()},
    }


def latent_set(
    folder: Path, manifest: Mapping[str, Any], name: str, *, seed: int, leave_out: Collection[str] = ()
) -> LatentSet:
    """Open one set of a cache. Raises ValueError where a file of it is gone or damaged."""
    columns = {key: Column(dtype, tuple(shape)) for key, (dtype, shape) in manifest["columns"][name].items()}
    table = ShardedTable(folder, name, manifest["rows"][name], columns, shard_rows=manifest["shard_rows"])
    table.check()
    flip = manifest["facts"]["horizontal_flip"][name]
    how = {"deterministic": manifest["deterministic"], "horizontal_flip": flip, "leave_out": leave_out}
    return LatentSet(table, seed=seed, **how)


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
