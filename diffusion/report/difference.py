"""What differs between two runs, and since when? Config, code, data, environment, and the step at which losses part.

    uv run python -m diffusion.report diff RUN RUN [tolerance=0.01]

ends with status 0 where nothing differs and with 1 where something does.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from diffusion.report.runs import PLACES, SWEEP_FILE, Run, is_run, read_run

ABSENT = "(none)"  # a key that only the other run has
TOLERANCE = 1e-2  # relative: about what another order of summation becomes in some hundred steps
TIMINGS = ("train/images_per_second", "train/memory_gb")  # of the machine's day, not of the run
NEVER, NOT_COMPARED = -1, -2  # in a matrix of steps: equal wherever both were measured; never measured at one step
ENVIRONMENT = ("python", "host", "device", "world_size", "threads")
DIFF_HEAD, PART_HEAD, MARKS = "diff --git ", "@@ ", ("+", "-")
SHOWN = 12  # rows of a section that the terminal shows before it counts the others

Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Difference:
    """What differs between runs a and b; each value is (a's, b's). What is equal in both does not appear.

    `parts_at` names each metric that both measured at some common step, with the first at which the two differ as they
    are written in metrics.csv (eight digits); None: nowhere. `drifts_at` asks for more than a relative `tolerance`.
    """

    config: dict[str, Pair]
    code: dict[str, Pair]  # "commit", and file by file the first uncommitted lines that differ
    data: dict[str, Pair]
    environment: dict[str, Pair]
    progress: dict[str, Pair]  # "state" and "step"
    parts_at: dict[str, int | None]
    drifts_at: dict[str, int | None]
    unknown: tuple[str, ...] = ()  # what one of the folders does not tell

    @property
    def same(self) -> bool:
        """Whether nothing that was compared differs."""
        told = (self.config, self.code, self.data, self.environment, self.progress)
        return not any(told) and all(step is None for step in self.parts_at.values())

    @property
    def first_parting(self) -> int | None:
        """The first step at which any metric parts."""
        return min((step for step in self.parts_at.values() if step is not None), default=None)


def difference(a: Run, b: Run, *, tolerance: float = TOLERANCE) -> Difference:
    """Compare two runs in whatever state they are. Places (run_dir, ...) and timings may differ and are left out."""
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} is a relative difference, at least 0; 0.01 is one in a hundred")
    common = common_metrics(a, b)
    return Difference(
        config=differing(without_places(a.flat), without_places(b.flat)) if a.config and b.config else {},
        code=code_difference(a, b),
        data=differing(a.record.get("data") or {}, b.record.get("data") or {}) if both(a, b, "data") else {},
        environment=differing(environment(a), environment(b)) if both(a, b, "starts") else {},
        progress=differing({"state": a.state, "step": a.step}, {"state": b.state, "step": b.step}),
        parts_at={name: parting_step(a.series(name), b.series(name)) for name in common},
        drifts_at={name: parting_step(a.series(name), b.series(name), tolerance) for name in common},
        unknown=tuple(_unknown(a, b)),
    )


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Pair]:
    """Return (a's value, b's value) of each key whose values differ, `ABSENT` for one that is not there."""
    keys = [*a, *(key for key in b if key not in a)]
    pairs = {key: (a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if not equal(*pair)}


def equal(a: Any, b: Any) -> bool:
    """Say whether two plain values are equal: NaN equals NaN, and True is not 1."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the keys of a flat config that say where a run is kept, not what it is."""
    return {key: value for key, value in config.items() if key not in PLACES}


def both(a: Run, b: Run, entry: str) -> bool:
    """Say whether both records have this entry."""
    return bool(a.record.get(entry)) and bool(b.record.get(entry))


def _unknown(a: Run, b: Run) -> Iterator[str]:
    for run in (a, b):
        if not run.config:
            yield f"{run.folder} has no config.yaml"
        if not run.record.get("starts"):
            yield f"{run.folder} has no record of its code and environment"
        if not run.record.get("data"):
            yield f"{run.folder} has no record of its data"


# ---------------------------------------------------------------------------------------------------------------------
# code and environment


