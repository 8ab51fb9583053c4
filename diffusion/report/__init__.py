"""Which choice was better? One page of all the runs of a sweep, and what it is computed from."""

from collections.abc import Sequence
from pathlib import Path


def build(folders: Sequence[str | Path], *, out: str | Path | None = None) -> Path:
    """Write the report of all runs in these folders, and a report.csv beside it; return the page's path.

    A folder is a sweep's, a run's, or one that holds either. `out` is the page; None: report.html in the first folder.
    Raises ValueError where the folders hold no run.
    """
    from diffusion.report.page import write_report  # pandas and plotly: not for whoever only imports the package

    return write_report([Path(folder) for folder in folders], out=None if out is None else Path(out))
