"""Guidance, clipping and thresholding against independent formulas, and a classifier score that is exactly right."""

import math

import numpy as np
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Mixture, normal
from torch import Tensor

from diffusion.denoiser import denoiser, denoiser_pair
from diffusion.guidance import (
    ClassifierFreeGuidance,
    NoGuidance,
    TwoScaleGuidance,
    classifier_score,
    clip_x0,
    threshold_x0,
)
from diffusion.process import GaussianDiffusion, Prediction, target
from diffusion.schedule import linear, zero_terminal_snr

SHAPE = (3, 2, 4, 4)
LABELS = {"label": torch.tensor([0, 1, 2])}
NULL = {"label": torch.tensor([-1, -1, -1])}
properties = settings(max_examples=30, deadline=None, derandomize=True)


class Net:
    """A conditional network that acts on each sample alone and remembers what it was asked."""

    def __init__(self, channels: int = 2):
        self.channels, self.batches = channels, []

    def __call__(self, x: Tensor, t: Tensor, *, label: Tensor, context: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        shift = (label.view(-1, 1, 1, 1) + 2) * torch.linspace(0.1, 0.9, self.channels, dtype=x.dtype).view(1, -1, 1, 1)
        shift = shift if context is None else shift + context.view(-1, 1, 1, 1)
        x = x if self.channels == x.shape[1] else torch.cat([x, x.flip(1)], 1)
        return torch.sin(x * (1 + shift) + shift) + t.view(-1, 1, 1, 1) / 100


def guide(scale: float, diffusion: GaussianDiffusion | None = None, **kwargs):
    diffusion = diffusion or GaussianDiffusion(linear(100))
    net = Net(diffusion.out_channels(2))
    return ClassifierFreeGuidance(scale, **kwargs)(diffusion, net, LABELS, NULL), net


def answers(diffusion: GaussianDiffusion, x: Tensor, t: int) -> tuple[Prediction, Prediction]:
    """The conditional and the unconditional prediction, asked one by one."""
    return tuple(denoiser(diffusion, Net(diffusion.out_channels(2)), **c)(x, t) for c in (LABELS, NULL))


def assert_same(ours: Prediction, other: Prediction, tolerance: float = 1e-9) -> None:
    for a, b in zip(ours, other, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=tolerance)


# -- classifier-free guidance ------------------------------------------------------------------------------------


def test_scale_one_is_the_conditional_model_asked_once():
    x, (guided, net) = normal(SHAPE), guide(1.0)
    given, _ = answers(GaussianDiffusion(linear(100)), x, 40)
    assert all(torch.equal(a, b) for a, b in zip(guided(x, 40)[:2], given[:2], strict=True))
    assert net.batches == [3]


def test_scale_zero_is_the_unconditional_model():
    x, (guided, net) = normal(SHAPE), guide(0.0)
    assert_same(guided(x, 40), answers(GaussianDiffusion(linear(100)), x, 40)[1])
    assert net.batches == [6]


@properties
@given(st.floats(0, 20), st.sampled_from(["eps", "x0", "v"]), st.integers(0, 99))
def test_guidance_extrapolates_the_networks_answer_in_one_doubled_batch(scale, parameterization, t):
    diffusion = GaussianDiffusion(linear(100), parameterization)
    x, (guided, net) = normal(SHAPE), guide(scale, diffusion)
    times = torch.full((3,), t)
    given, without = (Net()(x, times, **c) for c in (LABELS, NULL))
    wanted = diffusion.prediction(without + scale * (given - without), x, t)
    assert_same(guided(x, t), wanted, 1e-9 * (1 + scale) / diffusion.schedule.level(t).alpha)
    assert net.batches == ([3] if scale == 1 else [6])


def test_the_two_halves_are_the_two_answers():
    diffusion = GaussianDiffusion(linear(100), variance="learned")
    pair = denoiser_pair(diffusion, Net(4), LABELS, NULL)
    x = normal(SHAPE)
    for ours, other in zip(pair(x, 40), answers(diffusion, x, 40), strict=True):
        assert_same(ours, other)
    for ours, other in zip(pair(x, torch.tensor([40, 40, 40])), answers(diffusion, x, 40), strict=True):
        assert_same(ours, other)


def test_what_null_does_not_name_both_halves_share():
    diffusion, x, context = GaussianDiffusion(linear(100)), normal(SHAPE), normal((3, 1), 5)
    condition = {**LABELS, "context": context}
    given, without = denoiser_pair(diffusion, Net(), condition, NULL)(x, 40)
    assert_same(given, denoiser(diffusion, Net(), **condition)(x, 40))
    assert_same(without, denoiser(diffusion, Net(), **NULL, context=context)(x, 40))


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_a_learned_variance_is_the_conditional_halfs(scale):
    diffusion, x = GaussianDiffusion(linear(100), variance="learned"), normal(SHAPE)
    guided, _ = guide(scale, diffusion)
    given, without = answers(diffusion, x, 40)
    assert torch.allclose(guided(x, 40).var_frac, given.var_frac)
    assert not torch.allclose(given.var_frac, without.var_frac)


@pytest.mark.parametrize("phi", [0.2, 0.7, 1.0])
def test_rescale_of_an_eps_model_is_diffusers(phi):
    diffusion, x = GaussianDiffusion(linear(100)), normal(SHAPE)
    guided, _ = guide(5.0, diffusion, rescale=phi)
    given, without = (Net()(x, torch.full((3,), 40), **c) for c in (LABELS, NULL))
    eps = rescale_noise_cfg(without + 5.0 * (given - without), given, guidance_rescale=phi)
    assert_same(guided(x, 40), diffusion.prediction(eps, x, 40), 1e-9)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v", "mean"])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_gives_back_the_spread_of_what_the_network_predicts(parameterization, phi):
    diffusion, x = GaussianDiffusion(linear(100), parameterization), normal(SHAPE)
    p = guide(5.0, diffusion, rescale=phi)[0](x, 40)
    at, kind = diffusion.schedule.level(40), parameterization.replace("mean", "eps")
    given, without = ([target(kind, q.x0, q.eps, at)] for q in answers(diffusion, x, 40))
    ours, given, without = (q.numpy() for q in (target(kind, p.x0, p.eps, at), given[0], without[0]))
    for i in range(3):  # arXiv 2305.08891, eqs. 14-16, one image at a time
        cfg = without[i] + 5.0 * (given[i] - without[i])
        rescaled = cfg * given[i].std() / cfg.std()
        assert np.allclose(ours[i], phi * rescaled + (1 - phi) * cfg, atol=1e-9)
    assert torch.allclose(at.alpha * p.x0 + at.sigma * p.eps, x, atol=1e-9)


def test_guidance_outside_its_interval_is_the_conditional_model_at_half_the_cost():
    guided, net = guide(4.0, interval=(20, 60))
    x, diffusion = normal(SHAPE), GaussianDiffusion(linear(100))
    for t in (99, 61, 60, 40, 20, 19, 0):
        inside = 20 <= t <= 60
        p, (given, _) = guided(x, t), answers(diffusion, x, t)
        assert torch.equal(p.eps, given.eps) == (not inside)
    assert net.batches == [3, 3, 6, 6, 6, 3, 3]


def test_guidance_is_finite_at_zero_terminal_snr():
    diffusion = GaussianDiffusion(zero_terminal_snr(linear(100)), "v")
    p = guide(4.0, diffusion, rescale=0.7)[0](normal(SHAPE), 99)
    assert torch.isfinite(p.x0).all()
    assert torch.isfinite(p.eps).all()


def test_no_guidance_is_the_model_as_it_is():
    diffusion, x, net = GaussianDiffusion(linear(100)), normal(SHAPE), Net()
    assert_same(NoGuidance()(diffusion, net, LABELS, NULL)(x, 40), answers(diffusion, x, 40)[0], 0)
    assert net.batches == [3]


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf, -math.inf, None, "2"])
def test_a_scale_that_is_no_number_above_zero_is_an_error(scale):
    with pytest.raises(ValueError, match=r"guidance_scale must be a finite number >= 0, got .*1 is the plain cond"):
        ClassifierFreeGuidance(scale)
    with pytest.raises(ValueError, match="classifier_scale must be a finite number >= 0"):
        classifier_score(None, None, None, scale=scale)


