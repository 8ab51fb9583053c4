"""Which files of a run can it go on from, and how do they come and go without ever leaving none that can be read?

`last.ckpt` is the newest, `last-1.ckpt` the one before, and so on; with shards (FSDP) each is a folder of files.
"""

import errno
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from diffusion.checkpoint import atomic_write

LAST, BEST, NEW = "last.ckpt", "best.ckpt", ".new.ckpt"
META = "meta.pt"  # in a folder of shards: all but the tensors of network and optimizer
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, NotImplementedError, ValueError, KeyError, TypeError, AttributeError),
    *(IndexError, struct.error, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError),
)


class Damaged(ValueError):
    """A file is no checkpoint, or not what was written."""


def last_checkpoint(run_dir: str | Path) -> Path:
    """Return where the run in `run_dir` keeps its newest checkpoint."""
    return Path(run_dir) / "checkpoints" / LAST


def candidates(run_dir: str | Path) -> list[Path]:
    """Return the checkpoints that a run has: the last ones, newest first, then those that it keeps, by their step."""
    folder = last_checkpoint(run_dir).parent
    last = [path for number in range(1000) if (path := folder / _last(number)).exists()]
    kept = sorted((path for path in folder.glob("*step=*.ckpt")), key=step_in_name, reverse=True)
    return [*last, *kept, *(path for path in [folder / BEST] if path.exists())]


def _last(number: int) -> str:
    return LAST if number == 0 else f"last-{number}.ckpt"


def step_in_name(path: Path) -> int:
    """Return the step of step=0001000.ckpt or best_step=0001000.ckpt; -1 where the name has none."""
    digits = path.stem.rpartition("=")[2]
    return int(digits) if digits.isdigit() else -1


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, its tensors without their numbers (on the meta device); all bytes are checked.

    Raises `Damaged` for a file that is cut short, changed, or no checkpoint of ours. The check is that of the zip file
    that `torch.save` makes, whose checksums `torch.load` does not look at: gigabytes a second.
    """
    try:
        file = path / META if path.is_dir() else path
        with zipfile.ZipFile(file) as archive:
            if (entry := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {entry} is wrong")
        checkpoint = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        int(checkpoint["global_step"])
        if path.is_dir() and not (path / ".metadata").is_file():
            raise ValueError("its .metadata is not there")
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(reason) from error
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# writing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints so that a kill or a full disk leaves the previous file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the file, then rename. Raises OSError that says how much was to be written and how much fits."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(tensor_bytes(checkpoint).values())
        if needed > shutil.disk_usage(path.parent).free:
            raise _full(path, checkpoint, needed, errno.ENOSPC)
        try:
            with atomic_write(path) as partial:
                torch.save(checkpoint, partial)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise _full(path, checkpoint, needed, error.errno) from error

    def load_checkpoint(self, path: str | Path, *settings: Any, **named: Any) -> dict[str, Any]:
        """Read a file. Raises ValueError for a folder of shards, which several devices wrote together."""
        if Path(path).is_dir():
            raise ValueError(
                f"{path} is in shards, and this run keeps its network in one piece; go on with trainer=fsdp, on any "
                "number of devices, or make a model of it: python -m diffusion.training.merge"
            )
        return super().load_checkpoint(path, *settings, **named)


def tensor_bytes(value: Any) -> dict[int, int]:
    """Return the bytes of all tensors in nested data, by where their memory begins: what is shared counts once."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    found: dict[int, int] = {}
    for child in children:
        found |= tensor_bytes(child)
    return found


def _full(path: Path, checkpoint: Mapping[str, Any], needed: int, number: int) -> OSError:
    free = shutil.disk_usage(path.parent).free
    last = path.with_name(LAST)
    kept = "nothing that was there has changed" if not last.exists() else f"{last} is whole"
    return OSError(
        number,
        f"cannot write the checkpoint of step {checkpoint.get('global_step')} into {path.parent}: "
        f"{os.strerror(number)}; it needs {megabytes(needed)} and {megabytes(free)} are free there; {kept}, and the "
        "same command goes on once there is room",
    )


def megabytes(number: int) -> str:
    """Return a number of bytes in words."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


def promote(new: Path, keep_last: int) -> Path:
    """Make a checkpoint that is wholly written the last one, and the last one the one before; return its path.

    `keep_last` of them stay. There is a readable one at any moment: a file's old name is given up when it has another.
    """
    folder = new.parent
    for path in _older(folder, keep_last):
        remove(path)
    for number in range(keep_last - 2, 0, -1):
        if (folder / _last(number)).exists():
            _move(folder / _last(number), folder / _last(number + 1))
    last = folder / LAST
    if keep_last > 1 and last.exists():
        _move(last, folder / _last(1)) if last.is_dir() else keep(last, folder / _last(1))
    _move(new, last)
    return last


def _older(folder: Path, keep_last: int) -> Iterator[Path]:
    """Yield those of the last checkpoints that are more than `keep_last` will be."""
    for path in folder.glob("last-*.ckpt"):
        number = path.stem.removeprefix("last-")
        if number.isdigit() and int(number) >= keep_last:
            yield path


def _move(source: Path, target: Path) -> None:
    if source.is_dir() or target.is_dir():
        remove(target)
    os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file or a folder of shards, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def keep(source: Path, target: Path) -> None:
    """Give a file a second name that outlives the first, or a folder of shards a second one of the same files.

    By hard links where the file system has them, else by copies; `target` is replaced at once.
    """
    partial = target.with_name(f".{target.name}.link")
    remove(partial)
    if source.is_dir():
        shutil.copytree(source, partial, copy_function=_link)
    else:
        _link(source, partial)
    _move(partial, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
