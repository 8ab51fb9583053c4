"""Data whose denoiser is known exactly, so that a sampler's answer can be compared with the truth.

The pixels are independent in both distributions, which makes the probability-flow ODE's solution a formula: in one
dimension the flow keeps every quantile. (2011.13456 section 4.3 for the flow.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.denoiser import Denoiser
from diffusion.guidance import Levels
from diffusion.process import Prediction
from diffusion.schedule import Level


def normal(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A standard normal tensor of its own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def believe(x: Tensor, x0: Tensor, at: Level) -> Prediction:
    """x0 in both currencies; at sigma = 0, where x is x0, eps is the mean of noise that was not added: 0."""
    return Prediction(x0, torch.where(torch.as_tensor(at.sigma > 0), (x - at.alpha * x0) / max(at.sigma, 1e-300), 0))


@dataclass(frozen=True)
class Gaussian:
    """x0 ~ N(mean, diag(std^2)); both broadcast to (B, C, H, W)."""

    mean: Tensor
    std: Tensor

    def variance_at(self, at: Level) -> Tensor:
        return at.alpha**2 * self.std**2 + at.sigma**2

    def posterior_mean(self, x: Tensor, at: Level) -> Tensor:
        """E[x0 | x_t]."""
        return self.mean + at.alpha * self.std**2 / self.variance_at(at) * (x - at.alpha * self.mean)

    def denoiser(self, level: Levels) -> Denoiser:
        return lambda x, t: believe(x, self.posterior_mean(x, level(t)), level(t))

    def flow(self, x: Tensor, here: Level, there: Level) -> Tensor:
        """Where the probability-flow ODE carries x from one level to another: the standardised x does not change."""
        scale = (self.variance_at(there) / self.variance_at(here)).sqrt()
        return there.alpha * self.mean + scale * (x - here.alpha * self.mean)

    def draw(self, shape: tuple[int, ...], at: Level, seed: int = 0) -> Tensor:
        """Samples of the marginal q(x_t)."""
        return at.alpha * self.mean + self.variance_at(at).sqrt() * normal(shape, seed)


@dataclass(frozen=True)
class Mixture:
    """Every pixel independently from sum_k weights[k] N(means[k], stds[k]^2)."""

    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-0.6, 0.4)
    stds: tuple[float, ...] = (0.15, 0.2)

    def _parts(self, at: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and standard deviations (K, 1, 1, 1, 1) of q(x_t)."""
        w, m, s = torch.tensor([self.weights, self.means, self.stds], dtype=torch.float64).view(3, -1, 1, 1, 1, 1)
        return w, at.alpha * m, (at.alpha**2 * s**2 + at.sigma**2).sqrt()

    def responsibilities(self, x: Tensor, at: Level) -> Tensor:
        """p(component | x_t), (K, B, C, H, W)."""
        w, m, s = self._parts(at)
        return (w.log() - s.log() - 0.5 * ((x - m) / s) ** 2).softmax(0)

    def component(self, k: int) -> Gaussian:
        return Gaussian(*(torch.tensor(v[k], dtype=torch.float64) for v in (self.means, self.stds)))

    def posterior_mean(self, x: Tensor, at: Level) -> Tensor:
        """E[x0 | x_t]."""
        m, s = torch.tensor([self.means, self.stds], dtype=torch.float64).view(2, -1, 1, 1, 1, 1)
        each = Gaussian(m, s).posterior_mean(x, at)  # (K, B, C, H, W)
        return (self.responsibilities(x, at) * each).sum(0)

    def denoiser(self, level: Levels) -> Denoiser:
        return lambda x, t: believe(x, self.posterior_mean(x, level(t)), level(t))

    def cdf(self, x: Tensor, at: Level) -> Tensor:
        w, m, s = self._parts(at)
        return (w * torch.special.ndtr((x - m) / s)).sum(0)

    def flow(self, x: Tensor, here: Level, there: Level) -> Tensor:
        """Where the probability-flow ODE carries x: to the same quantile of the other marginal, found by bisection."""
        quantile, low, high = self.cdf(x, here), torch.full_like(x, -20.0), torch.full_like(x, 20.0)
        for _ in range(100):
            middle = (low + high) / 2
            below = self.cdf(middle, there) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def draw(self, shape: tuple[int, ...], at: Level, seed: int = 0) -> Tensor:
        """Samples of the marginal q(x_t)."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(torch.tensor(self.weights), torch.Size(shape).numel(), True, generator=generator)
        _, m, s = (part.flatten() for part in self._parts(at))
        return m[which].view(shape) + s[which].view(shape) * normal(shape, seed + 1)

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of a pixel."""
        mean = sum(w * m for w, m in zip(self.weights, self.means, strict=True))
        square = sum(w * (m**2 + s**2) for w, m, s in zip(self.weights, self.means, self.stds, strict=True))
        return mean, (square - mean**2) ** 0.5
