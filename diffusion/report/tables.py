"""What do the report's tables say? Final metrics by what was varied, the effect of each choice, what it cost.

Only runs that ended count (`Run.ended`); the table of all runs shows what the others had reached.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pandas as pd

from diffusion.files import atomic_write
from diffusion.report.runs import Run
from diffusion.report.statistics import Direction, Mean, Paired, best, direction, mean, paired
from diffusion.report.varied import Row, Varied

COSTS = ("train/images_per_second", "train/memory_gb")
SHOWN = 4  # columns of metrics that are shown until a reader asks for more
COUNTING = 3  # digits that a mean shows at least
PAIRED_ROWS = 60  # rows up to which each is compared with each
# What a reader looks at first; a metric's place is that of the first pattern that fits it.
ORDER = tuple(
    map(
        re.compile,
        (
            r"(?!train/|val/)(.*/)?fid.*",
            r"(?!train/|val/)(.*/)?(sfid|kid|is|precision|recall|bits_per_dim).*",
            r"(?!train/|val/).*",
            r"val/(accuracy@1|psnr|ssim|lpips)_ema",
            r"val/(accuracy@1|psnr|ssim|lpips)",
            r"val/loss_ema.*",
            r"val/loss",
            r"val/.*_ema.*",
            r"val/.*",
            r"train/loss",
        ),
    )
)
# What a curve shows but no table: parts of a loss, states of the optimiser, the evaluation's own time.
ASIDE = re.compile(
    r".*_q\d(_.*)?|.*/(grad_norm|lr|seconds|latent_\w+|logits_\w+|kl_\d+|.*_grad_norm)|train/(?!loss$).*"
)


class Column(NamedTuple):
    """A metric as a column: `unit` is what the header says beside the name, `by_definition` that the loss varies."""

    metric: str
    better: Direction | None
    shown: bool
    decimals: int
    by_definition: bool


class Cell(NamedTuple):
    """A number with its spread, as text; `value` is what to sort by."""

    text: str = ""
    spread: str = ""
    value: float | None = None
    best: bool = False


class ResultRow(NamedTuple):
    """A row of the table of results; `ended` of `of` runs have final values."""

    row: Row
    ended: int
    of: int
    cells: list[Cell]


class EffectRow(NamedTuple):
    """What it does to set `key` to `value` instead of `baseline`, all else and the seed alike."""

    key: str
    value: str
    baseline: str
    cells: list[tuple[Cell, str]]  # with "better", "worse" or "" where the interval has zero in it


@dataclass(frozen=True)
class Results:
    """The table of what was varied against final metrics, and differences of its rows on the same seeds."""

    columns: list[Column]
    rows: list[ResultRow]
    pairs: dict[str, dict[str, list[float | int | None]]]  # metric -> "i,j" -> mean of i - j, half interval, n
    effects: list[EffectRow]


def results(varied: Varied) -> Results:
    """Compute the table of results."""
    finals = [run.finals if run.ended else {} for run in varied.runs]
    metrics = ordered(name for own in finals for name in own)
    means = {metric: [_mean_of(row, finals, metric) for row in varied.rows] for metric in metrics}
    metrics.sort(key=lambda metric: 2 * sum(one.n > 0 for one in means[metric]) < len(varied.rows))  # seldom measured
    columns = [_column(metric, number, means[metric], varied) for number, metric in enumerate(metrics)]
    winners = {column.metric: best(means[column.metric], column.better) for column in columns}
    rows = []
    for number, row in enumerate(varied.rows):
        ended = sum(varied.runs[i].ended for i in row.runs)
        cells = [_cell(means[c.metric][number], c.decimals, number in winners[c.metric]) for c in columns]
        rows.append(ResultRow(row, ended, len(row.runs), cells))
    return Results(columns, rows, _pairs(varied, finals, metrics), list(_effects(varied, finals, columns)))


def ordered(names: Any) -> list[str]:
    """Return the metrics that a table shows, those that readers look at first in front."""
    kept = dict.fromkeys(name for name in names if not ASIDE.fullmatch(name))
    return sorted(kept, key=lambda name: next((i for i, one in enumerate(ORDER) if one.fullmatch(name)), len(ORDER)))


def _column(metric: str, number: int, means: Sequence[Mean], varied: Varied) -> Column:
    is_loss = "loss" in metric and bool(varied.loss_defining)
    return Column(metric, direction(metric), number < SHOWN, decimals(means), is_loss)


def _mean_of(row: Row, finals: Sequence[Mapping[str, float]], metric: str) -> Mean:
    return mean([finals[i][metric] for i in row.runs if metric in finals[i]])


def by_seed(varied: Varied, row: Row, finals: Sequence[Mapping[str, float]], metric: str) -> dict[str, float]:
    """Return a row's value of a metric for each seed; a seed that was run twice counts once, with its mean."""
    found: dict[str, list[float]] = {}
    for i in row.runs:
        if metric in finals[i]:
            found.setdefault(varied.runs[i].seed, []).append(finals[i][metric])
    return {seed: mean(values).mean for seed, values in found.items()}


