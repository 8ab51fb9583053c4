"""What do people see of a sweep? A line where a job begins or ends, what the running ones say, and a table at the end.

All of it is read from the jobs' folders, so that it is the same wherever they run.
"""

import re
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from diffusion.run_folder import Status, read_status
from diffusion.sweep.folder import LOG_FILE, OVERRIDES_FILE, Job
from diffusion.sweep.job import elapsed, last_words

PULSE = 0.25  # seconds between two looks
SECONDS_A_LINE = 20.0  # between two lines about a running job, where standard error is no terminal
# Lines of a log that are of no progress: the command, the tree of the config, what libraries warn of.
BESIDES = re.compile(r"\$ |[\s│├└]|\S+\.py:\d+: ")
NOT_BEGUN = "waiting"  # the state of a job that no STATUS tells of


class Watch(threading.Thread):
    """Print what becomes of the jobs while it is open: `labels` has {folder: "[3/8] schedule=linear"} of each.

    `search` is the folder of a search, where jobs appear as it goes, at most `total` in all.
    """

    def __init__(self, labels: Mapping[Path, str], *, search: Path | None = None, total: int | None = None) -> None:
        super().__init__(name="sweep-watch", daemon=True)
        self._labels = dict(labels)
        self._search, self._total = search, total
        self._terminal = sys.stderr.isatty()
        self._before = {folder: _begun(folder) for folder in labels}
        self._running: dict[Path, str] = {}  # the last line about each
        self._over: set[Path] = set()
        self._end = threading.Event()

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self.join()
        self.look()
        self._clear()

    def run(self) -> None:
        """Look at the jobs until the sweep has ended."""
        ticks = 0
        while not self._end.wait(PULSE):
            self.look()
            ticks += 1
            if ticks % round((1.0 if self._terminal else SECONDS_A_LINE) / PULSE) == 0:
                self._tell_running()

    def look(self) -> None:
        """Print a line for each job that has begun, or ended, since the last look."""
        self._find()
        for folder, label in self._labels.items():
            if folder in self._over or (begun := _begun(folder)) is None or begun == self._before.get(folder):
                continue
            if folder not in self._running:
                self._running[folder] = ""
                self._say(f"{label} begins")
            status = read_status(folder)
            if status is not None and status.state not in ("running", "killed") and _begun(folder) == begun:
                self._over.add(folder)
                del self._running[folder]
                self._say(f"{label} {ending(status)} {clock(elapsed(folder))}{_error(status)}")

    def _find(self) -> None:
        """Number the jobs that a search has begun since the last look."""
        if self._search is None:
            return
        new = [path.parent for path in self._search.glob(f"*/{OVERRIDES_FILE}") if path.parent not in self._labels]
        for folder in sorted(new, key=lambda folder: _begun(folder) or 0):
            of = "" if self._total is None else f"/{self._total}"
            self._labels[folder] = f"[{len(self._labels) + 1}{of}] {folder.name}"
            self._before[folder] = None

    def _tell_running(self) -> None:
        lines = {folder: last_line(folder / LOG_FILE) for folder in self._running}
        if self._terminal:
            shown = "  ".join(f"{self._labels[folder].partition(' ')[0]} {line}" for folder, line in lines.items())
            print(f"\r\x1b[K{shown[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
            return
        for folder, line in lines.items():
            if line and line != self._running[folder]:
                self._running[folder] = line
                self._say(f"{self._labels[folder].partition(' ')[0]} {line}")

    def _say(self, line: str) -> None:
        self._clear()
        print(line, file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _begun(folder: Path) -> int | None:
    """Return when a job was last begun, as what differs from other times; None where it never was."""
    try:
        return (folder / OVERRIDES_FILE).stat().st_mtime_ns
    except OSError:
        return None


def _error(status: Status) -> str:
    return f": {status.error}" if status.error else ""


def ending(status: Status) -> str:
    """Return how a line goes on before the time that a job took."""
    return {"finished": "finished in", "pruned": "pruned after", "preempted": "stopped after"}.get(
        status.state, f"{status.state} after"
    )


def clock(seconds: float) -> str:
    """Return a time as people write it: 1:02, or 2:00:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def last_line(log: Path) -> str:
    """Return the last line of a log that tells how the job goes, as a terminal shows it; "" where there is none."""
    try:
        lines = last_words(log).replace("\r", "\n").splitlines()
    except OSError:
        return ""
    return next((line.rstrip() for line in reversed(lines) if line.strip() and not BESIDES.match(line)), "")


def table(jobs: Mapping[str, Job]) -> str:
    """Return a line for each job: label, state and step; below one that did not finish its error and its log."""
    states = {label: NOT_BEGUN if job.status is None else job.status.state for label, job in jobs.items()}
    widths = max([3, *map(len, jobs)]), max([5, *map(len, states.values())])
    lines = [f"{'job':<{widths[0]}}  {'state':<{widths[1]}}  step"]
    for label, job in jobs.items():
        step = "" if job.status is None or job.status.step is None else f"{job.status.step}"
        step += f" of {job.status.max_steps}" if step and job.status.max_steps is not None else ""
        lines.append(f"{label:<{widths[0]}}  {states[label]:<{widths[1]}}  {step}".rstrip())
        if states[label] in ("failed", "killed"):
            lines += [f"    {line}" for line in (job.status.error, f"log: {job.folder / LOG_FILE}") if line]
    return "\n".join(lines)
