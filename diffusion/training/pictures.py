"""When are pictures drawn during training, and where do they go?"""

from abc import ABC, abstractmethod
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image

from diffusion.images import save_png
from diffusion.training.sharded import is_sharded

PATIENCE = timedelta(days=7)  # that other processes have with the one that draws


class Pictures(Callback, ABC):
    """Call `draw` every `every_n_steps` optimizer steps and at the last one; others wait for the first process.

    Of a network in shards all processes draw the same, because each of its calls needs all of them. `numbers` are the
    settings that must be at least 1, for the error; `name` is the callback's in the config.
    """

    def __init__(self, name: str, *, every_n_steps: int, **numbers: int) -> None:
        for key, value in {"every_n_steps": every_n_steps, **numbers}.items():
            if value < 1:
                raise ValueError(f"callbacks.{name}.{key} must be at least 1, got {value}")
        self.every_n_steps = every_n_steps
        self._last_step = 0
        self._waiting: dist.ProcessGroup | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count where the run begins or goes on."""
        self._last_step = trainer.global_step
        if trainer.world_size > 1:  # the training's own group gives up after half an hour
            self._waiting = dist.new_group(backend="gloo", timeout=PATIENCE)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Draw when this batch completed a step that is due; with accumulation several batches share a step."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if step % self.every_n_steps and step != trainer.max_steps:
            return
        if trainer.is_global_zero or is_sharded(pl_module.model):
            self.draw(trainer, pl_module)
        if self._waiting is not None:
            dist.barrier(self._waiting)

    @abstractmethod
    def draw(self, trainer: Trainer, task: LightningModule) -> None:
        """Draw and `show` what the model makes of its weights now."""


def show(trainer: Trainer, name: str, picture: Image.Image) -> None:
    """Write run_dir/samples/step=0001000_{name}.png, and hand the picture to the loggers that show pictures."""
    if not trainer.is_global_zero:
        return
    if not trainer.fast_dev_run:
        save_png(picture, Path(trainer.default_root_dir) / "samples" / f"step={trainer.global_step:07d}_{name}.png")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(f"samples/{name}", np.asarray(picture), trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(f"samples/{name}", [picture], step=trainer.global_step)
