"""What should a reader see first? Which choice was best and by how much, what went wrong, and what it all cost."""

import math
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from diffusion.report import difference, microscope
from diffusion.report.runs import IMAGES_PER_SECOND, UNKNOWN, Run
from diffusion.report.statistics import mean
from diffusion.report.tables import COUNTING, Results, duration, number, took
from diffusion.report.varied import Varied

MEMORY = "train/memory_gb"
STATES = ("finished", "running", "waiting", "failed", "killed", "preempted", "pruned", UNKNOWN)  # in a reader's order
WRONG = ("failed", "killed", "preempted", "pruned")
LOG_LINES = 30
WORSE = {"lower": "Lowest", "higher": "Highest"}


class Verdict(NamedTuple):
    """The best row by the first metric whose direction is known, and its lead on the next one."""

    word: str  # "Lowest", "Highest"
    metric: str
    row: str
    value: str
    second: str
    lead: str  # on the same seeds; "" where no two share one
    doubt: str  # why the lead may be chance; "" where its interval leaves out zero
    by_definition: bool  # the loss itself was varied: no verdict


class Problem(NamedTuple):
    """A run that did not end well, or whose files cannot all be read."""

    label: str
    state: str
    step: str
    error: str
    log: str
    troubles: tuple[str, ...]


class Hint(NamedTuple):
    """A hint of the loss microscope, and the runs that it was seen in."""

    name: str
    seen: str
    means: str
    check: str
    runs: list[str]


class Cost(NamedTuple):
    """What a row of runs cost; texts, with the share of the table's largest value for a bar, or None."""

    label: str
    cells: list[tuple[str, float | None, float | None]]  # text, share of the column's largest, what to sort by


class RunRow(NamedTuple):
    """A run in the table of all runs."""

    number: int
    label: str
    state: str
    step: str
    cells: list[str]
    time: str
    seconds: float | None
    folder: str


def verdict(results: Results) -> Verdict | None:
    """Name the best row; None where there are not two rows to compare by a metric that has a direction."""
    for place, column in enumerate(results.columns):
        if column.better is None:
            continue
        rows = [row for row in results.rows if (value := row.cells[place].value) is not None and math.isfinite(value)]
        if len(rows) < 2:
            continue
        rows.sort(key=lambda row: row.cells[place].value, reverse=column.better == "higher")
        first, second = rows[:2]
        lead, doubt = _lead(results, column.metric, results.rows.index(first), results.rows.index(second))
        cell = first.cells[place]
        value = f"{cell.text} {cell.spread}".strip()
        names = column.metric, first.row.label
        return Verdict(WORSE[column.better], *names, value, second.row.label, lead, doubt, column.by_definition)
    return None


def _lead(results: Results, metric: str, first: int, second: int) -> tuple[str, str]:
    pair = results.pairs.get(metric, {}).get(f"{max(first, second)},{min(first, second)}")
    if pair is None or pair[0] is None:
        return "", ""
    digits = next(column.decimals for column in results.columns if column.metric == metric)
    size, half, n = abs(pair[0]), pair[1], pair[2]
    lead = number(size, digits, least=2)
    if half is None:
        return lead, "one seed in common says nothing of chance"
    doubt = "the 95 % interval has zero in it, so chance may have decided" if size <= half else ""
    return f"{lead} ± {number(half, digits)} (n = {n})", doubt


def counts(runs: Sequence[Run]) -> list[tuple[str, int]]:
    """Count the runs in each state, those of a state that no run has left out."""
    found = {state: sum(run.state == state for run in runs) for state in STATES}
    return [(state, count) for state, count in found.items() if count]


def problems(varied: Varied) -> list[Problem]:
    """Return the runs that a reader has to look after, those that failed first."""
    found = []
    for run, label in zip(varied.runs, varied.labels, strict=True):
        if run.state in WRONG or run.troubles:
            error = (run.status.error if run.status else None) or ""
            log = "\n".join(run.log_tail.splitlines()[-LOG_LINES:])
            found.append(Problem(label, run.state, _step(run), error, log, run.troubles))
    return sorted(found, key=lambda one: WRONG.index(one.state) if one.state in WRONG else len(WRONG))


def _step(run: Run) -> str:
    last = run.status.max_steps if run.status else None
    if run.step is None:
        return ""
    return f"{run.step:,} of {last:,}" if last and last > 0 else f"{run.step:,}"


def hints(varied: Varied) -> list[Hint]:
    """Return the microscope's hints, each once with all runs that it was seen in."""
    found: dict[tuple[str, str], Hint] = {}
    for run, label in zip(varied.runs, varied.labels, strict=True):
        for hint in microscope.read_hints(run.folder):
            texts = {name: str(hint.get(name) or "") for name in ("name", "seen", "means", "check")}
            key = texts["name"], texts["means"]
            found.setdefault(key, Hint(**texts, runs=[])).runs.append(label)
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------------------
# cost

COST_COLUMNS = ("images/s", "peak memory (GB)", "time a run", "time in all", "parameters", "device")


def costs(varied: Varied) -> list[Cost]:
    """Return a line a row: throughput and memory as measured, time, size, and where it ran."""
    table = [_cost(varied, row.runs) for row in varied.rows]
    largest = [max((line[i][1] or 0 for line in table), default=0) for i in range(len(COST_COLUMNS))]
    lines = []
    for row, line in zip(varied.rows, table, strict=True):
        cells = [
            (text, None if value is None or not most or i > 3 else value / most, value)
            for i, ((text, value), most) in enumerate(zip(line, largest, strict=True))
        ]
        lines.append(Cost(row.label, cells))
    return lines if any(text for line in lines for text, _, _ in line.cells) else []


