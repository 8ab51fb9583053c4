"""What does every trained thing share? Counted draws, gradients clipped and measured, averages to validate with."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from diffusion.training.ema import EMA, average_name

OptimizerPartial = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerPartial = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class Task(LightningModule):
    """A Lightning module that wires and logs; formulas are elsewhere. A subclass gives `net` and `training_step`.

    Draws are keyed by (`seed`, a purpose, `batches_seen`, rank), so that a resumed run continues bit for bit.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.batches_seen = 0  # micro-batches over the whole run
        self.gradient_norm: Tensor | None = None  # of the last optimizer step, before clipping

    @property
    def model(self) -> nn.Module:
        """What is trained and averaged; its part `net` is what model.safetensors holds."""
        return self.net

    def weights(self) -> Iterator[tuple[str, contextlib.AbstractContextManager]]:
        """Yield a suffix for names, and a context in which `model` has these weights: raw ones, then each average."""
        yield "", contextlib.nullcontext()
        for ema in self.trainer.callbacks:
            if isinstance(ema, EMA):
                for decay in ema.averages:
                    suffix = "_ema" if decay == ema.decays[0] else f"_ema_{average_name(decay)}"
                    yield suffix, ema.swapped(self.model, decay)

    def with_schedule(self, optimizer: torch.optim.Optimizer, scheduler: SchedulerPartial | None) -> Any:
        """Return what `configure_optimizers` answers: a schedule is counted in optimizer steps."""
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler(optimizer), "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer's flags say, and keep the norm from before."""
        by_norm = bool(gradient_clip_val) and gradient_clip_algorithm in (None, "norm")
        next_step = self.trainer.global_step + 1
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not by_norm and next_step % self.trainer.log_every_n_steps == 0:  # costs a pass over the gradients
            self.gradient_norm = total_norm(parameters)
        if by_norm:
            self.gradient_norm = nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of batches seen, which all random numbers of a step are keyed by."""
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the random numbers of the batch after the last one."""
        self.batches_seen = checkpoint["batches_seen"]

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError where images of `shape` (C, H, W) cannot be trained on."""

    def for_export(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the config to store with `net`, and what it needs beside it (`diffusion.checkpoint.Part`)."""
        return dict(config), {}


class Means(nn.Module):
    """Means of named scalars since they were last asked for, summed on the device without waiting for it.

    The sums are a buffer, so that a checkpoint between two logs carries them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("sums", torch.zeros(len(names) + 1))

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one batch: a scalar for each of `names`."""
        self.sums += torch.stack([*(values[name].detach().float() for name in self.names), self.sums.new_ones(())])

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means over all ranks, whose sums `reduce` adds up, and begin anew; {} where nothing was added."""
        *totals, count = reduce(self.sums.clone()).tolist()
        self.sums.zero_()
        return {name: total / count for name, total in zip(self.names, totals, strict=True)} if count else {}


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the global generator of this device; `torch.manual_seed` would ask every backend, at 0.1 ms a call."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.manual_seed(seed)


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
