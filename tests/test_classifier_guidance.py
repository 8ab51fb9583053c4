"""Classifier guidance against closed forms: data whose classes, denoiser and classifier are known exactly."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from guidance_cases import (
    LABELS,
    SHAPE,
    Classes,
    Labelled,
    T,
    drawn,
    exact,
    gradient_by_hand,
)
from oracles import normal
from torch import Tensor

from diffusion.denoiser import denoiser
from diffusion.generate import guidance_for, say_guidance
from diffusion.guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    NoGuidance,
    classifier_score,
)
from diffusion.process import GaussianDiffusion, Prediction
from diffusion.sampling import Sampler
from diffusion.schedule import CLEAN, cosine, linear, zero_terminal_snr


def walk(sampler: Sampler, diffusion: GaussianDiffusion, denoise, push=None, seed: int = 3) -> list[Tensor]:
    """Every x of a trajectory in float64, on noise of its own that is the same each time."""
    draws = torch.Generator().manual_seed(seed)
    noise = lambda x: torch.randn(x.shape, generator=draws, dtype=x.dtype)  # noqa: E731
    states = sampler.states(diffusion, denoise, normal(SHAPE, 1), noise=noise, log_prob_grad=push)
    return [state.x for state in states]


# ---------------------------------------------------------------------------------------------------------------------
# the score form


@pytest.mark.parametrize("t", [0, 3, 60, 150, T - 1])
def test_the_gradient_of_the_exact_classifier_is_the_formula(t):
    diffusion, data, guidance = exact(classifier_scale=2.5)
    x = normal(SHAPE, 5)
    push = guidance.log_prob_grad(diffusion, x, LABELS)
    assert torch.allclose(push(x, t), 2.5 * gradient_by_hand(data, x, LABELS, diffusion.schedule.level(t)), atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("num_steps", [7, 50])
def test_at_scale_one_the_exact_classifier_turns_ddim_into_that_of_the_conditional_model(eta, num_steps):
    diffusion, data, guidance = exact()
    sampler = Sampler(num_steps, eta=eta, variance="posterior", clip=None)
    assert not sampler.shifts_mean
    push = guidance.log_prob_grad(diffusion, normal(SHAPE, 1), LABELS)
    ours = walk(sampler, diffusion, denoiser(diffusion, data.net(diffusion)), push)
    conditional = walk(sampler, diffusion, data.of(LABELS).denoiser(diffusion.schedule.level))
    for a, b in zip(ours, conditional, strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    assert guidance.net.asked == list(sampler.timesteps(diffusion.schedule)[:-1])  # once a step, and where it moves


def test_every_solver_but_eulers_bends_the_score():
    def midpoint(denoise, level, x, t, s, history):
        """A solver of two answers, the second one of the denoiser itself."""
        half = (t + s) // 2 if s != CLEAN and t - s > 1 else t
        return denoise(x, half)

    diffusion, data, guidance = exact()
    push = guidance.log_prob_grad(diffusion, normal(SHAPE, 1), LABELS)
    for eta in (0.0, 1.0):
        sampler = Sampler(20, solver=midpoint, eta=eta, variance="posterior", clip=None)
        assert not sampler.shifts_mean
        ours = walk(sampler, diffusion, denoiser(diffusion, data.net(diffusion)), push)
        conditional = walk(sampler, diffusion, data.of(LABELS).denoiser(diffusion.schedule.level))
        assert torch.allclose(ours[-1], conditional[-1], atol=1e-8)


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_a_scale_sharpens_the_classifier_to_its_power(scale):
    """p(x) p(label | x)^scale: the score is that of the classes less what they have in common, scale times."""
    diffusion, data, guidance = exact(classifier_scale=scale)
    x, level = normal(SHAPE, 5), diffusion.schedule.level
    push, state = guidance.log_prob_grad(diffusion, x, LABELS), []
    for state in Sampler(1, clip=None).states(
        diffusion, denoiser(diffusion, data.net(diffusion)), x, noise=torch.zeros_like, log_prob_grad=push
    ):
        at = level(state.t)
        plain = denoiser(diffusion, data.net(diffusion))(x, state.t)
        scores = -plain.eps / at.sigma + scale * gradient_by_hand(data, x, LABELS, at)
        assert torch.allclose(-state.prediction.eps / at.sigma, scores, atol=1e-10)
        assert torch.allclose(at.alpha * state.prediction.x0 + at.sigma * state.prediction.eps, x, atol=1e-10)


def test_the_score_is_added_outside_the_clipping_and_not_clipped_again():
    diffusion, data, guidance = exact(classifier_scale=30.0)
    x = 3 * normal(SHAPE, 5)
    push = guidance.log_prob_grad(diffusion, x, LABELS)
    raw = denoiser(diffusion, lambda x, t: 5 * torch.sin(x))
    state = next(Sampler(1, clip="auto").states(diffusion, raw, x, noise=torch.zeros_like, log_prob_grad=push))
    at = diffusion.schedule.level(T - 1)
    clipped = (5 * torch.sin(x)).clamp(-1, 1)
    push_by_hand = 30 * gradient_by_hand(data, x, LABELS, at)
    assert torch.allclose(state.prediction.x0, clipped + at.sigma**2 / at.alpha * push_by_hand, atol=1e-9)
    assert state.prediction.x0.abs().max() > 1


def test_at_zero_snr_nothing_guides_the_score():
    diffusion, data = GaussianDiffusion(zero_terminal_snr(linear(T)), "v"), Classes.make()
    guidance = ClassifierGuidance(classifier=data.classifier(diffusion), classifier_scale=3.0)
    push = guidance.log_prob_grad(diffusion, normal(SHAPE, 1), LABELS)
    ours = walk(Sampler(10, clip=None), diffusion, denoiser(diffusion, lambda x, t: 0.1 * x), push)
    assert all(x.isfinite().all() for x in ours)
    assert T - 1 not in guidance.net.asked and len(guidance.net.asked) == 9


def test_where_x_is_noise_only_the_score_is_not_asked_for_and_the_log_says_so(capsys):
    """A cosine schedule ends at alpha = 5e-5: there the score form divides by it what the classifier does not know."""
    diffusion, data = GaussianDiffusion(cosine(1000), "x0"), Classes.make()
    x, level, plain = normal(SHAPE, 1), diffusion.schedule.level, denoiser(diffusion, data.net(diffusion))
    asked = {}
    for eta in (0.0, 1.0):
        guidance, sampler = ClassifierGuidance(classifier=data.classifier(diffusion)), Sampler(10, eta=eta, clip=None)
        push = guidance.log_prob_grad(diffusion, x, LABELS)
        walk(sampler, diffusion, plain, push)
        asked[eta] = guidance.net.asked.copy()
        say_guidance(guidance, sampler, diffusion)
        say_guidance(replace(guidance, interval=(0, 998)), sampler, diffusion)
    assert asked[1.0] == [999, *asked[0.0]] and len(asked[0.0]) == 9
    lines = capsys.readouterr().err.splitlines()
    assert ["not at timestep 999" in line for line in lines] == [True, False, False, False]
    by_the_paper = classifier_score(plain, push, level)(x, 999)
    assert torch.allclose(by_the_paper.x0, data.of(LABELS).denoiser(level)(x, 999).x0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# the mean-shift form


def ddpm_by_the_paper(data, diffusion, grid, x, noises, scale, variance, var_frac) -> list[Tensor]:
    """2105.05233, algorithm 1, on DDPM's posterior written with betas (2006.11239, eq. 7), one step after another."""
    acp, xs = diffusion.schedule.alphas_cumprod, []
    before = None  # the posterior variance of the move before
    for t, s in pairwise(grid):
        now, then = acp[t], acp[s] if s != CLEAN else torch.ones((), dtype=torch.float64)
        beta = 1 - now / then
        tilde = (1 - then) / (1 - now) * beta
        x0 = data.net(diffusion)(x, torch.full((len(x),), t))
        mean = then.sqrt() * beta / (1 - now) * x0 + (now / then).sqrt() * (1 - then) / (1 - now) * x
        # The true posterior variance of the last move is 0: the published code takes that of the move before.
        floor = tilde if s != CLEAN or before is None else before
        sigma2 = {
            "posterior": tilde,
            "jump": beta if s != CLEAN else floor,
            "learned": torch.exp(var_frac * beta.log() + (1 - var_frac) * floor.clamp(min=1e-20).log()),
        }[variance]
        gradient = gradient_by_hand(data, x, LABELS, diffusion.schedule.level(t))
        x = mean + scale * sigma2 * gradient + (sigma2.sqrt() * next(noises) if s != CLEAN else 0)
        before = tilde
        xs.append(x)
    return xs


