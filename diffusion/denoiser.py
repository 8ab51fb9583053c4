"""From a network to a denoiser: parameterization and condition bound inside, (x, t) -> Prediction outside."""

from collections.abc import Callable

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
    unknown = set(null) - set(condition)
    if unknown:
        raise ValueError(f"the null condition names {sorted(unknown)}, which the condition {sorted(condition)} lacks")
    both = {name: torch.cat([value, null.get(name, value)]) for name, value in condition.items()}

    def denoise(x: Tensor, t: int | float | Tensor) -> tuple[Prediction, Prediction]:
        t = torch.cat([t, t]) if isinstance(t, Tensor) else t
        p = denoiser(diffusion, net, **both)(torch.cat([x, x]), t)
        halves = [(None, None) if part is None else part.chunk(2) for part in p]
        return Prediction(*(half[0] for half in halves)), Prediction(*(half[1] for half in halves))

    return denoise
