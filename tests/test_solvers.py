"""Every solver against its paper's own formulas in float64, at the edges of a schedule, and its convergence."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import Mixture, normal
from scipy.integrate import quad
from torch import Tensor

from diffusion.process import GaussianDiffusion, Prediction, target
from diffusion.sampling import SampleNoise, Sampler, sample, step
from diffusion.schedule import CLEAN, cosine, scaled_linear, zero_terminal_snr
from diffusion.solvers import SOLVERS

SCHEDULE = scaled_linear(1000)
LEVEL, TIME_OF = SCHEDULE.level, SCHEDULE.time_of
GRID = (999, 801.5, 640, 455, 250, 120, 33, 4)
WITHOUT_NOISE = [name for name, solver in SOLVERS.items() if name != "lcm"]


def net_x0(x: Tensor, t: float) -> Tensor:
    """A nonlinear denoiser with no structure of its own."""
    return torch.tanh(0.8 * x + math.sin(t / 150)) * (0.7 + t / 3000) + 0.1 * x.roll(1, -1)


def believing(level) -> Callable[[Tensor, float], Prediction]:
    return lambda x, t: Prediction.from_x0(x, net_x0(x, t), level(t))


DENOISE = believing(LEVEL)
X = normal((2, 1, 3, 4))


def alpha(t: float) -> float:
    return LEVEL(t).alpha


def sigma(t: float) -> float:
    return LEVEL(t).sigma


def lam(t: float) -> float:
    return math.log(alpha(t) / sigma(t))


def rho(t: float) -> float:
    return sigma(t) / alpha(t)


def at(log_snr: float) -> float:
    """The timestep of half a log-SNR."""
    return TIME_OF(math.exp(-log_snr))


def eps_of(x: Tensor, t: float) -> Tensor:
    return (x - alpha(t) * net_x0(x, t)) / sigma(t)


def ours(name: str, grid=GRID, x: Tensor = X, *, eta: float = 0.0, noise=None, **options) -> list[Tensor]:
    solver = SOLVERS[name].having(**options)
    kwargs = {"eta": eta, "noise": noise or SampleNoise([0, 1]), "time_of": TIME_OF}
    return [state.x for state in sample(DENOISE, x, grid, LEVEL, solver=solver, **kwargs)]


def assert_same(ours: list[Tensor], formulas: list[Tensor]) -> None:
    assert len(ours) == len(formulas)
    for k, (a, b) in enumerate(zip(ours, formulas, strict=True), start=1):
        assert (a - b).abs().max() < 1e-9 * max(1.0, b.abs().max()), f"after step {k}"


def walk(move: Callable[[Tensor, float, float], Tensor], grid=GRID, x: Tensor = X) -> list[Tensor]:
    found = []
    for t, s in pairwise(grid):
        x = move(x, t, s)
        found.append(x)
    return found


# -- the papers' formulas --------------------------------------------------------------------------------------------
# In the notation of each paper: VE coordinates y = x / alpha with sigma = rho (EDM), or alpha, sigma and
# lambda = log(alpha / sigma) (DPM-Solver).


def test_euler_is_ddims_equation_12():
    def move(x, t, s):
        return alpha(s) * net_x0(x, t) + sigma(s) * eps_of(x, t)

    assert_same(ours("euler"), walk(move))


def test_heun_is_edms_algorithm_1():
    def move(x, t, s):
        y = x / alpha(t)
        d = (y - net_x0(x, t)) / rho(t)
        ahead = y + (rho(s) - rho(t)) * d
        d2 = (ahead - net_x0(alpha(s) * ahead, s)) / rho(s)
        return alpha(s) * (y + (rho(s) - rho(t)) * (d + d2) / 2)

    assert_same(ours("heun"), walk(move))


def test_dpm2_is_dpm_solver_2():
    def move(x, t, s):
        h, middle = lam(s) - lam(t), at((lam(t) + lam(s)) / 2)
        u = alpha(middle) / alpha(t) * x - sigma(middle) * math.expm1(h / 2) * eps_of(x, t)
        return alpha(s) / alpha(t) * x - sigma(s) * math.expm1(h) * eps_of(u, middle)

    assert_same(ours("dpm2"), walk(move))


def test_dpm3_is_dpm_solver_3():
    def move(x, t, s):
        h, first, second = lam(s) - lam(t), at((2 * lam(t) + lam(s)) / 3), at((lam(t) + 2 * lam(s)) / 3)
        e = eps_of(x, t)
        u1 = alpha(first) / alpha(t) * x - sigma(first) * math.expm1(h / 3) * e
        d1 = eps_of(u1, first) - e
        u2 = alpha(second) / alpha(t) * x - sigma(second) * math.expm1(2 * h / 3) * e
        u2 = u2 - sigma(second) * 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * d1
        d2 = eps_of(u2, second) - e
        last = sigma(s) * 1.5 * (math.expm1(h) / h - 1) * d2
        return alpha(s) / alpha(t) * x - sigma(s) * math.expm1(h) * e - last

    assert_same(ours("dpm3"), walk(move))


def test_dpmpp_2s_is_dpm_solver_pp_2s():
    def move(x, t, s):
        h, middle = lam(s) - lam(t), at((lam(t) + lam(s)) / 2)
        u = sigma(middle) / sigma(t) * x - alpha(middle) * math.expm1(-h / 2) * net_x0(x, t)
        return sigma(s) / sigma(t) * x - alpha(s) * math.expm1(-h) * net_x0(u, middle)

    assert_same(ours("dpmpp_2s"), walk(move))


@pytest.mark.parametrize("name", ["dpm2", "dpmpp_2s"])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ancestral_steps_aim_below_and_add_noise(name, eta):
    draws = [normal(X.shape, 10 + k) for k in range(len(GRID))]

    def ancestral(x, t, s):
        up = eta * math.sqrt(rho(s) ** 2 * (rho(t) ** 2 - rho(s) ** 2) / rho(t) ** 2)
        down = math.sqrt(rho(s) ** 2 - up**2)
        middle, y, d = TIME_OF(math.sqrt(rho(t) * down)), x / alpha(t), eps_of(x, t)
        u = alpha(middle) * (y + (rho(middle) - rho(t)) * d)
        if name == "dpm2":
            y = y + (down - rho(t)) * eps_of(u, middle)
        else:
            y = down / rho(t) * y + (1 - down / rho(t)) * net_x0(u, middle)
        return alpha(s) * (y + up * draws[next(count)])

    count, source = iter(range(len(GRID))), iter(draws)
    assert_same(ours(name, eta=eta, noise=lambda x: next(source)), walk(ancestral))


def test_dpmpp_sde_takes_noise_on_the_way_as_well():
    draws = [normal(X.shape, 30 + k) for k in range(2 * len(GRID))]

    def move(x, t, s):
        def go(x0, u):
            up = rho(u) * math.sqrt(1 - rho(u) ** 2 / rho(t) ** 2)
            down = math.sqrt(rho(u) ** 2 - up**2)
            return alpha(u) * (x0 + down / rho(t) * (x / alpha(t) - x0) + up * next(source))

        middle = at((lam(t) + lam(s)) / 2)
        return go(net_x0(go(net_x0(x, t), middle), middle), s)

    source = iter(draws)
    formulas, source = walk(move), iter(draws)
    assert_same(ours("dpmpp_sde", eta=1.0, noise=lambda x: next(source)), formulas)


def multistep(update: Callable[..., Tensor], value: Callable[[Tensor, float], Tensor] = net_x0) -> list[Tensor]:
    """Walk with the answers so far: update(x, ts, values, s), newest first."""
    ts, values = [], []

    def move(x, t, s):
        ts.insert(0, t)
        values.insert(0, value(x, t))
        return update(x, ts, values, s)

    return walk(move)


@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_dpmpp_2m_and_its_sde(kind, eta):
    draws = [normal(X.shape, 50 + k) for k in range(len(GRID))]

    def update(x, ts, d, s):
        t, h = ts[0], lam(s) - lam(ts[0])
        decay, gain = math.exp(-h * eta), -math.expm1(-h * (1 + eta))
        new = sigma(s) / sigma(t) * decay * x + alpha(s) * gain * d[0]
        if len(ts) > 1:
            slope = (d[0] - d[1]) * h / (lam(t) - lam(ts[1]))
            weight = gain / 2 if kind == "midpoint" else 1 - gain / (h * (1 + eta))
            new = new + alpha(s) * weight * slope
        return new + sigma(s) * math.sqrt(-math.expm1(-2 * h * eta)) * next(source) if eta else new

    source = iter(draws)
    formulas, source = multistep(update), iter(draws)
    assert_same(ours("dpmpp_2m_sde", eta=eta, noise=lambda x: next(source), kind=kind), formulas)
    if eta == 0:
        assert_same(ours("dpmpp_2m", kind=kind), formulas)


@pytest.mark.parametrize("kind", ["heun", "exact"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_dpmpp_3m_and_its_sde(kind, eta):
    draws = [normal(X.shape, 70 + k) for k in range(len(GRID))]

    def update(x, ts, d, s):
        t, h = ts[0], lam(s) - lam(ts[0])
        full = h * (1 + eta)
        new = sigma(s) / sigma(t) * math.exp(-h * eta) * x - alpha(s) * math.expm1(-full) * d[0]
        phi2 = math.expm1(-full) / full + 1
        phi3 = phi2 / full - 0.5
        if len(ts) == 2:
            new = new + alpha(s) * phi2 * (d[0] - d[1]) * h / (lam(t) - lam(ts[1]))
        elif len(ts) > 2:
            r0, r1 = (lam(ts[k]) - lam(ts[k + 1]) for k in (0, 1))
            r0, r1 = r0 / h, r1 / h
            d10, d11 = (d[0] - d[1]) / r0, (d[1] - d[2]) / r1
            d1, d2 = d10 + (d10 - d11) * r0 / (r0 + r1), (d10 - d11) / (r0 + r1)
            new = new + alpha(s) * (phi2 * d1 - (2 if kind == "exact" else 1) * phi3 * d2)
        return new + sigma(s) * math.sqrt(-math.expm1(-2 * h * eta)) * next(source) if eta else new

    source = iter(draws)
    formulas, source = multistep(update), iter(draws)
    assert_same(ours("dpmpp_3m_sde", eta=eta, noise=lambda x: next(source), kind=kind), formulas)
    if eta == 0:
        assert_same(ours("dpmpp_3m", kind=kind), formulas)


def lagrange(nodes: list[float], k: int, u: float) -> float:
    return math.prod((u - other) / (nodes[k] - other) for i, other in enumerate(nodes) if i != k)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_integrates_the_polynomial_in_sigma(order):
    def update(x, ts, e, s):
        nodes, y = [rho(t) for t in ts[:order]], x / alpha(ts[0])
        for k in range(len(nodes)):
            others = nodes[:k] + nodes[k + 1 :]
            integral = np.poly1d(np.poly(others) if others else [1.0]).integ()
            scale = math.prod(nodes[k] - other for other in others)
            y = y + (integral(rho(s)) - integral(nodes[0])) / scale * e[k]
        return alpha(s) * y

    assert_same(ours("lms", order=order), multistep(update, eps_of))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_integrates_the_polynomial_in_log_sigma(order):
    def update(x, ts, e, s):
        nodes, y = [math.log(rho(t)) for t in ts[:order]], x / alpha(ts[0])
        for k in range(len(nodes)):
            weight, _ = quad(lambda r, k=k: lagrange(nodes, k, math.log(r)), rho(ts[0]), rho(s), epsabs=1e-12)
            y = y + weight * e[k]
        return alpha(s) * y

    assert_same(ours("deis", order=order), multistep(update, eps_of))


def transfer(x: Tensor, e: Tensor, t: float, s: float) -> Tensor:
    """PNDM's phi (2202.09778, eq. 11): DDIM's move, whatever eps."""
    return alpha(s) * (x - sigma(t) * e) / alpha(t) + sigma(s) * e


def test_plms_is_adams_bashforth_after_an_improved_euler_step():
    def update(x, ts, e, s):
        if len(e) == 1:
            ahead = transfer(x, e[0], ts[0], s)
            mixed = (e[0] + eps_of(ahead, s)) / 2
        elif len(e) == 2:
            mixed = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            mixed = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            mixed = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        return transfer(x, mixed, ts[0], s)

    assert_same(ours("plms"), multistep(update, eps_of))


@pytest.mark.parametrize(("grid", "middle"), [((999, 899, 800, 700, 600, 500), 949), ((90.5, 80, 70, 60, 50), 85.25)])
def test_pndm_begins_with_three_runge_kutta_steps(grid, middle):
    ts, e, asked = [], [], []

    def move(x, t, s):
        ts.insert(0, t)
        e.insert(0, eps_of(x, t))
        if len(e) > 3:
            return transfer(x, (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24, t, s)
        half = s + (t - s) // 2 if grid[0] == 999 else (t + s) / 2
        asked.append(half)
        e2 = eps_of(transfer(x, e[0], t, half), half)
        e3 = eps_of(transfer(x, e2, t, half), half)
        e4 = eps_of(transfer(x, e3, t, s), s)
        return transfer(x, (e[0] + 2 * e2 + 2 * e3 + e4) / 6, t, s)

    assert_same(ours("pndm", grid), walk(move, grid))
    assert asked[0] == middle


@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_the_papers_predictor_and_corrector(order, kind):
    """Written with the state that the paper keeps: the corrected x of the step before (2302.04867, algorithms 1, 2)."""

    def unified(x, ts, d, s, end=None):
        t, h = ts[0], lam(s) - lam(ts[0])
        ratios = [(lam(u) - lam(t)) / h for u in ts[1:]]
        slopes = [(value - d[0]) / r for r, value in zip(ratios, d[1:], strict=True)]
        if end is not None:
            ratios, slopes = [*ratios, 1.0], [*slopes, end - d[0]]
        b_h = -h if kind == "bh1" else math.expm1(-h)
        phis, phi, fact = [], math.expm1(-h) / -h - 1, 1
        for k in range(1, len(ratios) + 1):
            fact *= k
            phis.append(phi * fact / b_h)
            phi = phi / -h - 1 / (fact * (k + 1))
        rows = [[r**k for r in ratios] for k in range(len(ratios))]
        weights = [0.5] if len(ratios) == 1 else np.linalg.solve(rows, phis) if ratios else []
        straight = sigma(s) / sigma(t) * x - alpha(s) * math.expm1(-h) * d[0]
        return straight - alpha(s) * b_h * sum(w * slope for w, slope in zip(weights, slopes, strict=True))

    ts, d, corrected, found, x = [], [], None, [], X
    for t, s in pairwise(GRID):
        value = net_x0(x, t)
        if ts:
            x = unified(corrected, ts[:order], d[:order], t, end=value)
        ts.insert(0, t)
        d.insert(0, value)
        corrected = x
        x = unified(x, ts[:order], d[:order], s)
        found.append(x)
    assert_same(ours("unipc", order=order, kind=kind), found)


def test_lcm_takes_the_consistency_models_x0_and_new_noise():
    draws = [normal(X.shape, 90 + k) for k in range(len(GRID))]

    def move(x, t, s):
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / math.sqrt((10 * t) ** 2 + 0.25)
        return alpha(s) * (c_out * net_x0(x, t) + c_skip * x) + sigma(s) * next(source)

    source = iter(draws)
    formulas, source = walk(move), iter(draws)
    assert_same(ours("lcm", eta=math.inf, noise=lambda x: next(source)), formulas)


@pytest.mark.parametrize("s_churn", [2.0, 50.0])
@pytest.mark.parametrize("name", ["euler", "heun", "dpm2", "dpm3", "dpmpp_2s"])
def test_churn_goes_back_up_before_each_step(name, s_churn):
    """EDM's algorithm 2 in its own words; the noisiest level that the model knows is as far as it goes."""
    draws = [normal(X.shape, 110 + k) for k in range(len(GRID))]
    settings = {"s_churn": s_churn, "s_tmin": 0.1, "s_tmax": 8.0, "s_noise": 1.01}
    gamma = min(s_churn / (len(GRID) - 1), math.sqrt(2) - 1)

    def move(x, t, s):
        if 0.1 <= rho(t) <= 8.0:
            higher = rho(t) * (1 + gamma)
            y = x / alpha(t) + math.sqrt(higher**2 - rho(t) ** 2) * 1.01 * next(source)
            t = TIME_OF(higher)
            x = alpha(t) * y
        *_, last = sample(DENOISE, x, (t, s), LEVEL, solver=name, time_of=TIME_OF)
        return last.x

    source = iter(draws)
    formulas, source = walk(move), iter(draws)
    states = sample(DENOISE, X, GRID, LEVEL, solver=name, time_of=TIME_OF, noise=lambda x: next(source), **settings)
    assert_same([state.x for state in states], formulas)


