"""How is a folder filled with an autoencoder's answers, so that a stopped build goes on and never passes for complete?

Rows are appended in order; `progress.json` says how many the disk surely has, `manifest.json` comes last.
"""

import errno
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diffusion.checkpoint import atomic_write, package_version
from diffusion.data.batches import collated
from diffusion.data.images import ImageSet, KeyedSet
from diffusion.data.listing import some
from diffusion.data.table import TEXT, Column, TableWriter
from diffusion.latents import encode_moments, is_deterministic
from diffusion.progress import WorkBar

FORMAT = "diffusion-latents"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"  # is there when all else is
PROGRESS = "progress.json"  # is there until then
LOCK = ".lock"
DTYPES = ("float32", "float16")
SECONDS_A_SAVE = 30.0  # what a killed build loses at most


class LatentBuild:
    """Fill a folder with the latents of several sets, from wherever an earlier attempt was stopped."""

    def __init__(
        self,
        folder: Path,
        sets: Mapping[str, ImageSet],
        autoencoder: nn.Module,
        made_from: Mapping[str, Any],
        dtype: str | None,
    ) -> None:
        if dtype not in (None, *DTYPES):
            raise ValueError(f"latents are stored as {' or '.join(DTYPES)}, not as {dtype!r}")
        self.folder, self.sets, self.autoencoder = folder, sets, autoencoder
        self.begun = _begun(folder, made_from, dtype)
        self.done: dict[str, int] = self.begun["done"]
        self.columns = {name: self._columns(images) for name, images in sets.items()}
        self._check_space()

    @property
    def total(self) -> int:
        return sum(map(len, self.sets.values()))

    def run(self, device: torch.device, *, batch_size: int, precision: torch.dtype | None, num_workers: int) -> None:
        """Encode what is missing; the manifest, written last, makes the folder a cache."""
        with self._writing():
            _save(self.folder / PROGRESS, self.begun)
        home = next(self.autoencoder.parameters()).device
        self.autoencoder.to(device)
        bar = WorkBar(self.total, sum(self.done.values()), doing="encoding", done="encoded")
        try:
            with bar:
                for name, images in self.sets.items():
                    loader = _in_order(images, self.done[name], batch_size, num_workers, pin=device.type == "cuda")
                    encoded = (self._encode(name, batch, device, precision) for batch in loader)
                    self._write(name, encoded, bar)
        except KeyboardInterrupt:
            print(
                f"stopped; the latents of {sum(self.done.values())} of {self.total} images are kept in {self.folder}, "
                "and the same command goes on from there",
                file=sys.stderr,
            )
            raise SystemExit(128 + 2) from None
        finally:
            self.autoencoder.to(home)
        with self._writing():
            _save(self.folder / MANIFEST, self._manifest())
            (self.folder / PROGRESS).unlink()

    def _write(self, name: str, encoded: Iterator[dict[str, Any]], bar: WorkBar) -> None:
        """Append rows to one table, noting now and then on disk how many it surely has."""
        with self._writing():
            writer = TableWriter(self.folder, name, len(self.sets[name]), self.columns[name], done=self.done[name])
        try:
            saved = time.monotonic()
            for rows in encoded:
                with self._writing():
                    writer.append(rows)
                    if time.monotonic() - saved >= SECONDS_A_SAVE:
                        self._save_progress(name, writer)
                        saved = time.monotonic()
                bar.advance(len(rows["moments"]))
            with self._writing():
                self._save_progress(name, writer)
        except KeyboardInterrupt:
            self._save_progress(name, writer)
            raise
        finally:
            writer.close()

    def _save_progress(self, name: str, writer: TableWriter) -> None:
        self.done[name] = writer.sync()
        _save(self.folder / PROGRESS, self.begun)

    def _encode(
        self, name: str, batch: dict[str, Any], device: torch.device, precision: torch.dtype | None
    ) -> dict[str, Any]:
        """Turn a batch of images into rows: moments of the images and, where the set mirrors, of their mirrors."""
        images = batch.pop("image").to(device, non_blocking=True)
        sides = [images, images.flip(-1)] if self.sets[name].horizontal_flip else [images]
        moments = torch.stack([encode_moments(self.autoencoder, side, precision) for side in sides], dim=1)
        if is_deterministic(self.autoencoder):
            moments = moments.chunk(2, dim=2)[0]
        with np.errstate(over="ignore"):  # is seen below
            stored = moments.cpu().numpy().astype(self.begun["dtype"])
        if not np.isfinite(stored).all():
            finite = bool(moments.isfinite().all())
            raise ValueError(
                "the latents are too large for float16; build the cache in float32"
                if finite
                else "the autoencoder gives latents that are not finite; it cannot be used for training"
            )
        return {"moments": stored, **{key: _rows(key, value) for key, value in batch.items()}}

    def _columns(self, images: ImageSet) -> dict[str, Column]:
        """Say what a row of this set's table is, by its first sample."""
        batch = images.samples([0])
        channels, *size = self.autoencoder.latent_shape(tuple(batch.pop("image").shape[1:]))
        if not is_deterministic(self.autoencoder):
            channels *= 2
        sides = 2 if images.horizontal_flip else 1
        columns = {"moments": Column(self.begun["dtype"], (sides, channels, *size))}
        for key, value in batch.items():
            rows = _rows(key, value)
            columns[key] = Column(TEXT) if isinstance(rows, list) else Column(str(rows.dtype), rows.shape[1:])
        return columns

    def _check_space(self) -> None:
        needed = sum(
            (len(images) - self.done[name]) * column.row_bytes
            for name, images in self.sets.items()
            for column in self.columns[name].values()
        )
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the latent cache needs {needed / 1e9:.2f} GB more, but {self.folder} has {free / 1e9:.2f} GB free; "
                "name a folder on another disk: latent_cache=DIR",
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say of a failed write what has been kept."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno or errno.EIO,
                f"cannot write the latent cache {self.folder}: {error.strerror}; the latents of "
                f"{sum(self.done.values())} of {self.total} images are kept, and the same command goes on from there",
            ) from error

    def _manifest(self) -> dict[str, Any]:
        return {
            **{key: value for key, value in self.begun.items() if key != "done"},
            "deterministic": is_deterministic(self.autoencoder),
            "rows": {name: len(images) for name, images in self.sets.items()},
            "columns": self.columns,
            "package_version": package_version(),
            "torch_version": str(torch.__version__),
        }


