"""k-diffusion's own numbers: every sampler's trajectory, on its axis of sigma and along a schedule's timesteps.

Sigma there is sigma/alpha here. On its axis (alpha = 1) a timestep is its sigma; along a schedule the same run takes
fractional timesteps, and x is alpha times as large.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from golden_cases import Case, assert_close, load, names
from torch import Tensor

from diffusion.guidance import Levels
from diffusion.process import GaussianDiffusion, Prediction, fresh_variance, transition
from diffusion.sampling import sample
from diffusion.schedule import CLEAN, Level, Schedule, cosine, linear, power, scaled_linear
from diffusion.solvers import SOLVERS, Solver

# The peer's function: our solver, and the eta that it has unless told.
PEERS = {
    "sample_euler": ("euler", 0.0),
    "sample_euler_ancestral": ("euler", 1.0),
    "sample_heun": ("heun", 0.0),
    "sample_dpm_2": ("dpm2", 0.0),
    "sample_dpm_2_ancestral": ("dpm2", 1.0),
    "sample_lms": ("lms", 0.0),
    "sample_dpmpp_2s_ancestral": ("dpmpp_2s", 1.0),
    "sample_dpmpp_sde": ("dpmpp_sde", 1.0),
    "sample_dpmpp_2m": ("dpmpp_2m", 0.0),
    "sample_dpmpp_2m_sde": ("dpmpp_2m_sde", 1.0),
    "sample_dpmpp_3m_sde": ("dpmpp_3m_sde", 1.0),
}


class Axis:
    """Time is sigma/alpha itself."""

    def level(self, t: float) -> Level:
        return Level(1.0, 0.0 if t == CLEAN else float(t))

    def time_of(self, rho: float) -> float:
        return rho or CLEAN


AXES = {"sigma": Axis(), "schedule": cosine(1000)}


def mixture(parts: dict) -> Callable[[Tensor, float], Tensor]:
    """The peer's D(x, sigma) = E[x0 | x] for x0 ~ sum_k w_k N(mu_k, s_k^2)."""
    mu, s, w = (torch.tensor(parts[key], dtype=torch.float64) for key in ("mu", "s", "w"))

    def posterior_mean(x: Tensor, sigma: float) -> Tensor:
        var = s**2 + sigma**2
        square = ((x[:, None] - mu) ** 2).sum(-1)
        share = (w.log() - x.shape[-1] / 2 * var.log() - square / (2 * var)).softmax(1)[..., None]
        each = (s[:, None] ** 2 * x[:, None] + sigma**2 * mu) / var[:, None]
        return (share * each).sum(1)

    return posterior_mean


def denoiser(posterior_mean: Callable[[Tensor, float], Tensor], level: Levels):
    def denoise(x: Tensor, t: float) -> Prediction:
        at = level(t)
        return Prediction.from_x0(x, posterior_mean(x / at.alpha, at.sigma / at.alpha), at)

    return denoise


def solver_of(run: dict) -> tuple[Solver, dict]:
    name, eta = PEERS[run["function"]]
    kwargs = {"eta": eta} | run["kwargs"]
    named = {"order": "order", "solver_type": "kind", "r": "r"}
    told = {ours: kwargs.pop(theirs) for theirs, ours in named.items() if theirs in kwargs}
    return SOLVERS[name].having(**told), kwargs


SAMPLERS = [(n, run) for n in names("kdiffusion/samplers_*") for run in load(n).config["runs"]]


@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
@pytest.mark.parametrize(("name", "key"), SAMPLERS)
def test_trajectories(name, key, axis):
    case = load(name)
    solver, kwargs = solver_of(case.config["runs"][key])
    denoise = denoiser(mixture(case.config["denoisers"][key.split(".")[0]]), axis.level)
    timesteps = [axis.time_of(sigma) for sigma in case["in.sigmas"].tolist()]
    draws, drawn, asked = case.tensors.get(f"in.noise.{key}"), [], []

    def noise(x: Tensor) -> Tensor:
        drawn.append(0)
        # The peer's churn draws at every step, needed or not; its other noise is drawn when it is needed.
        return draws[step if "s_churn" in kwargs else len(drawn) - 1].double()

    def watched(x: Tensor, t: float) -> Prediction:
        asked.append(x / axis.level(t).alpha)
        return denoise(x, t)

    step, x = 0, case["in.x"].double() * axis.level(timesteps[0]).alpha
    states = sample(watched, x, timesteps, axis.level, solver=solver, noise=noise, time_of=axis.time_of, **kwargs)
    for state in states:
        # The x of the peer's trajectory is what it asks the network first, so after the churn.
        assert_close(asked[0], case[f"out.{key}.x"][step], 1e-4, f"x of step {step}")
        if f"out.{key}.denoised" in case.tensors:
            assert_close(state.prediction.x0, case[f"out.{key}.denoised"][step], 1e-4, f"x0 of step {step}")
        asked.clear()
        step += 1
    assert step == len(timesteps) - 1
    assert_close(state.x / axis.level(state.s).alpha, case[f"out.{key}.final"], 1e-4)
    if draws is not None and "s_churn" not in kwargs:
        assert len(drawn) == (len(draws) if kwargs["eta"] > 0 else 0)