@pytest.mark.parametrize("variance", ["posterior", "jump", "learned"])
@pytest.mark.parametrize("num_steps", [3, 40, T])
def test_ddpm_shifts_its_mean_by_the_variance_times_the_gradient(variance, num_steps):
    diffusion, data, guidance = exact(classifier_scale=1.7)
    diffusion = replace(diffusion, variance=variance)
    sampler = Sampler(num_steps, eta=1.0, clip=None)
    assert sampler.shifts_mean
    frac = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def denoise(x, t):
        return Prediction.from_x0(
            x, data.net(diffusion)(x, torch.full((len(x),), t)), diffusion.schedule.level(t), frac
        )

    push = guidance.log_prob_grad(diffusion, normal(SHAPE, 1), LABELS)
    ours = walk(sampler, diffusion, denoise, push)
    draws = torch.Generator().manual_seed(3)
    noises = iter(lambda: torch.randn(SHAPE, generator=draws, dtype=torch.float64), None)
    grid = sampler.timesteps(diffusion.schedule)
    paper = ddpm_by_the_paper(data, diffusion, grid, normal(SHAPE, 1), noises, 1.7, variance, frac)
    for a, b in zip(ours, paper, strict=True):
        assert torch.allclose(a, b, atol=1e-8)


def test_the_mean_shift_tends_to_the_conditional_model_as_steps_become_short():
    """Algorithm 1 is a first-order argument: twice the steps, half the error."""
    diffusion, data = GaussianDiffusion(cosine(4000), "x0"), Classes.make()
    guidance = ClassifierGuidance(classifier=data.classifier(diffusion))
    errors = []
    for num_steps in (250, 500, 1000):
        sampler = Sampler(num_steps, eta=1.0, clip=None)
        still = lambda x: torch.zeros_like(x)  # noqa: E731
        push = guidance.log_prob_grad(diffusion, normal(SHAPE, 1), LABELS)
        ours, conditional = (
            sampler.sample(diffusion, denoise, normal(SHAPE, 1), noise=still, log_prob_grad=gradient)
            for denoise, gradient in (
                (denoiser(diffusion, data.net(diffusion)), push),
                (data.of(LABELS).denoiser(diffusion.schedule.level), None),
            )
        )
        errors.append((ours - conditional).abs().max().item())
    assert errors[-1] < 0.02
    assert all(0.3 < later / earlier < 0.7 for earlier, later in pairwise(errors)), errors


