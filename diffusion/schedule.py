"""How much signal and noise is there at each trained timestep, and between two?

Tables are float64. DDPM (arXiv 2006.11239), iDDPM (2102.09672), simple diffusion (2301.11093), zero SNR (2305.08891).
Which of them a sampler visits is `grids`' question, its last entry included: nobody else derives "the previous one".
"""

import bisect
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import grids

CLEAN = -1  # the timestep of noiseless data; every schedule has it
WHOLE = 1e-9  # what `time_of` finds this near to a whole timestep is that timestep


class Level(NamedTuple):
    """x_t = alpha * x0 + sigma * eps. Floats when all samples share t, (B, 1, 1, 1) tensors when they do not."""

    alpha: float | Tensor
    sigma: float | Tensor

    def to(self, x: Tensor) -> "Level":
        """Match the dtype and device of x; floats stay floats."""
        if isinstance(self.alpha, Tensor):
            return Level(self.alpha.to(x), self.sigma.to(x))
        return self


class Schedule:
    """A variance-preserving chain: alpha_t^2 = prod_{i<=t} (1 - beta_i), sigma_t^2 = 1 - alpha_t^2, t in 0..T-1.

    `betas` (T,) lie in [0, 1]; a last beta of 1 is zero terminal SNR. Raises ValueError otherwise.
    """

    def __init__(self, betas: Tensor | Sequence[float]):
        self.betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").flatten().clone()
        if not len(self.betas) or not bool(((self.betas >= 0) & (self.betas <= 1)).all()):
            low, high = (self.betas.min().item(), self.betas.max().item()) if len(self.betas) else (math.nan, math.nan)
            raise ValueError(
                f"betas must be a non-empty list in [0, 1], got {len(self.betas)} values in [{low:g}, {high:g}]; "
                "a linear schedule needs more than 20 steps, cosine works for any number"
            )
        if self.betas[0] == 0:
            raise ValueError("the first beta is 0, so that timestep 0 would be clean data; start above 0")
        self.num_train_timesteps = len(self.betas)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        # T + 1 entries, CLEAN first: timestep t is at index t + 1, so a gather needs no special case.
        alphas = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod.sqrt()])
        sigmas = torch.cat([torch.zeros(1, dtype=torch.float64), (1 - self.alphas_cumprod).sqrt()])
        self._tables = {torch.device("cpu"): (alphas, sigmas)}
        self._levels = [Level(a, s) for a, s in zip(alphas.tolist(), sigmas.tolist(), strict=True)]
        self._log_noise = (sigmas.log() - alphas.log())[1:].tolist()  # rises with t, to infinity at zero terminal SNR

    @property
    def zero_terminal_snr(self) -> bool:
        return self._levels[-1].alpha == 0

    def level(self, t: int | float | Tensor) -> Level:
        """Return alpha and sigma at t in {CLEAN} or [0, T-1]; a fractional t is interpolated in log-SNR.

        A number gives floats (no device is touched); (B,) timesteps give (B, 1, 1, 1) float64 tensors on their device.
        Raises ValueError outside that range (on an accelerator, which must not be waited for, indexing fails instead).
        """
        last = self.num_train_timesteps - 1
        if type(t) is int and CLEAN <= t <= last:  # a sampler asks several times a step
            return self._levels[t + 1]
        if isinstance(t, Tensor):
            alphas, sigmas = self._on(t.device)
            if t.device.type == "cpu" and not bool(((t >= CLEAN) & (t <= last)).all()):
                raise ValueError(f"timesteps {t.tolist()} are not all in -1 (clean data) .. {last}")
            if t.is_floating_point():
                return self._between(t.to(alphas.dtype), alphas, sigmas)
            index = t.long() + 1
            return Level(alphas[index].view(-1, 1, 1, 1), sigmas[index].view(-1, 1, 1, 1))
        if not CLEAN <= t <= last:
            raise ValueError(f"timestep {t} is outside -1 (clean data) .. {last}")
        if t == int(t):
            return self._levels[int(t) + 1]
        if t < 0:
            return self._levels[0]
        low = int(t)
        log_noise = (low + 1 - t) * self._log_noise[low] + (t - low) * self._log_noise[low + 1]
        return Level(1 / math.hypot(1, math.exp(log_noise)), 1 / math.hypot(1, math.exp(-log_noise)))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            alphas, sigmas = self._tables[torch.device("cpu")]
            self._tables[device] = (alphas.to(device, dtype), sigmas.to(device, dtype))
        return self._tables[device]

    @staticmethod
    def _between(t: Tensor, alphas: Tensor, sigmas: Tensor) -> Level:
        low = t.floor().long() + 1
        high, weight = (low + 1).clamp(max=len(alphas) - 1), t - t.floor()
        first, second = (2 * (alphas[i].log() - sigmas[i].log()) for i in (low, high))
        # Not lerp, which turns the infinite log-SNR of clean data or zero terminal SNR into NaN.
        mixed = torch.where(weight == 0, first, (1 - weight) * first + weight * second).view(-1, 1, 1, 1)
        return Level(torch.sigmoid(mixed).sqrt(), torch.sigmoid(-mixed).sqrt())

    def noise_to_signal(self, t: int | float) -> float:
        """Return sigma/alpha at t, the "sigma" of k-diffusion and EDM: infinite where no signal is left."""
        at = self.level(t)
        return at.sigma / at.alpha if at.alpha else math.inf

    def time_of(self, noise_to_signal: float) -> int | float:
        """Return the timestep at which sigma/alpha has this value: the inverse of `level`, linear in log sigma.

        0 is CLEAN. What lies between CLEAN and timestep 0 becomes 0, and what lies beyond the last timestep becomes
        that, as in k-diffusion; at zero terminal SNR only infinity is T-1, for no signal is found between T-2 and it.
        Within rounding of a whole timestep an int is returned. Raises ValueError for a negative value.
        """
        if not noise_to_signal >= 0:
            raise ValueError(f"sigma/alpha is a level of noise, at least 0, got {noise_to_signal}")
        if noise_to_signal == 0:
            return CLEAN
        value, logs = math.log(noise_to_signal), self._log_noise
        high = bisect.bisect_left(logs, value)
        if high == 0 or high == len(logs) or logs[high] == value:
            return min(high, len(logs) - 1)
        low = logs[high - 1]
        t = high - 1 + (value - low) / (logs[high] - low)
        return round(t) if abs(t - round(t)) < WHOLE else t

    def timesteps(
        self,
        num_steps: int | str,
        spacing: str = "trailing",
        *,
        final: int = CLEAN,
        offset: int = 0,
        grid: Sequence[float] | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float | None = None,
        discard_penultimate: bool = False,
    ) -> grids.Grid:
        """Return a sampler's grid: strictly falling timesteps, whole ones as ints, then `final`.

        `num_steps`: 1..T, or guided-diffusion's strings, which ignore `spacing`: "ddim25" (integer stride), "250",
        "10,15,20" (so many steps in each equal section of the chain, first section cleanest).
        `spacing`, whole timesteps: trailing (starts at T-1; the right default, arXiv 2305.08891 table 2), leading
        (T//n stride from 0 plus `offset`; never starts at T-1), linspace (both ends), quad (DDIM's quadratic, ends
        near 0.8 T). Each has exactly n steps for every n. ldm and ldm_quad are latent-diffusion's own grids:
        everything is shifted by +1, and a stride of T//n takes more than n steps where n does not divide T; its index
        beyond T-1 (an IndexError there) becomes T-1, and repeated steps, which do not move, are left out.
        simple, ddim_uniform and beta are ComfyUI's; beta (arXiv 2407.12173) takes the quantiles of Beta(0.6, 0.6), and
        leaves out what rounding repeats. sgm is generative-models' (Stable Diffusion XL); lcm chooses among the 50
        timesteps of a latent consistency model.
        `spacing`, fractions: normal (linspace unrounded: k-diffusion's own), sgm_uniform (the same with
        `discard_penultimate`), karras (EDM eq. 5), exponential (even in log sigma), polyexponential, kl_optimal
        (arXiv 2404.14507), between `sigma_min` and `sigma_max` (sigma/alpha; None: the ends of the chain) and bent by
        `rho` (None: karras 7, polyexponential 1). At zero terminal SNR they start in pure noise and share the finite
        levels. align_your_steps and align_your_steps_xl (arXiv 2404.14507) are tables for Stable Diffusion's 1000
        timesteps.
        `discard_penultimate`: n + 1 points, the lowest left out, for solvers whose last move is best a long one:
        diffusers does it for DPM-Solver, UniPC and DEIS, A1111 and ComfyUI for DPM2 and others.
        `grid`: the timesteps themselves, falling, instead of `num_steps` and `spacing`.
        `final`: CLEAN, or 0 for latent-diffusion's and Stable Diffusion's habit of stopping at alphas_cumprod[0].
        """
        return grids.timesteps(
            self,
            num_steps,
            spacing,
            final=final,
            offset=offset,
            grid=grid,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            rho=rho,
            discard_penultimate=discard_penultimate,
        )