FAST = [
    (n, k.removesuffix(".final"))
    for n in names("kdiffusion/dpm_adaptive_fast")
    for k in load(n).group("out")
    if k.startswith("fast_")
]


@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
@pytest.mark.parametrize(("name", "key"), FAST)
def test_dpm_fast_is_a_grid_even_in_log_sigma_with_solvers_of_falling_order(name, key, axis):
    case, evaluations = load(name), int(key.removeprefix("fast_"))
    high, low = (case.config[end] for end in ("sigma_max", "sigma_min"))
    whole, rest = divmod(evaluations, 3)
    orders = [3] * (whole - 1) + [2, 1] if rest == 0 else [3] * whole + [rest]
    solvers = {1: SOLVERS["euler"], 2: SOLVERS["dpm2"], 3: SOLVERS["dpm3"]}
    ramp = [math.log(high) + k / len(orders) * math.log(low / high) for k in range(len(orders) + 1)]
    timesteps = [axis.time_of(math.exp(u)) for u in ramp]
    denoise = denoiser(mixture(case.config["denoiser"]), axis.level)
    x = case["in.x"].double() * axis.level(timesteps[0]).alpha
    for order, interval in zip(orders, pairwise(timesteps), strict=True):
        [state] = sample(denoise, x, interval, axis.level, solver=solvers[order], time_of=axis.time_of)
        x = state.x
    assert_close(x / axis.level(timesteps[-1]).alpha, case[f"out.{key}.final"], 1e-4)