@pytest.mark.parametrize(("eta", "shifts"), [(0.0, False), (0.5, False), (0.999, False), (1.0, True), (1, True)])
def test_the_sampler_chooses_the_form_and_says_so(eta, shifts, capsys):
    sampler = Sampler(10, eta=eta)
    assert sampler.shifts_mean is shifts
    diffusion = GaussianDiffusion(linear(T))
    say_guidance(ClassifierGuidance(classifier=lambda x, t: x, classifier_scale=4.0), sampler, diffusion)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.endswith("classifier_scale=4\n")
    assert ("shifts the mean (DDPM)" in line) is shifts and ("bends the score" in line) is not shifts
    for other in (NoGuidance(), ClassifierFreeGuidance(2.0)):
        say_guidance(other, sampler, diffusion)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------------
# both forms


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_scale_zero_is_unguided_bit_for_bit_and_asks_no_classifier(eta):
    guidance = exact(classifier_scale=0.0)[2]
    assert torch.equal(drawn(guidance, eta=eta), drawn(NoGuidance(), eta=eta))
    assert guidance.net.asked == []


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_outside_its_interval_the_classifier_is_not_asked(eta):
    guidance = exact(classifier_scale=2.0, interval=(60, 139))[2]
    drawn(guidance, eta=eta)
    assert guidance.net.asked == [139, 119, 99, 79]
    diffusion = GaussianDiffusion(linear(T), "x0")
    push = guidance.log_prob_grad(diffusion, normal(SHAPE), LABELS)
    assert push(normal(SHAPE), 140) is None and push(normal(SHAPE), 59) is None
    nowhere = exact(classifier_scale=2.0, interval=(50, 55))[2]  # no timestep of the grid
    assert torch.equal(drawn(nowhere, eta=eta), drawn(NoGuidance(), eta=eta))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_each_sample_goes_towards_its_own_label_alone(eta):
    together = drawn(exact(classifier_scale=1.5)[2], eta=eta)
    for i, label in enumerate(LABELS):
        alone = drawn(exact(classifier_scale=1.5)[2], eta=eta, labels=[label], seeds=[i])
        assert torch.allclose(together[i], alone[0], atol=1e-6)
    ones = drawn(exact(classifier_scale=5.0)[2], eta=eta, labels=[1, 1, 1, 1], pad_to=16)
    assert Classes.make().logits(ones.double(), linear(T).level(0)).argmax(1).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 3.0])
