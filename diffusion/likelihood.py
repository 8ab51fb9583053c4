"""How many bits a pixel costs: the variational bound, term by term (DDPM eq. 5, iDDPM section 3.3).

All terms are means over C, H, W in bits per dimension, one number a sample. Images are 8 bit, scaled to [-1, 1].
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoiser
from .process import (
    GaussianDiffusion,
    Prediction,
    last_variances,
    posterior_mean,
    q_sample,
    reverse_variance,
    variances,
)
from .schedule import CLEAN, Level, Schedule


def _bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor | float, log_var2: Tensor | float) -> Tensor:
    """KL(N(mean1, exp log_var1) || N(mean2, exp log_var2)) in nats, elementwise."""
    log_var2 = torch.as_tensor(log_var2, dtype=log_var1.dtype, device=log_var1.device)
    return 0.5 * (
        log_var2 - log_var1 - 1 + torch.exp(log_var1 - log_var2) + (mean1 - mean2) ** 2 * torch.exp(-log_var2)
    )


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """Page's tanh approximation (off by less than 3e-4), with which DDPM's and iDDPM's bits/dim were computed."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the 8-bit value that x in [-1, 1] stands for, in nats, elementwise: DDPM eq. 13."""
    centered, inverse = x - mean, torch.exp(-log_scale)
    below = approximate_normal_cdf(inverse * (centered - 1 / 255))
    above = approximate_normal_cdf(inverse * (centered + 1 / 255))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def reverse_log_variance(
    diffusion: GaussianDiffusion, p: Prediction, t: Tensor, s: Tensor, before_last: float
) -> tuple[Tensor, Tensor]:
    """Log variances of q(x_s | x_t, x0) and of the model's p(x_s | x_t), both finite by `last_variances`."""
    jump, posterior = variances(diffusion.schedule.level(t), diffusion.schedule.level(s))
    last = (s == CLEAN).view(-1, 1, 1, 1)
    last_jump, last_posterior = last_variances(diffusion.variance, jump, before_last)
    jump, posterior = torch.where(last, last_jump, jump), torch.where(last, last_posterior, posterior)
    log_var = reverse_variance(diffusion.variance, jump, posterior, p.var_frac).log()
    return posterior.log().to(p.x0), log_var.to(p.x0)


class Chain:
    """The steps over which the bound is summed: the full chain, or a sampler's falling grid that ends in CLEAN."""

    def __init__(self, schedule: Schedule, timesteps: Sequence[int] | None = None):
        grid = timesteps or (*range(schedule.num_train_timesteps - 1, -1, -1), CLEAN)
        if grid[-1] != CLEAN or any(t <= s for t, s in pairwise(grid)):
            raise ValueError("a chain of timesteps must fall and end in -1 (clean data)")
        self.timesteps = tuple(grid[:-1])
        self._previous = torch.full((schedule.num_train_timesteps,), -2, dtype=torch.long)
        self._previous[list(self.timesteps)] = torch.tensor(grid[1:])
        levels = [schedule.level(t) for t in grid[-3:]]
        # A chain of one step has no earlier posterior; its own jump is the only variance there is.
        self.before_last = variances(*levels[:2])[1 if len(levels) == 3 else 0]

    def __len__(self) -> int:
        return len(self.timesteps)

    def previous(self, t: Tensor) -> Tensor:
        """The timesteps (B,) before t (B,). Raises ValueError for a t outside the chain."""
        s = self._previous.to(t.device)[t]
        if t.device.type == "cpu" and bool((s < CLEAN).any()):
            raise ValueError(f"timesteps {t[s < CLEAN].tolist()} are not on the chain of {len(self)} steps")
        return s


@lru_cache(maxsize=8)
def chain_of(schedule: Schedule, timesteps: tuple[int, ...] | None = None) -> Chain:
    """The chain of a schedule, made once: a loss asks for it at every training step."""
    return Chain(schedule, timesteps)


def vlb_term(
    diffusion: GaussianDiffusion, p: Prediction, x0: Tensor, x: Tensor, t: Tensor, chain: Chain | None = None
) -> Tensor:
    """One term of the bound (B,) in bits/dim: L_{t-1} (KL), or L_0 (decoder) where t is the chain's last step.

    `p` is the prediction at x = x_t, t (B,) int64 on the chain.
    """
    chain = chain or chain_of(diffusion.schedule)
    s = chain.previous(t)
    true_log_var, log_var = reverse_log_variance(diffusion, p, t, s, chain.before_last)
    here, there = diffusion.schedule.level(t).to(x), diffusion.schedule.level(s).to(x)
    mean = posterior_mean(p.x0, x, here, there)
    kl = normal_kl(posterior_mean(x0, x, here, there), true_log_var, mean, log_var)
    nll = -discretized_gaussian_log_likelihood(x0, mean, (0.5 * log_var).expand_as(mean))
    return torch.where(s == CLEAN, _bits(nll), _bits(kl))


def prior_bits_per_dim(diffusion: GaussianDiffusion, x0: Tensor, t: int | None = None) -> Tensor:
    """L_T (B,): KL(q(x_t | x0) || N(0, 1)), what is left of the image where the chain starts (t = T - 1 if None)."""
    at: Level = diffusion.schedule.level(diffusion.num_train_timesteps - 1 if t is None else t)
    log_var = torch.full_like(x0, math.log(at.sigma**2))
    return _bits(normal_kl(at.alpha * x0, log_var, 0.0, 0.0))


class BitsPerDim(NamedTuple):
    """The bound and its parts, (B,) and (B, steps) with the noisiest step first."""

    total: Tensor
    prior: Tensor
    vlb: Tensor
    x0_mse: Tensor
    eps_mse: Tensor


def bits_per_dim(
    diffusion: GaussianDiffusion,
    denoise: Denoiser,
    x0: Tensor,
    *,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    timesteps: Sequence[int] | None = None,
) -> BitsPerDim:
    """Evaluate the whole bound of x0 (B, C, H, W) in [-1, 1]: one network call a step.

    Wrap `denoise` in `clip_x0` as the papers do. `timesteps` is a grid that ends in CLEAN; the full chain if None.
    """
    chain, columns = Chain(diffusion.schedule, timesteps), []
    with torch.no_grad():
        for step in chain.timesteps:
            t = torch.full((len(x0),), step, device=x0.device)
            eps = noise(x0)
            x = q_sample(x0, eps, diffusion.schedule.level(step))
            p = denoise(x, t)
            errors = [(a - b).square().flatten(1).mean(1) for a, b in ((p.x0, x0), (p.eps, eps))]
            columns.append((vlb_term(diffusion, p, x0, x, t, chain), *errors))
        prior = prior_bits_per_dim(diffusion, x0, chain.timesteps[0])
    vlb, x0_mse, eps_mse = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    return BitsPerDim(vlb.sum(1) + prior, prior, vlb, x0_mse, eps_mse)
