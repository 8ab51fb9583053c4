"""How does the learning rate change? Factors of the optimizer's own rate, in optimizer steps.

Each function takes an optimizer and returns a scheduler that Lightning steps once an optimizer step.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_constant(optimizer: Optimizer, *, warmup_steps: int = 0) -> LambdaLR:
    """Rise linearly over `warmup_steps` (the first step is not zero), then stay."""
    _check("warmup_steps", warmup_steps)
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1)))


def warmup_cosine(
    optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.0
) -> LambdaLR:
    """Rise linearly over `warmup_steps`, then fall on a half cosine to `final_fraction` at `total_steps`.

    A run that is no longer than its warm-up (a quick try with few steps) only rises.
    """

    def half_cosine(done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2

    return _falling(optimizer, half_cosine, total_steps, warmup_steps, final_fraction)


def warmup_linear(
    optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.0
) -> LambdaLR:
    """As `warmup_cosine`, but fall on a straight line; without warm-up it is guided-diffusion's `anneal_lr`."""
    return _falling(optimizer, lambda done: 1 - done, total_steps, warmup_steps, final_fraction)


def _falling(
    optimizer: Optimizer, shape: Callable[[float], float], total_steps: int, warmup_steps: int, final_fraction: float
) -> LambdaLR:
    """Rise, then follow `shape` (1 at 0, 0 at 1), lifted to end at `final_fraction`."""
    _check("warmup_steps", warmup_steps)
    falling = max(1, total_steps - warmup_steps)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup_steps + 1))
        done = min(1.0, max(0.0, (step - warmup_steps) / falling))
        return rise * (final_fraction + (1 - final_fraction) * shape(done))

    return LambdaLR(optimizer, factor)


def _check(name: str, steps: int) -> None:
    if steps < 0:
        raise ValueError(f"lr_scheduler.{name} is a number of steps, got {steps}")