def test_a_conditional_denoiser_and_classifier_free_guidance_are_bent_by_the_same_score(guidance_scale):
    diffusion, data, guidance = exact(classifier_scale=2.0, guidance_scale=guidance_scale)
    x, t, net = normal(SHAPE, 5), 120, Labelled()
    condition = {"label": torch.tensor(LABELS)}
    null = {"label": torch.full((4,), -1)}
    at, times = diffusion.schedule.level(t), torch.full((4,), t)
    without, given = (net(x, times, label=c["label"]) for c in (null, condition))
    eps = (x - at.alpha * (without + guidance_scale * (given - without))) / at.sigma
    wanted = eps - 2.0 * at.sigma * gradient_by_hand(data, x, LABELS, at)
    push = guidance.log_prob_grad(diffusion, x, LABELS, num_classes=3)
    guided = classifier_score(guidance(diffusion, net, condition, null), push, diffusion.schedule.level)
    assert torch.allclose(guided(x, t).eps, wanted, atol=1e-9)


def test_the_interval_holds_for_both_guidances():
    diffusion, _, guidance = exact(classifier_scale=2.0, guidance_scale=3.0, interval=(0, 50))
    x, condition = normal(SHAPE, 5), {"label": torch.tensor(LABELS)}
    denoise = guidance(diffusion, Labelled(), condition, {"label": torch.full((4,), -1)})
    plain = denoiser(diffusion, Labelled(), **condition)
    assert torch.equal(denoise(x, 51).eps, plain(x, 51).eps) and not torch.equal(denoise(x, 50).eps, plain(x, 50).eps)


def test_rescale_is_classifier_free_guidances():
    diffusion, _, guidance = exact(guidance_scale=3.0, rescale=0.7)
    x, condition, null = normal(SHAPE, 5), {"label": torch.tensor(LABELS)}, {"label": torch.full((4,), -1)}
    ours = guidance(diffusion, Labelled(), condition, null)(x, 30)
    assert torch.equal(ours.eps, ClassifierFreeGuidance(3.0, 0.7)(diffusion, Labelled(), condition, null)(x, 30).eps)


def test_a_model_without_a_condition_keeps_its_classifier_and_loses_the_other_guidance():
    guidance = exact(classifier_scale=2.0, guidance_scale=3.0)[2]
    with pytest.warns(UserWarning, match="classifier's guidance alone"):
        kept = guidance_for(guidance, conditional=False, condition_drop=0.1)
    assert kept == replace(guidance, guidance_scale=1.0)
    with pytest.warns(UserWarning, match="guidance_scale=3.0, but this model was trained without condition drop"):
        assert guidance_for(guidance, conditional=True, condition_drop=0.0) is guidance


@pytest.mark.parametrize("time_scale", [1.0, 2.5])
def test_the_classifier_is_told_the_time_of_its_own_training(time_scale):
    """The denoiser's time_scale may differ: x_t has the same noise, and the timestep is told differently."""
    denoisers, data = GaussianDiffusion(linear(T), "x0", time_scale=5.0), Classes.make()
    trained = replace(denoisers, time_scale=time_scale)
    guidance = ClassifierGuidance(classifier=SimpleNamespace(net=data.classifier(trained), diffusion=trained))
    x = normal(SHAPE, 5)
    push = guidance.log_prob_grad(denoisers, x, LABELS)
    assert torch.allclose(push(x, 80), gradient_by_hand(data, x, LABELS, denoisers.schedule.level(80)), atol=1e-10)
    assert guidance.net.asked == [80 * time_scale]
    alone = ClassifierGuidance(classifier=data.classifier(denoisers))  # a network of one's own: as the denoiser
    alone.log_prob_grad(denoisers, x, LABELS)(x, 80)
    assert alone.net.asked == [400]