@pytest.mark.parametrize("rescale", [-0.1, 1.1, math.nan])
def test_rescale_is_a_fraction(rescale):
    with pytest.raises(ValueError, match=r"rescale must be in \[0, 1\]"):
        ClassifierFreeGuidance(rescale=rescale)


@pytest.mark.parametrize("interval", [(5,), (5, 1), (1, 2, 3), (math.nan, 5)])
def test_an_interval_has_a_low_and_a_high_end(interval):
    with pytest.raises(ValueError, match=r"interval must be \(low, high\) timesteps"):
        ClassifierFreeGuidance(interval=interval)


def test_guidance_of_an_unconditional_model_is_an_error():
    with pytest.raises(ValueError, match="needs a condition; this model is unconditional: use guidance=none"):
        ClassifierFreeGuidance(2.0)(GaussianDiffusion(linear(100)), Net(), {}, {})
    with pytest.raises(ValueError, match=r"names \['context'\], which the condition \['label'\] lacks"):
        ClassifierFreeGuidance(2.0)(GaussianDiffusion(linear(100)), Net(), LABELS, {"context": normal((3, 1))})


# -- two scales ----------------------------------------------------------------------------------------------------


class Editor(Net):
    """A network that is told of a picture, too."""

    def __call__(self, x: Tensor, t: Tensor, *, label: Tensor, concat: Tensor) -> Tensor:
        return super().__call__(x + concat, t, label=label)


