"""What happens when the loss is not a number? The run stops with one message, and its last checkpoint stays good."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

ADVICE = (
    "Try a lower learning rate (optimizer.lr), a longer warm-up (lr_scheduler.warmup_steps), "
    "trainer.gradient_clip_val=1, or trainer.precision=bf16-mixed or 32-true instead of 16-mixed; if it comes at the "
    "same step again, look at that batch's images"
)


class NonFiniteLoss(ValueError):
    """Training diverged; the message says where and what to try."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. {ADVICE}")


class NonFiniteGuard(Callback):
    """Raise `NonFiniteLoss` when a loss is NaN or infinite, before anything of that step is logged or saved.

    On a GPU the loss of a batch is looked at one batch later, when it is there without waiting. Several ranks look at
    their mean loss, so that all of them stop.
    """

    def __init__(self) -> None:
        self._waiting: tuple[int, Tensor, Tensor | None] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Any], *args: object
    ) -> None:
        """Check this loss, or on a GPU the one before, whose value has arrived by now."""
        loss = outputs["loss"].detach()
        if trainer.world_size > 1:
            loss = trainer.strategy.reduce(loss.clone(), reduce_op="mean")
        current = (trainer.global_step, loss, outputs.get("t"))
        due, self._waiting = (self._waiting, current) if loss.is_cuda else (current, None)
        if due is not None:
            check(*due)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the loss that still waits."""
        if self._waiting is not None:
            check(*self._waiting)


def check(step: int, loss: Tensor, t: Tensor | None) -> None:
    """Raise `NonFiniteLoss`, naming the step and its timesteps where there are any, unless `loss` is finite."""
    if math.isfinite(loss):
        return
    timesteps = "" if t is None else ", in a batch with the timesteps " + ", ".join(map(str, sorted(t.tolist())[:64]))
    raise NonFiniteLoss(f"the loss became {loss.item()} at step {step}{timesteps}")