@pytest.mark.parametrize("schedule", [SCHEDULE, zero_terminal_snr(SCHEDULE)], ids=["some signal", "none"])
def test_churn_stops_at_the_last_timestep(schedule):
    data, grid, drawn = Mixture(), (999, 500), []
    kwargs = {"solver": "euler", "time_of": schedule.time_of, "noise": drawn.append}
    plain, churned = (
        list(sample(data.denoiser(schedule.level), X, grid, schedule.level, s_churn=churn, **kwargs))[-1].x
        for churn in (0, 1)
    )
    assert torch.equal(plain, churned)
    assert not drawn


# -- the edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_what_the_network_predicts_makes_no_difference(name, parameterization):
    def last(kind: str) -> Tensor:
        diffusion = GaussianDiffusion(SCHEDULE, kind)
        net = lambda x, t: target(kind, net_x0(x, t), eps_of(x, t), LEVEL(t))  # noqa: E731
        denoise = lambda x, t: diffusion.prediction(net(x, t), x, t)  # noqa: E731
        sampler = Sampler(7, solver=name, clip=None, noise="brownian")
        return sampler.sample(diffusion, denoise, X, noise=SampleNoise([0, 1]))

    assert (last(parameterization) - last("eps")).abs().max() < 1e-9


@pytest.mark.parametrize("name", SOLVERS)
def test_from_zero_terminal_snr_every_solver_starts_with_the_networks_x0(name):
    """At alpha = 0 x says nothing about the data: the first step can only be the network's belief."""
    schedule, calls = zero_terminal_snr(SCHEDULE), []
    data = Mixture()

    def denoise(x, t):
        calls.append(t)
        return data.denoiser(schedule.level)(x, t)

    sampler = Sampler(8, solver=name, eta=None, clip=None)
    states = sampler.states(GaussianDiffusion(schedule, "v"), denoise, X, noise=SampleNoise([0, 1]))
    first, *others = states
    assert calls[0] == 999
    assert calls[1] == first.s
    there, p = schedule.level(first.s), first.prediction
    if not SOLVERS[name].stochastic:
        assert torch.allclose(first.x, there.alpha * p.x0 + there.sigma * p.eps, atol=1e-12)
    assert all(state.x.isfinite().all() for state in others)
    assert others[-1].x.abs().max() < 2


