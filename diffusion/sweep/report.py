"""What does a sweep leave to read? Its report, made by a callback of Hydra's when the last job has ended."""

import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback


class Report(Callback):
    """Make report.html and report.csv of a sweep and print where they are."""

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        """Build the report of the sweep's folder. Whatever goes wrong there is told, and the sweep's result stands."""
        sweep_dir = Path(config.hydra.sweep.dir)
        try:
            from diffusion.report import build  # pandas and plotly: not for each job

            print(f"report: {build([sweep_dir])}", file=sys.stderr)
        except Exception as error:  # of a page about runs that are safe on disk
            again = f"uv run python -m diffusion.report {shlex.quote(str(sweep_dir))}"
            print(f"the report failed: {type(error).__name__}: {error}; to make it again: {again}", file=sys.stderr)
