"""How does one job of a sweep run? As a process of its own, so that nothing that ends it can end the sweep.

A launcher of Hydra's, whichever it is, calls a `JobProcess` where it wants the job to run; that starts the command
without -m, sends its output to log.txt, passes signals on, and says in STATUS how it ended. Nothing here imports torch.
"""

import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from diffusion.cli.composing import in_quotes
from diffusion.files import atomic_write
from diffusion.requeue import signal_for_launcher
from diffusion.run_folder import STATUS, Status, first_process, read_status, write_status
from diffusion.sweep.folder import LOG_FILE, OVERRIDES_FILE, SWEEP_FILE, digest, folder_names, read_sweep
from diffusion.sweep.gpus import held_gpus, wanted_gpus
from diffusion.sweep.plugins import let_ours_stand_first
from diffusion.sweep.share import job_environment

let_ours_stand_first()  # in each process that is handed a job, before Hydra composes the job's config there
DONE = ("finished", "pruned")  # states after which a job is not begun again
STOP_FILE = ".stop"  # in the sweep's folder: the number of the signal that all its jobs are to get, also on other hosts
PULSE = 0.2  # seconds between two looks at the job
# What a launcher sends to say that a job must go; submitit's own, SIGUSR2, the commands know as SIGUSR1.
PASSED_ON = {"SIGTERM": "SIGTERM", "SIGUSR1": "SIGUSR1", "SIGUSR2": "SIGUSR1"}
ENDING = 4096  # characters of a log in which the reason is looked for


class JobFailed(ValueError):
    """A job has ended without its result; the text is its error, in one line."""


@dataclass(frozen=True)
class JobProcess:
    """What a launcher calls for each job: it runs the job as a process and returns the `objective`, if there is one.

    The job is what Hydra's overrides say (`HydraConfig.get().overrides.task`). Raises JobFailed for one that failed or
    was stopped, after its STATUS says so. One that has finished already, or was pruned, is not begun again.
    """

    start: tuple[str, ...]  # what stands between the interpreter and the words: the script, or -m and the module; flags
    directory: str  # where the sweep was started, and the job is
    sweep_dir: str  # as typed: relative to `directory`, or absolute
    folder_key: str  # run_dir or out_dir
    keys: tuple[str, ...]  # what is varied, for the folders of a search, whose jobs sweep.yaml cannot name beforehand
    objective: str | None = None  # a column of metrics.csv or a score of metrics.json
    owner: int = 0  # the id of the sweep's own process, which takes care of signals itself
    environment: tuple[tuple[str, str], ...] = ()  # what is added to that of a job: its share of the cores
    gpus: tuple[str, ...] = ()  # those that all jobs share

    def __call__(self, cfg: Any = None) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        words = list(HydraConfig.get().overrides.task)
        with held_gpus(self.gpus, wanted_gpus(cfg, len(self.gpus)) if self.gpus else 0) as environment:
            return replace(self, environment=(*self.environment, *environment.items())).run(words)

    @property
    def root(self) -> Path:
        """The sweep's folder."""
        return Path(self.directory, self.sweep_dir)

    def folder_of(self, words: Sequence[str]) -> str:
        """Return the name of a job's folder: what sweep.yaml says, or of a search what follows from the words."""
        if (self.root / SWEEP_FILE).exists():
            for entry in read_sweep(self.root)["jobs"]:
                if digest(entry["overrides"]) == digest(words):
                    return entry["folder"]
        return folder_names([words], self.keys)[0]

    def run(self, words: Sequence[str]) -> float | None:
        """Run the job of these words, unless it is done; return the objective."""
        name = self.folder_of(words)
        folder = self.root / name
        status = read_status(folder)
        if status is None or status.state not in DONE:
            self._refuse(status)
            self._begin(folder, words)
            place = f"{self.folder_key}={in_quotes(str(Path(self.sweep_dir, name)))}"
            self._await([sys.executable, *self.start, *words, place], folder)
        return None if self.objective is None else final_value(folder, self.objective)

    def _refuse(self, status: Status | None) -> None:
        if (self.root / STOP_FILE).exists():
            raise JobFailed("not begun: the sweep was stopped")
        if status is not None and status.state == "running":
            raise JobFailed(f"it is running already: process {status.pid} on {status.host}")

    def _begin(self, folder: Path, words: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / OVERRIDES_FILE, durable=False) as partial:
            partial.write_text(yaml.safe_dump(list(words), allow_unicode=True, width=10**6), encoding="utf-8")
        if first_process():
            (folder / STATUS).unlink(missing_ok=True)  # what it says from now on is about this attempt

    def _await(self, command: Sequence[str], folder: Path) -> None:
        """Run the command to its end. Raises JobFailed unless it did what it should."""
        first = first_process()
        log = folder / (LOG_FILE if first else f"log_{os.getpid()}.txt")  # several where Slurm starts all ranks
        with open(log, "ab") as output:
            said = (
                f"$ {shlex.join(['python', *command[1:]])}  # {datetime.now().astimezone().isoformat(' ', 'seconds')}"
            )
            output.write(f"{said}\n".encode())
            output.flush()
            began = output.tell()
            with passing_on(owner=os.getpid() == self.owner) as signals:
                process = subprocess.Popen(
                    command,
                    cwd=self.directory,
                    env={**job_environment(), **dict(self.environment), "PYTHONUNBUFFERED": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches it once, through here
                )
                try:
                    self._watch(process, signals)
                except BaseException:  # Ctrl-C for the second time
                    process.kill()
                    process.wait()
                    raise
        error = settle(folder, process.returncode, last_words(log, began)) if first else None
        if signals.received and threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal_for_launcher(signals.received))  # now that the job has saved: its turn
        if error is not None:
            raise JobFailed(error)

    def _watch(self, process: subprocess.Popen, signals: "Signals") -> None:
        """Wait for the end; send what this process or the whole sweep was sent."""
        sent = 0
        stopped = False
        while process.poll() is None:
            for number in signals.received[sent:]:
                process.send_signal(getattr(signal, PASSED_ON[signal.Signals(number).name]))
                sent += 1
            if not stopped and (number := read_stop(self.root)) is not None:
                stopped = True
                process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(PULSE)


