"""The diffusion process: every q and p formula of the project, each once.

x_t = alpha_t x0 + sigma_t eps. DDPM (arXiv 2006.11239), DDIM (2010.02502), iDDPM (2102.09672), v (2202.00512).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import Level, Schedule

PARAMETERIZATIONS = ("eps", "x0", "v", "mean")
VARIANCES = ("posterior", "jump", "learned")
LAWS = ("ddim", "sde")  # what eta means between 0 and 1, where they are the same
# Names of the same things in DDPM's and guided-diffusion's code, accepted where a config names a variance.
VARIANCE_ALIASES = {"fixed_small": "posterior", "fixed_large": "jump", "learned_range": "learned"}


def mix(a: float | Tensor, x: Tensor, b: float | Tensor, y: Tensor) -> Tensor:
    """Return a x + b y: as a (x + b/a y), in two kernels and one allocation, where a and b are numbers."""
    if isinstance(b, Tensor):
        return a * x + b * y
    return torch.add(x, y, alpha=b / a).mul_(a) if a != 0 else y * b


def _at_least(value: float | Tensor, low: float) -> float | Tensor:
    return value.clamp(min=low) if isinstance(value, Tensor) else max(value, low)


def q_sample(x0: Tensor, eps: Tensor, at: Level) -> Tensor:
    """Draw x_t ~ q(x_t | x0) with the noise eps: DDPM eq. 4."""
    at = at.to(x0)
    return mix(at.alpha, x0, at.sigma, eps)


def variances(here: Level, there: Level) -> tuple[float | Tensor, float | Tensor]:
    """Return Var[x_t | x_s] ("jump", DDPM's beta) and Var[x_s | x_t, x0] ("posterior"), t at `here`, s at `there`."""
    jump = _at_least(here.sigma**2 - (here.alpha / there.alpha) ** 2 * there.sigma**2, 0.0)
    return jump, jump * there.sigma**2 / here.sigma**2


def posterior_mean(x0: Tensor, x: Tensor, here: Level, there: Level) -> Tensor:
    """Return E[x_s | x_t, x0]: DDPM eq. 7, for any two levels of one chain."""
    first, second = _posterior_coefficients(here, there)
    return mix(first, x0, second, x)


def _posterior_coefficients(here: Level, there: Level) -> tuple[float | Tensor, float | Tensor]:
    jump, _ = variances(here, there)
    return jump * there.alpha / here.sigma**2, here.alpha * there.sigma**2 / (there.alpha * here.sigma**2)


def target(parameterization: str, x0: Tensor, eps: Tensor, at: Level, before: Level | None = None) -> Tensor:
    """Return what a network of this parameterization should answer at x_t = q_sample(x0, eps, at).

    v is alpha eps - sigma x0 (2202.00512, appendix D). "mean" is DDPM's posterior mean at the level `before`.
    """
    at = at.to(x0)
    match parameterization:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return mix(at.alpha, eps, -at.sigma, x0)
        case "mean" if before is not None:
            return posterior_mean(x0, q_sample(x0, eps, at), at, before.to(x0))
    raise ValueError(f"parameterization must be one of {', '.join(PARAMETERIZATIONS)}, got {parameterization!r}")


class Prediction(NamedTuple):
    """What a denoiser believes about x_t, in both currencies; var_frac in 0 (posterior) .. 1 (jump) if learned."""

    x0: Tensor  # (B, C, H, W)
    eps: Tensor  # (B, C, H, W)
    var_frac: Tensor | None = None

    @classmethod
    def from_eps(cls, x: Tensor, eps: Tensor, at: Level, var_frac: Tensor | None = None) -> "Prediction":
        """DDPM eq. 4 solved for x0. At zero SNR (alpha = 0) there is no x0 to find: use `from_v` or `from_x0`."""
        if not isinstance(at.alpha, Tensor) and at.alpha == 0:
            raise ValueError("at zero SNR a prediction of eps says nothing about x0; use parameterization v or x0")
        return cls(mix(1 / at.alpha, x, -at.sigma / at.alpha, eps), eps, var_frac)

    @classmethod
    def from_x0(cls, x: Tensor, x0: Tensor, at: Level, var_frac: Tensor | None = None) -> "Prediction":
        return cls(x0, mix(1 / at.sigma, x, -at.alpha / at.sigma, x0), var_frac)

    @classmethod
    def from_v(cls, x: Tensor, v: Tensor, at: Level, var_frac: Tensor | None = None) -> "Prediction":
        return cls(mix(at.alpha, x, -at.sigma, v), mix(at.sigma, x, at.alpha, v), var_frac)

    @classmethod
    def from_mean(
        cls, x: Tensor, mean: Tensor, at: Level, before: Level, var_frac: Tensor | None = None
    ) -> "Prediction":
        """Invert `posterior_mean`: the parameterization "mu tilde" of DDPM's table 2."""
        first, second = _posterior_coefficients(at, before)
        return cls.from_x0(x, mix(1 / first, mean, -second / first, x), at, var_frac)


def q_step(x: Tensor, eps: Tensor, here: Level, there: Level) -> Tensor:
    """Draw x_t ~ q(x_t | x_s) with the noise eps: add noise to x at `here` until it is at the noisier `there`."""
    return mix(there.alpha / here.alpha, x, variances(there, here)[0] ** 0.5, eps)


def fresh_variance(here: Level, there: Level, eta: float, law: str = "ddim") -> float | Tensor:
    """Return how much of sigma_s^2 is new noise after the move here -> there.

    law="ddim": eta^2 posterior (DDIM eq. 16, k-diffusion's ancestral step). law="sde": 1 - (rho_s / rho_t)^(2 eta) of
    it, rho = sigma/alpha, as in the SDE form of DPM-Solver++ (2211.01095); eta = inf renews the noise entirely.
    """
    match law:
        case "ddim":
            return eta**2 * variances(here, there)[1]
        case "sde":
            ratio = here.alpha * there.sigma / (there.alpha * here.sigma)
            return there.sigma**2 * (1 - ratio ** (2 * eta))
    raise ValueError(f"law must be one of {', '.join(LAWS)}, got {law!r}")


def transition(
    p: Prediction, here: Level, there: Level, eta: float = 0.0, variance: str = "posterior", law: str = "ddim"
) -> tuple[Tensor, float | Tensor]:
    """Return mean and variance of the move here -> there. Every sampler ends in this function.

    DDIM eq. 12, whose sigma^2 is the `fresh_variance`; eta = 1 is DDPM's posterior mean. `variance` replaces the
    variance and not the mean.
    """
    if eta == 0 and variance == "posterior":  # DDIM, and inversion, which may start at sigma = 0
        return mix(there.alpha, p.x0, there.sigma, p.eps), 0.0
    fresh = fresh_variance(here, there, eta, law)
    direction = _at_least(there.sigma**2 - fresh, 0.0) ** 0.5
    var = reverse_variance(variance, variances(here, there)[0], fresh, p.var_frac)
    return mix(there.alpha, p.x0, direction, p.eps), var


def reverse_variance(
    variance: str, jump: float | Tensor, posterior: float | Tensor, var_frac: Tensor | None = None
) -> float | Tensor:
    """Return the model's Var[x_s | x_t]: one of DDPM's two choices, or exp(v log jump + (1 - v) log posterior).

    The last is iDDPM eq. 15 with v = var_frac; 1e-20 stands for a posterior variance of zero.
    """
    match variance:
        case "posterior":
            return posterior
        case "jump":
            return jump
        case "learned" if var_frac is None:
            raise ValueError("variance=learned needs a network with a variance head; this one predicts the mean only")
        case "learned":
            high, low = (_log(_at_least(value, 1e-20)) for value in (jump, posterior))
            if isinstance(low, Tensor):
                high, low = high.to(var_frac), low.to(var_frac)
            return torch.exp(low + (high - low) * var_frac)
    raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")


def _log(value: float | Tensor) -> float | Tensor:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def last_variances(variance: str, jump: float | Tensor, before: float) -> tuple[float | Tensor, float]:
    """Return the jump and posterior variance to use on the move to CLEAN, where the true posterior variance is zero.

    The bound needs one there, and guided-diffusion shifts by it: DDPM takes the posterior variance of the move
    `before`, for variance="jump" as well; a learned variance keeps jump as its upper end.
    """
    return (before if variance == "jump" else jump), before


@dataclass(frozen=True)
class GaussianDiffusion:
    """A schedule, what the network predicts, and which reverse variance it was made for: how to read its output.

    `parameterization`: eps, x0, v, or mean (DDPM's mu tilde, tied to the full chain t -> t - 1).
    `variance`: posterior, jump, or learned (the network answers 2C channels, the second half being v of iDDPM
    eq. 15 in [-1, 1]). `time_scale` multiplies the timestep that the network sees (guided-diffusion's
    rescale_timesteps is 1000 / num_train_timesteps).
    """

    schedule: Schedule
    parameterization: str = "eps"
    variance: str = "posterior"
    time_scale: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "variance", VARIANCE_ALIASES.get(self.variance, self.variance))
        for name, allowed in (("parameterization", PARAMETERIZATIONS), ("variance", VARIANCES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.schedule.zero_terminal_snr and self.parameterization in ("eps", "mean"):
            raise ValueError(
                f"a schedule with zero terminal SNR cannot be sampled with parameterization={self.parameterization}: "
                "at the last timestep it says nothing about x0; use v or x0"
            )

    @property
    def num_train_timesteps(self) -> int:
        return self.schedule.num_train_timesteps

    @property
    def learned_variance(self) -> bool:
        return self.variance == "learned"

    def out_channels(self, channels: int) -> int:
        """How many channels a network for images of `channels` must answer."""
        return 2 * channels if self.learned_variance else channels

    def time(self, x: Tensor, t: int | float | Tensor) -> Tensor:
        """The (B,) tensor of times that the network is given for x (B, C, H, W) at timestep t."""
        t = t if isinstance(t, Tensor) else torch.full(x.shape[:1], t, device=x.device)
        return t if self.time_scale == 1 else t * self.time_scale

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should answer at q_sample(x0, eps, t)."""
        before = self.schedule.level(t - 1) if self.parameterization == "mean" else None
        return target(self.parameterization, x0, eps, self.schedule.level(t), before)

    def prediction(self, output: Tensor, x: Tensor, t: int | float | Tensor) -> Prediction:
        """Read the network's answer (B, C or 2C, H, W) to x at t. Raises ValueError if the channels do not fit."""
        learned = self.learned_variance
        if output.shape[1] != self.out_channels(x.shape[1]):
            raise ValueError(
                f"the network answered {output.shape[1]} channels for an image of {x.shape[1]}; with "
                f"variance={self.variance} it must answer {self.out_channels(x.shape[1])}: set out_channels so, or "
                f"variance={'posterior' if learned else 'learned'}"
            )
        output, var_frac = output.to(x.dtype), None  # a half-precision network still moves a float32 x
        if learned:
            output, var_frac = output.chunk(2, dim=1)
            var_frac = (var_frac + 1) / 2
        at = self.schedule.level(t).to(x)
        match self.parameterization:
            case "eps":
                return Prediction.from_eps(x, output, at, var_frac)
            case "x0":
                return Prediction.from_x0(x, output, at, var_frac)
            case "v":
                return Prediction.from_v(x, output, at, var_frac)
        return Prediction.from_mean(x, output, at, self.schedule.level(t - 1).to(x), var_frac)
