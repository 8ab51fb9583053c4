"""Walking a grid of timesteps: `step` is one move, `sample` the loop, `Sampler` the choice of both as a value.

Noise comes from outside: one generator a sample, so image i depends on its own seed and on nothing else.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .brownian import BrownianNoise
from .denoiser import Denoiser
from .grids import Grid, as_grid, check_spacing
from .guidance import LEAST_SNR, Gradient, Levels, classifier_score, clip_x0, threshold_x0
from .process import (
    VARIANCE_ALIASES,
    VARIANCES,
    GaussianDiffusion,
    Prediction,
    last_variances,
    q_step,
    reverse_variance,
    transition,
    variances,
)
from .randomness import fold
from .schedule import CLEAN, Level, Schedule
from .solvers import SOLVERS, Draw, History, Solver, TimeOf, euler, find_solver

Noise = Callable[[Tensor], Tensor]  # noise(x): standard normal, shaped like x
Project = Callable[[Tensor, float], Tensor]  # project(x, t): x at timestep t, put where it has to be


class SampleNoise:
    """Standard normal noise with one CPU generator a sample, seeded by `seeds[i]` alone, moved to `device`.

    The draws of sample i do not depend on which other samples share its batch, nor on the device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.seeds = tuple(seeds)
        self.generators = [torch.Generator().manual_seed(fold(seed, "sample")) for seed in seeds]
        self.device = torch.device(device)

    def initial(self, shape: Sequence[int]) -> Tensor:
        """Draw the start x_T (B, *shape) in float32."""
        return self._draw(tuple(shape))

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) != len(self.generators):
            raise ValueError(f"noise for {len(self.generators)} samples was asked for a batch of {len(x)}")
        return self._draw(tuple(x.shape[1:])).to(x.dtype)

    def brownian(self) -> BrownianNoise:
        """Noise of the same seeds whose moves belong together."""
        return BrownianNoise(self.seeds, self.device)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        noise = torch.empty((len(self.generators), *shape))
        for row, generator in zip(noise.unbind(), self.generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(self.device)


class State(NamedTuple):
    """Where a sampler stands after a move from t to s."""

    index: int  # moves made, from 1
    t: float
    s: float
    x: Tensor  # (B, C, H, W) at timestep s
    prediction: Prediction  # what the denoiser believed at t


def _untold(noise_to_signal: float) -> float:
    raise ValueError("this solver asks the network between timesteps: pass time_of=schedule.time_of")


def step(
    denoise: Denoiser,
    level: Levels,
    x: Tensor,
    t: float,
    s: float,
    history: History = (),
    *,
    solver: str | Solver | Callable[..., Prediction] = euler,
    eta: float | None = None,
    variance: str = "posterior",
    shift: Gradient | None = None,
    noise: Noise = torch.randn_like,
    s_noise: float = 1.0,
    churn: float = 0.0,
    time_of: TimeOf = _untold,
    parameterization: str = "eps",
    ask: Callable[[float, float], float] = max,
) -> tuple[Tensor, History]:
    """Carry x (B, C, H, W) from timestep t to s: s < t denoises, s > t inverts. Differentiable.

    `eta` None is the solver's own. `ask` chooses at which end of the interval an inversion asks the network: max is
    the noisier one (null-text inversion), min the cleaner (guided-diffusion). `shift(x, t)` is a classifier's
    gradient, or None: variance times it is added to the mean (2105.05233, algorithm 1); on the move to CLEAN that is
    nothing with variance="posterior" and the variance of `last_variances` otherwise. No noise is drawn for eta = 0 or
    on the move to CLEAN. `s_noise` multiplies all noise. `churn` > 0 first adds noise until sigma/alpha has grown by
    this share (EDM, 2206.00364, algorithm 2), but not beyond the last timestep. `time_of` (`Schedule.time_of`) is
    needed for that, and by solvers that ask between t and s; `parameterization` by those that mix its own answers.
    """
    solver = find_solver(solver)
    eta = solver.eta if eta is None else eta
    solver.check_noise(eta)
    draw = partial(_draw, noise, s_noise)
    if churn > 0 and s < t:
        x, t = _churned(level, x, t, churn, time_of, draw)
    here, there = level(t), level(s)
    if s < t:
        p = denoise(x, t)
    else:
        _check_inversion(t, s, solver, eta)
        variance = "posterior"
        p = denoise(x, ask(t, s))
        p = Prediction.from_eps(x, p.eps, here, p.var_frac)
    history = ((t, p), *history[:3])
    known = {"eta": eta, "time_of": time_of, "draw": draw, "parameterization": parameterization}
    belief = solver(denoise, level, x, t, s, history, **known)
    mean, var = transition(belief, here, there, eta, variance, solver.law)
    if shift is not None and s == CLEAN and len(history) > 1 and variance != "posterior":
        before = variances(level(history[1][0]), here)[1]
        var = reverse_variance(variance, *last_variances(variance, variances(here, there)[0], before), p.var_frac)
    if shift is not None and (gradient := shift(x, t)) is not None:
        mean = mean + var * gradient
    if eta == 0 or s == CLEAN:
        return mean, history
    fresh = draw(x, here, there)
    if isinstance(var, Tensor):
        return torch.addcmul(mean, var.sqrt(), fresh), history
    return torch.add(mean, fresh, alpha=var**0.5), history


def _check_inversion(t: float, s: float, solver: Solver, eta: float) -> None:
    if eta != 0:
        raise ValueError(f"inversion (from timestep {t} up to {s}) is deterministic; use eta=0, not {eta}")
    if solver.name in SOLVERS and solver.belief is not euler:
        raise ValueError(f"inversion (from timestep {t} up to {s}) takes solver euler, not {solver.name}")


def _along_a_path(noise: Noise) -> BrownianNoise:
    if not isinstance(noise, SampleNoise):
        raise ValueError(f"noise=brownian is drawn by seed: give SampleNoise(seeds), not {noise!r}")
    return noise.brownian()


def _draw(noise: Noise | BrownianNoise, s_noise: float, x: Tensor, here: Level, there: Level) -> Tensor:
    """The noise of a move between two levels, in either direction."""
    fresh = noise.between(x, here, there) if isinstance(noise, BrownianNoise) else noise(x)
    return fresh if s_noise == 1 else s_noise * fresh


def _churned(level: Levels, x: Tensor, t: float, churn: float, time_of: TimeOf, draw: Draw) -> tuple[Tensor, float]:
    """Add noise until sigma/alpha has grown by the share `churn`."""
    here = level(t)
    noisier = time_of((1 + churn) * here.sigma / here.alpha) if here.alpha else t
    return (q_step(x, draw(x, here, level(noisier)), here, level(noisier)), noisier) if noisier > t else (x, t)


def sample(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Sequence[float] | Iterable[tuple[float, float]],
    level: Levels,
    *,
    project: Project | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    **step_kwargs,
) -> Iterator[State]:
    """Walk x along `timesteps` (or along explicit (t, s) intervals) and yield each State; no gradients.

    A rising grid inverts: `sample(denoise, x0, (CLEAN, *grid), level)` is DDIM inversion. `project(x, t)` is applied
    to the start and to the x of every State (t is its s): what is known of a picture goes back in there. `s_churn` is
    shared by the steps that start with s_tmin <= sigma/alpha <= s_tmax (EDM, 2206.00364, algorithm 2).
    """
    intervals = list(timesteps)
    if intervals and not isinstance(intervals[0], tuple):
        intervals = list(pairwise(intervals))
    history: History = ()
    churn = min(s_churn / max(len(intervals), 1), math.sqrt(2) - 1)
    for index, (t, s) in enumerate(intervals, start=1):
        # A generator must not hold `no_grad` while its caller runs; where the caller does, there is nothing to enter.
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            x = project(x, t) if project is not None and index == 1 else x
            share = churn if churn and s_tmin <= level(t).sigma / (level(t).alpha or 1e-300) <= s_tmax else 0.0
            x, history = step(denoise, level, x, t, s, history, churn=share, **step_kwargs)
            x = project(x, s) if project is not None else x
        yield State(index, t, s, x, history[0][1])


@dataclass(frozen=True)
class Sampler:
    """A way to sample, as a value: grid, solver, stochasticity, and what is done to the believed x0.

    `solver`, `order` and `kind` say how (`SOLVERS`; None: the solver's own). `eta`: how much noise is renewed; None is
    the solver's own; with the Euler solver 0 is DDIM, 1 is DDPM. `s_noise` multiplies that noise; `s_churn`, `s_tmin`
    and `s_tmax` as in `sample`. `noise`: "fresh" for every move, or "brownian": moves of one path a seed, so that a
    picture changes less with the number of steps. `variance` None takes the model's own (learned included) with the
    Euler solver; all others, and DDIM proper, use "posterior". `clip`: "clip" (pixels in [-1, 1]), "dynamic" (Imagen,
    at `dynamic_quantile`), None (latents), or "auto": as "clip", unless the caller says that these are latents
    (`generate` does).
    The grid's fields, `num_steps`, `spacing` and `final` to `discard_penultimate`: see `Schedule.timesteps`.
    """

    num_steps: int | str = 50
    solver: str | Solver | Callable[..., Prediction] = "euler"
    spacing: str = "trailing"
    eta: float | None = None
    variance: str | None = None
    clip: str | None = "auto"
    dynamic_quantile: float = 0.995
    final: int = CLEAN
    offset: int = 0
    grid: Sequence[float] | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    discard_penultimate: bool = False
    order: int | None = None
    kind: str | None = None
    noise: str = "fresh"
    s_noise: float = 1.0
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf

    def __post_init__(self):
        check_spacing(self.spacing)
        if self.eta is None:
            object.__setattr__(self, "eta", self.method.eta)
        self.method.check_noise(self.eta, self.s_noise, self.s_churn)
        if self.grid is not None:
            object.__setattr__(self, "grid", as_grid(self.grid))
        if self.variance is not None:
            object.__setattr__(self, "variance", VARIANCE_ALIASES.get(self.variance, self.variance))
        for name, allowed in (
            ("variance", (None, *VARIANCES)),
            ("clip", (None, "auto", "clip", "dynamic")),
            ("noise", ("fresh", "brownian")),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join("null" if value is None else value for value in allowed)
                raise ValueError(f"sampler {name} must be one of {choices}, got {getattr(self, name)!r}")

    @property
    def method(self) -> Solver:
        """The solver itself, where `solver` names it, of the order and kind wanted."""
        solver = find_solver(self.solver)
        return solver if self.order is None and self.kind is None else solver.having(self.order, self.kind)

    @property
    def shifts_mean(self) -> bool:
        """Whether a classifier's gradient shifts the mean of a move (2105.05233, algorithm 1) or bends eps (2).

        Algorithm 1 is derived for ancestral sampling, p(x_s | x_t, label) near the Gaussian p(x_s | x_t): DDPM, which
        is eta = 1 with the Euler solver, with whichever variance. With less noise it would guide the noisy part of
        the move only, at eta = 0 not at all: so DDIM with eta < 1 and every other solver get the score.
        """
        return self.eta == 1 and self.method.belief is euler

    def timesteps(self, schedule: Schedule) -> Grid:
        """The grid that this sampler walks on `schedule`, `final` included."""
        return schedule.timesteps(
            self.num_steps,
            self.spacing,
            final=self.final,
            offset=self.offset,
            grid=self.grid,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            rho=self.rho,
            discard_penultimate=self.discard_penultimate,
        )

    def states(
        self,
        diffusion: GaussianDiffusion,
        denoise: Denoiser,
        x: Tensor,
        *,
        noise: Noise,
        log_prob_grad: Gradient | None = None,
        timesteps: Sequence[float] | None = None,
        project: Project | None = None,
        **step_kwargs,
    ) -> Iterator[State]:
        """Yield every State from x ~ N(0, 1) at the first timestep to `final`. Errors come before the first step.

        `timesteps` walks these instead, x being at the first of them: the tail of a grid, for a picture that is given.
        `project` as in `sample`.

        `log_prob_grad(x, t)` is what a classifier guides by, its scale included (`ClassifierGuidance.log_prob_grad`);
        `shifts_mean` says how. Its score is not clipped again, and none is asked for where x_t is noise (`LEAST_SNR`).
        """
        level, solver = diffusion.schedule.level, self.method
        if self.clip in ("auto", "clip"):
            denoise = clip_x0(denoise, level)
        elif self.clip == "dynamic":
            denoise = threshold_x0(denoise, level, quantile=self.dynamic_quantile)
        if log_prob_grad is not None and self.shifts_mean:
            step_kwargs["shift"] = log_prob_grad
        elif log_prob_grad is not None:
            denoise = classifier_score(denoise, log_prob_grad, level, least_snr=LEAST_SNR)
        return sample(
            denoise,
            x,
            self.timesteps(diffusion.schedule) if timesteps is None else timesteps,
            level,
            project=project,
            s_churn=self.s_churn,
            s_tmin=self.s_tmin,
            s_tmax=self.s_tmax,
            solver=solver,
            eta=self.eta,
            variance=self.variance or (diffusion.variance if solver.belief is euler else "posterior"),
            noise=_along_a_path(noise) if self.noise == "brownian" else noise,
            s_noise=self.s_noise,
            time_of=diffusion.schedule.time_of,
            parameterization=diffusion.parameterization,
            **step_kwargs,
        )

    @torch.no_grad()
    def sample(
        self,
        diffusion: GaussianDiffusion,
        denoise: Denoiser,
        x: Tensor,
        *,
        noise: Noise,
        log_prob_grad: Gradient | None = None,
    ) -> Tensor:
        """Return the last state's x (B, C, H, W); `log_prob_grad` as in `states`."""
        for state in self.states(diffusion, denoise, x, noise=noise, log_prob_grad=log_prob_grad):
            x = state.x
        return x