class Signals:
    """The numbers of the signals that came since a job began."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __call__(self, number: int, frame: Any) -> None:
        self.received.append(number)


@contextmanager
def passing_on(*, owner: bool) -> Iterator[Signals]:
    """Collect signals that are for the job. Where a launcher made this process, Ctrl-C is the sweep's own business."""
    signals = Signals()
    if owner or threading.current_thread() is not threading.main_thread():
        yield signals  # the sweep's process writes the stop file
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for good: a pool's idle workers must survive it, too
    with handled(PASSED_ON, signals):
        yield signals


@contextmanager
def handled(names: Iterable[str], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let `handler` have these signals, as far as the system has them, and put back what was there before."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def write_stop(sweep_dir: Path, number: int) -> None:
    """Ask all jobs of a sweep, wherever they run, to save and end as this signal asks."""
    with atomic_write(sweep_dir / STOP_FILE, durable=False) as partial:
        partial.write_text(str(int(number)), encoding="utf-8")


def read_stop(sweep_dir: Path) -> int | None:
    """Return the signal that all jobs of a sweep are asked to obey, or None."""
    try:
        return int((sweep_dir / STOP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# how it ended


def settle(folder: Path, returncode: int, said: str) -> str | None:
    """See that STATUS says how a job ended, by what the job wrote itself, its exit status and the end of its log.

    Returns the error in one line, None where there is none.
    """
    status = read_status(folder)
    state = status.state if status is not None else None
    step, max_steps = (status.step, status.max_steps) if status is not None else (None, None)
    if returncode == 0 and state not in ("failed", "preempted"):
        if state not in DONE:
            write_status(folder, "finished", step=step, max_steps=max_steps)
        return None
    if state == "preempted" or (state != "failed" and _was_asked(returncode)):
        if state != "preempted":
            write_status(folder, "preempted", step=step, max_steps=max_steps)
        return (
            "stopped before its end" if status is None or status.step is None else f"stopped after step {status.step}"
        )
    error = (status.error if state == "failed" else None) or reason(returncode, said)
    if state != "failed" or not status.error:
        write_status(folder, "failed", step=step, max_steps=max_steps, error=error)
    return error


def _was_asked(returncode: int) -> bool:
    """Say whether a process ended because it was asked to: by its own exit status, or before it could handle that."""
    asking = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    return returncode - 128 in asking or -returncode in asking


def reason(returncode: int, said: str) -> str:
    """Return in one line why a process ended: the signal, its `error: ...`, or the last thing it said."""
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return f"killed by {name}" + (" (out of memory, or by hand)" if name == "SIGKILL" else "")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    if told is not None:
        return told.removeprefix("error: ").partition(" [DIFFUSION_TRACEBACK")[0]
    return f"exit status {returncode}: {lines[-1]}" if lines else f"exit status {returncode}"


def last_words(log: Path, began: int = 0) -> str:
    """Return the last lines of what a log holds from byte `began` on."""
    with open(log, "rb") as file:
        first = max(began, file.seek(0, os.SEEK_END) - ENDING)
        file.seek(first)
        text = file.read().decode("utf-8", errors="replace")
    return text if first == began else text.partition("\n")[2]  # a line that is cut says something else


def final_value(folder: Path, name: str) -> float:
    """Return the last value of a column of metrics.csv, or a score of metrics.json.

    Raises JobFailed where there is none, or it is not finite.
    """
    found = _scores(folder / "metrics.json") | _last_values(folder / "metrics.csv")
    if name not in found:
        raise JobFailed(f"objective={name} was not measured; {folder} has {', '.join(sorted(found)) or 'no metrics'}")
    if not math.isfinite(found[name]):
        raise JobFailed(f"objective={name} is {found[name]}")
    return found[name]


def _last_values(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if name and value}


def _scores(path: Path) -> dict[str, float]:
    return json.loads(path.read_text(encoding="utf-8"))["scores"] if path.exists() else {}


def elapsed(folder: Path) -> float:
    """Return the seconds that a job has taken since it was last begun, until now or until STATUS says that it ended."""
    begun = (folder / OVERRIDES_FILE).stat().st_mtime
    status = read_status(folder)
    ended = (folder / STATUS).stat().st_mtime if status is not None and status.state != "running" else time.time()
    return max(0.0, ended - begun)
