"""Bits per dimension on Gaussian data, whose entropy, posteriors and mutual information are formulas."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import Gaussian, normal
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion.denoiser import Denoiser
from diffusion.likelihood import (
    Chain,
    approximate_normal_cdf,
    bits_per_dim,
    chain_of,
    discretized_gaussian_log_likelihood,
    normal_kl,
    prior_bits_per_dim,
    vlb_term,
)
from diffusion.process import GaussianDiffusion, q_sample
from diffusion.randomness import generator
from diffusion.schedule import CLEAN, Schedule, cosine, linear, zero_terminal_snr

STD = 0.3
PIXELS = torch.linspace(-1, 1, 256, dtype=torch.float64)  # the 8-bit values
DATA = Gaussian(torch.tensor(0.0, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64))


def pixel_probabilities() -> Tensor:
    """Of the 256 values of a Gaussian that is rounded to 8 bits, the tails going to the ends."""
    edges = torch.cat([torch.tensor([-math.inf]), (PIXELS[1:] + PIXELS[:-1]) / 2, torch.tensor([math.inf])])
    return torch.special.ndtr(edges.double() / STD).diff()


def images(count: int) -> Tensor:
    draw = torch.multinomial(pixel_probabilities(), count * 32, True, generator=generator(0, "images"))
    return PIXELS[draw].view(count, 2, 4, 4)


def exact(schedule: Schedule, chain: Chain | None = None) -> Denoiser:
    """The exact denoiser; with a chain it also knows the exact variance of its moves, as a var_frac."""

    def denoise(x: Tensor, t: Tensor):
        t = int(t[0])
        p = DATA.denoiser(schedule.level)(x, t)
        s = CLEAN if chain is None else int(chain.previous(torch.tensor([t])))
        if s == CLEAN:
            return p._replace(var_frac=torch.ones_like(x))
        jump, posterior, coefficient = by_hand(schedule, t, s)
        var = posterior + coefficient**2 * error_variance(schedule, t)  # Var[x_s | x_t], by the law of total variance
        frac = math.log(var / posterior) / math.log(jump / posterior)
        return p._replace(var_frac=torch.full_like(x, frac))

    return denoise


def by_hand(schedule: Schedule, t: int, s: int) -> tuple[float, float, float]:
    """beta, beta tilde and the coefficient of x0 in mu tilde, from DDPM's eqs. 6 and 7."""
    a = schedule.alphas_cumprod[t].item()
    b = 1.0 if s == CLEAN else schedule.alphas_cumprod[s].item()
    beta = 1 - a / b
    return beta, (1 - b) / (1 - a) * beta, math.sqrt(b) * beta / (1 - a)


def error_variance(schedule: Schedule, t: int) -> float:
    """E (x0 - E[x0 | x_t])^2 of a pixel."""
    snr = schedule.alphas_cumprod[t].item() / (1 - schedule.alphas_cumprod[t].item())
    return STD**2 / (1 + snr * STD**2)


def evaluate(diffusion: GaussianDiffusion, denoise: Denoiser, x0: Tensor, **kwargs):
    draws = generator(1, "noise")
    noise = lambda x: torch.randn(x.shape, generator=draws, dtype=x.dtype)  # noqa: E731
    return bits_per_dim(diffusion, denoise, x0, noise=noise, **kwargs)


def within(draws: Tensor, wanted: float, extra: float = 0.0) -> bool:
    """Is the mean of `draws` (B,) right, within four standard errors?"""
    return bool(abs(draws.mean() - wanted) < 4 * draws.std() / math.sqrt(len(draws)) + extra)


# -- parts -------------------------------------------------------------------------------------------------------