# ---------------------------------------------------------------------------------------------------------------
# Schedules. Each function returns a Schedule; configs/schedule/ has one file for each.


def power(
    num_train_timesteps: int = 1000,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    power: float = 1.0,
    reference_steps: int | None = None,
) -> Schedule:
    """Betas equally spaced in beta^(1/power): 1 is linear (DDPM), 2 is scaled_linear (latent-diffusion).

    With `reference_steps` the betas are meant for a chain that long and are multiplied by
    reference_steps / num_train_timesteps, so that a shorter chain destroys the same signal (guided-diffusion).
    """
    _check_length(num_train_timesteps)
    scale = reference_steps / num_train_timesteps if reference_steps else 1.0
    ends = [(scale * beta) ** (1 / power) for beta in (beta_start, beta_end)]
    return Schedule(torch.linspace(*ends, num_train_timesteps, dtype=torch.float64) ** power)


def linear(
    num_train_timesteps: int = 1000,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    reference_steps: int | None = 1000,
) -> Schedule:
    """DDPM section 4. The betas are those of a 1000-step chain unless `reference_steps` is None."""
    return power(
        num_train_timesteps, beta_start=beta_start, beta_end=beta_end, power=1.0, reference_steps=reference_steps
    )


def scaled_linear(
    num_train_timesteps: int = 1000,
    *,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    reference_steps: int | None = None,
) -> Schedule:
    """Linear in sqrt(beta): latent-diffusion's "linear", Stable Diffusion's schedule with these defaults."""
    return power(
        num_train_timesteps, beta_start=beta_start, beta_end=beta_end, power=2.0, reference_steps=reference_steps
    )


