"""Choosing a solver: names and their neighbours, what each takes, and the hooks of the loop."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import Mixture, normal

from diffusion.process import GaussianDiffusion, Prediction, fresh_variance, q_sample, q_step, transition
from diffusion.sampling import SampleNoise, Sampler, sample, step
from diffusion.schedule import CLEAN, Level, cosine, linear, scaled_linear, zero_terminal_snr
from diffusion.solvers import SOLVERS, dpmpp_multistep, euler, find_solver

SCHEDULE = scaled_linear()
DIFFUSION, DENOISE = GaussianDiffusion(SCHEDULE), Mixture().denoiser(SCHEDULE.level)
X = normal((2, 1, 4, 4))


def run(sampler: Sampler, **kwargs) -> torch.Tensor:
    *_, last = sampler.states(DIFFUSION, DENOISE, X, noise=SampleNoise([0, 1]), **kwargs)
    return last.x


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_is_chosen_by_name_record_or_function(name):
    named = run(Sampler(6, solver=name, clip=None))
    assert torch.equal(named, run(Sampler(6, solver=SOLVERS[name], clip=None)))
    assert SOLVERS[name].name == name
    assert SOLVERS[name].text
    assert SOLVERS[name].evaluations in (1, 2, 3)


def test_a_function_that_is_registered_is_that_solver():
    assert find_solver(euler) is SOLVERS["euler"]
    assert find_solver(dpmpp_multistep) is SOLVERS["dpmpp_2m"]


def test_a_function_of_ones_own_is_a_solver():
    def halfway(denoise, level, x, t, s, history):
        p = history[0][1]
        return Prediction.from_x0(x, p.x0 / 2, level(t))

    assert find_solver(halfway).name == "halfway"
    ours = run(Sampler(3, solver=halfway, eta=0.5, clip=None))
    *_, last = sample(
        DENOISE, X, SCHEDULE.timesteps(3), SCHEDULE.level, solver=halfway, eta=0.5, noise=SampleNoise([0, 1])
    )
    assert torch.equal(ours, last.x)


def test_a_function_of_ones_own_may_ask_for_what_the_step_knows():
    seen = []

    def asking(denoise, level, x, t, s, history, *, time_of, eta, weight=2.0):
        seen.append((time_of(1.0), eta, weight))
        return history[0][1]

    run(Sampler(2, solver=asking, eta=0.25, clip=None))
    assert seen == [(SCHEDULE.time_of(1.0), 0.25, 2.0)] * 2


@pytest.mark.parametrize(
    ("name", "near"), [("dpmpp_2", "dpmpp_2s or dpmpp_2m"), ("uler", "euler"), ("unipcc", "unipc"), ("lmss", "lms")]
)
def test_an_unknown_name_is_an_error_that_knows_the_nearest(name, near):
    with pytest.raises(
        ValueError, match=f"there is no solver '{name}'; did you mean .*{near.split(' or ')[0]}"
    ) as error:
        Sampler(solver=name)
    assert "solver must be one of euler, heun, dpm2" in str(error.value)


# -- what a solver takes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"solver": "heun", "eta": 1.0}, "solver heun takes no eta, got 1.0; leave it out, or use one of euler, dpm2"),
        ({"solver": "lcm", "eta": 0.0}, "solver lcm takes no eta, got 0.0"),
        ({"solver": "dpmpp_2m_sde", "eta": 2.0}, r"eta must be in \[0, 1\]"),
        (
            {"solver": "dpmpp_2m", "s_churn": 1.0},
            "solver dpmpp_2m takes no s_churn, got 1.0; .* euler, heun, dpm2, dpm3",
        ),
        ({"s_churn": -1.0}, "s_noise and s_churn must be at least 0, got 1.0 and -1.0"),
        ({"s_noise": math.nan}, "s_noise and s_churn must be at least 0"),
        ({"solver": "lms", "order": 5}, "the order of solver lms must be one of 1, 2, 3, 4, got 5"),
        ({"solver": "heun", "order": 3}, "the order of solver heun cannot be chosen, got 3"),
        ({"solver": "unipc", "kind": "bh3"}, "the kind of solver unipc must be one of bh1, bh2, got bh3"),
        ({"kind": "heun"}, "the kind of solver euler cannot be chosen, got heun"),
        ({"noise": "white"}, "sampler noise must be one of fresh, brownian, got 'white'"),
    ],
)
def test_what_a_solver_has_no_use_for_is_an_error_when_the_sampler_is_made(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**kwargs)


def test_eta_is_the_solvers_own_unless_told():
    noisy = ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm"]
    assert [name for name, solver in SOLVERS.items() if solver.stochastic] == noisy
    assert [Sampler(solver=name).eta for name in noisy] == [1.0, 1.0, 1.0, math.inf]
    assert all(Sampler(solver=name).eta == 0 for name in SOLVERS if name not in noisy)
    assert Sampler(solver="dpmpp_2m_sde", eta=0.0).eta == 0


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_and_kind_reach_the_solver(order):
    one = run(Sampler(8, solver="unipc", order=order, kind="bh1", clip=None))
    method = SOLVERS["unipc"].having(order, "bh1")
    *_, last = sample(DENOISE, X, SCHEDULE.timesteps(8), SCHEDULE.level, solver=method)
    assert torch.equal(one, last.x)
    assert not torch.equal(one, run(Sampler(8, solver="unipc", order=order % 3 + 1, kind="bh1", clip=None)))
    assert method.order == order + 1


def test_s_noise_multiplies_the_noise_and_0_takes_it_away():
    quiet = run(Sampler(5, solver="dpmpp_sde", s_noise=0.0, clip=None))
    kwargs = {"solver": "dpmpp_sde", "eta": 1.0, "time_of": SCHEDULE.time_of, "noise": torch.zeros_like}
    *_, last = sample(DENOISE, X, SCHEDULE.timesteps(5), SCHEDULE.level, **kwargs)
    assert torch.allclose(quiet, last.x, atol=1e-12)


def test_churn_stays_within_its_levels_and_is_shared_by_the_steps():
    plain = run(Sampler(10, solver="heun", clip=None))
    assert torch.equal(plain, run(Sampler(10, solver="heun", s_churn=5.0, s_tmin=50.0, clip=None)))
    assert not torch.allclose(plain, run(Sampler(10, solver="heun", s_churn=5.0, clip=None)))
    drawn = []

    def noise(x):
        drawn.append(1)
        return torch.zeros_like(x)

    grid = SCHEDULE.timesteps(10)
    inside = [t for t in grid[:-1] if 0.5 <= SCHEDULE.noise_to_signal(t) <= 5.0]
    kwargs = {"s_churn": 1.0, "s_tmin": 0.5, "s_tmax": 5.0, "time_of": SCHEDULE.time_of, "noise": noise}
    list(sample(DENOISE, X, grid, SCHEDULE.level, **kwargs))
    assert len(drawn) == len(inside) > 2


def test_a_solver_that_asks_between_timesteps_needs_to_know_where_they_are():
    with pytest.raises(ValueError, match=r"asks the network between timesteps: pass time_of=schedule.time_of"):
        list(sample(DENOISE, X, (500, 400), SCHEDULE.level, solver="dpm2"))


def test_only_euler_inverts():
    with pytest.raises(ValueError, match=r"inversion .* takes solver euler, not dpmpp_2m"):
        list(sample(DENOISE, X, (10, 50), SCHEDULE.level, solver="dpmpp_2m"))


def test_paths_are_drawn_by_seed():
    with pytest.raises(ValueError, match="noise=brownian is drawn by seed"):
        Sampler(3, solver="dpmpp_sde", noise="brownian").states(DIFFUSION, DENOISE, X, noise=torch.randn_like)


@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "dpmpp_sde"])
def test_a_learned_variance_belongs_to_the_euler_solver(solver):
    """Other solvers' noise is their own law's: the network's variance is that of DDPM's step."""
    learned = GaussianDiffusion(SCHEDULE, variance="learned")
    denoise = lambda x, t: DENOISE(x, t)._replace(var_frac=torch.full_like(x, 0.9))  # noqa: E731
    sampler = Sampler(5, solver=solver, clip=None)
    ours = sampler.sample(learned, denoise, X, noise=SampleNoise([0, 1]))
    assert torch.equal(ours, run(sampler))


# -- the loop's hooks ------------------------------------------------------------------------------------------------


def test_a_projection_is_applied_to_the_start_and_after_every_step():
    seen = []

    def project(x, t):
        seen.append(t)
        return x.clone().fill_(float(t))

    asked = []

    def denoise(x, t):
        asked.append(x.unique().tolist())
        return DENOISE(x, t)

    states = list(sample(denoise, X, (900, 500, 100, CLEAN), SCHEDULE.level, project=project))
    assert seen == [900, 500, 100, CLEAN]
    assert asked == [[900.0], [500.0], [100.0]]
    assert [state.x.unique().tolist() for state in states] == [[500.0], [100.0], [-1.0]]


def test_a_known_half_stays_as_it_is_and_the_other_half_is_sampled():
    x0, known = normal(X.shape, 5), torch.arange(4) < 2
    project = lambda x, t: torch.where(known, q_sample(x0, normal(X.shape, 6), SCHEDULE.level(t)), x)  # noqa: E731
    x = run(Sampler(12, solver="dpmpp_2m", clip=None), project=project)
    assert torch.equal(x[..., :2], x0[..., :2])
    assert not torch.allclose(x[..., 2:], x0[..., 2:])


def test_the_tail_of_a_grid_is_walked_as_given():
    sampler = Sampler(10, solver="dpmpp_2m", clip=None)
    tail = sampler.timesteps(SCHEDULE)[4:]
    states = list(sampler.states(DIFFUSION, DENOISE, X, noise=SampleNoise([0, 1]), timesteps=tail))
    assert [(state.t, state.s) for state in states] == list(pairwise(tail))
    *_, last = sample(DENOISE, X, tail, SCHEDULE.level, solver="dpmpp_2m")
    assert torch.equal(states[-1].x, last.x)


# -- the moves -------------------------------------------------------------------------------------------------------


def test_adding_noise_in_two_moves_is_adding_it_in_one():
    """q(x_t | x_s) after q(x_s | x0) is q(x_t | x0): mean and variance, read off at 0 and 1."""
    zero, one = torch.zeros(1), torch.ones(1)
    here, there = SCHEDULE.level(200), SCHEDULE.level(700.5)
    assert q_step(q_sample(one, zero, here), zero, here, there).item() == pytest.approx(there.alpha)
    parts = (q_step(q_sample(zero, one, here), zero, here, there), q_step(zero, one, here, there))
    assert sum(part.item() ** 2 for part in parts) == pytest.approx(there.sigma**2)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_both_laws_renew_noise_and_keep_its_sum(eta):
    here, there = SCHEDULE.level(700), SCHEDULE.level(300)
    p = Prediction(torch.zeros(1), torch.ones(1))
    for law in ("ddim", "sde"):
        mean, var = transition(p, here, there, eta, law=law)
        assert mean.item() ** 2 + var == pytest.approx(there.sigma**2, rel=1e-6)
    both = [fresh_variance(here, there, eta, law) for law in ("ddim", "sde")]
    assert (abs(both[0] - both[1]) < 1e-12) == (eta != 0.3)


def test_the_sde_law_renews_everything_at_infinite_eta():
    here, there = SCHEDULE.level(700), SCHEDULE.level(300)
    p = Prediction(torch.full((1,), 2.0), torch.ones(1))
    mean, var = transition(p, here, there, math.inf, law="sde")
    assert mean.item() == pytest.approx(2 * there.alpha)
    assert var == pytest.approx(there.sigma**2)
    assert fresh_variance(Level(0.0, 1.0), there, 0.5, "sde") == there.sigma**2


def test_the_sde_law_of_two_moves_is_that_of_one():
    """What it keeps is a power of sigma/alpha, so it does not depend on the grid; DDIM's does, but for eta 0 and 1."""
    a, b, c = (SCHEDULE.level(t) for t in (700, 500, 300))

    def kept(here, there, law):
        return 1 - fresh_variance(here, there, 0.4, law) / there.sigma**2

    assert kept(a, b, "sde") * kept(b, c, "sde") == pytest.approx(kept(a, c, "sde"))
    assert abs(kept(a, b, "ddim") * kept(b, c, "ddim") - kept(a, c, "ddim")) > 0.05


def test_an_unknown_law_is_an_error():
    with pytest.raises(ValueError, match="law must be one of ddim, sde, got 'vp'"):
        fresh_variance(Level(0.5, 0.8), Level(0.8, 0.5), 0.5, "vp")


@pytest.mark.parametrize("make", [lambda: cosine(1000), lambda: zero_terminal_snr(linear(1000))])
@pytest.mark.parametrize("name", ["heun", "dpm2", "dpm3", "plms", "pndm"])
def test_solvers_on_eps_do_not_blow_up_where_x_is_noise_only(name, make):
    """sigma/alpha falls from 20000 or more to about 10 in the first step; its error in eps would be multiplied so."""
    schedule = make()
    x = Sampler(20, solver=name, clip=None).sample(
        GaussianDiffusion(schedule, "v"), Mixture().denoiser(schedule.level), X, noise=SampleNoise([0, 1])
    )
    assert x.abs().max() < 2


def test_a_step_may_be_taken_alone_by_any_solver():
    for name in SOLVERS:
        x, history = step(DENOISE, SCHEDULE.level, X, 600, 400, solver=name, time_of=SCHEDULE.time_of)
        assert x.isfinite().all()
        assert [t for t, _ in history] == [600]
