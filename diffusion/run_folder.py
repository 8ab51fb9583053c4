"""How does a folder say what became of the run in it? STATUS, record.yaml, and a lock that dies with its process.

STATUS is one of `STATES` in its first line; record.yaml has an entry a start: command, code, packages, machine.
Nothing here imports torch, so that a report or a sweep reads hundreds of folders at once.
"""

import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from diffusion.code_state import git_commit, uncommitted
from diffusion.files import atomic_write

STATES = ("running", "finished", "failed", "preempted", "pruned")
KILLED = "killed"  # what "running" means where no process holds the lock; no file says so
PACKAGES = (
    *("diffusion", "torch", "torchvision", "lightning", "numpy", "hydra-core", "omegaconf", "safetensors", "einops"),
    *("open_clip_torch", "webdataset", "torchmetrics", "torch-fidelity", "wandb", "tensorboard"),
)
STATUS, RECORD, LOCK = "STATUS", "record.yaml", ".lock"
PATIENCE = 2.0  # seconds: whoever only looks at a lock holds it for a moment
MOST_TEXT = 500  # characters of an error


class Status(NamedTuple):
    """What STATUS says. `state` is one of `STATES`, or "killed": it says running, but nobody holds the lock."""

    state: str
    step: int | None
    max_steps: int | None
    time: str  # ISO 8601, of the last change
    error: str | None  # one line
    host: str
    pid: int


# ---------------------------------------------------------------------------------------------------------------------
# what became of it


def write_status(
    folder: str | Path,
    state: str,
    *,
    step: int | None = None,
    max_steps: int | None = None,
    error: str | None = None,
) -> None:
    """Write STATUS, whole or not at all, with the first line of the error. Raises OSError where it cannot."""
    if state not in STATES:
        raise ValueError(f"a run is one of {', '.join(STATES)}, not {state!r}")
    if error is not None:
        error = (error.strip().splitlines() or [""])[0][:MOST_TEXT]
    status = Status(state, step, max_steps, _now(), error, socket.gethostname(), os.getpid())
    with atomic_write(Path(folder) / STATUS, durable=False) as partial:
        partial.write_text(_dumped(status._asdict()), encoding="utf-8")


def read_status(folder: str | Path) -> Status | None:
    """Return what became of the run in a folder; None where no STATUS says, or one that is no status.

    "running" is true while its process holds the folder's lock; otherwise the state is "killed".
    """
    try:
        found = yaml.safe_load((Path(folder) / STATUS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(found, Mapping) or found.get("state") not in STATES:
        return None
    status = Status(**{name: found.get(name) for name in Status._fields})
    if status.state == "running" and not _is_held(Path(folder), status):
        return status._replace(state=KILLED)
    return status


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _dumped(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**6)


# ---------------------------------------------------------------------------------------------------------------------
# one process at a time

_HELD: set[int] = set()  # descriptors of locks


def _forget_locks() -> None:
    """Close them in a forked child: a loader's worker that outlives a killed run must not keep its folder locked."""
    for descriptor in _HELD:
        with suppress(OSError):
            os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is not there; the system frees it however the process ends.

    Raises ValueError that names the process and its host where another one holds it. On Windows, and on a file system
    without locks, a process of this machine that STATUS calls running is taken at its word.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        end = time.monotonic() + PATIENCE
        while (free := _try_lock(descriptor)) is False and time.monotonic() < end:
            time.sleep(0.05)
        if free is False or (free is None and _says_running(folder)):
            raise ValueError(
                f"another process is at work in {folder}: {_holder(folder)}; let it end, stop it (the same command "
                "goes on then), or choose another folder"
            )
        _HELD.add(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _dumped({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        if descriptor in _HELD:
            _HELD.discard(descriptor)
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Say whether the lock is ours now; None where there is nothing of that kind."""
    if os.name != "posix":
        return None
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_held(folder: Path, status: Status) -> bool:
    """Say whether a process holds the lock of a folder."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        free = _try_lock(descriptor, shared=True)
    finally:
        os.close(descriptor)
    return _is_alive(status) if free is None else not free


def _says_running(folder: Path) -> bool:
    status = read_status(folder)
    return status is not None and status.state == "running" and status.pid != os.getpid()


def _is_alive(status: Status) -> bool:
    if status.host != socket.gethostname():
        return True  # who can tell
    try:
        os.kill(status.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _holder(folder: Path) -> str:
    for name in (LOCK, STATUS):
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            found = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
            if isinstance(found, Mapping) and "pid" in found:
                return f"process {found['pid']} on {found.get('host')}"
    return "one that has just begun"


def first_process() -> bool:
    """Say whether this process is the one of its job that writes: rank 0 by what torchrun, Slurm or Lightning set."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


# ---------------------------------------------------------------------------------------------------------------------
# how it was made


def record_start(folder: str | Path, *, resumed_step: int | None = None, **known: Any) -> None:
    """Append this start to record.yaml: command, folder, commit, uncommitted changes, versions, host, and `known`.

    The changes lie beside it in changes_N.diff, N the number of the start from 1; equal ones are kept once.
    """
    folder, record = Path(folder), read_record(folder)
    start = {
        "time": _now(),
        "command": shlex.join(sys.argv),
        "directory": os.getcwd(),
        "commit": git_commit(),
        "changes": _save_changes(folder, record["starts"]),
        "python": platform.python_version(),
        "packages": _versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": None,
        "world_size": 1,
        "threads": None,
        "resumed_step": resumed_step,
        **known,
    }
    _write_record(folder, {**record, "starts": [*record["starts"], start]})


def record_facts(folder: str | Path, *, start: Mapping[str, Any] | None = None, **facts: Any) -> None:
    """Add what is known later: `start` to the entry of the last start, `facts` (data=, parameters=) to all of it."""
    record = read_record(folder)
    if record["starts"]:
        record["starts"][-1] |= dict(start or {})
    _write_record(Path(folder), record | facts)


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return {"starts": [...], "data": {name, hash, num_samples} or None, "parameters": int or None, ...}.

    A file that is not there or cannot be read is one without starts.
    """
    empty: dict[str, Any] = {"starts": [], "data": None, "parameters": None}
    try:
        found = yaml.safe_load((Path(folder) / RECORD).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return empty
    if not isinstance(found, Mapping) or not isinstance(found.get("starts"), list):
        return empty
    return empty | dict(found)


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    with atomic_write(folder / RECORD, durable=False) as partial:
        partial.write_text(_dumped(dict(record)), encoding="utf-8")


def _save_changes(folder: Path, starts: list[dict[str, Any]]) -> str | None:
    """Keep the uncommitted changes in a file and return its name; None where there are none."""
    if not (changes := uncommitted()):
        return None
    for name in sorted({start["changes"] for start in starts if start.get("changes")}):
        with suppress(OSError):
            if (folder / name).read_bytes() == changes.encode():
                return name
    name = f"changes_{len(starts) + 1}.diff"
    with atomic_write(folder / name, durable=False) as partial:
        partial.write_bytes(changes.encode())
    return name


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
