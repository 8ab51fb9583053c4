"""How does sampling go on where it was stopped? Each batch gets a file of its own, until all are there.

`parts/settings.json` says what the batches are made with. It is the first file to come and the first to go, so a
folder that has it is unfinished, and a folder of batches without it is worth nothing.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.files import atomic_write

NOTE = "settings.json"
LOCK = ".lock"
PATIENCE = 60.0  # seconds until a run that was killed has surely let go of its folder


@dataclass
class Parts:
    """The batches of a run in `out_dir`: `num_samples` uint8 images of `shape` (H, W, C), `batch_size` in a file.

    `begin` is for one process, `hold` for all after it: each keeps later runs out for as long as its process lives.
    """

    out_dir: Path
    num_samples: int
    batch_size: int
    shape: tuple[int, int, int]
    _lock: Any = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        return self.out_dir / "parts"

    @property
    def starts(self) -> range:
        """The number of the first image of each batch."""
        return range(0, self.num_samples, self.batch_size)

    def path(self, start: int) -> Path:
        """Return the file of the batch that begins with image `start`."""
        return self.folder / f"{start:08d}.npy"

    def count(self) -> int:
        """Return how many images are there."""
        return sum(min(self.batch_size, self.num_samples - start) for start in self.starts if self.path(start).exists())

    def begin(self, settings: Mapping[str, Any], versions: Mapping[str, Any], *, overwrite: bool) -> int:
        """Prepare the folder, or go on in it, and return how many images it has.

        Raises ValueError for a folder that holds finished samples or has been begun with other settings, unless
        `overwrite`, and for one in which another run is at work; OSError for a disk with too little space.
        """
        if not self.folder.exists():
            self._refuse_finished(overwrite)
        self._take(exclusively=True)
        self._refuse_finished(overwrite)
        settings, versions = json.loads(json.dumps([settings, versions]))
        note = self.folder / NOTE
        if note.exists():
            before = json.loads(note.read_text(encoding="utf-8"))
            if not (changed := list(changes(before["settings"], settings))):
                self._check_space()
                self._report(before["versions"], versions)
                return self.count()
            if self.count() and not overwrite:
                raise ValueError(
                    f"{self.out_dir} holds {self.count()} samples of an unfinished run with other settings: "
                    f"{', '.join(changed)}. Repeat the command as it was to go on, or choose another out_dir, or "
                    "overwrite=true to begin anew"
                )
        self._clear()
        self._check_space()
        with atomic_write(note) as partial:
            partial.write_text(json.dumps({"settings": settings, "versions": versions}, indent=2), encoding="utf-8")
        return 0

    def _refuse_finished(self, overwrite: bool) -> None:
        if (self.out_dir / "samples.npz").exists() and not (self.folder / NOTE).exists() and not overwrite:
            shutil.rmtree(self.folder, ignore_errors=True)  # what a kill at the very end has left, and the lock
            raise ValueError(f"{self.out_dir} already holds samples; choose another out_dir, or overwrite=true")

    def _report(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        print(f"going on after {self.count()} of {self.num_samples} samples in {self.out_dir}", file=sys.stderr)
        if changed := list(changes(before, now)):
            print(f"  the samples before were made by another program: {', '.join(changed)}", file=sys.stderr)

    def _clear(self) -> None:
        """Remove what an earlier run has left, but for the files that this one replaces in the end."""
        (self.folder / NOTE).unlink(missing_ok=True)
        for file in self.folder.glob("*.npy"):
            file.unlink()
        for file in (self.out_dir / "images").glob("[0-9]*.png"):
            file.unlink()

    def _check_space(self) -> None:
        """Images lie on the disk twice in the end, in their parts and in samples.npz."""
        height, width, channels = self.shape
        needed = (2 * self.num_samples - self.count()) * height * width * channels
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the samples need {needed / 1e9:.2f} GB more while they are made, but {self.out_dir} has "
                f"{free / 1e9:.2f} GB free; choose an out_dir on another disk",
            )

    def save(self, start: int, images: np.ndarray) -> None:
        """Write a batch."""
        with atomic_write(self.path(start)) as partial, open(partial, "wb") as file:
            np.save(file, images)

    def missing(self, numbers: Iterable[int]) -> Iterator[int]:
        """Yield the numbers of the batches that are not there."""
        return (number for number in numbers if not self.path(self.starts[number]).exists())

    def images(self) -> Iterator[np.ndarray]:
        """Yield all batches in order. Raises ValueError for a file that is not what was written."""
        for start in self.starts:
            wanted = (min(self.batch_size, self.num_samples - start), *self.shape)
            try:
                images = np.load(self.path(start))
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"{self.path(start)} is damaged ({error}); delete it and run again") from error
            if images.shape != wanted or images.dtype != np.uint8:
                raise ValueError(f"{self.path(start)} is damaged: it holds {images.shape}; delete it and run again")
            yield images

    def first(self, count: int) -> np.ndarray:
        """Return the first images."""
        blocks, found = [], 0
        for images in self.images():
            blocks.append(images)
            found += len(images)
            if found >= count:
                break
        return np.concatenate(blocks)[:count]

    def remove(self) -> None:
        """Take the parts away, when all that is made of them is there."""
        (self.folder / NOTE).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -----------------------------------------------------------------------------------------------------------------
    # one run at a time

    def hold(self) -> None:
        """Let the other processes of this run in, but no other run; a process that is killed lets go."""
        self._take(exclusively=False)

    def _take(self, *, exclusively: bool) -> None:
        """Lock the folder, or raise ValueError. File systems without locks, and Windows, do without."""
        file = self._lock or self._opened()
        end, told = time.monotonic() + PATIENCE, False
        while not _locked(file, self.folder / LOCK, exclusively=exclusively):
            if time.monotonic() > end:
                raise ValueError(f"another run writes in {self.out_dir}; let it finish, or choose another out_dir")
            if not told:
                print(f"waiting for another run, which writes in {self.out_dir}", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.1)
            file.close()
            file = self._opened()
        self._lock = file

    def _opened(self) -> Any:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # a run that finished just now took the folder away
                return open(self.folder / LOCK, "w")
        except OSError as error:
            problem = f"cannot write {self.folder}: {error.strerror}; choose another out_dir"
            raise OSError(error.errno, problem) from error
        return self._opened()


def _locked(file: Any, path: Path, *, exclusively: bool) -> bool:
    """Try to lock a file, and say whether it is locked and still the one at `path`."""
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return True


def changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Yield in words what differs between two nested mappings."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in (*new, *(key for key in old if key not in new)):
            yield from changes(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    elif old != new:
        yield f"{name} was {_short(old)} and is {_short(new)}"


def _short(value: Any) -> str:
    """A hash by its first digits, nothing as it is typed."""
    if value is None:
        return "null"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