PICTURE = {"concat": normal(SHAPE) + 1}
NO_PICTURE = {"concat": torch.zeros(SHAPE, dtype=torch.float64)}


def edit(text: float, image: float, diffusion: GaussianDiffusion | None = None, **kwargs):
    diffusion = diffusion or GaussianDiffusion(linear(100))
    net = Editor(diffusion.out_channels(2))
    return TwoScaleGuidance(text, image, **kwargs)(diffusion, net, LABELS | PICTURE, NULL | NO_PICTURE), net


def edits(diffusion: GaussianDiffusion, x: Tensor, t: int) -> list[Prediction]:
    """What is predicted from text and picture, from the picture, and from nothing."""
    told = (LABELS | PICTURE, NULL | PICTURE, NULL | NO_PICTURE)
    return [denoiser(diffusion, Editor(diffusion.out_channels(2)), **condition)(x, t) for condition in told]


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
@pytest.mark.parametrize(
    ("text", "image", "asked"),
    [(7.5, 1.5, 3), (2.0, 2.0, 2), (3.0, 1.0, 2), (1.0, 1.0, 1), (0.0, 0.0, 1), (0.0, 1.5, 3), (1.0, 0.0, 3)],
)
def test_two_scales_are_instruct_pix2pixs_equation_in_one_batch_of_what_counts(text, image, asked, parameterization):
    diffusion, x = GaussianDiffusion(linear(100), parameterization), normal(SHAPE)
    guided, net = edit(text, image, diffusion)
    given, picture, nothing = edits(diffusion, x, 40)
    expected = nothing.eps + text * (given.eps - picture.eps) + image * (picture.eps - nothing.eps)
    assert torch.allclose(guided(x, 40).eps, expected, atol=1e-9)
    assert net.batches == [asked * SHAPE[0]]


def test_two_equal_scales_are_classifier_free_guidance_on_both():
    x, (guided, _) = normal(SHAPE), edit(3.0, 3.0)
    diffusion = GaussianDiffusion(linear(100))
    free = ClassifierFreeGuidance(3.0)(diffusion, Editor(), LABELS | PICTURE, NULL | NO_PICTURE)
    assert_same(guided(x, 40), free(x, 40))


@pytest.mark.parametrize(("text", "image"), [(7.5, 1.5), (0.0, 1.5), (1.0, 1.0)])
def test_a_learned_variance_is_that_of_text_and_picture(text, image):
    diffusion, x = GaussianDiffusion(linear(100), variance="learned"), normal(SHAPE)
    guided, _ = edit(text, image, diffusion)
    assert torch.allclose(guided(x, 40).var_frac, edits(diffusion, x, 40)[0].var_frac)


def test_two_scales_can_be_rescaled_and_kept_to_an_interval():
    x, diffusion = normal(SHAPE), GaussianDiffusion(linear(100))
    guided, _ = edit(7.5, 1.5, rescale=1.0, interval=(30, 60))
    given = edits(diffusion, x, 40)[0]
    assert torch.allclose(guided(x, 40).eps.std((1, 2, 3)), given.eps.std((1, 2, 3)))
    assert_same(guided(x, 20), edits(diffusion, x, 20)[0])


