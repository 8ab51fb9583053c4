"""Samplers on data whose denoiser is exact: order of convergence, moments, inversion; and reproducible noise."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import Gaussian, Mixture, normal

from diffusion.guidance import clip_x0
from diffusion.process import GaussianDiffusion, Prediction
from diffusion.randomness import fold
from diffusion.sampling import SampleNoise, Sampler, sample, step
from diffusion.schedule import CLEAN, cosine, linear, zero_terminal_snr
from diffusion.solvers import euler

RAMP = torch.linspace(-1, 1, 32, dtype=torch.float64).view(1, 1, 4, 8)
GAUSSIAN = Gaussian(0.5 * RAMP, 0.6 + 0.4 * RAMP)  # standard deviations 0.2 .. 1
DATA = {"gaussian": GAUSSIAN, "mixture": Mixture()}


# -- convergence -------------------------------------------------------------------------------------------------


def orders(solver, data, schedule, grids) -> list[float]:
    """Measured orders of convergence to the closed form from the first to the last entry of grids that double."""
    level = schedule.level
    here, there = level(grids[0][0]), level(grids[0][-1])
    x = here.alpha * 0.2 + 1.5 * RAMP
    exact, errors = data.flow(x, here, there), []
    for grid in grids:
        *_, last = sample(data.denoiser(level), x, grid, level, solver=solver)
        errors.append((last.x - exact).abs().mean().item())
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("make", [linear, cosine])
def test_ddim_is_of_first_order_on_a_long_chain(data, make):
    # 1025 timesteps have 1024 intervals, which 64 .. 512 divide. The end is the cleanest trained level: the move to
    # CLEAN is a last step whose length no grid changes. Measured: 0.93 .. 1.01, at the finest 0.995 .. 1.005.
    grids = [range(1024, -1, -1024 // n) for n in (64, 128, 256, 512)]
    measured = orders(euler, data, make(1025), grids)
    assert all(abs(order - 1) < 0.1 for order in measured), measured


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_ddim_is_of_first_order_on_fractional_timesteps(data):
    # More steps than the chain has timesteps.
    grids = [torch.linspace(99, 10, n + 1, dtype=torch.float64).tolist() for n in (100, 200, 400)]
    measured = orders(euler, data, linear(100), grids)
    assert all(abs(order - 1) < 0.1 for order in measured), measured


def test_ddim_follows_the_flow_of_every_pixel():
    level = cosine(1000).level
    x = normal((4, 1, 4, 8))
    *_, last = sample(GAUSSIAN.denoiser(level), x, cosine(1000).timesteps(1000), level)
    assert torch.allclose(last.x, GAUSSIAN.flow(x, level(999), level(CLEAN)), atol=3e-3)


def inversion_error(data, schedule, n: int) -> float:
    """Mean change of x0 by n steps of inversion and n steps back."""
    level, x0 = schedule.level, data.draw((2, 1, 4, 8), schedule.level(CLEAN))
    grid = schedule.timesteps(n)
    *_, noisy = sample(data.denoiser(level), x0, grid[::-1], level)
    *_, back = sample(data.denoiser(level), noisy.x, grid, level)
    return (back.x - x0).abs().mean().item()


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_inversion_and_sampling_come_back_the_closer_the_more_steps(data):
    errors = [inversion_error(data, linear(800), n) for n in (25, 50, 100, 200)]
    assert all(fine < 0.7 * coarse for coarse, fine in pairwise(errors)), errors
    assert errors[-1] < 0.05


def test_inversion_carries_data_to_standard_noise():
    level, schedule = cosine(1000).level, cosine(1000)
    x0 = GAUSSIAN.draw((500, 1, 4, 8), level(CLEAN))
    *_, noisy = sample(GAUSSIAN.denoiser(level), x0, schedule.timesteps(200)[::-1], level)
    assert abs(noisy.x.mean()) < 4 / 126  # 16000 pixels: 4 standard errors of the mean are 4 / sqrt(16000)
    assert abs(noisy.x.std() - 1) < 4 / 126 / math.sqrt(2) + 0.01  # and 0.01 for 200 steps


# -- moments -----------------------------------------------------------------------------------------------------


def exact_moments(data: Gaussian, schedule, sampler: Sampler) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each pixel of the sampler's output, without Monte Carlo.

    A step on Gaussian data is affine in x and in the noise, so its coefficients are read off at 0 and 1.
    """
    level, denoise = schedule.level, data.denoiser(schedule.level)
    zero, one = torch.zeros_like(data.mean), torch.ones_like(data.mean)
    mean, var = zero, one
    for t, s in pairwise(sampler.timesteps(schedule)):

        def move(x, noise, t=t, s=s):
            kwargs = {"eta": sampler.eta, "variance": sampler.variance, "noise": lambda x: noise}
            return step(denoise, level, x, t, s, **kwargs)[0]

        offset = move(zero, zero)
        slope, spread = move(one, zero) - offset, move(zero, one) - offset
        mean, var = offset + slope * mean, slope**2 * var + spread**2
    return mean, var.sqrt()


