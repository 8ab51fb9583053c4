"""Losses and weightings: one meaning for eps, x0 and v, the papers' tables, and gradients that go where they should."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import normal

from diffusion.draws import SampleDraws
from diffusion.losses import P2, DenoisingLoss, MinSNR, TruncatedSNR, in_output_space, snr_weight
from diffusion.process import GaussianDiffusion, q_sample, target
from diffusion.schedule import cosine, linear, zero_terminal_snr

SHAPE = (5, 2, 3, 3)
T = torch.tensor([0, 10, 40, 70, 99])
WEIGHTINGS = {"min-snr": MinSNR(), "min-snr-1": MinSNR(1.0), "p2": P2(), "p2-half": P2(0.5, 2.0),
              "truncated": TruncatedSNR()}  # fmt: skip
properties = settings(max_examples=30, deadline=None, derandomize=True)


def answering(output):
    """A network that answers `output` whatever it is asked."""
    return lambda x, t, **condition: output


def lose(loss: DenoisingLoss, diffusion: GaussianDiffusion, output, t=T, seed: int = 0):
    return loss(diffusion, answering(output), normal(SHAPE, seed), t, normal(SHAPE, seed + 1), {})


# -- the simple term ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v", "mean"])
@pytest.mark.parametrize(
    ("kind", "peer"),
    [
        ("mse", F.mse_loss),
        ("l1", F.l1_loss),
        ("huber", lambda a, b: F.huber_loss(a, b, delta=0.3)),
    ],
)
def test_the_simple_loss_is_torchs_one_image_at_a_time(parameterization, kind, peer):
    diffusion, output = GaussianDiffusion(linear(100), parameterization), normal(SHAPE, 9)
    x0, eps = normal(SHAPE, 0), normal(SHAPE, 1)
    terms = lose(DenoisingLoss(kind, huber_delta=0.3), diffusion, output)
    goal = diffusion.target(x0, eps, T)
    for i in range(len(T)):
        assert terms.loss[i].item() == pytest.approx(peer(output[i], goal[i]).item(), rel=1e-12)
        assert terms.mse[i].item() == pytest.approx(F.mse_loss(output[i], goal[i]).item(), rel=1e-12)
    assert terms.vlb is None


def test_the_network_sees_the_noisy_image_its_time_and_its_condition():
    seen = {}

    def net(x, t, **condition):
        seen.update(x=x, t=t, **condition)
        return x

    x0, eps, label = normal(SHAPE, 0), normal(SHAPE, 1), torch.arange(5)
    diffusion = GaussianDiffusion(linear(100), time_scale=10.0)
    DenoisingLoss()(diffusion, net, x0, T, eps, {"label": label})
    acp = linear(100).alphas_cumprod[T].view(-1, 1, 1, 1)
    assert torch.allclose(seen["x"], acp.sqrt() * x0 + (1 - acp).sqrt() * eps)
    assert torch.equal(seen["t"], T * 10.0)
    assert seen["label"] is label


def test_a_perfect_network_loses_nothing():
    for parameterization in ("eps", "x0", "v"):
        diffusion = GaussianDiffusion(linear(100), parameterization)
        perfect = diffusion.target(normal(SHAPE, 0), normal(SHAPE, 1), T)
        assert (lose(DenoisingLoss(weighting=MinSNR()), diffusion, perfect).loss == 0).all()


def test_losses_are_float32_when_the_network_answers_in_half_precision():
    x0 = normal(SHAPE, 0, torch.float32)
    net = answering(torch.ones(SHAPE, dtype=torch.bfloat16, requires_grad=True))
    terms = DenoisingLoss(weighting=MinSNR())(GaussianDiffusion(linear(100)), net, x0, T, x0, {})
    assert terms.loss.dtype == terms.mse.dtype == torch.float32
    assert terms.loss.requires_grad
    assert not terms.mse.requires_grad


# -- weightings --------------------------------------------------------------------------------------------------


def three_answers(schedule, t):
    """One wrong belief about x0 as the answers of an eps, an x0 and a v network."""
    x0, eps, believed = normal(SHAPE, 0), normal(SHAPE, 1), normal(SHAPE, 5)
    at = schedule.level(t)
    x = q_sample(x0, eps, at)
    implied = (x - at.alpha * believed) / at.sigma
    return {kind: target(kind, believed, implied, at) for kind in ("eps", "x0", "v")}, believed - x0


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("make", [linear, cosine])
def test_a_weighting_means_the_same_for_eps_x0_and_v(weighting, make):
    schedule = make(100)
    outputs, error = three_answers(schedule, T)
    snr = schedule.alphas_cumprod[T] / (1 - schedule.alphas_cumprod[T])
    wanted = weighting(snr) * error.square().mean((1, 2, 3))
    for kind, output in outputs.items():
        ours = lose(DenoisingLoss(weighting=weighting), GaussianDiffusion(schedule, kind), output).loss
        assert torch.allclose(ours, wanted, rtol=1e-6), kind


def test_without_a_weighting_each_parameterization_has_its_own():
    outputs, error = three_answers(linear(100), T)
    acp = linear(100).alphas_cumprod[T]
    x0_mse = error.square().mean((1, 2, 3))
    for kind, weight in {"x0": torch.ones(5), "eps": acp / (1 - acp), "v": 1 / (1 - acp)}.items():
        ours = lose(DenoisingLoss(), GaussianDiffusion(linear(100), kind), outputs[kind]).loss
        assert torch.allclose(ours, weight * x0_mse, rtol=1e-6), kind


# Weights of the loss of what the network answers, by hand, at SNR 0.04, 1 and 25.
PAPERS = [
    # min-SNR-gamma, gamma = 5 (2303.09556, section 3.4): min(SNR, g) for x0, / SNR for eps, / (SNR + 1) for v.
    (MinSNR(5.0), "x0", (0.04, 1.0, 5.0)),
    (MinSNR(5.0), "eps", (1.0, 1.0, 0.2)),
    (MinSNR(5.0), "v", (0.04 / 1.04, 0.5, 5 / 26)),
    # P2 (2204.00227, eq. 8): eps loss times 1 / (k + SNR)^gamma.
    (P2(1.0, 1.0), "eps", (1 / 1.04, 0.5, 1 / 26)),
    (P2(0.5, 1.0), "eps", (1.04**-0.5, 0.5**0.5, 26**-0.5)),
    # Truncated SNR (2202.00512, eq. 10): max(SNR, 1) on x0.
    (TruncatedSNR(1.0), "x0", (1.0, 1.0, 25.0)),
    (TruncatedSNR(1.0), "eps", (25.0, 1.0, 1.0)),
    # SNR + 1 on x0 is 1 on v (2202.00512, section 4).
    (lambda snr: snr + 1, "v", (1.0, 1.0, 1.0)),
]


@pytest.mark.parametrize(("weighting", "parameterization", "weights"), PAPERS)
def test_weights_are_those_of_the_papers(weighting, parameterization, weights):
    snr = torch.tensor([0.04, 1.0, 25.0], dtype=torch.float64)
    ours = in_output_space(parameterization, weighting(snr), snr)
    assert torch.allclose(ours, torch.tensor(weights, dtype=torch.float64), rtol=1e-12)


@properties
@given(st.sampled_from(["eps", "x0", "v"]), st.integers(0, 99), st.floats(0.1, 20))
def test_min_snr_is_what_training_scripts_write(parameterization, t, gamma):
    acp = linear(100).alphas_cumprod[t].item()
    alpha, sigma = math.sqrt(acp), math.sqrt(1 - acp)
    snr = (alpha / sigma) ** 2
    theirs = {  # as diffusers' examples have it, by prediction type
        "x0": min(gamma, snr),
        "eps": min(gamma, snr) / snr,
        "v": min(gamma, snr) / (snr + 1),
    }[parameterization]
    ours = snr_weight(MinSNR(gamma), GaussianDiffusion(linear(100), parameterization), torch.tensor([t]))
    assert ours.item() == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_weights_are_finite_at_zero_terminal_snr(weighting, parameterization):
    diffusion = GaussianDiffusion(zero_terminal_snr(linear(100)), parameterization)
    weight = snr_weight(weighting, diffusion, T)
    assert weight.shape == (5,)
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()
    output = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    loss = lose(DenoisingLoss(weighting=weighting), diffusion, output).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(output.grad).all()


def test_the_limits_at_zero_snr_are_the_weightings_own():
    zero = torch.tensor([1e-20], dtype=torch.float64)  # where `snr_weight` takes its limits
    assert in_output_space("eps", MinSNR()(zero), zero).item() == pytest.approx(1)
    assert in_output_space("eps", P2(1.0, 2.0)(zero), zero).item() == pytest.approx(0.5)
    diffusion = GaussianDiffusion(zero_terminal_snr(linear(100)), "v")
    last = torch.tensor([99])
    assert snr_weight(MinSNR(), diffusion, last).item() == pytest.approx(0, abs=1e-15)
    assert snr_weight(TruncatedSNR(), diffusion, last).item() == pytest.approx(1)


def test_a_weighting_of_ones_own_is_never_asked_at_an_snr_of_zero():
    diffusion = GaussianDiffusion(zero_terminal_snr(linear(100)), "v")
    weight = snr_weight(lambda snr: snr.log() ** 2, diffusion, torch.tensor([99]))
    assert weight.item() == pytest.approx(math.log(1e-20) ** 2)


def test_weightings_of_the_posterior_mean_are_an_error():
    with pytest.raises(ValueError, match="weightings are defined for eps, x0 and v; use weighting=null"):
        snr_weight(MinSNR(), GaussianDiffusion(linear(100), "mean"), T)


# -- the bound ---------------------------------------------------------------------------------------------------


def split(seed: int = 9) -> torch.Tensor:
    """The answer of a network with a variance head."""
    return torch.cat([normal(SHAPE, seed), normal(SHAPE, seed + 1).tanh()], 1).requires_grad_()


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_the_bound_of_a_hybrid_loss_does_not_train_the_mean(parameterization):
    diffusion = GaussianDiffusion(linear(100), parameterization, "learned")
    hybrid, simple = split(), split()
    lose(DenoisingLoss(vlb_weight=0.001), diffusion, hybrid).loss.sum().backward()
    fixed = GaussianDiffusion(linear(100), parameterization)
    lose(DenoisingLoss(), fixed, simple[:, :2]).loss.sum().backward()
    assert torch.allclose(hybrid.grad[:, :2], simple.grad[:, :2], rtol=1e-12)
    assert (hybrid.grad[:, 2:].abs().amax((1, 2, 3)) > 0).all()


def test_the_full_bound_trains_mean_and_variance():
    output = split()
    lose(
        DenoisingLoss("vlb", vlb_weight=1.0), GaussianDiffusion(linear(100), "eps", "learned"), output
    ).loss.sum().backward()
    for part in output.grad.chunk(2, dim=1):
        assert (part.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("weight", [0.001, 1.0])
def test_the_terms_of_a_hybrid_loss_add_up(weight):
    diffusion = GaussianDiffusion(linear(100), "eps", "learned")
    terms = lose(DenoisingLoss(vlb_weight=weight), diffusion, split())
    assert torch.allclose(terms.loss, terms.mse + weight * 100 * terms.vlb)
    weighted = lose(DenoisingLoss(weighting=P2(), vlb_weight=weight), diffusion, split())
    simple = snr_weight(P2(), diffusion, T) * terms.mse
    assert torch.allclose(weighted.loss, simple + weight * 100 * terms.vlb)  # the weighting is not the bound's
    alone = lose(DenoisingLoss("vlb", vlb_weight=weight), diffusion, split())
    assert torch.allclose(alone.loss, weight * 100 * terms.vlb)
    assert not terms.vlb.requires_grad


def test_a_respaced_bound_sums_over_its_own_chain():
    diffusion, chain = GaussianDiffusion(linear(100), "eps", "learned"), (99, 70, 40, 10, 0, -1)
    terms = lose(DenoisingLoss(vlb_weight=1.0, timesteps=chain), diffusion, split())
    assert torch.allclose(terms.loss, terms.mse + 5 * terms.vlb)
    with pytest.raises(ValueError, match=r"timesteps \[50\] are not on the chain of 5 steps"):
        lose(DenoisingLoss(vlb_weight=1.0, timesteps=chain), diffusion, split(), torch.tensor([0, 10, 50, 70, 99]))


def test_an_untrained_part_of_the_network_is_an_error():
    learned, fixed = GaussianDiffusion(linear(100), variance="learned"), GaussianDiffusion(linear(100))
    for diffusion, weight in ((learned, 0.0), (fixed, 0.001)):
        with pytest.raises(ValueError, match=f"vlb_weight={weight}.*loss=hybrid task.variance=learned"):
            DenoisingLoss(vlb_weight=weight).check(diffusion)
    DenoisingLoss().check(fixed)
    DenoisingLoss(vlb_weight=0.001).check(learned)
    for diffusion in (learned, fixed):
        DenoisingLoss("vlb", vlb_weight=1.0).check(diffusion)


def test_a_loss_that_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="loss kind must be one of mse, l1, huber, vlb, got 'l2'"):
        DenoisingLoss("l2")
    for kwargs in ({"vlb_weight": -1.0}, {"kind": "vlb"}):
        with pytest.raises(ValueError, match="vlb_weight must be positive with kind=vlb"):
            DenoisingLoss(**kwargs)


def test_a_network_with_the_wrong_channels_is_told_which_fit():
    with pytest.raises(ValueError, match="answered 4 channels for an image of 2"):
        lose(DenoisingLoss(), GaussianDiffusion(linear(100)), split())
    with pytest.raises(ValueError, match=r"answered 2 channels .* must answer 4"):
        lose(DenoisingLoss(vlb_weight=1.0), GaussianDiffusion(linear(100), variance="learned"), normal(SHAPE))


# -- noise -------------------------------------------------------------------------------------------------------


def test_offset_noise_is_constant_over_the_image_and_has_its_own_size():
    x0 = torch.zeros(400, 3, 8, 8)
    draws = SampleDraws(0, range(400))
    offset = DenoisingLoss(offset_noise=0.5).noise(x0, draws) - DenoisingLoss().noise(x0, draws)
    assert torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-5)
    each = offset[:, :, 0, 0]
    assert abs(each.std() - 0.5) < 4 * 0.5 / math.sqrt(2 * each.numel())
    assert abs(each.mean()) < 4 * 0.5 / math.sqrt(each.numel())
    between = np.corrcoef(each.T)[np.triu_indices(3, 1)]
    assert np.abs(between).max() < 4 / math.sqrt(400)  # each channel has its own


def test_noise_is_standard_normal_and_decided_by_seed_and_sample():
    x0 = torch.zeros(50, 3, 16, 16)
    eps = DenoisingLoss().noise(x0, SampleDraws(0, range(50)))
    assert abs(eps.std() - 1) < 4 / math.sqrt(2 * eps.numel())
    for loss in (DenoisingLoss(), DenoisingLoss(offset_noise=0.1)):
        places = ((0, 0), (0, 0), (1, 0), (0, 10))
        draws = [loss.noise(x0, SampleDraws(seed, range(first, first + 50))) for seed, first in places]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        assert torch.equal(draws[0][10:], draws[3][:-10])
    assert DenoisingLoss().noise(x0.double(), SampleDraws(0, range(50))).dtype == torch.float64