EXACT_AT_ZERO_SNR = ["euler", "lms", "deis", "dpmpp_2m", "dpmpp_3m", "unipc", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm"]


@pytest.mark.parametrize("name", EXACT_AT_ZERO_SNR)
def test_zero_terminal_snr_is_the_limit_of_ever_less_signal(name):
    """Solvers that look back in log(sigma/alpha) come near to it as 1 / log alpha, the others as alpha."""
    schedule = zero_terminal_snr(SCHEDULE)
    grid, data = schedule.timesteps(9), Mixture()

    def last(alpha: float) -> Tensor:
        def level(t):
            return schedule.level(t)._replace(alpha=alpha) if t == 999 else schedule.level(t)

        kwargs = {"noise": SampleNoise([0, 1]).brownian(), "time_of": schedule.time_of}
        return list(sample(data.denoiser(level), X, grid, level, solver=name, **kwargs))[-1].x

    limit = last(0.0)
    far, near = ((last(10.0**-power) - limit).abs().max() for power in (30, 300))
    assert near < 1e-3
    assert near < far / 8 or near < 1e-12


@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_step_to_clean_data_is_the_belief_about_x0(name):
    sampler = Sampler(6, solver=name, clip=None)
    schedule = cosine(1000)
    *_, last = sampler.states(
        GaussianDiffusion(schedule), Mixture().denoiser(schedule.level), X, noise=SampleNoise([0, 1])
    )
    assert last.s == CLEAN
    if name not in ("lms", "plms", "pndm", "lcm"):  # which mix their eps to the end, or skip
        assert torch.allclose(last.x, last.prediction.x0, atol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_steps_work(name, steps):
    schedule = cosine(1000)
    x = Sampler(steps, solver=name, clip=None).sample(
        GaussianDiffusion(schedule), Mixture().denoiser(schedule.level), X, noise=SampleNoise([0, 1])
    )
    assert x.isfinite().all()
    assert x.abs().max() < 3


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_follows_float64(name):
    schedule, data = scaled_linear(), Mixture()

    def last(x: Tensor) -> Tensor:
        denoise = lambda x, t: Prediction(*(part.to(x) for part in data.denoiser(schedule.level)(x.double(), t)[:2]))  # noqa: E731
        sampler = Sampler(20, solver=name, clip=None, noise="brownian")
        return sampler.sample(GaussianDiffusion(schedule), denoise, x, noise=SampleNoise([0, 1]))

    double, single = last(X.float().double()), last(X.float())
    assert single.dtype == torch.float32
    assert (single - double).abs().max() < 1e-4


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_are_differentiable(name):
    x = X[:1, :, :1, :2].clone().requires_grad_()

    def two_steps(x):
        history = ()
        for t, s in ((700, 500), (500, 200)):
            kwargs = {"solver": name, "time_of": TIME_OF, "noise": lambda x: 0 * x}
            x, history = step(DENOISE, LEVEL, x, t, s, history, **kwargs)
        return x

    assert torch.autograd.gradcheck(two_steps, (x,))