@pytest.mark.parametrize("wrong", [{"image_guidance_scale": -1.0}, {"guidance_scale": math.nan}, {"rescale": 2.0}])
def test_two_scales_are_checked_like_one(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TwoScaleGuidance(**wrong)


def test_two_scales_without_a_picture_are_an_error():
    with pytest.raises(ValueError, match="takes none: use guidance=classifier_free"):
        TwoScaleGuidance()(GaussianDiffusion(linear(100)), Net(), LABELS, NULL)


# -- classifier score --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 30, 70, 99])
@pytest.mark.parametrize("label", [0, 1])
def test_the_exact_classifiers_score_turns_the_mixture_into_its_component(t, label):
    data, level = Mixture(), linear(100).level

    def log_prob_grad(x, t):
        x = x.clone().requires_grad_()
        log_p = data.responsibilities(x, level(t))[label].log().sum()
        return torch.autograd.grad(log_p, x)[0]

    x = data.draw(SHAPE, level(t))
    guided = classifier_score(data.denoiser(level), log_prob_grad, level)(x, t)
    assert_same(guided, data.component(label).denoiser(level)(x, t), 1e-8)
    unguided = classifier_score(data.denoiser(level), log_prob_grad, level, scale=0.0)(x, t)
    assert_same(unguided, data.denoiser(level)(x, t))


def test_classifier_score_moves_eps_by_scale_sigma_gradient_and_keeps_the_variance():
    level, x, grad, frac = linear(100).level, normal(SHAPE), normal(SHAPE, 7), normal(SHAPE, 8)
    p = Prediction.from_eps(x, normal(SHAPE, 6), level(40), frac)
    guided = classifier_score(lambda x, t: p, lambda x, t: grad, level, scale=2.5)(x, 40)
    assert torch.allclose(guided.eps, p.eps - 2.5 * level(40).sigma * grad)
    assert torch.allclose(level(40).alpha * guided.x0 + level(40).sigma * guided.eps, x)
    assert guided.var_frac is frac


# -- clipping and thresholding -----------------------------------------------------------------------------------


@properties
@given(st.integers(0, 99), st.floats(0.1, 3))
def test_clipping_bounds_x0_and_keeps_x(t, bound):
    level, x = linear(100).level, 3 * normal(SHAPE)
    raw = Prediction.from_eps(x, normal(SHAPE, 2), level(t), normal(SHAPE, 3))
    p = clip_x0(lambda x, t: raw, level, bound=bound)(x, t)
    assert np.array_equal(p.x0.numpy(), np.clip(raw.x0.numpy(), -bound, bound))
    assert torch.allclose(level(t).alpha * p.x0 + level(t).sigma * p.eps, x, atol=1e-9)
    assert p.var_frac is raw.var_frac
    kept = clip_x0(lambda x, t: raw, level, bound=bound, keep_eps=True)(x, t)
    assert torch.equal(kept.x0, p.x0)
    assert kept.eps is raw.eps


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("max_bound", [math.inf, 1.5])
def test_dynamic_thresholding_is_imagens(quantile, max_bound):
    level, x = linear(100).level, normal((4, 2, 4, 4))
    scale = torch.tensor([0.2, 1.0, 3.0, 10.0], dtype=torch.float64).view(-1, 1, 1, 1)
    raw = Prediction.from_x0(x, scale * normal(x.shape, 2), level(40))
    p = threshold_x0(lambda x, t: raw, level, quantile=quantile, max_bound=max_bound)(x, 40)
    for x0, ours in zip(raw.x0.numpy(), p.x0.numpy(), strict=True):  # Imagen, appendix A.32, one image at a time
        s = min(max(np.percentile(np.abs(x0.astype(np.float32)), 100 * quantile), 1.0), max_bound)
        assert np.allclose(ours, np.clip(x0, -s, s) / s, atol=1e-6)
    assert np.allclose(p.x0[0], raw.x0[0])  # an image inside [-1, 1] is left alone
    assert torch.allclose(level(40).alpha * p.x0 + level(40).sigma * p.eps, x, atol=1e-9)


def test_wrappers_work_on_a_batch_of_different_timesteps():
    level, x, t = linear(100).level, 2 * normal(SHAPE), torch.tensor([3, 50, 99])
    diffusion = GaussianDiffusion(linear(100))
    denoise = denoiser(diffusion, Net(), **LABELS)
    for wrap in (clip_x0, threshold_x0):
        together = wrap(denoise, level)(x, t)
        for i in range(3):
            one = denoiser(diffusion, Net(), label=LABELS["label"][i : i + 1])
            alone = wrap(one, level)(x[i : i + 1], t[i].item())
            assert torch.allclose(together.eps[i], alone.eps[0], atol=1e-9)


def test_the_order_of_wrappers_is_the_order_of_effects():
    data, level = Mixture(), linear(100).level
    x = 3 * normal(SHAPE)
    score = lambda x, t: torch.ones_like(x)  # noqa: E731
    outside = classifier_score(clip_x0(data.denoiser(level), level), score, level, scale=50.0)(x, 60)
    inside = clip_x0(classifier_score(data.denoiser(level), score, level, scale=50.0), level)(x, 60)
    assert outside.x0.abs().max() > 1
    assert inside.x0.abs().max() <= 1
