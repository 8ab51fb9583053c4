"""How is a folder filled with frozen networks' answers, so that a stopped build goes on and never passes for complete?

Rows are appended in order, shard after shard; `progress.json` says how many the disk surely has, `manifest.json` comes
last.
"""

import errno
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diffusion.checkpoint import atomic_write, package_version
from diffusion.conditioner import Conditioner
from diffusion.data.batches import collated
from diffusion.data.images import BROKEN, ImageSet, KeyedSet
from diffusion.data.listing import some
from diffusion.data.table import TEXT, Column, TableWriter, shard_name
from diffusion.latent_facts import MANIFEST  # is there when all else is
from diffusion.latents import encode_moments, is_deterministic
from diffusion.progress import WorkBar
from diffusion.stored_condition import stored_entries

FORMAT = "diffusion-latents"
FORMAT_VERSION = 2
PROGRESS = "progress.json"  # is there until then
LOCK = ".lock"
DTYPES = ("float32", "float16")
SECONDS_A_SAVE = 30.0  # what a killed build loses at most
SHARD_BYTES = 2**30  # the most of a shard's largest file, so that folders can be copied and files be stored anywhere


class LatentBuild:
    """Fill a folder with the latents of several sets, from wherever an earlier attempt was stopped.

    With a `conditioner` (frozen) rows hold its answers to the captions, too. `about` is kept in the manifest.
    """

    def __init__(
        self,
        folder: Path,
        sets: Mapping[str, ImageSet],
        autoencoder: nn.Module,
        made_from: Mapping[str, Any],
        dtype: str | None,
        *,
        conditioner: Conditioner | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if dtype not in (None, *DTYPES):
            raise ValueError(f"latents are stored as {' or '.join(DTYPES)}, not as {dtype!r}")
        self.folder, self.sets, self.autoencoder, self.conditioner = folder, sets, autoencoder, conditioner
        self.about = dict(about or {})
        self.begun = _begun(folder, made_from, dtype)
        self.done: dict[str, int] = self.begun["done"]
        self.columns = {name: self._columns(images) for name, images in sets.items()}
        self.begun.setdefault("shard_rows", self._shard_rows())
        self._check_space()

    def _shard_rows(self) -> int:
        columns = [column for each in self.columns.values() for column in each.values()]
        return max(1, SHARD_BYTES // max(column.row_bytes for column in columns))

    @property
    def total(self) -> int:
        return sum(map(len, self.sets.values()))

    def run(self, device: torch.device, *, batch_size: int, precision: torch.dtype | None, num_workers: int) -> None:
        """Encode what is missing; the manifest, written last, makes the folder a cache."""
        with self._writing():
            _save(self.folder / PROGRESS, self.begun)
        modules = [module for module in (self.autoencoder, self.conditioner) if module is not None]
        homes = [_device(module) for module in modules]
        bar = WorkBar(self.total, sum(self.done.values()), doing="encoding", done="encoded")
        try:
            for module in modules:
                module.to(device)
            with bar:
                for name in self.sets:
                    self._fill(name, bar, batch_size, (device, precision), num_workers)
        except KeyboardInterrupt:
            print(
                f"stopped; the latents of {sum(self.done.values())} of {self.total} images are kept in {self.folder}, "
                "and the same command goes on from there",
                file=sys.stderr,
            )
            raise SystemExit(128 + 2) from None
        finally:
            for module, home in zip(modules, homes, strict=True):
                module.to(home)
        with self._writing():
            _save(self.folder / MANIFEST, self._manifest())
            (self.folder / PROGRESS).unlink()

    def _fill(self, name: str, bar: WorkBar, batch_size: int, how: tuple[Any, Any], num_workers: int) -> None:
        """Write what is missing of one set, shard after shard."""
        images, device = self.sets[name], how[0]
        for number, begin in enumerate(range(0, len(images), self.begun["shard_rows"])):
            end = min(begin + self.begun["shard_rows"], len(images))
            if self.done[name] < end:
                rows = range(max(begin, self.done[name]), end)
                loader = _in_order(images, rows, batch_size, num_workers, pin=device.type == "cuda")
                encoded = (self._encode(name, batch, *how) for batch in loader)
                self._write(name, number, begin, end, encoded, bar)

    def _write(
        self, name: str, number: int, begin: int, end: int, encoded: Iterator[dict[str, Any]], bar: WorkBar
    ) -> None:
        """Append rows to one shard, noting now and then on disk how many it surely has."""
        with self._writing():
            done = max(self.done[name] - begin, 0)
            writer = TableWriter(self.folder, shard_name(name, number), end - begin, self.columns[name], done=done)
        try:
            saved = time.monotonic()
            for rows in encoded:
                with self._writing():
                    writer.append(rows)
                    if time.monotonic() - saved >= SECONDS_A_SAVE:
                        self._save_progress(name, begin, writer)
                        saved = time.monotonic()
                bar.advance(len(rows["moments"]))
            with self._writing():
                self._save_progress(name, begin, writer)
        except KeyboardInterrupt:
            self._save_progress(name, begin, writer)
            raise
        finally:
            writer.close()

    def _save_progress(self, name: str, begin: int, writer: TableWriter) -> None:
        self.done[name] = begin + writer.sync()
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
        told = {} if self.conditioner is None else stored_entries(self.conditioner, batch)
        batch.pop(BROKEN, None)  # has been told by a warning
        found = {"moments": self._stored(moments, "latents", "the autoencoder")}
        found |= {key: self._stored(value, "text embeddings", "the conditioner") for key, value in told.items()}
        return found | {key: _rows(key, value) for key, value in batch.items()}

    def _stored(self, values: Tensor, what: str, who: str) -> np.ndarray:
        """Return values as the cache stores them. Raises ValueError where that loses them."""
        if not values.is_floating_point():
            return values.cpu().numpy()
        with np.errstate(over="ignore"):  # is seen below
            stored = values.float().cpu().numpy().astype(self.begun["dtype"])
        if not np.isfinite(stored).all():
            finite = bool(values.isfinite().all())
            raise ValueError(
                f"the {what} are too large for float16; build the cache in float32"
                if finite
                else f"{who} gives {what} that are not finite; it cannot be used for training"
            )
        return stored

    def _columns(self, images: ImageSet) -> dict[str, Column]:
        """Say what a row of this set's table is, by its first sample."""
        batch = images.samples([0])
        channels, *size = self.autoencoder.latent_shape(tuple(batch.pop("image").shape[1:]))
        if not is_deterministic(self.autoencoder):
            channels *= 2
        sides = 2 if images.horizontal_flip else 1
        columns = {"moments": Column(self.begun["dtype"], (sides, channels, *size))}
        batch.pop(BROKEN, None)
        for key, value in ({} if self.conditioner is None else stored_entries(self.conditioner, batch)).items():
            dtype = self.begun["dtype"] if value.is_floating_point() else "bool"
            columns[key] = Column(dtype, tuple(value.shape[1:]))
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
            **self.about,
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


def _device(module: nn.Module) -> torch.device:
    return next(chain(module.parameters(), module.buffers())).device


def _in_order(images: KeyedSet, rows: range, batch_size: int, num_workers: int, *, pin: bool) -> DataLoader:
    """Load these samples one after the other."""
    batches = [rows[begin : begin + batch_size] for begin in range(0, len(rows), batch_size)]
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


OTHER_FOLDER = (
    "Name another folder (latent_cache=DIR), which is then filled, or delete this one and run again; latent_cache=null "
    "encodes in each step"
)


def refuse_other(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], advice: str = OTHER_FOLDER) -> None:
    """Raise one ValueError that names everything in which a cache differs from what is asked for."""
    changed = [
        f"{name} was {_short(old.get(name))} and is {_short(new.get(name))}"
        for name in (*new, *(old.keys() - new.keys()))
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise ValueError(f"the latent cache {folder} was made from something else: {some(changed)}. {advice}")


def _short(value: Any) -> Any:
    """A hash by its first digits."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
