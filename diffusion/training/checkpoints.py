"""How does a run survive being stopped? Atomic checkpoints at optimizer steps, on a schedule and on a signal.

`checkpoints/last.ckpt` is all that a resumed run needs; `model.safetensors` is all that sampling needs.
"""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from diffusion.checkpoint import atomic_write
from diffusion.training.export import export_model
from diffusion.training.guard import NonFiniteLoss

# The last two are what Slurm, or submitit, is told to send before a job is killed.
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


class Interrupted(Exception):
    """A signal ended the run, after a checkpoint was written to `path`."""

    def __init__(self, number: int, step: int, path: Path) -> None:
        super().__init__(f"{signal.Signals(number).name} after step {step}; saved {path}")
        self.number, self.step, self.path = number, step, path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints so that a kill or a full disk leaves the previous file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the file, then rename."""
        with atomic_write(path) as partial:
            torch.save(checkpoint, partial)


class Checkpoints(Checkpoint):
    """Keep `checkpoints/last.ckpt` current: every n optimizer steps, at the last one, and when a signal asks to stop.

    `keep_every_n_steps` also keeps `checkpoints/step=0010000.ckpt`. `export` writes `model.safetensors` (the first
    average where there is one) beside each checkpoint; `config` and `facts` go into its header (`save_model`).
    A checkpoint is written after all that belongs to its step, validation included, so that a resumed run repeats
    and omits nothing. `SIGNALS` raise `Interrupted` from there; a second SIGINT (Ctrl-C) stops at once.
    """

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        every_n_steps: int = 1000,
        keep_every_n_steps: int | None = None,
        export: bool = True,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep_every_n_steps", keep_every_n_steps)):
            if value is not None and value < 1:
                raise ValueError(f"callbacks.checkpoints.{name} is a number of optimizer steps >= 1, got {value}")
        self.config, self.facts = config, facts
        self.every_n_steps, self.keep_every_n_steps, self.export = every_n_steps, keep_every_n_steps, export
        self.signal: int | None = None
        self._last_step = 0
        self._at_step = False  # no micro-batch has been added to the gradients since the last step
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals that end a run."""
        self._last_step = trainer.global_step
        self.signal = None
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
            self._save_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        if self._at_step and self._saved_step != trainer.global_step:
            self.save(trainer, pl_module)

    def _save_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        stopped = self._stopped(trainer)
        if stopped or step % self.every_n_steps == 0 or step == trainer.max_steps or self._kept(step):
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
        norm = nn.utils.get_total_norm(list(pl_module.model.parameters()))
        if not torch.isfinite(norm):
            raise NonFiniteLoss(f"the weights became non-finite at or before step {trainer.global_step}")
        run_dir = Path(trainer.default_root_dir)
        for logger in trainer.loggers:
            logger.save()  # the rows up to this step, before the checkpoint that says they are done
        path = last_checkpoint(run_dir)
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_step = trainer.global_step
        if not trainer.is_global_zero:
            return
        if self._kept(trainer.global_step):
            keep(path, path.with_name(f"step={trainer.global_step:07d}.ckpt"))
        if self.export:
            export_model(run_dir / "model.safetensors", trainer, pl_module, self.config, self.facts)


def last_checkpoint(run_dir: str | Path) -> Path:
    """Return where the run in `run_dir` keeps the checkpoint that it resumes from."""
    return Path(run_dir) / "checkpoints" / "last.ckpt"


def validation_follows(trainer: Trainer) -> bool:
    """Tell in `on_train_batch_end` whether Lightning is about to validate, by its rules for counting batches."""
    every = trainer.val_check_batch
    if not trainer.enable_validation or every is None or every == float("inf"):
        return False
    epochs = trainer.check_val_every_n_epoch
    if epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % every == 0
    return (trainer.current_epoch + 1) % epochs == 0 and (trainer.fit_loop.batch_idx + 1) % every == 0


def keep(source: Path, target: Path) -> None:
    """Give a file a second name that outlives the first: a hard link where the file system has them, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with atomic_write(target) as partial:
            shutil.copyfile(source, partial)
