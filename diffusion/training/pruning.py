"""When is a run of a search not worth its end? When the search's pruner says so, by what other runs had by then.

A search leaves a trial.yaml in the run folder; without one the callback does nothing.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from diffusion.sweep.trial import TRIAL_FILE, OpenTrial, check_pruner
from diffusion.training.checkpoints import current_row


class Pruned(SystemExit):
    """A run has ended before its last step because it would not be among the best; its exit status is 0."""

    state = "pruned"  # what STATUS says of such a run

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.code = 0


class Pruning(Callback):
    """Report each new value of the config's `objective`, a column of metrics.csv, and raise `Pruned` where it is bad.

    `pruner` "median" ends a run whose best value so far is worse than the median of what the runs that came to their
    end had at that step, once there are `startup_trials` of those and not before step `warmup_steps`; "hyperband" (Li
    et al. 2018, arXiv 1603.06560) lets most runs end early and the best third of them go on three times as long.
    """

    def __init__(
        self, *, config: Mapping[str, Any], pruner: str = "median", startup_trials: int = 5, warmup_steps: int = 0
    ) -> None:
        check_pruner(pruner, startup_trials=startup_trials, warmup_steps=warmup_steps)
        self.objective = config.get("objective")
        self.settings = {"pruner": pruner, "startup_trials": startup_trials, "warmup_steps": warmup_steps}
        self._searched = False
        self._trial: OpenTrial | None = None  # on the first process
        self._reported = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the trial that this run is."""
        folder = Path(trainer.default_root_dir)
        self._reported = trainer.global_step
        self._searched = self.objective is not None and not trainer.fast_dev_run and (folder / TRIAL_FILE).exists()
        if self._searched and trainer.is_global_zero:
            self._trial = OpenTrial(folder, max_steps=trainer.max_steps, **self.settings)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Report what was measured after the step before, when all that belongs to it is done."""
        self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what the last step brought: others are compared with it."""
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if not self._searched or step == self._reported:
            return
        reason = self._judged(trainer, step) if trainer.is_global_zero else None
        reason = trainer.strategy.broadcast(reason) if trainer.world_size > 1 else reason
        if reason is not None:
            raise Pruned(reason)

    def _judged(self, trainer: Trainer, step: int) -> str | None:
        """Report the value of this step, if it has one; return why the run should end, or None."""
        value = current_row(trainer).get(self.objective)
        if value is None:
            return None
        self._reported = step
        if self._trial.goes_on(float(value), step) or step == trainer.max_steps:
            return None
        reason = f"{self.objective} is {float(value):.6g} at step {step}: the {self._trial.name} pruner ends the run"
        print(f"pruned: {reason}", file=sys.stderr)
        return reason