def test_the_divergence_of_two_normals_is_torchs():
    mean1, log_var1, mean2, log_var2 = (normal((4, 5), k) for k in range(4))
    theirs = kl_divergence(Normal(mean1, (0.5 * log_var1).exp()), Normal(mean2, (0.5 * log_var2).exp()))
    assert torch.allclose(normal_kl(mean1, log_var1, mean2, log_var2), theirs, atol=1e-12)
    assert torch.allclose(normal_kl(mean1, log_var1, mean1, log_var1), torch.zeros(4, 5, dtype=torch.float64))
    standard = kl_divergence(Normal(mean1, (0.5 * log_var1).exp()), Normal(0.0, 1.0))
    assert torch.allclose(normal_kl(mean1, log_var1, 0.0, 0.0), standard, atol=1e-12)


def test_the_normal_cdf_is_pages_approximation():
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    assert (approximate_normal_cdf(x) - torch.special.ndtr(x)).abs().max() < 3e-4


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.3, 0.05), (-0.9, 0.2), (1.0, 0.01)])
def test_the_likelihoods_of_all_pixel_values_add_up_to_one_and_are_those_of_the_bins(mean, std):
    mean, log_std = (torch.full((256,), v, dtype=torch.float64) for v in (mean, math.log(std)))
    ours = discretized_gaussian_log_likelihood(PIXELS, mean, log_std).exp()
    assert ours.sum().item() == pytest.approx(1, abs=1e-9)
    above, below = (torch.special.ndtr((PIXELS + half - mean) / std) for half in (1 / 255, -1 / 255))
    above[-1], below[0] = 1.0, 0.0
    assert (ours - (above - below)).abs().max() < 6e-4  # twice the error of the approximate cdf


def test_likelihoods_far_from_the_mean_are_finite():
    far = discretized_gaussian_log_likelihood(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor(50.0), torch.tensor(-9.0))
    assert torch.isfinite(far).all()


@pytest.mark.parametrize("t", [None, 99, 60])
def test_the_prior_term_is_a_divergence_from_the_standard_normal(t):
    schedule, x0 = linear(100), normal((3, 2, 4, 4))
    at = schedule.alphas_cumprod[99 if t is None else t]
    theirs = kl_divergence(Normal(at.sqrt() * x0, (1 - at).sqrt()), Normal(0.0, 1.0)).mean((1, 2, 3)) / math.log(2)
    assert torch.allclose(prior_bits_per_dim(GaussianDiffusion(schedule), x0, t), theirs, rtol=1e-9)


def test_the_prior_term_vanishes_at_zero_terminal_snr():
    diffusion = GaussianDiffusion(zero_terminal_snr(linear(100)), "v")
    assert (prior_bits_per_dim(diffusion, normal((3, 2, 4, 4))) == 0).all()


# -- terms of the bound ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["posterior", "jump", "learned"])
@pytest.mark.parametrize("grid", [None, (99, 60, 30, 10, 0, CLEAN)], ids=["full", "respaced"])
def test_a_term_of_the_bound_is_the_divergence_of_the_two_reverse_steps(variance, grid):
    schedule = cosine(100)
    diffusion, chain = GaussianDiffusion(schedule, "eps", variance), Chain(schedule, grid)
    for t, s in ((60, 30), (10, 0)) if grid else ((60, 59), (1, 0)):
        x0, eps, frac = normal((3, 2, 4, 4), 1), normal((3, 2, 4, 4), 2), normal((3, 2, 4, 4), 3).sigmoid()
        x = q_sample(x0, eps, schedule.level(t))
        p = exact(schedule)(x, torch.tensor([t]))._replace(var_frac=frac)
        jump, posterior, of_x0 = by_hand(schedule, t, s)
        a, b = schedule.alphas_cumprod[t].item(), schedule.alphas_cumprod[s].item()
        of_x = math.sqrt(a / b) * (1 - b) / (1 - a)
        var = {"posterior": posterior, "jump": jump, "learned": jump**frac * posterior ** (1 - frac)}[variance]
        model = Normal(of_x0 * p.x0 + of_x * x, torch.as_tensor(var, dtype=torch.float64).sqrt().expand_as(x))
        truth = Normal(of_x0 * x0 + of_x * x, math.sqrt(posterior))
        wanted = kl_divergence(truth, model).mean((1, 2, 3)) / math.log(2)
        assert torch.allclose(vlb_term(diffusion, p, x0, x, torch.full((3,), t), chain), wanted, rtol=1e-6)