class StepSize:
    """The peer's controller: the next step from the errors of the last three, and whether this one is accepted."""

    def __init__(self, order: int, pcoeff: float = 0.0, icoeff: float = 1.0, dcoeff: float = 0.0, h: float = 0.05):
        self.h, self.inverse_errors = h, []
        self.powers = [c / order for c in (pcoeff + icoeff + dcoeff, -(pcoeff + 2 * dcoeff), dcoeff)]

    def accepts(self, error: float) -> bool:
        inverse = 1 / (error + 1e-8)
        self.inverse_errors = [inverse, *(self.inverse_errors or [inverse] * 3)[1:]]
        factor = math.prod(e**power for e, power in zip(self.inverse_errors, self.powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        if factor >= 0.81:
            self.inverse_errors = [inverse, inverse, self.inverse_errors[1]]
        self.h *= factor
        return factor >= 0.81


ADAPTIVE = [(n, key) for n in names("kdiffusion/dpm_adaptive_fast") for key in load(n).config["runs"]]


@pytest.mark.parametrize(("name", "key"), ADAPTIVE)
def test_dpm_adaptive_compares_two_of_our_beliefs(name, key):
    """The norm of its error spans the batch, so that an image would depend on its neighbours: no sampler of ours.

    The weaker belief of the third order is DPM-Solver-2 with the first of its points; of the second order it is Euler.
    """
    case, axis = load(name), AXES["sigma"]
    kwargs = dict(case.config["runs"][key]["kwargs"])
    order, rtol, atol = kwargs.pop("order"), kwargs.pop("rtol", 0.05), 0.0078
    high, low = (-math.log(case.config[end]) for end in ("sigma_max", "sigma_min"))
    x, here, size, trace = case["in.x"].double(), high, StepSize(order, **kwargs), []
    denoise, asked = denoiser(mixture(case.config["denoiser"]), axis.level), []

    def watched(x: Tensor, t: float) -> Prediction:
        asked.append(denoise(x, t))
        return asked[-1]

    before = x
    while here < low - 1e-5:
        there = min(low, here + size.h)
        t, s = math.exp(-here), math.exp(-there)
        asked.clear()
        solver = SOLVERS[{2: "dpm2", 3: "dpm3"}[order]]
        [state] = sample(watched, x, (t, s), axis.level, solver=solver, time_of=axis.time_of)
        eps = asked[0].eps + (1.5 * (asked[1].eps - asked[0].eps) if order == 3 else 0)
        weaker, _ = transition(Prediction.from_eps(x, eps, axis.level(t)), axis.level(t), axis.level(s))
        allowed = torch.maximum(weaker.abs(), before.abs()).mul(rtol).clamp(min=atol)
        error = (((weaker - state.x) / allowed).norm() / x.numel() ** 0.5).item()
        if size.accepts(error):
            x, before, here = state.x, weaker, there
        trace.append((math.exp(-here), error, size.h))
    assert len(trace) == case.config["runs"][key]["info"]["steps"]
    # The first errors are of the size of the peer's rounding, which moves the steps after them by a part in 1000.
    assert_close(torch.tensor(trace), case[f"out.{key}.trace"], 2e-3, "sigma, error, h")
    assert_close(x, case[f"out.{key}.final"], 1e-4)


@pytest.mark.parametrize("name", names("kdiffusion/ancestral_step"))
def test_the_ancestral_step_is_ddims(name):
    for start, end, eta, down, up in load(name)["out.table"].tolist():
        fresh = fresh_variance(Level(1.0, start), Level(1.0, end), eta)
        assert fresh**0.5 == pytest.approx(up, abs=1e-6)
        assert max(end**2 - fresh, 0) ** 0.5 == pytest.approx(down, abs=1e-6)


# -- levels and grids ------------------------------------------------------------------------------------------------


def peer_denoised(case: Case, schedule: Schedule, parameterization: str, timesteps: list) -> Tensor:
    """D(x, sigma) of the inner model tanh(x / 2 + t / 1000), a row for each sigma."""
    rows, diffusion = [], GaussianDiffusion(schedule, parameterization)
    for row, t in zip(case["in.x"].double(), timesteps, strict=True):
        x = schedule.level(t).alpha * row.view(1, 1, 1, -1)
        rows.append(diffusion.prediction(torch.tanh(0.5 * x + t / 1000), x, t).x0.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("name", names("kdiffusion/discrete_denoisers"))
def test_discrete_denoisers_and_the_sigmas_of_timesteps(name):
    case, schedule = load(name), scaled_linear()
    assert_close(schedule.alphas_cumprod, case["in.alphas_cumprod"], 1e-6)
    found = [schedule.time_of(sigma) for sigma in case["in.sigma"].tolist()]
    assert_close(torch.tensor(found), case["out.t_of_sigma"], 1e-4)
    assert [round(t) for t in found] == case["out.t_of_sigma_quantized"].tolist()
    sigmas = [schedule.noise_to_signal(t) for t in case["in.t"].tolist()]
    assert_close(torch.tensor(sigmas), case["out.sigma_of_t"], 1e-5)
    assert_close(peer_denoised(case, schedule, "eps", found), case["out.denoised_eps"], 1e-4)
    assert_close(peer_denoised(case, schedule, "v", found), case["out.denoised_v"], 1e-4)
    every = [schedule.noise_to_signal(t) for t in range(999, CLEAN - 1, -1)]
    assert_close(torch.tensor(every), case["out.get_sigmas_none"], 1e-5)
    assert_close(torch.tensor(every[-2::-1]), case["out.sigmas"], 1e-5)
    eight = [schedule.noise_to_signal(t) for t in schedule.timesteps(8, "normal")]
    assert_close(torch.tensor(eight), case["out.get_sigmas_8"], 1e-5)


SIGMAS = [(n, key) for n in names("kdiffusion/sigmas") for key in load(n).group("out")]


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, k in SIGMAS if not k.startswith("vp")])
def test_grids_of_sigmas(name, key):
    spacing, rest = key.split(".", 1)
    count, low, high = rest.split(".rho")[0].removeprefix("n").split("_")
    rho = float(rest.split(".rho")[1]) if ".rho" in rest else None
    schedule = power(1000, beta_start=1e-6)  # sigma/alpha 0.001 .. 150
    grid = schedule.timesteps(int(count), spacing, sigma_min=float(low), sigma_max=float(high), rho=rho)
    ours = torch.tensor([schedule.noise_to_signal(t) for t in grid], dtype=torch.float64)
    torch.testing.assert_close(ours.float(), load(name)[f"out.{key}"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, k in SIGMAS if k.startswith("vp")])
def test_the_continuous_vp_process_is_the_limit_of_the_linear_chain(name, key):
    count, slope_and_least, last = key.removeprefix("vp.n").split("_")
    count, slope = count.split(".", 1)
    assert (slope, slope_and_least, last) == ("19.9", "0.1", "0.001")  # what linear() discretises
    schedule, steps = linear(100_000), int(count)
    times = [1 + k / (steps - 1) * (float(last) - 1) for k in range(steps)]
    ours = [schedule.noise_to_signal(round(100_000 * u) - 1) for u in times] + [0.0]
    torch.testing.assert_close(torch.tensor(ours), load(name)[f"out.{key}"], rtol=2e-3, atol=0)