def _begun(folder: Path, made_from: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return what an earlier attempt has noted, or begin anew. Raises ValueError for a folder of something else."""
    if exists(folder / PROGRESS):
        found = read(folder / PROGRESS)
        wanted = {**made_from, "dtype": dtype or found["dtype"]}
        refuse_other(folder, {**found["made_from"], "dtype": found["dtype"]}, wanted)
        return found
    others = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if others:
        raise ValueError(f"{folder} holds no latent cache, but {some(others)}; name an empty folder: latent_cache=DIR")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "made_from": dict(made_from),
        "dtype": dtype or DTYPES[0],
        "done": {"train": 0, "val": 0},
    }


def _rows(name: str, value: Any) -> np.ndarray | list[str]:
    """Return an entry of a batch as it is stored. Raises ValueError for what is neither numbers nor texts."""
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        return list(value)
    raise ValueError(f"the batches' {name!r} can be no part of a latent cache: it is no tensor and no list of texts")


class _Unmirrored(Dataset):
    """A set's samples as they are, a list of indices at a time."""

    def __init__(self, images: KeyedSet) -> None:
        self.images = images

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        return self.images.samples(list(indices))


def _in_order(images: KeyedSet, start: int, batch_size: int, num_workers: int, *, pin: bool) -> DataLoader:
    """Load all samples from `start` on."""
    ends = [*range(start + batch_size, len(images), batch_size), len(images)]
    batches = [range(begin, end) for begin, end in zip([start, *ends], ends, strict=False) if begin < end]
    return DataLoader(
        _Unmirrored(images),
        batch_sampler=batches,
        collate_fn=collated,
        num_workers=num_workers,
        pin_memory=pin,
        generator=torch.Generator(),  # nothing is drawn from the global one
    )


# ---------------------------------------------------------------------------------------------------------------------
# what lies in a folder


def exists(path: Path) -> bool:
    """Say whether this is a file; a path that cannot be asked is none."""
    try:
        return path.is_file()
    except OSError:  # a path under a file, a folder that may not be entered
        return False


def _save(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2), encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Read a manifest or a note of progress. Raises ValueError for what this package did not write, or cannot read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent} and build it anew") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not that of a latent cache; name an empty folder: latent_cache=DIR")
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"the latent cache {path.parent} has format {content.get('format_version')}, this package reads "
            f"{FORMAT_VERSION}; update it, or name another folder: latent_cache=DIR"
        )
    return content


def refuse_other(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise one ValueError that names everything in which a cache differs from what is asked for."""
    changed = [
        f"{name} was {_short(old.get(name))} and is {_short(new.get(name))}"
        for name in (*new, *(old.keys() - new.keys()))
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise ValueError(
            f"the latent cache {folder} was made from something else: {some(changed)}. Name another folder "
            "(latent_cache=DIR), which is then filled, or delete this one and run again; latent_cache=null encodes in "
            "each step"
        )


def _short(value: Any) -> Any:
    """A hash by its first digits."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