@pytest.mark.parametrize("variance", ["posterior", "jump"])
def test_the_last_term_is_the_decoders_negative_log_likelihood(variance):
    schedule, x0 = linear(100), images(3)
    x = q_sample(x0, normal(x0.shape, 2), schedule.level(0))
    p = exact(schedule)(x, torch.tensor([0]))
    ours = vlb_term(GaussianDiffusion(schedule, "eps", variance), p, x0, x, torch.zeros(3, dtype=torch.long))
    _, posterior, _ = by_hand(schedule, 1, 0)  # DDPM's choice: its own posterior variance would be zero
    decoder = Normal(p.x0, math.sqrt(posterior))  # the mean of the last move is x0 itself
    above = torch.where(x0 > 0.999, 1.0, decoder.cdf(x0 + 1 / 255))
    below = torch.where(x0 < -0.999, 0.0, decoder.cdf(x0 - 1 / 255))
    assert torch.allclose(ours, -(above - below).log2().mean((1, 2, 3)), atol=0.01)


@pytest.mark.parametrize("variance", ["posterior", "jump"])
@pytest.mark.parametrize("grid", [None, (90, 60, 30, 10, 0, CLEAN)], ids=["full", "respaced"])
def test_every_term_of_an_exact_denoiser_has_its_closed_form(variance, grid):
    schedule = linear(100)
    diffusion, chain = GaussianDiffusion(schedule, "eps", variance), Chain(schedule, grid)
    x0 = STD * normal((500, 2, 4, 4))
    result = evaluate(diffusion, exact(schedule), x0, timesteps=grid)
    assert result.vlb.shape == result.x0_mse.shape == result.eps_mse.shape == (500, len(chain))
    for k, (t, s) in enumerate(pairwise((*chain.timesteps, CLEAN))):
        error = error_variance(schedule, t)
        snr = schedule.alphas_cumprod[t].item() / (1 - schedule.alphas_cumprod[t].item())
        assert within(result.x0_mse[:, k], error)
        assert within(result.eps_mse[:, k], snr * error)
        if s == CLEAN:
            continue
        jump, posterior, of_x0 = by_hand(schedule, t, s)
        var = jump if variance == "jump" else posterior
        nats = 0.5 * (math.log(var / posterior) - 1 + posterior / var + of_x0**2 * error / var)
        assert within(result.vlb[:, k], nats / math.log(2), 1e-12), (t, s)
    assert torch.allclose(result.total, result.vlb.sum(1) + result.prior)
    assert torch.equal(result.prior, prior_bits_per_dim(diffusion, x0, chain.timesteps[0]))


@pytest.mark.parametrize("grid", [None, (90, 60, 30, 10, 0, CLEAN), (50, 49, 3, CLEAN)], ids=["full", "short", "odd"])
def test_with_exact_mean_and_variance_the_terms_add_up_to_mutual_information(grid):
    """Sum of KL(q(x_s | x_t, x0) || q(x_s | x_t)) is I(x0; x_first) - I(x0; x_last), on any chain."""
    schedule = linear(100)
    chain = Chain(schedule, grid)
    diffusion = GaussianDiffusion(schedule, "eps", "learned")
    result = evaluate(diffusion, exact(schedule, chain), STD * normal((1000, 2, 4, 4)), timesteps=grid)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    information = 0.5 * torch.log2(1 + snr * STD**2)
    wanted = (information[chain.timesteps[-1]] - information[chain.timesteps[0]]).item()
    assert within(result.vlb[:, :-1].sum(1), wanted)


# -- the whole bound ---------------------------------------------------------------------------------------------


