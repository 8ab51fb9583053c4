"""What do the report's figures draw? Curves by step, by time and by timestep, as plain lists that a page can hold."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from diffusion.report import microscope
from diffusion.report.runs import Run
from diffusion.report.tables import ordered, rounded
from diffusion.report.varied import Varied

POINTS = 400_000  # numbers in all curves together
MOST, LEAST = 2_000, 60  # points of one curve
QUARTER = re.compile(r"(.+)_q([1-4])(_.+)?")
DIGITS = 5
# What the microscope's columns are called; those that are not listed are no curve to look at.
SEEN = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "x0_mse": "predicted-x0 error",
    "x0_trivial": "predicted-x0 error of the best guess without a network",
    "mse": "error of the network's answer",
    "mse_ema": "error of the averaged weights' answer",
    "accuracy": "accuracy",
}


class Curves:
    """Curves that share their x values: `plain` is {"x": [[...], ...], "of": {name: {number: [x's place, [y, ...]]}}}.

    Where a figure would hold too many points, every n-th one is kept and the last (`every` says which n is largest).
    """

    def __init__(self, most: int = MOST) -> None:
        self.most, self.every = most, 1
        self._places: dict[tuple[float, ...], int] = {}
        self._of: dict[str, dict[str, list[Any]]] = {}

    def add(self, name: str, number: int, values: pd.Series, spread: pd.Series | None = None) -> None:
        """Add a curve by its index; `spread` belongs to the same points."""
        if not len(values):
            return
        stride = -(-len(values) // self.most)
        kept = np.unique([*range(stride - 1, len(values), stride), len(values) - 1]) if stride > 1 else slice(None)
        self.every = max(self.every, stride)
        x = tuple(values.index[kept].tolist())
        place = self._places.setdefault(x, len(self._places))
        columns = [values] if spread is None else [values, spread]
        self._of.setdefault(name, {})[str(number)] = [place, *(plain(column.iloc[kept]) for column in columns)]

    @property
    def plain(self) -> dict[str, Any]:
        return {"x": [list(x) for x in self._places], "of": self._of, "every": self.every}


def plain(values: pd.Series) -> list[float | None]:
    """Return numbers as JSON can hold them."""
    return [rounded(value, DIGITS) for value in values]


def learning_curves(varied: Varied) -> dict[str, Any]:
    """Return each metric of each run by step, the mean and spread of each row of several, and seconds by step."""
    names = list(dict.fromkeys(name for run in varied.runs for name in run.metrics))
    most = max(LEAST, min(MOST, POINTS // max(1, len(names) * len(varied.runs))))
    runs, rows, seconds = Curves(most), Curves(most), Curves(most)
    for number, run in enumerate(varied.runs):
        for name in names:
            runs.add(name, number, run.series(name))
        seconds.add("seconds", number, run.seconds.dropna())
    for number, row in enumerate(varied.rows):
        for name in names:
            if (table := _together([varied.runs[i].series(name) for i in row.runs])) is not None:
                rows.add(name, number, table.mean(axis=1), table.std(axis=1))
    return {"metrics": _grouped(names), "runs": runs.plain, "rows": rows.plain, "seconds": seconds.plain}


def _together(series: Sequence[pd.Series]) -> pd.DataFrame | None:
    """Return curves of runs that differ by their seed at the steps that all have; None where there are not two."""
    measured = [one for one in series if len(one)]
    if len(measured) < 2:
        return None
    table = pd.concat(measured, axis=1, join="inner")
    return table if len(table) else None


def _grouped(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Sort metrics into what a reader would look for together."""
    main = ordered(names)
    quarters = [name for name in names if QUARTER.fullmatch(name)]
    rest = [name for name in names if name not in main and name not in quarters]
    groups = [("Results", main), ("Training", rest), ("By quarter of the timesteps", quarters)]
    return [(title, them) for title, them in groups if them]


def by_timestep(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return what is known by timestep at the end of each run: the microscope's curves, and losses by quarter."""
    quantities = []
    tables = [microscope.read(run.folder) for run in runs]
    for column, title in SEEN.items():
        curves = Curves()
        for number, table in enumerate(tables):
            last = table[table["step"] == table["step"].max()].set_index("t")[column].dropna()
            curves.add(title, number, last)
        if curves.plain["of"]:
            quantities.append({"name": title, "axis": "timestep t", "curves": curves.plain})
    for name, values in _quarters(runs).items():
        curves = Curves()
        for number, four in values.items():
            curves.add(name, number, pd.Series(four, index=[1, 2, 3, 4]))
        quantities.append({"name": f"{name} by quarter", "axis": "quarter of the timesteps, 1: least noise",
                           "curves": curves.plain})  # fmt: skip
    return quantities


def _quarters(runs: Sequence[Run]) -> Mapping[str, dict[int, list[float]]]:
    """Return {metric: {run: its last values in the four quarters}}."""
    found: dict[str, dict[int, list[float]]] = {}
    for number, run in enumerate(runs):
        for name in run.metrics:
            if (match := QUARTER.fullmatch(name)) and match[2] == "1":
                four = [f"{match[1]}_q{quarter}{match[3] or ''}" for quarter in (1, 2, 3, 4)]
                if all(one in run.finals for one in four):
                    values = [run.finals[one] for one in four]
                    found.setdefault(f"{match[1]}{match[3] or ''}", {})[number] = values
    return found
