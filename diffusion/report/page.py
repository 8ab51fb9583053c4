"""How do runs become a page? Reads the folders, computes what is shown, and writes one HTML file and one CSV file.

Figures, pictures and plotly's own script lie compressed in the page, which unpacks them when they come into view.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from diffusion import __version__
from diffusion.files import atomic_write
from diffusion.report.figures import SEEN, by_timestep, learning_curves
from diffusion.report.pictures import shown_pictures
from diffusion.report.runs import Sweep, read_sweeps
from diffusion.report.summary import (
    COST_COLUMNS,
    FORECAST_COLUMNS,
    comparison,
    costs,
    counts,
    forecasts,
    hints,
    problems,
    run_rows,
    verdict,
)
from diffusion.report.tables import Results, duration, frame, results, took, write_csv
from diffusion.report.varied import Varied, find_varied

HERE = Path(__file__).parent
PAGE = "report.html"
FEW = 10  # colours that a reader tells apart


def write_report(folders: Sequence[Path], *, out: Path | None = None) -> Path:
    """Write the page and, beside it, the CSV file of the same name."""
    if not folders:
        raise ValueError("a report is of at least one folder of a sweep or of a run; got none")
    page = folders[0] / PAGE if out is None else out / PAGE if out.is_dir() else out
    if page.suffix != ".html":
        raise ValueError(f"out={page} is to be a page; let its name end in .html")
    sweeps = read_sweeps(folders)
    varied = find_varied(sweeps)
    owners = [sweep.name for sweep in sweeps for _ in sweep.runs]
    table = page.with_suffix(".csv")
    write_csv(frame(varied, owners), table)
    with atomic_write(page) as partial:
        partial.write_text(render(sweeps, varied, csv_name=table.name), encoding="utf-8")
    return page


def render(sweeps: Sequence[Sweep], varied: Varied, *, csv_name: str) -> str:
    """Return the page's text."""
    found = results(varied)
    curves = learning_curves(varied)
    timesteps = by_timestep(varied.runs)
    pictures = shown_pictures(varied.runs)
    times = [seconds for run in varied.runs if (seconds := took(run)) is not None]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["zip"] = zip
    return environment.get_template("page.html.j2").render(
        title=" + ".join(dict.fromkeys(sweep.name for sweep in sweeps)),
        sweeps=sweeps,
        varied=varied,
        seeds=list(dict.fromkeys(run.seed for run in varied.runs if run.seed)),
        loss_defining=varied.loss_defining,
        counts=counts(varied.runs),
        ended=any(run.ended for run in varied.runs),
        unended=any(run.state in ("running", "waiting") for run in varied.runs),
        total_time=duration(sum(times)) if times else "",
        devices=devices(varied),
        verdict=verdict(found),
        problems=problems(varied),
        hints=hints(varied),
        results=found,
        gaps=any(row.ended and not all(cell.text for cell in row.cells) for row in found.rows),
        costs=costs(varied),
        cost_columns=COST_COLUMNS,
        forecasts=forecasts(varied),
        forecast_columns=FORECAST_COLUMNS,
        runs=run_rows(varied, found),
        has_curves=bool(curves["runs"]["of"]),
        has_rows=bool(curves["rows"]["of"]),
        has_seconds=bool(curves["seconds"]["of"]),
        every=curves["runs"]["every"],
        has_timesteps=bool(timesteps),
        has_pictures=bool(pictures["kinds"]),
        pictures_note=pictures_note(varied, pictures),
        csv_name=csv_name,
        time=datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        version=__version__,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup("".join((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "figures.js"))),
        data=packed(page_data(varied, found, curves, timesteps)),
        pictures=packed(pictures),
        plotly=plotly_script(),
    )


def page_data(varied: Varied, found: Results, curves: Any, timesteps: Any) -> dict[str, Any]:
    """Return what the page's script reads."""
    rows = {run: number for number, row in enumerate(varied.rows) for run in row.runs}
    runs = [
        {"label": label, "row": rows[i], "values": varied.values[i], "seed": varied.runs[i].seed}
        for i, label in enumerate(varied.labels)
    ]
    repeated = any(pair[2] > 1 for pairs in found.pairs.values() for pair in pairs.values())
    measured = [column.metric for column in found.columns if column.metric in curves["runs"]["of"]]
    return {
        "runs": runs,
        "rows": [row.label for row in varied.rows],
        "keys": varied.names,
        "columns": [column._asdict() for column in found.columns],
        "pairs": found.pairs,
        "baseline": "0" if repeated else "",
        "curves": curves,
        "metric": next((name for name in measured if len_most(curves, name) > 1), None),
        "colour": colour(varied),
        "timesteps": timesteps,
        "quantity": quantity(varied, timesteps),
        "compare": comparison(varied) if len(runs) > 1 else None,
    }


def len_most(curves: Any, metric: str) -> int:
    """Return the points of a metric's longest curve."""
    return max(len(curve[1]) for curve in curves["runs"]["of"][metric].values())


def colour(varied: Varied) -> str:
    """Choose what colours tell apart: rows, or where those are too many, the key with most values that are not."""
    if len(varied.rows) == 1:
        return "run"
    if len(varied.rows) <= FEW:
        return "configuration"
    few = [(len(varied.choices(key)), name) for key, name in zip(varied.keys, varied.names, strict=True)]
    return max([(count, name) for count, name in few if count <= FEW], default=(0, "configuration"))[1]


def quantity(varied: Varied, timesteps: Any) -> int:
    """Choose what to draw by timestep first: where the loss itself was varied, the error of x0, which compares."""
    names = [one["name"] for one in timesteps]
    return names.index(SEEN["x0_mse"]) if varied.loss_defining and SEEN["x0_mse"] in names else 0


def devices(varied: Varied) -> list[str]:
    """Return the devices that runs were started on."""
    starts = [start for run in varied.runs for start in run.record.get("starts") or []]
    return list(dict.fromkeys(str(start["device"]) for start in starts if start.get("device")))


def pictures_note(varied: Varied, pictures: dict[str, Any]) -> str:
    """Say on which seeds the pictures were drawn, and what was done to fit them in."""
    drawn = [run for run in varied.runs if run.pictures]
    seeds = {run.flat.get("callbacks.samples.seed", run.flat.get("seed")) for run in drawn}
    words = ["The last picture of each run."]
    if len(seeds) == 1:
        words.append("Equal places hold equal seeds: all runs began from the same noise.")
    elif seeds:
        words.append("The runs drew on different seeds, so equal places do not compare.")
    if pictures["scaled"]:
        words.append("Pictures are scaled down; the originals lie in the run folders.")
    if pictures["left_out"]:
        words.append("Some earlier steps were left out, to keep the page small.")
    return " ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# packing


def packed(value: Any) -> Markup:
    """Return data as compressed JSON in base64; no text in it can end the script that it lies in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(_compressed(text))


@cache
def plotly_script() -> Markup:
    """Return plotly's script, compressed: 2 MB of text instead of 5."""
    return Markup(_compressed(get_plotlyjs(), level=9))


def _compressed(text: str, level: int = 6) -> str:
    return base64.b64encode(gzip.compress(text.encode(), level, mtime=0)).decode()