def _cost(varied: Varied, numbers: Sequence[int]) -> list[tuple[str, float | None]]:
    runs = [varied.runs[i] for i in numbers]
    rates = [float(rate.median()) for run in runs if len(rate := run.series(IMAGES_PER_SECOND).dropna())]
    memory = [float(used.max()) for run in runs if len(used := run.series(MEMORY).dropna())]
    times = [seconds for run in runs if (seconds := took(run)) is not None]
    sizes = sorted({size for run in runs if isinstance(size := run.record.get("parameters"), int)})
    devices = dict.fromkeys(_device(run) for run in runs)
    return [
        _spread(rates, 0 if max(rates, default=0) >= 100 else 1),
        (number(max(memory), 2), max(memory)) if memory else ("", None),
        (duration(mean(times).mean), mean(times).mean) if times else ("", None),
        (duration(sum(times)), sum(times)) if times else ("", None),
        (" / ".join(map(_count, sizes)), float(sizes[0])) if sizes else ("", None),
        (", ".join(filter(None, devices)), None),
    ]


def _spread(values: Sequence[float], digits: int) -> tuple[str, float | None]:
    if not values:
        return "", None
    found = mean(values)
    spread = "" if math.isnan(found.sd) else f" ± {number(found.sd, digits)}"
    return f"{number(found.mean, digits)}{spread}", found.mean


def _count(parameters: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)


def _device(run: Run) -> str:
    start = (run.record.get("starts") or [{}])[-1]
    device, many = start.get("device"), start.get("world_size") or 1
    return "" if not device else f"{many} × {device}" if many > 1 else str(device)


FORECAST_COLUMNS = ("time forecast", "measured", "off by", "memory forecast (GB)", "measured", "off by", "FLOPs a step")


def forecasts(varied: Varied) -> list[tuple[str, list[str]]]:
    """Set beside each other what finished runs said at their start that they would cost, and what they did."""
    lines = []
    for run, label in zip(varied.runs, varied.labels, strict=True):
        said = run.forecast
        once = len(run.record.get("starts") or ()) == 1  # a resumed run took several programs
        if not said or run.state != "finished":
            continue
        peak = run.series(MEMORY).max() if len(run.series(MEMORY)) else None
        held = said.get("memory")
        total = _number(held.get("total")) if isinstance(held, dict) else None
        time = _against(_number(said.get("total_seconds")), run.wall_seconds if once else None, duration)
        memory = _against(None if total is None else total / 2**30, peak, lambda size: number(size, 2, least=2))
        flops = _number(said.get("flops_per_step"))
        lines.append((label, [*time, *memory, "" if flops is None else f"{flops:.3g}"]))
    return lines


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _against(said: float | None, was: float | None, write: Callable[[float], str]) -> tuple[str, str, str]:
    known = said is not None and was is not None and was > 0
    off = f"{'+' if said >= was else '−'}{abs(said / was - 1):.0%}" if known else ""
    return "" if said is None else write(said), "" if was is None else write(was), off


# ---------------------------------------------------------------------------------------------------------------------
# all runs


def run_rows(varied: Varied, results: Results) -> list[RunRow]:
    """Return a line a run, with the last values of the metrics that the table of results shows."""
    columns = [column for column in results.columns if column.shown] or []
    rows = []
    for place, (run, label) in enumerate(zip(varied.runs, varied.labels, strict=True)):
        cells = [
            number(run.finals[c.metric], c.decimals, least=COUNTING) if c.metric in run.finals else "" for c in columns
        ]
        seconds = took(run)
        rows.append(RunRow(place, label, run.state, _step(run), cells, duration(seconds), seconds, str(run.folder)))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# two runs

PARTING = ("train/loss", "val/loss", "val/loss_ema", "train/grad_norm")
LONG = 20_000  # characters of a value that the page holds


def comparison(varied: Varied) -> dict[str, Any]:
    """Return what the page compares two runs by: facts that differ among any of them, and steps at which they part."""
    facts = [
        {
            "config": difference.without_places(run.flat),
            "code": _code(run),
            "data": run.record.get("data") or {},
            "environment": difference.environment(run) if run.record.get("starts") else {},
        }
        for run in varied.runs
    ]
    sections = {name: _differing([own[name] for own in facts]) for name in ("config", "code", "data", "environment")}
    metrics = [name for name in PARTING if any(name in run.metrics for run in varied.runs)]
    return {
        "sections": sections,
        "known": {name: [bool(own[name]) for own in facts] for name in sections},
        "metrics": metrics,
        "parts": {name: difference.parting_matrix(varied.runs, name) for name in metrics},
        "drifts": {
            name: difference.parting_matrix(varied.runs, name, tolerance=difference.TOLERANCE) for name in metrics
        },
        "tolerance": difference.TOLERANCE,
    }


def _code(run: Run) -> dict[str, Any]:
    starts = run.record.get("starts") or []
    if not starts:
        return {}
    files = {f"uncommitted: {name}": "\n".join(lines) for name, lines in difference.changed_files(run.changes).items()}
    return {"commit": starts[-1].get("commit") or "unknown"} | files


def _differing(mappings: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Return the keys that are not the same in all: {"texts": distinct values, "of": which one each has, or None}."""
    keys = dict.fromkeys(key for own in mappings for key in own)
    found = {}
    for key in keys:
        values = [_short(own[key]) if key in own else None for own in mappings]
        texts = list(dict.fromkeys(value for value in values if value is not None))
        if len(set(values)) > 1:
            found[key] = {"texts": texts, "of": [None if value is None else texts.index(value) for value in values]}
    return found


def _short(value: Any) -> str:
    text = str(value)
    if len(text) <= LONG:
        return text
    return f"{text[:LONG]}… ({len(text):,} characters, sha256 {sha256(text.encode()).hexdigest()[:12]})"