@pytest.mark.parametrize("steps", [5, 10, 20, 50, 100])
def test_short_ancestral_grids_under_disperse_with_posterior_and_over_disperse_with_jump(steps):
    small, large = (
        exact_moments(
            GAUSSIAN, linear(1000), Sampler(steps, spacing="linspace", eta=1.0, variance=variance, clip=None)
        )[1]
        for variance in ("posterior", "jump")
    )
    # Where the data's own deviation is 1, jump is the exact variance. The grid ends at timestep 0, since the move to
    # CLEAN, which draws no noise, would hide what is measured.
    inner = GAUSSIAN.std < 0.9
    assert (small < GAUSSIAN.std).all()
    assert (large > GAUSSIAN.std)[inner].all()


@pytest.mark.parametrize(
    ("eta", "variance"), [(0.0, "posterior"), (1.0, "posterior"), (1.0, "jump"), (0.5, "posterior")]
)
def test_moments_approach_the_datas_as_steps_grow(eta, variance):
    errors = []
    for steps in (50, 200, 1000):
        mean, std = exact_moments(GAUSSIAN, linear(1000), Sampler(steps, eta=eta, variance=variance, clip=None))
        assert torch.allclose(mean, GAUSSIAN.mean, atol=0.01)
        errors.append((std - GAUSSIAN.std).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.012


def test_jump_variance_is_exact_for_data_of_unit_variance_at_any_number_of_steps():
    unit = Gaussian(0.5 * RAMP, torch.ones_like(RAMP))
    schedule = linear(1000)
    for steps in (5, 50):
        sampler = Sampler(steps, eta=1.0, variance="jump", clip=None)
        _, std = exact_moments(unit, schedule, sampler)
        # The move to CLEAN leaves out its own noise, which is all that is missing.
        last = schedule.level(sampler.timesteps(schedule)[-2])
        assert torch.allclose(std, torch.full_like(std, last.alpha), atol=1e-9)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize(
    ("eta", "variance"), [(1.0, "posterior"), (1.0, "jump"), (0.0, "posterior")], ids=["ddpm", "ddpm-jump", "ddim"]
)
def test_sample_moments_are_right_within_monte_carlo_error_at_the_full_chain(data, eta, variance):
    """Bound: 4 standard errors, plus 1 % of the deviation for the chain's own bias (`exact_moments`: below 0.012)."""
    schedule = linear(1000)
    diffusion, batch = GaussianDiffusion(schedule), 500
    sampler, noise = Sampler(1000, eta=eta, variance=variance, clip=None), SampleNoise(range(batch))
    x = noise.initial((1, 4, 8)).double()
    x = sampler.sample(diffusion, data.denoiser(schedule.level), x, noise=noise)
    if isinstance(data, Gaussian):  # standardise, so that every pixel counts
        x, mean, std = (x - data.mean) / data.std, 0.0, 1.0
    else:
        mean, std = data.moments
    count = x.numel()
    assert abs(x.mean() - mean) < 4 * std / math.sqrt(count)
    fourth = ((x - mean) ** 4).mean() / std**4  # the standard error of a standard deviation, for any distribution
    assert abs(x.std() - std) < std * (4 * math.sqrt((fourth - 1) / (4 * count)) + 0.012)
    if isinstance(data, Mixture):  # and not only the moments: the share below the gap between the two components
        share = data.cdf(torch.zeros(1, 1, 1, 1, dtype=torch.float64), schedule.level(CLEAN)).item()
        assert abs((x < 0).double().mean() - share) < 4 * math.sqrt(share * (1 - share) / count) + 0.005


# -- noise -------------------------------------------------------------------------------------------------------


def test_a_samples_noise_depends_on_its_seed_alone_bit_for_bit():
    together, alone = SampleNoise([3, 4, 5]), [SampleNoise([seed]) for seed in (3, 4, 5)]
    shuffled = SampleNoise([5, 3, 4])
    first, firsts = together.initial((2, 5, 3)), [noise.initial((2, 5, 3)) for noise in alone]
    assert torch.equal(first, torch.cat(firsts))
    assert torch.equal(shuffled.initial((2, 5, 3)), first[[2, 0, 1]])
    for _ in range(3):
        draw = together(first)
        assert torch.equal(draw, torch.cat([noise(first[:1]) for noise in alone]))
        assert torch.equal(shuffled(first), draw[[2, 0, 1]])
    assert not torch.equal(first[0], first[1])


def test_noise_is_standard_normal_in_the_dtype_of_the_image():
    noise = SampleNoise(range(4))
    x = noise(torch.zeros(4, 3, 64, 64))
    assert abs(x.mean()) < 4 / math.sqrt(x.numel())
    assert abs(x.std() - 1) < 4 / math.sqrt(2 * x.numel())
    assert noise(torch.zeros(4, 1, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert noise.initial((1, 2, 2)).dtype == torch.float32


def test_noise_is_that_of_the_documented_seed():
    generator = torch.Generator().manual_seed(fold(7, "sample"))
    assert torch.equal(SampleNoise([7]).initial((1, 8, 8))[0], torch.randn(1, 8, 8, generator=generator))


def test_noise_for_another_batch_is_an_error():
    with pytest.raises(ValueError, match="noise for 3 samples was asked for a batch of 2"):
        SampleNoise([0, 1, 2])(torch.zeros(2, 1, 2, 2))


def pointwise(x, t):
    """A net that treats every element alone, so that only the sampler could mix samples."""
    return torch.cat([0.7 * torch.tanh(x) + 0.001 * t.view(-1, 1, 1, 1) * x, torch.sin(3 * x)], 1)


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(7, eta=0.0),
        Sampler(7, eta=1.0),
        Sampler(7, eta=0.4, variance="posterior", clip="dynamic"),
        Sampler(7, eta=1.0, variance="jump", spacing="leading", clip=None),
    ],
    ids=str,
)
def test_images_do_not_depend_on_the_batch_size_bit_for_bit(sampler):
    diffusion, shape = GaussianDiffusion(linear(100), variance="learned"), (3, 5, 3)

    def images(size: int) -> torch.Tensor:
        parts = []
        for start in range(0, 7, size):
            noise = SampleNoise(range(start, min(start + size, 7)))
            x = noise.initial(shape)
            denoise = lambda x, t: diffusion.prediction(pointwise(x, diffusion.time(x, t)), x, t)  # noqa: E731
            parts.append(sampler.sample(diffusion, denoise, x, noise=noise))
        return torch.cat(parts)

    whole = images(7)
    assert torch.isfinite(whole).all()
    assert torch.equal(images(1), whole)
    assert torch.equal(images(3), whole)


def test_sampling_leaves_the_global_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise = SampleNoise([1])
    Sampler(5, eta=1.0).sample(
        GaussianDiffusion(linear(100)), Mixture().denoiser(linear(100).level), noise.initial((1, 2, 2)), noise=noise
    )
    assert torch.equal(torch.get_rng_state(), before)


# -- step and sample ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eta", "variance"), [(0.0, "posterior"), (1.0, "posterior"), (1.0, "learned")])
def test_two_steps_are_differentiable(eta, variance):
    level, fresh = linear(50).level, normal((2, 1, 2, 2), 9)
    w = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    x = normal((2, 1, 2, 2)).requires_grad_()

    def two_steps(x, w):
        def denoise(x, t):
            frac = torch.sigmoid(w[0] * x) if variance == "learned" else None
            return Prediction.from_eps(x, torch.tanh(w[0] * x + w[1] * t / 50), level(t), frac)

        kwargs = {"eta": eta, "variance": variance, "noise": lambda x: fresh}
        x, history = step(denoise, level, x, 40, 20, **kwargs)
        return step(denoise, level, x, 20, 5, history, **kwargs)[0]

    assert torch.autograd.gradcheck(two_steps, (x, w))  # against finite differences


def test_states_tell_where_the_sampler_stands():
    schedule, data = linear(100), Mixture()
    diffusion, x, noise = GaussianDiffusion(schedule), normal((2, 1, 3, 3)), SampleNoise([0, 1])
    sampler = Sampler(4, eta=1.0, clip=None)
    states = list(sampler.states(diffusion, data.denoiser(schedule.level), x, noise=noise))
    assert [(p.index, p.t, p.s) for p in states] == [(1, 99, 74), (2, 74, 49), (3, 49, 24), (4, 24, CLEAN)]
    assert torch.equal(states[0].prediction.x0, data.posterior_mean(x, schedule.level(99)))
    for before, after in pairwise(states):
        assert torch.equal(after.prediction.x0, data.posterior_mean(before.x, schedule.level(after.t)))
    assert torch.equal(states[-1].x, states[-1].prediction.x0)
    again = sampler.sample(diffusion, data.denoiser(schedule.level), x, noise=SampleNoise([0, 1]))
    assert torch.equal(states[-1].x, again)


def test_states_are_made_one_by_one_when_asked_for():
    calls, level = [], linear(100).level

    def denoise(x, t):
        calls.append(t)
        return Mixture().denoiser(level)(x, t)

    states = Sampler(5).states(GaussianDiffusion(linear(100)), denoise, normal((1, 1, 2, 2)), noise=SampleNoise([0]))
    assert calls == []
    next(states)
    assert calls == [99]
    assert len(list(states)) == 4


def test_samples_carry_no_gradient():
    level, x = linear(100).level, normal((1, 1, 2, 2)).requires_grad_()
    *_, last = sample(Mixture().denoiser(level), x, (99, 50, CLEAN), level)
    assert not last.x.requires_grad


def test_explicit_intervals_are_walked_as_given():
    level, x = linear(100).level, normal((1, 1, 2, 2))
    denoise = GAUSSIAN.denoiser(level)
    x = normal((1, 1, 4, 8))
    states = [list(sample(denoise, x, path, level)) for path in ((99, 50, CLEAN), [(99, 50), (50, CLEAN)])]
    assert torch.equal(states[0][-1].x, states[1][-1].x)
    assert [(p.t, p.s) for p in states[0]] == [(p.t, p.s) for p in states[1]]


def test_the_history_has_at_most_the_last_four_answers_newest_first():
    seen = []

    def watching(denoise, level, x, t, s, history):
        seen.append([at for at, _ in history])
        return history[0][1]

    level = linear(100).level
    list(sample(Mixture().denoiser(level), normal((1, 1, 2, 2)), (90, 70, 50, 30, 10, 0), level, solver=watching))
    assert seen == [[90], [70, 90], [50, 70, 90], [30, 50, 70, 90], [10, 30, 50, 70]]


@pytest.mark.parametrize(("ask", "asked"), [(max, [10, 50, 99]), (min, [CLEAN, 10, 50])])
def test_a_rising_grid_inverts_and_asks_at_the_chosen_end(ask, asked):
    calls, schedule, x = [], linear(100), normal((1, 1, 2, 2))

    def denoise(x, t):
        calls.append(t)
        return Prediction(torch.full_like(x, 9.0), torch.full_like(x, 0.3))  # only eps is believed

    states = list(sample(denoise, x, (CLEAN, 10, 50, 99), schedule.level, ask=ask))
    assert calls == asked
    for state in states:  # with a constant eps inversion is exact: x_t = alpha x0 + sigma eps all along
        at = schedule.level(state.s)
        assert torch.allclose(state.x, at.alpha * x + at.sigma * 0.3)


def test_inversion_is_deterministic_or_an_error():
    level, x = linear(100).level, normal((1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"inversion \(from timestep 10 up to 50\) is deterministic; use eta=0, not 1"):
        list(sample(Mixture().denoiser(level), x, (10, 50), level, eta=1.0))


def test_inversion_reaches_zero_terminal_snr():
    schedule, x0 = zero_terminal_snr(linear(100)), normal((2, 1, 4, 8))
    *_, last = sample(GAUSSIAN.denoiser(schedule.level), x0, schedule.timesteps(50)[::-1], schedule.level)
    assert torch.isfinite(last.x).all()


def test_no_noise_is_drawn_where_none_is_used():
    draws, level = [], linear(100).level

    def noise(x):
        draws.append(1)
        return torch.zeros_like(x)

    for eta, wanted in ((0.0, 0), (0.5, 3), (1.0, 3)):  # the fourth move, to CLEAN, draws none
        draws.clear()
        list(
            sample(Mixture().denoiser(level), normal((1, 1, 2, 2)), (90, 60, 30, 0, CLEAN), level, eta=eta, noise=noise)
        )
        assert len(draws) == wanted


def test_a_classifiers_shift_moves_the_mean_by_variance_times_gradient():
    level, x, grad = linear(100).level, normal((2, 1, 3, 3)), normal((2, 1, 3, 3), 4)
    fresh = normal((2, 1, 3, 3), 5)
    kwargs = {"eta": 1.0, "variance": "jump", "noise": lambda x: fresh}
    plain, _ = step(Mixture().denoiser(level), level, x, 50, 30, **kwargs)
    shifted, _ = step(Mixture().denoiser(level), level, x, 50, 30, shift=lambda x, t: 2 * grad, **kwargs)
    jump = level(50).sigma ** 2 - (level(50).alpha / level(30).alpha) ** 2 * level(30).sigma ** 2
    assert torch.allclose(shifted - plain, 2 * jump * grad, atol=1e-12)


# -- Sampler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "told", "used"),
    [("jump", None, "jump"), ("posterior", "fixed_large", "jump"), ("jump", "posterior", "posterior")],
)
def test_the_sampler_takes_the_models_variance_unless_told_otherwise(own, told, used):
    schedule, x = linear(100), normal((1, 1, 2, 2))
    diffusion, denoise = GaussianDiffusion(schedule, variance=own), Mixture().denoiser(schedule.level)
    ours = Sampler(5, eta=1.0, variance=told, clip=None).sample(diffusion, denoise, x, noise=SampleNoise([0]))
    grid, noise = schedule.timesteps(5), SampleNoise([0])
    *_, last = sample(denoise, x, grid, schedule.level, eta=1.0, variance=used, noise=noise)
    assert torch.equal(ours, last.x)


@pytest.mark.parametrize("clip", ["clip", "dynamic"])
def test_clipped_samples_stay_in_range(clip):
    schedule, noise = linear(100), SampleNoise([0, 1])
    wide = Gaussian(torch.tensor(0.0), torch.tensor(5.0))
    x = noise.initial((1, 8, 8)).double()
    for sampler, bounded in ((Sampler(10, clip=clip), True), (Sampler(10, clip=None), False)):
        last = sampler.sample(GaussianDiffusion(schedule), wide.denoiser(schedule.level), x, noise=noise)
        assert (last.abs().max() <= 1) == bounded


def test_clip_is_the_wrapper_of_that_name():
    schedule, x = linear(100), 2 * normal((1, 1, 4, 4))
    denoise = Gaussian(torch.tensor(0.0), torch.tensor(5.0)).denoiser(schedule.level)
    ours = Sampler(10, clip="clip").sample(GaussianDiffusion(schedule), denoise, x, noise=SampleNoise([0]))
    *_, last = sample(clip_x0(denoise, schedule.level), x, schedule.timesteps(10), schedule.level)
    assert torch.equal(ours, last.x)


def test_the_sampler_passes_grid_and_solver_on():
    sampler = Sampler("5,3", final=0, solver=lambda *a: a[-1][0][1]._replace(eps=torch.zeros(())))
    assert sampler.timesteps(linear(100)) == linear(100).timesteps("5,3", final=0)
    x = sampler.sample(GaussianDiffusion(linear(100)), Mixture().denoiser(linear(100).level), normal((1, 1, 2, 2)),
                       noise=SampleNoise([0]))  # fmt: skip
    assert torch.isfinite(x).all()
    assert Sampler(4, spacing="leading", offset=1).timesteps(linear(100)) == (76, 51, 26, 1, CLEAN)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"variance": "big"}, "sampler variance must be one of null, posterior, jump, learned, got 'big'"),
        ({"clip": "hard"}, "sampler clip must be one of null, auto, clip, dynamic, got 'hard'"),
        ({"spacing": "even"}, "spacing must be one of trailing, leading, linspace, quad, ldm, ldm_quad"),
        ({"eta": 1.5}, r"eta must be in \[0, 1\] \(0 is DDIM, 1 is DDPM\), got 1.5"),
        ({"eta": -0.1}, r"eta must be in \[0, 1\]"),
        ({"eta": math.nan}, r"eta must be in \[0, 1\]"),
    ],
)
def test_a_sampler_that_cannot_be_is_an_error_when_it_is_made(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**kwargs)


def test_a_grid_that_cannot_be_is_an_error_before_the_first_step():
    with pytest.raises(ValueError, match=r"num_steps must be 1\.\.100"):
        Sampler(101).states(GaussianDiffusion(linear(100)), None, normal((1, 1, 2, 2)), noise=SampleNoise([0]))


def test_a_learned_variance_that_the_model_lacks_is_an_error():
    denoise = Mixture().denoiser(linear(100).level)
    sampler = Sampler(5, eta=1.0, variance="learned")
    with pytest.raises(ValueError, match="needs a network with a variance head"):
        sampler.sample(GaussianDiffusion(linear(100)), denoise, normal((1, 1, 2, 2)), noise=SampleNoise([0]))
