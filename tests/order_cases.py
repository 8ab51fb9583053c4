"""How fast does each solver come near to the exact flow? The measurement behind configs/sampler's table and plot.

The data are a mixture whose denoiser and flow are known (`oracles.Mixture`), the grids even in log(sigma/alpha) from 20
to 0.05. The move to clean data is left out: its length does not depend on the number of steps.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from oracles import Mixture
from torch import Tensor

from diffusion.brownian import BrownianNoise
from diffusion.sampling import step
from diffusion.schedule import linear
from diffusion.solvers import SOLVERS, History, Solver

SCHEDULE = linear(1000)
DATA = Mixture(stds=(0.25, 0.35))
HIGH, LOW = 20.0, 0.05
ORDERED = {
    **{name: solver for name, solver in SOLVERS.items() if solver.order is not None},
    "lms, order 2": SOLVERS["lms"].having(order=2),
    "lms, order 3": SOLVERS["lms"].having(order=3),
    "deis, order 2": SOLVERS["deis"].having(order=2),
    "deis, order 4": SOLVERS["deis"].having(order=4),
    "dpmpp_2m, heun": SOLVERS["dpmpp_2m"].having(kind="heun"),
    "dpmpp_3m, exact": SOLVERS["dpmpp_3m"].having(kind="exact"),
    "unipc, bh1": SOLVERS["unipc"].having(kind="bh1"),
    "unipc, order 1": SOLVERS["unipc"].having(order=1),
    "unipc, order 3": SOLVERS["unipc"].having(order=3),
}
STOCHASTIC = {name: solver for name, solver in SOLVERS.items() if solver.takes_eta}


def grid(steps: int, spacing: str = "log") -> list[float]:
    """Timesteps between the two levels of noise, even in log(sigma/alpha) or in sigma/alpha."""
    if spacing == "log":
        rhos = [HIGH * (LOW / HIGH) ** (k / steps) for k in range(steps + 1)]
    else:
        rhos = [HIGH + (LOW - HIGH) * k / steps for k in range(steps + 1)]
    return [SCHEDULE.time_of(rho) for rho in rhos]


def start() -> Tensor:
    """64 pixels all over the range of x at the first level, at which x is about alpha times 20 times eps."""
    return torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8)


def end(
    solver: Solver, timesteps: Sequence[float], *, known: int = 0, eta: float = 0.0, noise: BrownianNoise | None = None
) -> tuple[Tensor, int]:
    """Where the solver arrives, and how often it asked. Its first `known` steps are made exactly, for its history."""
    level, calls, exact = SCHEDULE.level, [], DATA.denoiser(SCHEDULE.level)

    def denoise(x: Tensor, t: float):
        calls.append(t)
        return exact(x, t)

    x, history = start(), ()
    kwargs = {"solver": solver, "eta": eta, "noise": noise, "time_of": SCHEDULE.time_of}
    for k, (t, s) in enumerate(pairwise(timesteps)):
        if k < known:
            x, history = _exactly(denoise, x, t, s, history)
        else:
            x, history = step(denoise, level, x, t, s, history, **kwargs)
    return x, len(calls)


def _exactly(denoise, x: Tensor, t: float, s: float, history: History) -> tuple[Tensor, History]:
    return DATA.flow(x, SCHEDULE.level(t), SCHEDULE.level(s)), ((t, denoise(x, t)), *history[:3])


def errors(
    solver: Solver, counts: Sequence[int], *, known: int = 0, spacing: str = "log"
) -> tuple[list[float], list[int]]:
    """Mean distance from the exact flow after so many steps, and the evaluations that they took."""
    grids = [grid(steps, spacing) for steps in counts]
    exact = DATA.flow(start(), *(SCHEDULE.level(grids[0][i]) for i in (0, -1)))
    ends = [end(solver, timesteps, known=known) for timesteps in grids]
    return [(x - exact).abs().mean().item() for x, _ in ends], [calls for _, calls in ends]


def path_errors(solver: Solver, counts: Sequence[int], seeds: Sequence[int] = range(4)) -> list[float]:
    """The same with all noise renewed (eta = 1), from the end of the same Brownian path in four times finer steps."""
    found = [0.0] * len(counts)
    for seed in seeds:
        fine = _path_end(seed, 4 * max(counts))
        for i, steps in enumerate(counts):
            x, _ = end(solver, grid(steps), eta=1.0, noise=BrownianNoise([seed]))
            found[i] += (x - fine).abs().mean().item() / len(seeds)
    return found


@cache
def _path_end(seed: int, steps: int) -> Tensor:
    return end(SOLVERS["dpmpp_2m_sde"], grid(steps), eta=1.0, noise=BrownianNoise([seed]))[0]


def slope(found: Sequence[float], counts: Sequence[int]) -> float:
    """The order of convergence: the slope of a line through log error against log steps."""
    a, b = torch.tensor(counts, dtype=torch.float64).log(), torch.tensor(found, dtype=torch.float64).log()
    a, b = a - a.mean(), b - b.mean()
    return -((a * b).sum() / (a * a).sum()).item()
