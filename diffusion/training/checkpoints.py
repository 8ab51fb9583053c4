"""How does a run survive being stopped? Atomic checkpoints at optimizer steps, on a schedule and on a signal.

`checkpoints/last.ckpt` is all that a resumed run needs; `model.safetensors` is all that sampling needs.
"""

import math
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from diffusion.processes import SIGNALS
from diffusion.run_folder import write_status
from diffusion.training.checkpoint_files import BEST, NEW, keep, last_checkpoint, promote, remove
from diffusion.training.export import export_model
from diffusion.training.guard import NonFiniteLoss
from diffusion.training.metrics import MetricsCSV
from diffusion.training.resume import samples_a_step
from diffusion.training.sharded import norm_of


class Interrupted(Exception):
    """A signal ended the run, after a checkpoint was written to `path`."""

    state = "preempted"  # what STATUS says of such a run

    def __init__(self, number: int, step: int, path: Path) -> None:
        super().__init__(f"{signal.Signals(number).name} after step {step}; saved {path}")
        self.number, self.step, self.path = number, step, path


class Checkpoints(Checkpoint):
    """Keep `checkpoints/last.ckpt` current: every n optimizer steps, at the last one, and when a signal asks to stop.

    `keep_last` of them stay: last.ckpt, last-1.ckpt, ... `keep_every_n_steps` also keeps step=0010000.ckpt. `best`
    names a metric, such as val/loss_ema: the `keep_best` checkpoints with the least of it (`best_mode` max: the most)
    stay, too, the first of them as best.ckpt with best.safetensors. Validation that finds a new best saves; of other
    columns of metrics.csv the values count that are there when a checkpoint is due.
    `export` writes `model.safetensors` (the first average where there is one) beside each checkpoint; `config` and
    `facts` go into its header (`save_model`).

    A checkpoint is written after all that belongs to its step, validation included, so that a resumed run repeats
    and omits nothing. `SIGNALS` raise `Interrupted` from there; a second SIGINT (Ctrl-C) stops at once.
    """

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        every_n_steps: int = 1000,
        keep_last: int = 2,
        keep_every_n_steps: int | None = None,
        best: str | None = None,
        best_mode: str = "min",
        keep_best: int = 1,
        export: bool = True,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep_every_n_steps", keep_every_n_steps)):
            if value is not None and value < 1:
                raise ValueError(f"callbacks.checkpoints.{name} is a number of optimizer steps >= 1, got {value}")
        for name, value in (("keep_last", keep_last), ("keep_best", keep_best)):
            if value < 1:
                raise ValueError(f"callbacks.checkpoints.{name} is a number of checkpoints >= 1, got {value}")
        self.config, self.facts = config, facts
        self.every_n_steps, self.keep_every_n_steps, self.export = every_n_steps, keep_every_n_steps, export
        self.keep_last = keep_last
        self.best = None if best is None else Best(best, best_mode, keep_best)
        self.signal: int | None = None
        self._last_step = 0
        self._at_step = False  # no micro-batch has been added to the gradients since the last step
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals that end a run, and finish what a kill between two files has left."""
        self._last_step = trainer.global_step
        self.signal = None
        if self.best is not None:
            self._catch_up(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:  # Lightning puts back what was there when the run ends
                if hasattr(signal, name):
                    signal.signal(getattr(signal, name), self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            again = " (once more stops at once)" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            print(f"{name}: stopping after this step with a checkpoint{again}", file=sys.stderr)
        elif number == signal.SIGINT:  # a scheduler repeats itself: to each process, and when the time of grace ends
            raise SystemExit(128 + number)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Save where a step is complete and due, unless validation is about to add its metrics."""
        self._at_step = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if self._at_step and not validation_follows(trainer):
            self._save_if_due(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited for the validation of this step."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._at_step:
            if self.best is not None:
                self.best.check(trainer)
            self._save_if_due(trainer, pl_module, best=self.best is not None and self.best.improves(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        if self._at_step and self._saved_step != trainer.global_step:
            self.save(trainer, pl_module)

    def _save_if_due(self, trainer: Trainer, pl_module: LightningModule, *, best: bool = False) -> None:
        step = trainer.global_step
        stopped = self._stopped(trainer)
        if stopped or best or step % self.every_n_steps == 0 or step == trainer.max_steps or self._kept(step):
            self.save(trainer, pl_module)
        if stopped:
            raise Interrupted(stopped, step, last_checkpoint(trainer.default_root_dir))

    def _kept(self, step: int) -> bool:
        return self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0

    def _stopped(self, trainer: Trainer) -> int | None:
        """Return the signal that asks to stop; ranks agree on it, so that all stop after the same step."""
        if trainer.world_size == 1:
            return self.signal
        heard = torch.tensor(float(self.signal or 0), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(heard, reduce_op="max")) or None

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write last.ckpt, then model.safetensors. Raises OSError (the previous files stay) or `NonFiniteLoss`."""
        if trainer.fast_dev_run:
            return
        if not torch.isfinite(norm_of(pl_module.model.parameters())):
            raise NonFiniteLoss(f"the weights became non-finite at or before step {trainer.global_step}")
        run_dir = Path(trainer.default_root_dir)
        for logger in trainer.loggers:
            logger.save()  # the rows up to this step, before the checkpoint that says they are done
        if self.best is not None:
            self.best.note(trainer)
        new = run_dir / "checkpoints" / NEW
        if trainer.is_global_zero:
            remove(new)  # what a kill has left of a folder of shards
        trainer.save_checkpoint(new, weights_only=False)
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            self._arrange(new, trainer)
        if self.export:
            export_model(run_dir / "model.safetensors", trainer, pl_module, self.config, self.facts)
            if self.best is not None and self.best.first_step == trainer.global_step and trainer.is_global_zero:
                keep(run_dir / "model.safetensors", run_dir / "best.safetensors")

    def _arrange(self, new: Path, trainer: Trainer) -> None:
        """Give a checkpoint that is wholly written its names, and take away those that are no longer kept."""
        step = trainer.global_step
        path = promote(new, self.keep_last)
        if self._kept(step):
            keep(path, path.with_name(f"step={step:07d}.ckpt"))
        if self.best is not None:
            self.best.arrange(path, step)
        max_steps = trainer.max_steps if trainer.max_steps > 0 else None
        write_status(trainer.default_root_dir, "running", step=step, max_steps=max_steps)

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best checkpoint where the run was killed before that; those of another run do not count here."""
        run_dir, step = Path(trainer.default_root_dir), trainer.global_step
        last = last_checkpoint(run_dir)
        if trainer.ckpt_path is None or Path(trainer.ckpt_path).parent != last.parent:
            self.best.found = []
        elif Path(trainer.ckpt_path) == last:
            if trainer.is_global_zero:
                self.best.arrange(last, step)
            if self.export and self.best.first_step == step:
                export_model(run_dir / "best.safetensors", trainer, pl_module, self.config, self.facts)

    # -- what rides along ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint say with which settings it was made, and what its model knows of the data."""
        checkpoint["config"], checkpoint["facts"] = dict(self.config), dict(self.facts)
        checkpoint["samples_a_step"] = samples_a_step(trainer, getattr(trainer.datamodule, "batch_size", None))

    def state_dict(self) -> dict[str, Any]:
        """Return the best values so far."""
        return {} if self.best is None else {"best": self.best.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best values so far, if they are of the same metric."""
        if self.best is not None and "best" in state_dict:
            self.best.load_state_dict(state_dict["best"])


class Best:
    """The steps at which a metric was best, `count` of them, and their checkpoints."""

    def __init__(self, metric: str, mode: str, count: int) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"callbacks.checkpoints.best_mode is min or max, got {mode!r}")
        self.metric, self.mode, self.count = metric, mode, count
        self.found: list[tuple[float, int]] = []  # value and step, best first

    @property
    def first_step(self) -> int | None:
        """The step of the best value."""
        return self.found[0][1] if self.found else None

    def check(self, trainer: Trainer) -> None:
        """Raise ValueError for a metric of validation that validation does not measure."""
        row = current_row(trainer)
        if row and self.metric.startswith("val/") and self.metric not in row:
            known = ", ".join(name for name in row if name.startswith("val/"))
            raise ValueError(
                f"callbacks.checkpoints.best={self.metric}, but validation measures {known or 'nothing'}; choose one "
                "of these, or best=null"
            )

    def improves(self, trainer: Trainer) -> bool:
        """Say, to all ranks alike, whether the metric of this step is among the best."""
        return trainer.strategy.broadcast(trainer.global_step in [step for _, step in self._with(trainer)])

    def _with(self, trainer: Trainer) -> list[tuple[float, int]]:
        """Return what the best are with this step among them, of which one value counts."""
        step = trainer.global_step
        others = [(value, at) for value, at in self.found if at != step]
        value = current_row(trainer).get(self.metric)
        if value is None or not math.isfinite(value):
            return self.found
        sign = 1 if self.mode == "min" else -1
        return sorted([*others, (float(value), step)], key=lambda entry: (sign * entry[0], entry[1]))[: self.count]

    def note(self, trainer: Trainer) -> None:
        """Count the metric of this step, on all ranks alike."""
        self.found = trainer.strategy.broadcast(self._with(trainer))

    def arrange(self, path: Path, step: int) -> None:
        """Keep the checkpoint of this step where it is among the best, and let go of those that no longer are."""
        folder = path.parent
        names = {at: folder / f"best_step={at:07d}.ckpt" for _, at in self.found}
        if step in names:
            keep(path, names[step])
        if step == self.first_step:
            keep(path, folder / BEST)
        for other in folder.glob("best_step=*.ckpt"):
            if other not in names.values():
                remove(other)

    def state_dict(self) -> dict[str, Any]:
        """Return the values with their steps."""
        return {"metric": self.metric, "mode": self.mode, "found": [list(entry) for entry in self.found]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them."""
        if (state["metric"], state["mode"]) == (self.metric, self.mode):
            self.found = [(value, step) for value, step in state["found"]][: self.count]


def current_row(trainer: Trainer) -> dict[str, Any]:
    """Return what metrics.csv has of this step, on the rank that writes it."""
    log = next((logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)), None)
    return log.row(trainer.global_step) if log is not None else {}


def validation_follows(trainer: Trainer) -> bool:
    """Tell in `on_train_batch_end` whether Lightning is about to validate, by its rules for counting batches."""
    every = trainer.val_check_batch
    if not trainer.enable_validation or every is None or every == float("inf"):
        return False
    epochs = trainer.check_val_every_n_epoch
    if epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % every == 0
    return (trainer.current_epoch + 1) % epochs == 0 and (trainer.fit_loop.batch_idx + 1) % every == 0
