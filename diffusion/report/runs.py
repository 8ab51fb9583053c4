"""What does a run folder say, in whatever state its run left it? Everything a report knows of a run is read here.

A file that is missing, half written or not ours is a gap in what is known (`Run.troubles` names it), never an error.
"""

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from diffusion.cli import flat
from diffusion.run_folder import Status, read_record, read_status
from diffusion.sweep.folder import SWEEP_FILE, jobs_of

# What makes a folder a run's; one of them is enough.
MARKS = ("STATUS", "config.yaml", "metrics.csv", "overrides.yaml", "record.yaml")
UNKNOWN, WAITING = "unknown", "waiting"  # states that no STATUS file says: none is there; the job has not begun
ENDED = ("finished", UNKNOWN)  # whose last values are final, as far as anybody can say
SEED = "seed"
PLACES = ("run_dir", "out_dir", "sweep_dir", "resume", "overwrite")  # keys that say where, not what
PICTURE = re.compile(r"step=(\d+)_(.+)\.png")
TERMINAL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # colours and cursor moves
TAIL = 16_384  # bytes of a log that are looked at
IMAGES_PER_SECOND = "train/images_per_second"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is built


class Picture(NamedTuple):
    """A picture of a run: of which step (None: of a finished model) and of what, "ema", "raw", "grid", ..."""

    step: int | None
    kind: str
    path: Path


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it. Metrics are indexed by optimizer step; what was not measured there is NaN."""

    folder: Path
    name: str
    state: str  # one of run_folder.STATES, "killed", "waiting" or "unknown"
    status: Status | None
    overrides: Mapping[str, str]  # what its sweep set for this job
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    metrics: pd.DataFrame
    scores: Mapping[str, float]  # of metrics.json: of a model, not of a step
    pictures: tuple[Picture, ...]
    troubles: tuple[str, ...] = ()
    written: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)  # where metrics.csv has a value, NaN or not

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The config as {dotted key: value}."""
        return flat(self.config) if self.config else {}

    @property
    def seed(self) -> str:
        """The run's seed as text, "" where nothing says it."""
        return str(self.overrides.get(SEED, self.flat.get(SEED, "")))

    @property
    def step(self) -> int | None:
        """The last optimizer step that is known of."""
        known = [self.status.step] if self.status and self.status.step is not None else []
        return max([*known, *map(int, self.metrics.index[-1:])], default=None)

    @property
    def ended(self) -> bool:
        """Whether its last values are final."""
        return self.state in ENDED

    def series(self, metric: str) -> pd.Series:
        """Return the values of a metric by step where it was measured; one that was measured as NaN is NaN."""
        if metric not in self.metrics:
            return pd.Series(dtype=float)
        return self.metrics.loc[self.written[metric], metric]

    @cached_property
    def finals(self) -> dict[str, float]:
        """The last value of each metric, and the scores."""
        columns = {name: self.series(name) for name in self.metrics}
        return {name: float(values.iloc[-1]) for name, values in columns.items() if len(values)} | dict(self.scores)

    @cached_property
    def seconds(self) -> pd.Series:
        """Seconds of training until each step that has a throughput: images done, divided by images per second."""
        rate = self.series(IMAGES_PER_SECOND)
        images = self.flat.get("data.batch_size"), self.flat.get("trainer.accumulate_grad_batches", 1)
        if not len(rate) or not all(isinstance(number, int) for number in images):
            return pd.Series(dtype=float)
        starts = self.record.get("starts") or [{}]
        images_a_step = images[0] * images[1] * int(starts[-1].get("world_size") or 1)
        steps = pd.Series(rate.index, index=rate.index).diff().fillna(rate.index[0])
        return (steps * images_a_step / rate.where(rate > 0)).cumsum()

    @property
    def wall_seconds(self) -> float | None:
        """Seconds from the last start to the end; None where it has not ended, or nothing says when it began."""
        starts = self.record.get("starts") or []
        if not starts or self.status is None or self.state in ("running", "killed"):
            return None
        try:
            ended, began = (datetime.fromisoformat(time) for time in (self.status.time, starts[-1]["time"]))
            return (ended - began).total_seconds()
        except (KeyError, TypeError, ValueError):
            return None

    @cached_property
    def forecast(self) -> dict[str, Any]:
        """What forecast.yaml said at the start that the run would cost; {} where there is none."""
        return read_mapping(self.folder / "forecast.yaml")[0]

    @cached_property
    def log_tail(self) -> str:
        """The last lines of log.txt as a terminal would show them, without its colours; "" where there is none."""
        try:
            with open(self.folder / "log.txt", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        lines = (TERMINAL.sub("", line).rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
        return "\n".join(line for line in lines if line)

    @cached_property
    def changes(self) -> str:
        """What was not committed when the run last started, as a diff; "" where all was, or nothing is known."""
        name = (self.record.get("starts") or [{}])[-1].get("changes")
        return read_text(self.folder / name) if name else ""


@dataclass(frozen=True)
class Sweep:
    """Runs that belong together: `keys` are what was varied, where a sweep.yaml says so."""

    folder: Path
    name: str
    command: str
    keys: tuple[str, ...]
    runs: tuple[Run, ...]


# ---------------------------------------------------------------------------------------------------------------------
# folders


def read_sweeps(folders: Sequence[Path]) -> list[Sweep]:
    """Return the sweeps in several folders, each run once; runs of no sweep are one by the name of the folder given.

    Raises ValueError for a folder that is not there or holds no run.
    """
    sweeps: list[Sweep] = []
    seen: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}; give the folder of a sweep or of a run")
        found = list(_found(folder))
        loose = tuple(part for part in found if isinstance(part, Run))
        parts = [part for part in found if isinstance(part, Sweep)]
        parts += [Sweep(folder, folder.resolve().name, "", (), loose)] if loose else []
        if not any(sweep.runs for sweep in parts):
            raise ValueError(
                f"{folder} holds no run: no {SWEEP_FILE} with jobs, and no folder with {', '.join(MARKS[:3])}; "
                "give the folder of a sweep or of a run"
            )
        for sweep in parts:
            runs = tuple(run for run in sweep.runs if run.folder.resolve() not in seen)
            seen |= {run.folder.resolve() for run in runs}
            sweeps += [replace(sweep, runs=runs)] if runs else []
    return sweeps


def is_run(folder: Path) -> bool:
    """Say whether a folder looks like a run's."""
    return any((folder / mark).is_file() for mark in MARKS)


def _found(folder: Path) -> Iterator[Sweep | Run]:
    """Find sweeps and runs in a folder, and look into neither for more."""
    if (sweep := read_sweep(folder)) is not None:
        yield sweep
    elif is_run(folder):
        yield read_run(folder)
    else:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.name.startswith(".") and not child.is_symlink():
                yield from _found(child)


def read_sweep(folder: Path) -> Sweep | None:
    """Read a sweep's folder; None where there is no sweep.yaml, or none that can be read."""
    said, _ = read_mapping(folder / SWEEP_FILE)
    if not isinstance(said.get("jobs"), list):
        return None
    runs = tuple(read_run(job.folder, overrides=job.overrides, job=True) for job in jobs_of(folder))
    keys = tuple(map(str, said.get("keys") or ()))
    return Sweep(folder, str(said.get("name") or folder.name), str(said.get("command") or ""), keys, runs)


def read_run(folder: Path, *, overrides: Mapping[str, str] | None = None, job: bool = False) -> Run:
    """Read a run's folder, which need not exist for a `job` of a sweep; that one waits."""
    config, troubles = read_mapping(folder / "config.yaml")
    status = read_status(folder)
    cells, more = read_cells(folder / "metrics.csv")
    scores, most = read_scores(folder / "metrics.json")
    begun = status is not None or len(cells) or scores or (folder / "log.txt").exists()
    return Run(
        folder=folder,
        name=folder.resolve().name,
        state=status.state if status else UNKNOWN if begun or not job else WAITING,
        status=status,
        overrides=read_overrides(folder) if overrides is None else dict(overrides),
        config=config,
        record=read_record(folder),
        metrics=cells.apply(pd.to_numeric, errors="coerce").astype(float),
        scores=scores,
        pictures=tuple(find_pictures(folder)),
        troubles=(*troubles, *more, *most),
        written=cells != "",
    )


# ---------------------------------------------------------------------------------------------------------------------
# files


def read_text(path: Path) -> str:
    """Return a file's text; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_mapping(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return a YAML or JSON file's mapping and what is wrong with it; a missing file is an empty one."""
    if not path.exists():
        return {}, []
    try:
        found = yaml.load(read_text(path), _Loader)
    except yaml.YAMLError as error:
        return {}, [f"{path.name} cannot be read: {str(error).splitlines()[0]}"]
    return (found, []) if isinstance(found, dict) else ({}, [f"{path.name} cannot be read: it is no mapping"])


def read_cells(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return a metrics file's cells as text by step, without a last line that is not whole, and what is wrong."""
    text = read_text(path)
    text = text[: text.rfind("\n") + 1]
    if not text:
        return pd.DataFrame(), []
    try:
        cells = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, on_bad_lines="skip").fillna("")
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        return pd.DataFrame(), [f"{path.name} cannot be read: {error}"]
    if "step" not in cells:
        return pd.DataFrame(), [f"{path.name} cannot be read: it has no column step"]
    steps = pd.to_numeric(cells.pop("step"), errors="coerce")
    cells = cells[steps.notna()].set_axis(steps[steps.notna()].astype(int), axis=0)
    return cells[~cells.index.duplicated(keep="last")].sort_index(), []


def read_scores(path: Path) -> tuple[dict[str, float], list[str]]:
    """Return the scores of a metrics.json, as sample.py writes it, and what is wrong with it."""
    said, troubles = read_mapping(path)
    scores = said.get("scores")
    if not isinstance(scores, dict):
        return {}, troubles
    return {str(name): float(value) for name, value in scores.items() if isinstance(value, (int, float))}, troubles


def read_overrides(folder: Path) -> dict[str, str]:
    """Return what a job's overrides.yaml says was set for it."""
    try:
        found = yaml.load(read_text(folder / "overrides.yaml"), _Loader)
    except yaml.YAMLError:
        return {}
    words = [word.partition("=") for word in found if isinstance(word, str)] if isinstance(found, list) else []
    return {key.lstrip("+"): value for key, equals, value in words if equals}


def find_pictures(folder: Path) -> Iterator[Picture]:
    """Find samples/step=N_KIND.png in the order of their steps, and the grid.png of sample.py."""
    named = [(PICTURE.fullmatch(path.name), path) for path in (folder / "samples").glob("*.png")]
    yield from sorted(Picture(int(match[1]), match[2], path) for match, path in named if match)
    if (folder / "grid.png").is_file():
        yield Picture(None, "grid", folder / "grid.png")
