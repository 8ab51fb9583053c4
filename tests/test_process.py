"""The process against Bayes' rule and the papers, in float64: conversions, posteriors, transitions, variances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Gaussian, normal

from diffusion.denoiser import denoiser
from diffusion.process import (
    GaussianDiffusion,
    Prediction,
    last_variances,
    posterior_mean,
    q_sample,
    reverse_variance,
    target,
    transition,
    variances,
)
from diffusion.sampling import SampleNoise, Sampler, sample
from diffusion.schedule import CLEAN, Level, cosine, linear, scaled_linear, sigmoid, zero_terminal_snr

SHAPE = (3, 2, 4, 5)
SCHEDULES = {
    "linear": linear(100),
    "cosine": cosine(100),
    "sigmoid": sigmoid(100),
    "zero-snr": zero_terminal_snr(linear(100)),
}
properties = settings(max_examples=40, deadline=None, derandomize=True)
noise_levels = st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)).filter(lambda ab: abs(ab[0] - ab[1]) > 1e-3)


def level_of(alphas_cumprod: float) -> Level:
    return Level(alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5)


def two_levels(pair: tuple[float, float]) -> tuple[Level, Level]:
    """A noisier and a cleaner level."""
    return level_of(min(pair)), level_of(max(pair))


# -- conversions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("parameterization", ["eps", "x0", "v", "mean"])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_what_the_network_should_answer_reads_back_as_x0_and_eps(schedule, parameterization, as_tensor):
    if schedule.zero_terminal_snr and parameterization in ("eps", "mean"):
        with pytest.raises(ValueError, match="use v or x0"):
            GaussianDiffusion(schedule, parameterization)
        return
    diffusion = GaussianDiffusion(schedule, parameterization)
    x0, eps = normal(SHAPE, 1), normal(SHAPE, 2)
    for steps in ([1, 50, 98], [7, 7, 7]):
        if not as_tensor and len(set(steps)) > 1:
            continue
        t = torch.tensor(steps)
        x = q_sample(x0, eps, schedule.level(t))
        output = diffusion.target(x0, eps, t)
        p = diffusion.prediction(output, x, t if as_tensor else steps[0])
        assert torch.allclose(p.x0, x0, atol=1e-9)
        assert torch.allclose(p.eps, eps, atol=1e-9)
        assert p.var_frac is None


@properties
@given(st.floats(1e-4, 0.9999), st.sampled_from(["eps", "x0", "v"]))
def test_a_prediction_is_consistent_with_the_image_it_was_read_from(alphas_cumprod, kind):
    at, x, output = level_of(alphas_cumprod), normal(SHAPE, 3), normal(SHAPE, 4)
    p = {"eps": Prediction.from_eps, "x0": Prediction.from_x0, "v": Prediction.from_v}[kind](x, output, at)
    assert torch.allclose(at.alpha * p.x0 + at.sigma * p.eps, x, atol=1e-9)
    assert torch.allclose(target(kind, p.x0, p.eps, at), output, atol=1e-9)


def test_v_is_that_of_salimans_and_ho():
    x0, eps, phi = normal(SHAPE, 1), normal(SHAPE, 2), 0.7  # appendix D: z_phi = cos(phi) x + sin(phi) eps
    at = Level(math.cos(phi), math.sin(phi))
    assert torch.allclose(target("v", x0, eps, at), math.cos(phi) * eps - math.sin(phi) * x0)
    h = 1e-6  # v is dz / dphi
    difference = (q_sample(x0, eps, Level(math.cos(phi + h), math.sin(phi + h))) - q_sample(x0, eps, at)) / h
    assert torch.allclose(target("v", x0, eps, at), difference, atol=1e-5)


def test_target_names_what_it_knows():
    for kind in ("mean", "noise"):  # mean needs the level before
        with pytest.raises(ValueError, match="parameterization must be one of eps, x0, v, mean"):
            target(kind, normal(SHAPE), normal(SHAPE), level_of(0.5))


def test_images_keep_their_dtype():
    x0 = torch.zeros(SHAPE, dtype=torch.bfloat16)
    diffusion = GaussianDiffusion(linear(100), "v")
    t = torch.tensor([0, 50, 99])
    x = q_sample(x0, x0, diffusion.schedule.level(t))
    p = diffusion.prediction(x0, x, t)
    assert x.dtype == diffusion.target(x0, x0, t).dtype == p.x0.dtype == p.eps.dtype == torch.bfloat16


# -- the posterior -----------------------------------------------------------------------------------------------


@properties
@given(noise_levels, st.floats(-2, 2), st.floats(-2, 2))
def test_the_posterior_is_bayes_rule(pair, x0, x_t):
    here, there = two_levels(pair)
    # Prior N(there.alpha x0, there.sigma^2) of x_s, likelihood x_t = r x_s + N(0, jump): precisions add.
    ratio = here.alpha / there.alpha
    jump = here.sigma**2 - ratio**2 * there.sigma**2
    precision = 1 / there.sigma**2 + ratio**2 / jump
    mean = (there.alpha * x0 / there.sigma**2 + ratio * x_t / jump) / precision
    ours = variances(here, there)
    assert ours == (pytest.approx(jump, rel=1e-6), pytest.approx(1 / precision, rel=1e-6))
    x0, x_t = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (x0, x_t))
    assert posterior_mean(x0, x_t, here, there).item() == pytest.approx(mean, rel=1e-6, abs=1e-9)


def test_the_jump_between_neighbours_is_beta():
    schedule = linear(50)
    for t in range(50):
        jump, _ = variances(schedule.level(t), schedule.level(t - 1))
        assert jump == pytest.approx(schedule.betas[t].item(), rel=1e-9)


def test_q_sample_composes():
    """x_0 -> x_s -> x_t has the moments of x_0 -> x_t."""
    schedule = cosine(100)
    here, there = schedule.level(70), schedule.level(30)
    jump, _ = variances(here, there)
    ratio = here.alpha / there.alpha
    assert ratio**2 * there.sigma**2 + jump == pytest.approx(here.sigma**2, rel=1e-12)


# -- transitions -------------------------------------------------------------------------------------------------


@properties
@given(noise_levels)
def test_with_eta_one_the_mean_of_a_transition_is_the_posterior_mean(pair):
    here, there = two_levels(pair)
    x = normal(SHAPE, 1)
    p = Prediction.from_x0(x, normal(SHAPE, 2), here)
    mean, var = transition(p, here, there, eta=1.0)
    assert torch.allclose(mean, posterior_mean(p.x0, x, here, there), atol=1e-9)
    assert var == pytest.approx(variances(here, there)[1], rel=1e-12)


@properties
@given(noise_levels, st.floats(0, 1))
def test_a_transition_keeps_the_marginal_for_every_eta(pair, eta):
    """DDIM lemma 1: with the true x0 and eps, mean and variance together have the moments of q(x_s | x0)."""
    here, there = two_levels(pair)
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    of_x0, var = transition(Prediction(one, zero), here, there, eta)
    of_eps, _ = transition(Prediction(zero, one), here, there, eta)
    assert of_x0.item() == pytest.approx(there.alpha, rel=1e-12)
    assert of_eps.item() ** 2 + var == pytest.approx(there.sigma**2, rel=1e-9)


@properties
@given(noise_levels, st.floats(0, 1))
def test_a_transition_is_ddim_eq_12_and_16(pair, eta):
    here, there = two_levels(pair)
    a, b = here.alpha**2, there.alpha**2  # the paper's alpha_t, alpha_{t-1}
    sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
    x, eps = normal(SHAPE, 1), normal(SHAPE, 2)
    wanted = math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b - sigma**2) * eps
    mean, var = transition(Prediction.from_eps(x, eps, here), here, there, eta)
    assert torch.allclose(mean, wanted, atol=1e-9)
    assert var == pytest.approx(sigma**2, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("variance", ["posterior", "jump", "learned"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_numbers_and_tensors_make_the_same_transition(variance, eta):
    schedule, x = linear(100), normal(SHAPE, 1)
    p = Prediction.from_eps(x, normal(SHAPE, 2), schedule.level(60), normal(SHAPE, 3).sigmoid())
    t = torch.full((3,), 60)
    by_number = transition(p, schedule.level(60), schedule.level(40), eta, variance)
    by_tensor = transition(p, schedule.level(t), schedule.level(t - 20), eta, variance)
    for ours, other in zip(by_number, by_tensor, strict=True):
        ours, other = (torch.as_tensor(value, dtype=torch.float64) for value in (ours, other))
        assert torch.allclose(ours, other, atol=1e-12)


def test_ddim_with_eta_one_is_ancestral_sampling():
    schedule, data = linear(50), Gaussian(torch.tensor(0.3), torch.tensor(0.5))
    start, draws = normal(SHAPE, 1), [normal(SHAPE, 10 + k) for k in range(50)]
    x, beta = start, schedule.betas.tolist()  # DDPM, algorithm 2, with its own symbols
    for t in range(49, -1, -1):
        alpha_bar, before = schedule.alphas_cumprod[t].item(), schedule.alphas_cumprod[t - 1].item() if t else 1.0
        eps = data.denoiser(schedule.level)(x, t).eps
        x = (x - beta[t] / math.sqrt(1 - alpha_bar) * eps) / math.sqrt(1 - beta[t])
        if t:
            x = x + math.sqrt((1 - before) / (1 - alpha_bar) * beta[t]) * draws[49 - t]
    queue = iter(draws)
    grid = schedule.timesteps(50)
    *_, last = sample(data.denoiser(schedule.level), start, grid, schedule.level, eta=1.0, noise=lambda x: next(queue))
    assert torch.allclose(last.x, x, atol=1e-10)


def test_a_transition_to_clean_data_is_the_believed_x0():
    p = Prediction(normal(SHAPE, 1), normal(SHAPE, 2))
    for eta in (0.0, 1.0):
        mean, _ = transition(p, linear(50).level(3), linear(50).level(CLEAN), eta)
        assert torch.equal(mean, p.x0)


# -- variances ---------------------------------------------------------------------------------------------------


@properties
@given(noise_levels, st.floats(0, 1))
def test_a_learned_variance_lies_between_posterior_and_jump(pair, fraction):
    here, there = two_levels(pair)
    jump, posterior = variances(here, there)
    learned = reverse_variance("learned", jump, posterior, torch.tensor(fraction, dtype=torch.float64)).item()
    assert posterior * (1 - 1e-12) <= learned <= jump * (1 + 1e-12)
    assert learned == pytest.approx(jump**fraction * posterior ** (1 - fraction), rel=1e-9)  # iDDPM eq. 15
    assert reverse_variance("posterior", jump, posterior) == posterior
    assert reverse_variance("jump", jump, posterior) == jump


def test_a_learned_variance_is_finite_on_the_move_to_clean_data():
    jump, posterior = variances(linear(50).level(0), linear(50).level(CLEAN))
    assert posterior == 0
    learned = reverse_variance("learned", jump, posterior, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert torch.allclose(learned, torch.tensor([1e-20, (1e-20 * jump) ** 0.5, jump], dtype=torch.float64))


def test_the_last_variances_stand_in_for_a_posterior_of_zero():
    assert last_variances("posterior", 2.0, 1.0) == (2.0, 1.0)
    assert last_variances("learned", 2.0, 1.0) == (2.0, 1.0)
    assert last_variances("jump", 2.0, 1.0) == (1.0, 1.0)


def test_variances_that_cannot_be_had_are_errors():
    with pytest.raises(ValueError, match="variance=learned needs a network with a variance head"):
        reverse_variance("learned", 0.2, 0.1)
    with pytest.raises(ValueError, match="variance must be one of posterior, jump, learned, got 'fixed'"):
        reverse_variance("fixed", 0.2, 0.1)


@pytest.mark.parametrize(
    ("alias", "name"), [("fixed_small", "posterior"), ("fixed_large", "jump"), ("learned_range", "learned")]
)
def test_the_peers_names_of_variances_are_accepted(alias, name):
    assert GaussianDiffusion(linear(50), variance=alias).variance == name
    assert Sampler(variance=alias).variance == name


# -- GaussianDiffusion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("make", [linear, cosine, scaled_linear, sigmoid])
def test_zero_terminal_snr_samples_finitely_from_the_last_timestep(parameterization, eta, make):
    schedule = zero_terminal_snr(make(100))
    diffusion = GaussianDiffusion(schedule, parameterization)
    data = Gaussian(torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))

    def net(x, t):
        p = data.denoiser(schedule.level)(x, t[0].item())
        return target(parameterization, p.x0, p.eps, schedule.level(t[0].item()))

    noise = SampleNoise(range(64))
    sampler = Sampler(50, eta=eta, clip=None)
    assert sampler.timesteps(schedule)[0] == 99
    x = sampler.sample(diffusion, denoiser(diffusion, net), noise.initial((1, 8, 8)).double(), noise=noise)
    assert torch.isfinite(x).all()
    assert x.mean().item() == pytest.approx(0.3, abs=4 * 0.5 / 64)  # 4 standard errors of 4096 pixels
    assert 0.42 < x.std().item() < 0.55  # 50 steps under-disperse


@pytest.mark.parametrize("parameterization", ["eps", "mean"])
def test_zero_terminal_snr_refuses_what_says_nothing_about_x0(parameterization):
    with pytest.raises(ValueError, match=f"parameterization={parameterization}.*use v or x0"):
        GaussianDiffusion(zero_terminal_snr(linear(50)), parameterization)
    with pytest.raises(ValueError, match="at zero SNR a prediction of eps says nothing about x0"):
        Prediction.from_eps(normal(SHAPE), normal(SHAPE), Level(0.0, 1.0))


def test_a_network_with_the_wrong_number_of_channels_is_told_what_to_change():
    x = normal((2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"answered 6 channels for an image of 3; .*must answer 3.*variance=learned"):
        GaussianDiffusion(linear(50)).prediction(torch.cat([x, x], 1), x, 3)
    with pytest.raises(ValueError, match=r"answered 3 channels .*must answer 6.*variance=posterior"):
        GaussianDiffusion(linear(50), variance="learned").prediction(x, x, 3)


def test_a_learned_variance_reads_the_second_half_of_the_channels_as_a_fraction():
    diffusion = GaussianDiffusion(linear(50), variance="learned")
    assert diffusion.out_channels(3) == 6
    assert GaussianDiffusion(linear(50)).out_channels(3) == 3
    x, eps = normal((2, 3, 4, 4), 1), normal((2, 3, 4, 4), 2)
    p = diffusion.prediction(torch.cat([eps, torch.full_like(eps, -1.0)], 1), x, 3)
    assert torch.equal(p.eps, eps)
    assert (p.var_frac == 0).all()  # -1 is the posterior variance, 1 the jump
    assert (diffusion.prediction(torch.cat([eps, torch.ones_like(eps)], 1), x, 3).var_frac == 1).all()


def test_the_network_sees_scaled_time():
    x = normal((3, 1, 2, 2))
    assert torch.equal(GaussianDiffusion(linear(50)).time(x, 7), torch.tensor([7, 7, 7]))
    assert not GaussianDiffusion(linear(50)).time(x, 7).is_floating_point()
    assert torch.equal(GaussianDiffusion(linear(50)).time(x, 7.5), torch.tensor([7.5, 7.5, 7.5]))
    scaled = GaussianDiffusion(linear(50), time_scale=1000 / 50)
    assert torch.equal(scaled.time(x, 7), torch.tensor([140.0, 140.0, 140.0]))
    assert torch.equal(scaled.time(x, torch.tensor([0, 1, 49])), torch.tensor([0.0, 20.0, 980.0]))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="parameterization must be one of eps, x0, v, mean, got 'noise'"):
        GaussianDiffusion(linear(50), "noise")
    with pytest.raises(ValueError, match="variance must be one of posterior, jump, learned, got 'big'"):
        GaussianDiffusion(linear(50), variance="big")
