"""Which GPU does a job of a sweep train on, where several jobs share a machine? One that no other job holds.

Slurm and Ray see to that themselves; joblib and submitit's local processes know no GPUs. Nothing here imports torch.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

VARIABLE = "CUDA_VISIBLE_DEVICES"
PULSE = 0.5  # seconds between two looks for one that is free


def visible_gpus() -> tuple[str, ...]:
    """Return the names, as `CUDA_VISIBLE_DEVICES` has them, of the GPUs that this process may use."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip() not in ("", "-1"))
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return tuple(str(i) for i, line in enumerate(filter(lambda line: line.startswith("GPU "), listed.splitlines())))


def wanted_gpus(cfg: Any, there: int) -> int:
    """Return how many of the GPUs that are there a job takes, by its config; 0 where it names one, or takes none."""
    settings = cfg.get("trainer") or {}  # train.py; sample.py has `device` and `devices` instead
    kind, count = settings.get("accelerator", cfg.get("device")), settings.get("devices", cfg.get("devices"))
    if kind not in ("auto", "gpu", "cuda"):
        return 0
    if count in ("auto", -1, "-1"):
        return there
    return min(count, there) if isinstance(count, int) else 0


@contextmanager
def held_gpus(names: Sequence[str], count: int) -> Iterator[dict[str, str]]:
    """Wait for `count` GPUs that no job of this user's sweeps holds, hold them, and yield what shows a job no others.

    Without file locks (Windows) every job sees all of them.
    """
    if not names or not count or os.name != "posix":
        yield {}
        return
    with ExitStack() as held:
        while len(mine := _try(names, count, held)) < count:
            held.close()
            time.sleep(PULSE)
        yield {VARIABLE: ",".join(mine)}


def _try(names: Sequence[str], count: int, held: ExitStack) -> list[str]:
    """Lock up to `count` GPUs and return their names; the locks end with `held`, or with the process."""
    import fcntl

    folder = Path(tempfile.gettempdir(), f"diffusion-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    mine: list[str] = []
    for name in names:
        if len(mine) == count:
            break
        file: TextIO = open(folder / name.replace("/", "_"), "w", encoding="utf-8")  # noqa: SIM115
        held.enter_context(file)
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine.append(name)
    return mine
