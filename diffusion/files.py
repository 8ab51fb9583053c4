"""How is a file written so that a kill or a full disk half way leaves the file that was there before?"""

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def atomic_write(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it becomes `path`, on any failure `path` stays what it was.

    Folders are made as needed. A full disk or a folder that cannot be written raises one OSError that names `path`,
    also where the library that writes reports it as something else. `durable` waits until the disk has it.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")  # a fixed name: a killed run leaves at most one behind
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.chmod(partial, 0o666 & ~_umask())  # safetensors writes for the owner alone
        if durable:
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException as error:
        _remove(partial)
        if (reason := _write_failure(error)) is None:
            raise
        kept = "the file that was there is untouched" if exists(path) else "nothing was written"
        raise OSError(reason, f"cannot write {path}: {os.strerror(reason)}; {kept}") from error


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write_failure(error: BaseException) -> int | None:
    """Return the errno of a failed write, or None where `error` is about something else."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    # torch.save and safetensors write from C++ and Rust, and wrap the operating system's answer in their own types.
    if isinstance(error, (RuntimeError, SafetensorError)):
        text = str(error)
        if numbered := re.search(r"os error (\d+)", text):
            return int(numbered[1])
        if "No space left" in text:
            return errno.ENOSPC
        if "PytorchStreamWriter" in text or "inline_container" in text or "iostream error" in text:
            return errno.ENOSPC  # the zip writer does not say why; a full disk is what stops it half way
    return None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut; Windows offers no such call and needs none."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if exists(path):
        path.unlink()


def exists(path: Path) -> bool:
    """Say whether something is there; a name that no file can have has nothing there."""
    try:
        return path.exists()
    except OSError:  # a path under a file, a name too long
        return False


def numbered(path: str | Path) -> tuple[Path, int | None]:
    """Return the path and the number of FILE#NUMBER, one image of a file of many; None for a path without a number."""
    bare, mark, number = str(path).rpartition("#")
    if mark and number.isdigit() and not exists(Path(path).expanduser()):
        return Path(bare).expanduser(), int(number)
    return Path(path).expanduser(), None


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_hash(paths: Sequence[str | Path]) -> str:
    """Return one SHA-256 of several files, and of all that lies in folders among them."""
    found = hashlib.sha256()
    for path, _ in map(numbered, paths):
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        found.update("".join(file_hash(file) for file in below if file.is_file()).encode())
    return found.hexdigest()


def path_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file, or the one of all files in a folder."""
    return files_hash([path]) if Path(path).is_dir() else file_hash(path)
