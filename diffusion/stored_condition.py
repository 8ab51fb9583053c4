"""What is a network told where its captions were encoded ahead, once for all epochs?

A batch then has the conditioner's answers as entries named "condition.context" and the like, a row a sample.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.conditioner import Conditioner
from diffusion.randomness import Draws

PREFIX = "condition."


def why_not_stored(conditioner: nn.Module) -> str | None:
    """Say why a conditioner's answers cannot be stored; None where they can."""
    if any(parameter.requires_grad for parameter in conditioner.parameters()):
        return "it is trained along"
    if conditioner.entries != ("caption",):
        return f"it reads {', '.join(conditioner.entries)}, not captions alone"
    if conditioner.train_noise[1]:
        return "training shows it noise"
    if any(getattr(part, "long_prompt", "cut") != "cut" for part in conditioner.modules()):
        return "with long_prompt=chunk its contexts have several lengths"
    return None


@torch.no_grad()
def stored_entries(conditioner: Conditioner, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode a batch's captions in float32: {"condition.context": (B, L, D), ...}."""
    prepared = conditioner.prepare_batch(batch)
    with torch.autocast(conditioner.device.type, enabled=False):
        return {f"{PREFIX}{name}": value for name, value in conditioner(prepared).items()}


def condition_on(
    conditioner: Conditioner, batch: Mapping[str, Any], draws: Draws, drop: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the condition of a batch, stored or encoded now; rows where `drop` (B,) is True get the null condition."""
    stored = {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith(PREFIX)}
    if not stored:
        return conditioner(conditioner.augmented(conditioner.prepare_batch(batch), draws), drop)
    if drop is None:
        return stored
    null = null_row(conditioner)
    return {
        name: torch.where(drop.to(value.device).view(-1, *(1,) * (value.ndim - 1)), null[name], value)
        for name, value in stored.items()
    }


def null_row(conditioner: Conditioner) -> dict[str, Tensor]:
    """Return the null condition of one sample, of a frozen conditioner of captions; it is encoded once a device."""
    known = vars(conditioner).setdefault("_null_rows", {})
    device = conditioner.device
    if device not in known:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            known[device] = conditioner(conditioner.prepare_batch({"caption": [""]}), torch.ones(1, dtype=torch.bool))
    return known[device]
