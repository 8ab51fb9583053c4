"""How far is the run? One bar with the time left; in a log file, a readable line now and then."""

import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffusion.training.metrics import TrainingLog

SHOWN = {"train/loss": "loss", "val/loss": "val", "val/loss_ema": "val ema", "train/images_per_second": "img/s"}


class StepBar(ProgressBar):
    """Count optimizer steps. Where standard error is no terminal, print a line at most every `seconds_a_line`."""

    def __init__(self, seconds_a_line: float = 20.0) -> None:
        super().__init__()
        self.seconds_a_line = seconds_a_line
        self._bar: Progress | None = None
        self._log: TrainingLog | None = None
        self._first_step = self._shown_step = 0
        self._started = self._printed = 0.0
        self._enabled = True

    def disable(self) -> None:  # Lightning calls it on all ranks but the first
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar on a terminal, at the step where the run goes on."""
        if not self._enabled:
            return
        self._log = next((callback for callback in trainer.callbacks if isinstance(callback, TrainingLog)), None)
        self._first_step = self._shown_step = trainer.global_step
        self._started = self._printed = time.monotonic()
        if sys.stderr.isatty():
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=Console(stderr=True),
                refresh_per_second=2,
            )
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._bar.add_task("train", total=total, completed=trainer.global_step, metrics="")
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Move the bar, or print a line now and then."""
        step = trainer.global_step
        if not self._enabled or step == self._shown_step:
            return
        self._shown_step = step
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, metrics=self.metrics())
            return
        now = time.monotonic()
        if now - self._printed >= self.seconds_a_line or step == trainer.max_steps:
            self._printed = now
            print(self.line(step, trainer.max_steps, now - self._started), file=sys.stderr, flush=True)

    def metrics(self) -> str:
        """Return the latest metrics in a few words."""
        latest = self._log.latest if self._log else {}
        return "  ".join(f"{short} {latest[name]:.4g}" for name, short in SHOWN.items() if name in latest)

    def line(self, step: int, total: int, seconds: float) -> str:
        """Return a line for log files: steps, time since the start and left, metrics."""
        elapsed = timedelta(seconds=round(seconds))
        if total <= 0:
            return f"step {step}  {elapsed}  {self.metrics()}"
        left = timedelta(seconds=round(seconds / max(1, step - self._first_step) * (total - step)))
        return f"step {step}/{total}  {elapsed} gone  {left} left  {self.metrics()}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal in order when a run fails."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