def _pairs(
    varied: Varied, finals: Sequence[Mapping[str, float]], metrics: Sequence[str]
) -> dict[str, dict[str, list[float | int | None]]]:
    if len(varied.rows) > PAIRED_ROWS:
        return {}
    found: dict[str, dict[str, list[float | int | None]]] = {}
    for metric in metrics:
        own = [by_seed(varied, row, finals, metric) for row in varied.rows]
        for i in range(len(own)):
            for j in range(i):
                if (difference := paired(own[i], own[j])) is not None:
                    found.setdefault(metric, {})[f"{i},{j}"] = plain_pair(difference)
    return found


def plain_pair(pair: Paired) -> list[float | int | None]:
    """Return a paired difference as JSON can hold it."""
    return [rounded(pair.mean), rounded(pair.half), pair.n]


def _effects(varied: Varied, finals: Sequence[Mapping[str, float]], columns: Sequence[Column]) -> Iterator[EffectRow]:
    """Compare each value of each key with the key's first, over the runs that have a partner with all else alike."""
    if len(varied.keys) < 2:
        return
    for place, key in enumerate(varied.keys):
        baseline, *others = varied.choices(key)
        partners: dict[str, dict[str, int]] = {value: {} for value in (baseline, *others)}
        for i, own in enumerate(varied.values):
            rest = "\0".join([*own[:place], *own[place + 1 :], varied.runs[i].seed])
            partners[own[place]][rest] = i
        for value in others:
            cells = []
            for column in columns:
                ones, twos = (
                    {rest: finals[i][column.metric] for rest, i in partners[one].items() if column.metric in finals[i]}
                    for one in (value, baseline)
                )
                cells.append(_effect_cell(paired(ones, twos), column))
            if any(cell.text for cell, _ in cells):
                yield EffectRow(varied.names[place], value, baseline, cells)


def _effect_cell(pair: Paired | None, column: Column) -> tuple[Cell, str]:
    if pair is None:
        return Cell(), ""
    verdict = ""
    if pair.certain and column.better and not column.by_definition:
        verdict = "better" if (pair.mean < 0) == (column.better == "lower") else "worse"
    spread = "" if math.isnan(pair.half) else f"± {number(pair.half, column.decimals)}"
    text = number(pair.mean, column.decimals, sign=True)
    return Cell(text, f"{spread} (n = {pair.n})".strip(), pair.mean), verdict


# ---------------------------------------------------------------------------------------------------------------------
# numbers for people


def decimals(means: Sequence[Mean]) -> int:
    """Return how many digits after the point a column shows: two of its spread, or where none is known, of its range.

    More than six that count in its largest number are noise.
    """
    finite = [one for one in means if math.isfinite(one.mean)]
    spreads = [one.sd for one in finite if one.sd > 0]
    extent = max(one.mean for one in finite) - min(one.mean for one in finite) if finite else 0
    largest = max((abs(one.mean) for one in finite), default=0)
    scale = median(spreads) if spreads else extent / 10 or largest / 100
    if scale <= 0:
        return 2
    return max(0, min(1 - math.floor(math.log10(scale)), 5 - math.floor(math.log10(largest or scale)), 8))


def number(value: float, digits: int, *, sign: bool = False, least: int = 0) -> str:
    """Write a number with so many digits after the point; one so small that fewer than `least` count gets those."""
    if not math.isfinite(value):
        return str(value)
    mark = "+" if sign and value > 0 else "−" if value < 0 else ""
    size = abs(value)
    if size >= 1e7:
        return f"{mark}{size:.3e}"
    if size and (size < 0.5 * 10**-digits or size < 10 ** (least - 1 - digits)):
        return f"{mark}{size:.{max(2, least)}g}"
    return f"{mark}{size:,.{digits}f}"


def rounded(value: float, digits: int = 6) -> float | None:
    """Return a number as JSON can hold it, with so many digits that count; None for what is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _cell(found: Mean, digits: int, is_best: bool) -> Cell:
    if found.n == 0:
        return Cell()
    spread = "" if math.isnan(found.sd) else f"± {number(found.sd, digits)}"
    return Cell(number(found.mean, digits, least=COUNTING), spread, found.mean, is_best)


def duration(seconds: float | None) -> str:
    """Write seconds as people say them: 41 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def took(run: Run) -> float | None:
    """Return the seconds that a run trained, or where it did not train, that passed from its last start to its end."""
    trained = run.seconds.dropna()
    return float(trained.iloc[-1]) if len(trained) else run.wall_seconds


# ---------------------------------------------------------------------------------------------------------------------
# report.csv


def frame(varied: Varied, sweeps: Sequence[str]) -> pd.DataFrame:
    """Return a row a run: where it lies, what became of it, what was varied, what it cost, all its last values."""
    metrics = list(dict.fromkeys(name for run in varied.runs for name in run.finals))
    rows = []
    for run, sweep, values in zip(varied.runs, sweeps, varied.values, strict=True):
        known = {"sweep": sweep, "folder": str(run.folder), "state": run.state, "step": run.step}
        known |= {"error": run.status.error if run.status else None}
        known |= dict(zip(varied.keys, values, strict=True)) | {"seed": run.seed}
        known |= {"seconds": took(run), "parameters": run.record.get("parameters")}
        rows.append(known | {name: run.finals.get(name) for name in metrics})
    return pd.DataFrame(rows).convert_dtypes(convert_string=False, convert_floating=False)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write report.csv, whole or not at all; numbers as metrics.csv has them."""
    with atomic_write(path) as partial:
        table.to_csv(partial, index=False, float_format="%.8g", lineterminator="\n")