def environment(run: Run) -> dict[str, Any]:
    """Return {"host": ..., "packages.torch": ...}; where a run was started several times, all that it saw in turn."""
    starts = run.record.get("starts") or []
    keys = [*ENVIRONMENT, *sorted({f"packages.{name}" for start in starts for name in start.get("packages") or {}})]
    found = {key: [_of_start(start, key) for start in starts] for key in keys}
    return {key: _joined(values) for key, values in found.items()}


def _of_start(start: Mapping[str, Any], key: str) -> Any:
    group, _, name = key.rpartition(".") if key.startswith("packages.") else ("", "", key)
    return (start.get(group) or {}).get(name, ABSENT) if group else start.get(key, ABSENT)


def _joined(values: Sequence[Any]) -> Any:
    distinct = list(dict.fromkeys(map(str, values)))
    return values[0] if len(distinct) == 1 else ", then ".join(distinct)


def code_difference(a: Run, b: Run) -> dict[str, Pair]:
    """Return {"commit": ..., FILE: the first line of its uncommitted diff that the other run's lacks}."""
    if not both(a, b, "starts"):
        return {}
    commits = ({"commit": run.record["starts"][-1].get("commit") or ABSENT} for run in (a, b))
    one, other = changed_files(a.changes), changed_files(b.changes)
    files = {}
    for name in sorted(one.keys() | other.keys()):
        lines = first_difference(one.get(name, []), other.get(name, []))
        if lines is not None:
            files[name] = lines
    return differing(*commits) | files


def changed_files(diff: str) -> dict[str, list[str]]:
    """Return the added and removed lines of each file in a diff as git writes it."""
    files: dict[str, list[str]] = {}
    lines: list[str] = []
    within = False  # a part of the file; before the first one come the file's names, which begin with the same marks
    for line in diff.splitlines():
        if line.startswith(DIFF_HEAD):
            lines, within = files.setdefault(line.rpartition(" b/")[2], []), False
        elif line.startswith(PART_HEAD):
            within = True
        elif within and line.startswith(MARKS):
            lines.append(line)
    return files


def first_difference(a: Sequence[str], b: Sequence[str]) -> Pair | None:
    """Return the first pair of lines that differ, `ABSENT` for a list that has ended; None where there is none."""
    for i in range(max(len(a), len(b))):
        pair = (a[i] if i < len(a) else ABSENT, b[i] if i < len(b) else ABSENT)
        if pair[0] != pair[1]:
            return pair
    return None


# ---------------------------------------------------------------------------------------------------------------------
# metrics


def common_metrics(a: Run, b: Run) -> list[str]:
    """Return the metrics, timings aside, that both runs measured at some common step."""
    shared = [name for name in a.metrics if name in b.metrics and name not in TIMINGS]
    return [name for name in shared if len(a.series(name).index.intersection(b.series(name).index))]


def parting_step(a: pd.Series, b: pd.Series, tolerance: float = 0.0) -> int | None:
    """Return the first step at which two metrics, measured at both, differ; None where they never do.

    NaN equals NaN. With a tolerance they differ by more than that share of the greater one.
    """
    steps = a.index.intersection(b.index).sort_values()
    apart = _apart(a[steps].to_numpy(float), b[steps].to_numpy(float), tolerance)
    return int(steps[apart.argmax()]) if apart.any() else None


def _apart(a: np.ndarray, b: np.ndarray, tolerance: float) -> np.ndarray:
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if tolerance:
        with np.errstate(invalid="ignore"):  # an infinity beside a number parts
            same |= np.isfinite(a - b) & (np.abs(a - b) <= tolerance * np.maximum(np.abs(a), np.abs(b)))
    return ~same


def parting_matrix(runs: Sequence[Run], metric: str, *, tolerance: float = 0.0) -> list[list[int]]:
    """Return for each two runs the step at which a metric parts, `NEVER` or `NOT_COMPARED`; symmetric."""
    series = [run.series(metric) for run in runs]
    steps = sorted(set().union(*(one.index for one in series)))
    if not steps:
        return [[NOT_COMPARED] * len(runs) for _ in runs]
    values = np.stack([one.reindex(steps).to_numpy(float) for one in series])
    measured = np.stack([np.isin(steps, one.index) for one in series])
    rows = []
    for i in range(len(runs)):
        shared = measured[i] & measured
        apart = _apart(values[i], values, tolerance) & shared
        first = np.where(apart.any(1), np.asarray(steps)[apart.argmax(1)], NEVER)
        rows.append([int(step) for step in np.where(shared.any(1), first, NOT_COMPARED)])
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# the terminal