def from_alphas_cumprod(function: Callable[[float], float], num_train_timesteps: int, *, max_beta: float) -> Schedule:
    """Discretise alpha^2(u), u in [0, 1]: beta_i = 1 - alpha^2((i+1)/T) / alpha^2(i/T), at most `max_beta`."""
    _check_length(num_train_timesteps)
    values = [function(i / num_train_timesteps) for i in range(num_train_timesteps + 1)]
    return Schedule([min(1 - after / before, max_beta) for before, after in pairwise(values)])


def cosine(num_train_timesteps: int = 1000, *, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """iDDPM eq. 17: alpha^2(u) = cos^2((u + s) / (1 + s) * pi / 2)."""
    return from_alphas_cumprod(
        lambda u: math.cos((u + s) / (1 + s) * math.pi / 2) ** 2, num_train_timesteps, max_beta=max_beta
    )


def sigmoid(
    num_train_timesteps: int = 1000,
    *,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
) -> Schedule:
    """arXiv 2301.10972 (Chen, algorithm 1): alpha^2(u) falls as a sigmoid of ((end - start) u + start) / tau."""

    def value(u: float) -> float:
        at = [1 / (1 + math.exp(-x / tau)) for x in (start, end, u * (end - start) + start)]
        return max((at[1] - at[2]) / (at[1] - at[0]), 0.0)

    return from_alphas_cumprod(value, num_train_timesteps, max_beta=max_beta)


def shifted_cosine(
    num_train_timesteps: int = 1000, *, image_size: int = 256, reference_size: int = 64, max_beta: float = 0.999
) -> Schedule:
    """simple diffusion eq. 4: the cosine schedule with log-SNR lowered by 2 log(image_size / reference_size)."""
    return shifted(cosine(num_train_timesteps, max_beta=max_beta), image_size=image_size, reference_size=reference_size)


def shifted(schedule: Schedule, *, image_size: int, reference_size: int = 64) -> Schedule:
    """Give `schedule`, tuned at `reference_size`, the same SNR after average pooling at `image_size` (2301.11093)."""
    if image_size <= 0 or reference_size <= 0:
        raise ValueError(f"image_size and reference_size must be positive, got {image_size} and {reference_size}")
    odds = (reference_size / image_size) ** 2 * schedule.alphas_cumprod
    return _from_table(odds / (odds + 1 - schedule.alphas_cumprod))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """arXiv 2305.08891, algorithm 1: shift and scale alpha so that the last is 0 and the first stays.

    Needs parameterization v or x0: at the last timestep eps says nothing about x0.
    """
    alphas = schedule.alphas_cumprod.sqrt()
    if len(alphas) < 2:
        raise ValueError("zero terminal SNR needs at least 2 timesteps")
    return _from_table(((alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))) ** 2)


def _from_table(alphas_cumprod: Tensor) -> Schedule:
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return Schedule(1 - alphas_cumprod / before)


def _check_length(num_train_timesteps: int) -> None:
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