def gap_to_entropy(schedule: Schedule, variance: str) -> Tensor:
    """Bits per dimension above the exact cost of each image, whose mean is the entropy of the rounded data."""
    p, x0 = pixel_probabilities(), images(400)
    cost = -p[((x0 + 1) * 127.5).round().long()].log2().mean((1, 2, 3))
    assert within(cost, -(p * p.log2()).sum().item())
    denoise = exact(schedule, chain_of(schedule))
    return evaluate(GaussianDiffusion(schedule, variance=variance), denoise, x0).total - cost


@pytest.mark.parametrize("schedule", [linear(50), linear(200), cosine(100)], ids=["linear50", "linear200", "cosine100"])
def test_with_exact_mean_and_variance_the_bound_is_the_entropy(schedule):
    # 0.005 bits for the approximate cdf and for a denoiser that does not know that the data is rounded.
    assert within(gap_to_entropy(schedule, "learned"), 0.0, 0.005)


def test_fixed_variances_cost_bits_and_posterior_fewer_on_finer_chains():
    gaps = {v: [gap_to_entropy(linear(total), v) for total in (25, 50, 100, 200)] for v in ("posterior", "jump")}
    for gap in (*gaps["posterior"], *gaps["jump"]):
        assert gap.mean() > 4 * gap.std() / math.sqrt(len(gap))
    posterior, jump = ([gap.mean().item() for gap in gaps[v]] for v in ("posterior", "jump"))
    assert all(fine < coarse for coarse, fine in pairwise(posterior))
    assert all(
        large < 0.15 * small for large, small in zip(jump, posterior, strict=True)
    )  # for data narrower than noise


def test_one_image_has_the_same_bound_in_any_batch_and_dtype():
    schedule, x0 = linear(50), images(4)
    diffusion, noise = GaussianDiffusion(schedule), normal((4, 2, 4, 4), 3)
    whole = bits_per_dim(diffusion, exact(schedule), x0, noise=lambda x: noise)
    alone = bits_per_dim(diffusion, exact(schedule), x0[2:3], noise=lambda x: noise[2:3])
    assert torch.allclose(whole.total[2:3], alone.total)
    single = bits_per_dim(diffusion, exact(schedule), x0.float(), noise=lambda x: noise.float())
    assert torch.allclose(single.total.double(), whole.total, rtol=1e-3)


def test_a_bound_of_a_zero_snr_schedule_is_finite():
    schedule = zero_terminal_snr(cosine(50))
    for variance in ("posterior", "jump"):
        result = evaluate(GaussianDiffusion(schedule, "v", variance), exact(schedule), images(4))
        assert torch.isfinite(result.total).all()


# -- chains ------------------------------------------------------------------------------------------------------


def test_a_chain_knows_the_timestep_before_each_of_its_own():
    chain = Chain(linear(100), (99, 40, 7, CLEAN))
    assert len(chain) == 3
    assert chain.previous(torch.tensor([7, 99, 40])).tolist() == [CLEAN, 40, 7]
    with pytest.raises(ValueError, match=r"timesteps \[8\] are not on the chain of 3 steps"):
        chain.previous(torch.tensor([7, 8]))
    full = chain_of(linear(100))
    assert full.previous(torch.arange(100)).tolist() == list(range(-1, 99))


@pytest.mark.parametrize("grid", [(99, 40), (40, 99, CLEAN), (99, 99, CLEAN), (99, 40, 0)])
def test_a_chain_that_does_not_fall_to_clean_data_is_an_error(grid):
    with pytest.raises(ValueError, match="a chain of timesteps must fall and end in -1"):
        Chain(linear(100), grid)


def test_a_chain_is_made_once_for_each_schedule():
    one, other = linear(100), linear(100)
    assert chain_of(one) is chain_of(one)
    assert chain_of(one) is not chain_of(other)


def test_a_chain_of_one_step_has_a_finite_bound():
    diffusion = GaussianDiffusion(linear(100))
    result = evaluate(diffusion, exact(linear(100)), images(2), timesteps=(50, CLEAN))
    assert torch.isfinite(result.total).all()
