"""From a network to a denoiser: parameterization and condition bound inside, (x, t) -> Prediction outside."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .process import GaussianDiffusion, Prediction

NULL_LABEL = -1  # of a sample without a class; networks add nothing for it

Denoiser = Callable[[Tensor, int | float | Tensor], Prediction]
Network = Callable[..., Tensor]  # net(x, t, *, label=None, context=None, vector=None, concat=None)


def denoiser(diffusion: GaussianDiffusion, net: Network, **condition: Tensor) -> Denoiser:
    """Bind a network and its condition: `label` (B,), `context` (B, L, D), `vector` (B, D), `concat` (B, C, H, W)."""

    def denoise(x: Tensor, t: int | float | Tensor) -> Prediction:
        return diffusion.prediction(net(x, diffusion.time(x, t), **condition), x, t)

    return denoise


def denoiser_pair(
    diffusion: GaussianDiffusion, net: Network, condition: dict[str, Tensor], null: dict[str, Tensor]
) -> Callable[[Tensor, int | float | Tensor], tuple[Prediction, Prediction]]:
    """Ask for the conditional and the null answer in one doubled batch; what `null` does not name, both share."""
    check_null(condition, null)
    return denoiser_each(diffusion, net, [condition, condition | null])


def check_null(condition: dict[str, Tensor], null: dict[str, Tensor]) -> None:
    """Raise ValueError where there is no condition that a null value could stand for."""
    if unknown := set(null) - set(condition):
        raise ValueError(f"the null condition names {sorted(unknown)}, which the condition {sorted(condition)} lacks")


def denoiser_each(
    diffusion: GaussianDiffusion, net: Network, conditions: Sequence[dict[str, Tensor]]
) -> Callable[[Tensor, int | float | Tensor], tuple[Prediction, ...]]:
    """Ask for the answer under each of several conditions, which name the same tensors, in one batch."""
    count = len(conditions)
    together = {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}

    def denoise(x: Tensor, t: int | float | Tensor) -> tuple[Prediction, ...]:
        t = torch.cat([t] * count) if isinstance(t, Tensor) else t
        p = denoiser(diffusion, net, **together)(torch.cat([x] * count), t)
        parts = [[None] * count if part is None else part.chunk(count) for part in p]
        return tuple(Prediction(*(part[i] for part in parts)) for i in range(count))

    return denoise
