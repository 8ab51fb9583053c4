"""What bends a denoiser's belief: classifier-free guidance, classifier scores, clipping. Wrappers, their order visible.

A classifier score belongs outside the clipping (guided-diffusion does not clip again), clipping outside
classifier-free guidance. arXiv 2207.12598, 2105.05233, 2205.11487 (dynamic thresholding), 2305.08891 (rescale).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Denoiser, Network, denoiser, denoiser_pair
from .process import GaussianDiffusion, Prediction, mix, target
from .schedule import Level

Levels = Callable[[int | float | Tensor], Level]


def check_scale(name: str, value: float) -> float:
    """Raise ValueError unless the scale is a finite number of at least 0."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}; 1 is the plain conditional model")
    return value


@dataclass(frozen=True)
class NoGuidance:
    """The conditional model as it is."""

    def __call__(
        self, diffusion: GaussianDiffusion, net: Network, condition: dict[str, Tensor], null: dict[str, Tensor]
    ) -> Denoiser:
        return denoiser(diffusion, net, **condition)


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """null + guidance_scale (conditional - null): 1 is the plain conditional model, 0 the unconditional one.

    `rescale` is phi of arXiv 2305.08891 eq. 16: 0 leaves the result, 1 gives it the conditional answer's standard
    deviation, measured on what the network predicts. `interval` (low, high) restricts guidance to timesteps
    low <= t <= high (arXiv 2404.07724); outside it the conditional model answers alone, at half the cost. A learned
    variance is the conditional half's.
    """

    guidance_scale: float = 2.0
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        check_scale("guidance_scale", self.guidance_scale)
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1], got {self.rescale}")
        if self.interval is not None and not (len(self.interval) == 2 and self.interval[0] <= self.interval[1]):
            raise ValueError(f"interval must be (low, high) timesteps with low <= high, got {self.interval}")

    def __call__(
        self, diffusion: GaussianDiffusion, net: Network, condition: dict[str, Tensor], null: dict[str, Tensor]
    ) -> Denoiser:
        """Bind to a network; `null` holds the null values of those conditions that guidance is about."""
        conditional = denoiser(diffusion, net, **condition)
        if self.guidance_scale == 1:
            return conditional
        if not null:
            raise ValueError(
                "classifier-free guidance needs a condition; this model is unconditional: use guidance=none"
            )
        pair = denoiser_pair(diffusion, net, condition, null)

        def denoise(x: Tensor, t: int | float | Tensor) -> Prediction:
            if self.interval is not None and not self.interval[0] <= t <= self.interval[1]:
                return conditional(x, t)
            given, without = pair(x, t)
            guided = Prediction(
                torch.lerp(without.x0, given.x0, self.guidance_scale),
                torch.lerp(without.eps, given.eps, self.guidance_scale),
                given.var_frac,
            )
            return self._rescaled(diffusion, given, guided, x, t) if self.rescale else guided

        return denoise

    def _rescaled(
        self, diffusion: GaussianDiffusion, given: Prediction, guided: Prediction, x: Tensor, t: int | float | Tensor
    ) -> Prediction:
        # Measured on what the network predicts; "mean" has no spread of its own to keep, so it is read as eps.
        kind = "eps" if diffusion.parameterization == "mean" else diffusion.parameterization
        at = diffusion.schedule.level(t).to(x)
        wanted, got = (target(kind, p.x0, p.eps, at) for p in (given, guided))
        spread = wanted.std((1, 2, 3), keepdim=True) / got.std((1, 2, 3), keepdim=True)
        output = got * (self.rescale * spread + (1 - self.rescale))
        read = {"eps": Prediction.from_eps, "x0": Prediction.from_x0, "v": Prediction.from_v}[kind]
        return read(x, output, at, given.var_frac)


def classifier_score(denoise: Denoiser, log_prob_grad: Callable, level: Levels, *, scale: float = 1.0) -> Denoiser:
    """Guide eps by the classifier's gradient (2105.05233, algorithm 2): for DDIM and ODE solvers.

    `log_prob_grad(x, t)` is the gradient of log p(label | x_t) with respect to x_t.
    """
    check_scale("classifier_scale", scale)

    def guided(x: Tensor, t: int | float | Tensor) -> Prediction:
        p, at = denoise(x, t), level(t).to(x)
        return Prediction.from_eps(x, mix(1.0, p.eps, -scale * at.sigma, log_prob_grad(x, t)), at, p.var_frac)

    return guided


def clip_x0(denoise: Denoiser, level: Levels, *, bound: float = 1.0, keep_eps: bool = False) -> Denoiser:
    """Clamp the believed x0 to [-bound, bound]; eps follows, unless `keep_eps` (diffusers' DDIM leaves it)."""
    return _bounded(denoise, level, lambda x0: x0.clamp(-bound, bound), keep_eps)


def threshold_x0(
    denoise: Denoiser, level: Levels, *, quantile: float = 0.995, max_bound: float = math.inf, keep_eps: bool = False
) -> Denoiser:
    """Imagen's dynamic thresholding: clamp x0 to its own `quantile` of |x0| (between 1 and max_bound), divide by it."""

    def threshold(x0: Tensor) -> Tensor:
        bound = x0.flatten(1).abs().float().quantile(quantile, dim=1).clamp(1.0, max_bound).to(x0.dtype)
        bound = bound.view(-1, 1, 1, 1)
        return torch.minimum(torch.maximum(x0, -bound), bound) / bound

    return _bounded(denoise, level, threshold, keep_eps)


def _bounded(denoise: Denoiser, level: Levels, bound: Callable[[Tensor], Tensor], keep_eps: bool) -> Denoiser:
    def bounded(x: Tensor, t: int | float | Tensor) -> Prediction:
        p = denoise(x, t)
        x0 = bound(p.x0)
        return p._replace(x0=x0) if keep_eps else Prediction.from_x0(x, x0, level(t).to(x), p.var_frac)

    return bounded