def run_difference(words: Sequence[str]) -> int:
    """Print what differs between two runs: `RUN RUN [tolerance=0.01]`. Returns 0 where nothing does, else 1.

    Raises ValueError for folders that hold no run, and for two runs without a metric that both measured.
    """
    folders = [Path(word) for word in words if not word.startswith("tolerance=")]
    tolerance = next((word.partition("=")[2] for word in words if word.startswith("tolerance=")), str(TOLERANCE))
    if len(folders) != 2:
        raise ValueError(f"diff takes the folders of two runs, got {len(folders)}: diff RUN RUN [tolerance=0.01]")
    a, b = (run_of(folder) for folder in folders)
    found = difference(a, b, tolerance=as_number(tolerance))
    if not found.parts_at:
        raise ValueError(
            f"{a.folder} and {b.folder} have no metric that both measured at one step, so their losses cannot be "
            f"compared; {_has(a)}, {_has(b)}"
        )
    show(Console(soft_wrap=False), a, b, found, as_number(tolerance))
    return 0 if found.same else 1


def run_of(folder: Path) -> Run:
    """Read the run in a folder; ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the folders of two runs")
    if not is_run(folder):
        what = "is a sweep's folder; give two runs inside it" if (folder / SWEEP_FILE).exists() else "holds no run"
        raise ValueError(f"{folder} {what}: a run's folder has a config.yaml and a metrics.csv")
    return read_run(folder)


def as_number(text: str) -> float:
    """Read a tolerance; ValueError where it is no number."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"tolerance={text} is no number; 0.01 is one in a hundred") from None


def _has(run: Run) -> str:
    names = [name for name in run.metrics if name not in TIMINGS]
    return f"{run.name} has {', '.join(names[:6])}" if names else f"{run.name} has measured nothing yet"


def show(console: Console, a: Run, b: Run, found: Difference, tolerance: float) -> None:
    """Print a difference for people: what is the same in a word, what is not in a table."""
    console.print(f"[bold]A[/bold] {escape(str(a.folder))}\n[bold]B[/bold] {escape(str(b.folder))}\n")
    sections = {"config": found.config, "code": found.code, "data": found.data}
    sections |= {"environment": found.environment, "progress": found.progress}
    if equal_parts := [name for name, pairs in sections.items() if not pairs and not _missing(name, found)]:
        console.print(f"the same: {', '.join(equal_parts)}")
    for name, pairs in sections.items():
        if pairs:
            console.print(_table(name, pairs))
    for line in found.unknown:
        console.print(f"[yellow]unknown[/yellow]: {escape(line)}")
    console.print(_parting_table(found, tolerance))
    first = found.first_parting
    nothing = "nothing that is known differs" if found.unknown else "nothing differs"
    console.print(
        nothing if found.same else f"the metrics part at step {first}" if first is not None else
        "the runs differ, but their metrics are equal wherever both were measured"
    )  # fmt: skip


def _missing(section: str, found: Difference) -> bool:
    word = {"config": "config.yaml", "code": "code", "environment": "environment", "data": "data"}.get(section)
    return word is not None and any(word in line for line in found.unknown)


def _table(title: str, pairs: Mapping[str, Pair]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for column in ("", "A", "B"):
        table.add_column(column, overflow="fold")
    for key, pair in list(pairs.items())[:SHOWN]:
        table.add_row(Text(key), *(Text(str(value)) for value in pair))
    if len(pairs) > SHOWN:
        table.add_row(Text(f"and {len(pairs) - SHOWN} more"))
    return table


def _parting_table(found: Difference, tolerance: float) -> Table:
    table = Table(title="metrics part at step", title_justify="left", title_style="bold", show_edge=False)
    for column in ("", "as written", f"by more than {100 * tolerance:g} %"):
        table.add_column(column, overflow="fold", justify="left" if not column else "right")
    for name, step in found.parts_at.items():
        table.add_row(Text(name), *("never" if at is None else str(at) for at in (step, found.drifts_at[name])))
    return table
