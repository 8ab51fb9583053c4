"""Which jobs of a sweep does Slurm still have? Where one is lost, submitit's launcher gives up and leaves the others.

Nothing here imports torch.
"""

import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

PULSE = 5.0  # seconds between two looks at the queue


def await_rest(sweep_dir: str | Path, signals: Sequence[int]) -> None:
    """Wait until the queue has none of the jobs that submitit has sent there for a sweep, or until a signal comes."""
    numbers = {path.name.partition("_")[0] for path in Path(sweep_dir, ".submitit").glob("[0-9]*")}
    while not signals and is_queued(numbers):
        time.sleep(PULSE)


def is_queued(numbers: Iterable[str]) -> bool:
    """Say whether Slurm has one of these jobs: waiting, running, or about to end."""
    if not numbers or shutil.which("squeue") is None:
        return False
    command = ["squeue", "--noheader", f"--jobs={','.join(sorted(numbers))}", "--format=%i"]
    said = subprocess.run(command, capture_output=True, text=True)
    return said.returncode == 0 and bool(said.stdout.strip())
