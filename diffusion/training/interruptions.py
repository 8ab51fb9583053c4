"""What comes between the steps of a run: validation, pictures, evaluation, checkpoints. How often, and how long?"""

import math
import os
import re
import time
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from diffusion.training.ema import EMA
from diffusion.training.samples import Drawing

BACKWARD = 3  # a training step on a sample costs about three network calls: one forward, two's worth backward


class Event(NamedTuple):
    """What comes between steps: how often in the run, and how many seconds each time."""

    name: str
    times: int
    seconds: float


def name_of(callback: Callback) -> str:
    """Name a callback by its class, in words: SampleGrid is "sample grid"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(callback).__name__).lower()


def discriminator_start(task: LightningModule) -> int:
    """Return the step from which on a discriminator takes part; 0 where none does, so that all steps are alike."""
    return task.loss.adversarial.start if getattr(task, "discriminator", None) is not None else 0


def times_due(every_n_steps: int, max_steps: int) -> int:
    """Return how often a run meets a multiple of `every_n_steps` or its last step."""
    return -(-max_steps // every_n_steps)


def validations(trainer: Trainer, max_steps: int) -> int:
    """Return how many validations a run of so many steps sees, by Lightning's count of batches."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or not every or max_steps < 0:
        return 0
    batches = max_steps * trainer.accumulate_grad_batches
    if epochs is None:
        return int(batches // every)
    an_epoch = trainer.num_training_batches
    return int(batches / an_epoch / epochs * max(1, an_epoch // every)) if math.isfinite(an_epoch) else 0


def validation_batches(trainer: Trainer, limit: float | None) -> int | None:
    """Return the batches of one validation, of which `limit` leaves a number or a share; None where nobody knows."""
    try:
        batches = len(trainer.datamodule.val_dataloader())
    except TypeError:
        return limit if isinstance(limit, int) else None
    if isinstance(limit, int):
        return min(batches, limit)
    return batches if limit is None else int(batches * limit)


def guessed(trainer: Trainer, task: LightningModule, seconds_per_step: float) -> list[Event]:
    """Return what comes between steps with its time guessed by calls of the network."""
    batch_size = trainer.datamodule.batch_size
    a_call = seconds_per_step / BACKWARD / (batch_size * trainer.accumulate_grad_batches)  # of one sample
    averages = sum(len(callback.decays) for callback in trainer.callbacks if isinstance(callback, EMA))
    events = []
    times = validations(trainer, trainer.max_steps)
    batches = validation_batches(trainer, trainer.limit_val_batches) if times else None
    if batches:
        events.append(Event("validation", times, batches * batch_size * (1 + averages) * a_call))
    for callback in trainer.callbacks:
        if isinstance(callback, Drawing):
            times = times_due(callback.every_n_steps, trainer.max_steps)
            events.append(Event(name_of(callback), times, calls(callback, task) * a_call))
    return events


def calls(drawing: Any, task: LightningModule) -> int:
    """Return how many samples the network is called on by one drawing."""
    num_steps = len(drawing.sampler.timesteps(task.diffusion.schedule)) - 1
    twice = 1 if getattr(drawing.guidance, "guidance_scale", 1) == 1 else 2
    samples = getattr(drawing, "num_samples", None) or 2 * drawing.rows * drawing.columns  # a grid: raw and averaged
    return samples * num_steps * twice


def age_of_process() -> float:
    """Return the seconds since this process began, where the system says so; else 0."""
    try:
        return max(0.0, time.time() - os.stat("/proc/self").st_ctime)
    except OSError:
        return 0.0
