"""What did the loss microscope see of a run? Its curves by timestep, and the hints that they gave.

Written by `diffusion.training.microscope` to microscope.csv and hints.yaml; a folder without them has seen nothing.
"""

import io
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

CURVES, HINTS = "microscope.csv", "hints.yaml"
COLUMNS = (
    "step",
    "t",
    "alpha",  # x_t = alpha x0 + sigma eps
    "sigma",
    "loss",  # what training minimises, here
    "grad_norm",  # of this timestep's loss, by the network's parameters
    "mse",  # of what the network answers, in the space of its parameterization
    "mse_trivial",  # of the best answer that knows the data's mean and variance only (Wiener)
    "mse_null",  # without the condition; empty where there is none
    "mse_ema",  # of the averaged weights; empty where there are none
    "x0_mse",  # of the x0 that follows from the answer, in data units
    "x0_trivial",
    "eps_error",  # of the answer taken for eps, relative to the mean square of eps: 1 is what answering 0 gets
    "x0_error",
    "v_error",
    "eps_correlation",  # of the answer with eps
    "x0_correlation",
    "v_correlation",
    "x_correlation",
    "accuracy",  # of a classifier, which has none of the columns from mse on
)


def read(folder: str | Path) -> pd.DataFrame:
    """Return the curves of a run: a row a step and timestep, `COLUMNS` as float64; no rows where there are none."""
    path = Path(folder) / CURVES
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    text = text[: text.rfind("\n") + 1]  # without a last line that a kill cut short
    try:
        table = pd.read_csv(io.StringIO(text), on_bad_lines="skip") if text else pd.DataFrame()
    except (pd.errors.ParserError, pd.errors.EmptyDataError):
        table = pd.DataFrame()
    table = table.reindex(columns=list(COLUMNS)).apply(pd.to_numeric, errors="coerce").astype(float)
    table = table[table["step"].notna() & table["t"].notna()].astype({"step": int, "t": int})
    return table.sort_values(["step", "t"], kind="stable").reset_index(drop=True)


def read_hints(folder: str | Path) -> list[dict[str, Any]]:
    """Return the hints of a run: {"name", "seen", "means", "check", "since", "until"}; the last two are steps."""
    path = Path(folder) / HINTS
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []
    except (yaml.YAMLError, UnicodeDecodeError):
        return []
    return [hint for hint in found if isinstance(hint, dict) and "name" in hint] if isinstance(found, list) else []
