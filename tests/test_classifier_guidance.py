"""Classifier guidance against closed forms: data whose classes, denoiser and classifier are known exactly."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from golden_cases import assert_close, load, names
from oracles import Gaussian, normal
from torch import Tensor, nn

from diffusion.checkpoint import weights_hash
from diffusion.denoiser import denoiser
from diffusion.generate import check_same_space, generate, guidance_for, say_guidance
from diffusion.guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    LogProbGrad,
    NoGuidance,
    NonFiniteGradient,
    classifier_score,
)
from diffusion.pretrained.guided_diffusion_classifier import load_classifier as foreign_classifier
from diffusion.process import GaussianDiffusion, Prediction
from diffusion.sampling import Sampler
from diffusion.schedule import CLEAN, cosine, linear, zero_terminal_snr

SHAPE = (4, 2, 4, 4)
LABELS = [0, 1, 2, 1]
T = 200


@dataclass(frozen=True)
class Classes:
    """x0 of class k is N(means[k], stds[k]^2), each class as likely: denoiser and classifier in closed form."""

    means: Tensor  # (K, C, H, W)
    stds: Tensor  # (K,)

    @classmethod
    def make(cls, shape=SHAPE, num_classes=3) -> "Classes":
        means = 0.5 * normal((num_classes, *shape[1:]), 11)
        return cls(means, torch.linspace(0.3, 0.5, num_classes, dtype=torch.float64))

    def logits(self, x: Tensor, at) -> Tensor:
        """log p(x_t, class), (B, K)."""
        variance = (at.alpha * self.stds) ** 2 + at.sigma**2
        away = (x[:, None] - at.alpha * self.means).square().flatten(2).sum(2)
        return -0.5 * (away / variance + x[0].numel() * variance.log())

    def of(self, labels) -> Gaussian:
        return Gaussian(self.means[labels], self.stds[labels].view(-1, 1, 1, 1))

    def net(self, diffusion: GaussianDiffusion):
        """What an unconditional network with parameterization=x0 answers at best: E[x0 | x_t]."""

        def answer(x: Tensor, t: Tensor) -> Tensor:
            at = diffusion.schedule.level(round(t[0].item() / diffusion.time_scale))
            p = self.logits(x, at).softmax(1)
            each = [self.of([k]).posterior_mean(x, at) for k in range(len(self.means))]
            return sum(p[:, k].view(-1, 1, 1, 1) * each[k] for k in range(len(each)))

        return answer

    def classifier(self, diffusion: GaussianDiffusion) -> "Exact":
        return Exact(self, diffusion)


class Exact(nn.Module):
    """The classifier that is right, which remembers the timesteps it was asked at."""

    def __init__(self, data: Classes, diffusion: GaussianDiffusion) -> None:
        super().__init__()
        self.data, self.diffusion, self.asked = data, diffusion, []
        self.num_classes, (self.in_channels, self.image_size) = len(data.means), data.means.shape[1:3]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked.append(t[0].item())
        return self.data.logits(x, self.diffusion.schedule.level(round(t[0].item() / self.diffusion.time_scale)))


class Small(nn.Module):
    """A classifier with weights, of any behaviour; its activations may be scaled down towards float16's underflow."""

    num_classes, in_channels, image_size = 3, 2, 4

    def __init__(self, dtype=torch.float32, *, spread: float = 1.0) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(8, 3)
        with torch.no_grad():
            for k, weight in enumerate(self.parameters()):
                weight.copy_(0.4 * normal(tuple(weight.shape), 20 + k))
            self.last.weight.mul_(spread)
        self.to(dtype)
        self.seen = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x.dtype, t.dtype, torch.is_autocast_enabled(x.device.type)))
        h = torch.tanh(self.first(x) + (t.to(self.first.weight) / 1000).view(-1, 1, 1, 1))
        return self.last(h.mean((2, 3)))


def exact(**settings) -> tuple[GaussianDiffusion, Classes, ClassifierGuidance]:
    diffusion, data = GaussianDiffusion(linear(T), "x0"), Classes.make()
    return diffusion, data, ClassifierGuidance(classifier=data.classifier(diffusion), **settings)


def walk(sampler: Sampler, diffusion: GaussianDiffusion, denoise, push=None, seed: int = 3) -> list[Tensor]:
    """Every x of a trajectory in float64, on noise of its own that is the same each time."""
    draws = torch.Generator().manual_seed(seed)
    noise = lambda x: torch.randn(x.shape, generator=draws, dtype=x.dtype)  # noqa: E731
    states = sampler.states(diffusion, denoise, normal(SHAPE, 1), noise=noise, log_prob_grad=push)
    return [state.x for state in states]


def gradient_by_hand(data: Classes, x: Tensor, labels, at) -> Tensor:
    """d log p(label | x_t) / d x_t of Gaussian classes: that of its own class less the mean over all."""
    variance = ((at.alpha * data.stds) ** 2 + at.sigma**2).view(1, -1, 1, 1, 1)
    each = -(x[:, None] - at.alpha * data.means) / variance  # (B, K, C, H, W)
    p = data.logits(x, at).softmax(1).view(len(x), -1, 1, 1, 1)
    return each[torch.arange(len(x)), labels] - (p * each).sum(1)


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


def drawn(guidance, *, eta=0.0, labels=LABELS, net=None, dtype=torch.float64, **settings) -> Tensor:
    diffusion, data = GaussianDiffusion(linear(T), "x0"), Classes.make()
    sampler = Sampler(10, eta=eta, clip=None)
    asked = {"shape": SHAPE[1:], "seeds": range(4), "labels": labels, "dtype": dtype}
    return generate(net or Unconditional(data.net(diffusion)), diffusion, sampler, guidance, **{**asked, **settings})


class Unconditional(nn.Module):
    """A network that knows no classes."""

    num_classes = None

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.answer(x, t)


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


class Labelled(nn.Module):
    """A network that knows three classes, or none where the label is -1."""

    num_classes = 3

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
        return 0.2 * x + (label.view(-1, 1, 1, 1) + 1) * 0.1 * torch.cos(x)


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


# ---------------------------------------------------------------------------------------------------------------------
# precision and gradients


def small_push(net: nn.Module, x: Tensor, *, t: int = 60, **settings) -> Tensor:
    guidance = ClassifierGuidance(classifier=net, **settings)
    return guidance.log_prob_grad(GaussianDiffusion(linear(T)), x, LABELS)(x, t)


def reference(x: Tensor, t: int = 60, **settings) -> Tensor:
    """The gradient in float64, by another route: log_softmax and a full graph."""
    x = x.double().clone().requires_grad_()
    log_p = Small(torch.float64, **settings)(x, torch.full((len(x),), t)).log_softmax(1)
    (gradient,) = torch.autograd.grad(log_p[torch.arange(len(x)), LABELS].sum(), x)
    return gradient


@pytest.mark.parametrize("sampler_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_is_computed_in_the_precision_of_the_weights(sampler_dtype, dtype):
    net, x = Small(dtype), normal(SHAPE, 5).to(sampler_dtype)
    with torch.autocast("cpu", torch.bfloat16):  # the denoiser's precision is not the classifier's
        ours = small_push(net, x, classifier_scale=2.0)
    assert ours.dtype == sampler_dtype
    assert net.seen[0][0] == dtype and not net.seen[0][2]
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-7 if sampler_dtype == torch.float32 else 1e-14}.get(dtype, 0.05)
    wanted = 2 * reference(x)
    assert (ours - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_classifier_can_be_run_under_autocast(dtype):
    for sampler_dtype in (torch.float32, torch.float64):
        net, x = Small(), normal(SHAPE, 5).to(sampler_dtype)
        ours, wanted = small_push(net, x, classifier_dtype=dtype), reference(x)
        assert net.seen[0][0] == torch.float32 and net.seen[0][2] and ours.dtype == sampler_dtype
        assert (ours - wanted).abs().max() <= 0.03 * wanted.abs().max()
        assert not torch.equal(ours, small_push(Small(), x))


@pytest.mark.parametrize("own", [True, False], ids=["weights", "autocast"])
def test_float16_does_not_lose_small_gradients(own):
    """Without a lift, what is below 6e-8 within the network would be zero."""
    x, spread = normal(SHAPE, 5).float(), 1e-5
    ours = small_push(Small(torch.float16 if own else torch.float32, spread=spread), x,
                      classifier_dtype=None if own else "float16")  # fmt: skip
    wanted = reference(x, spread=spread)
    assert wanted.abs().max() < 1e-6
    assert (ours - wanted).abs().max() <= 0.1 * wanted.abs().max()


def test_nothing_but_the_gradient_is_left_behind():
    net, x = Small(), normal(SHAPE, 5).float().requires_grad_()
    with torch.no_grad():
        gradient = small_push(net, x)
    assert not gradient.requires_grad and x.grad is None
    assert all(weight.grad is None for weight in net.parameters())
    assert torch.equal(gradient, small_push(net, x.detach()))


def test_sampling_in_inference_mode_is_guided_too():
    for guidance in (ClassifierGuidance(classifier=Small()), exact(classifier_scale=2.0)[2]):
        plain = drawn(guidance, eta=1.0)
        with torch.inference_mode():
            assert torch.equal(drawn(guidance, eta=1.0), plain)


class Broken(Small):
    """Its gradient is NaN at timestep 99 and below."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        logits = super().forward(x, t)
        return logits * (x.sum() * 0 + (torch.nan if t[0] < 100 else 1.0))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_one_clear_error(eta):
    guidance, steps = ClassifierGuidance(classifier=Broken(), classifier_scale=3.5), []
    with pytest.raises(NonFiniteGradient, match=r"not finite at timestep 99, with classifier_scale=3.5; lower the"):
        drawn(guidance, eta=eta, on_step=lambda: steps.append(1))
    assert len(steps) == 5  # at once: the grid is 199, 179, ..., 99, ...


def test_no_step_waits_for_the_device(monkeypatch):
    """On tensors without data whatever asked for a value would be an error."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # knows no such device
    labels = torch.zeros(4, dtype=torch.long, device="meta")
    push = LogProbGrad(lambda x, t: x.sin().flatten(1)[:, :3], labels, time=GaussianDiffusion(linear(T)).time)
    for t in (90, 80):
        assert push(torch.empty(SHAPE, device="meta"), t).shape == SHAPE


def test_where_the_device_is_not_waited_for_the_first_broken_timestep_is_found_at_the_end():
    push = LogProbGrad(Small(), torch.tensor(LABELS), time=GaussianDiffusion(linear(T)).time, scale=2.0)
    push._sums = [(90, torch.tensor(1.0)), (80, torch.tensor(math.inf)), (70, torch.tensor(math.nan))]
    with pytest.raises(NonFiniteGradient, match="timestep 80"):
        push.check()
    push.check()  # what was said is not said again


def test_samples_are_only_given_out_after_that_check(monkeypatch):
    class Late:
        def __call__(self, x, t):
            return torch.zeros_like(x)

        def check(self):
            raise NonFiniteGradient("said at the end")

    monkeypatch.setattr(ClassifierGuidance, "log_prob_grad", lambda *args, **kwargs: Late())
    with pytest.raises(NonFiniteGradient, match="said at the end"):
        drawn(ClassifierGuidance(classifier=Small()))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_images_do_not_depend_on_the_batch(eta):
    net, guidance = Small(), ClassifierGuidance(classifier=Small(), classifier_scale=2.0)
    labels = [i % 3 for i in range(33)]
    conv = Unconditional(lambda x, t: 0.3 * torch.tanh(nn.functional.conv2d(x, net.first.weight[:2], padding=1)))
    settings = {"eta": eta, "net": conv, "pad_to": 16, "dtype": torch.float32}

    def images(batch_size):
        parts = [range(start, min(start + batch_size, 33)) for start in range(0, 33, batch_size)]
        return torch.cat([drawn(guidance, seeds=p, labels=[labels[i] for i in p], **settings) for p in parts])

    with torch.no_grad():
        whole = images(33)
        assert all(torch.equal(images(size), whole) for size in (1, 7))


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("name", names("adm/classifier_*"))
def test_the_gradient_is_guided_diffusions(name, scale):
    """Two samples at a timestep each, as the peer was asked."""
    case = load(name)
    guidance = ClassifierGuidance(classifier=foreign_classifier(case.config, case.group("weights")).eval(),
                                  classifier_scale=scale)  # fmt: skip
    diffusion, x = GaussianDiffusion(linear()), case["in.x"]
    gradient = guidance.log_prob_grad(diffusion, x, case["in.y"].tolist())(x, case["in.timesteps"])
    size = scale * case["out.grad_logp_x"].abs().max()
    assert_close(gradient / size, scale * case["out.grad_logp_x"] / size, 3e-4)


# ---------------------------------------------------------------------------------------------------------------------
# what does not fit


def fitting(**changes) -> SimpleNamespace:
    diffusion = changes.pop("diffusion", GaussianDiffusion(linear(T), "x0"))
    net = Small()
    for name, value in changes.items():
        setattr(net, name, value)
    return SimpleNamespace(net=net, diffusion=diffusion, path="classifier.safetensors")


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (fitting(in_channels=3), r"classifier.safetensors reads images of 3 channels, but the denoiser's have 2"),
        (fitting(image_size=8), r"was made for 8x8, but the denoiser draws 4x4"),
        (fitting(num_classes=5), r"knows 5 classes, but the denoiser 3"),
        (fitting(diffusion=GaussianDiffusion(linear(2 * T))), r"num_train_timesteps=400, but the denoiser with 200"),
        (fitting(diffusion=GaussianDiffusion(cosine(T))), r"another noise schedule than the denoiser: at timestep \d+"),
    ],
    ids=["channels", "size", "classes", "length", "schedule"],
)
def test_a_classifier_of_something_else_is_refused_before_the_first_step(classifier, message):
    steps = []
    with pytest.raises(ValueError, match=message):
        drawn(ClassifierGuidance(classifier=classifier), net=Labelled(), on_step=lambda: steps.append(1))
    assert steps == []
    drawn(ClassifierGuidance(classifier=fitting(), classifier_scale=0.1), net=Labelled())


def test_another_parameterization_or_variance_is_no_other_noise():
    trained = GaussianDiffusion(linear(T), "v", "learned", time_scale=5.0)
    drawn(ClassifierGuidance(classifier=fitting(diffusion=trained)), net=Labelled())


@pytest.mark.parametrize("labels", [None, [0, 1]])
def test_labels_that_are_missing_are_an_error(labels):
    x = normal(SHAPE)
    with pytest.raises(ValueError, match=r"needs a label for each sample, got .*give labels="):
        exact()[2].log_prob_grad(GaussianDiffusion(linear(T)), x, labels)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_that_the_classifier_does_not_know_are_an_error(wrong):
    with pytest.raises(ValueError, match=rf"towards the labels \[{wrong}\]; they must be 0 to 2"):
        drawn(exact()[2], labels=[0, 1, 2, wrong])
    if wrong < 0:
        with pytest.raises(ValueError, match=r"must be 0 and above"):
            drawn(ClassifierGuidance(classifier=lambda x, t: x.flatten(1)), labels=[0, 1, 2, wrong])


def test_a_classifier_that_was_not_loaded_is_an_error():
    for settings in ({}, {"classifier_checkpoint": "some.safetensors"}):
        with pytest.raises(ValueError, match=r"no classifier yet; give classifier=load_classifier"):
            drawn(ClassifierGuidance(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifier_scale": -1.0}, "classifier_scale must be a finite number >= 0"),
        ({"classifier_scale": math.nan}, "classifier_scale must be a finite number >= 0"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number >= 0"),
        ({"rescale": 2.0}, r"rescale must be in \[0, 1\]"),
        ({"interval": (9, 1)}, r"interval must be \(low, high\)"),
        ({"classifier_dtype": "int8"}, "classifier_dtype must be null, bfloat16 or float16, got 'int8'"),
    ],
)
def test_settings_out_of_range_are_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassifierGuidance(**settings)


def test_pixels_and_latents_are_never_mixed():
    autoencoder = nn.Linear(2, 2)
    autoencoder.scale_factor, autoencoder.shift = 0.5, 0.0
    of = {"sha256": weights_hash(autoencoder), "config": {"scale_factor": 0.5}}
    check_same_space("FILE", None, None)
    check_same_space("FILE", of, autoencoder)
    with pytest.raises(ValueError, match="FILE judges pixels, but the denoiser draws the latents"):
        check_same_space("FILE", None, autoencoder)
    with pytest.raises(ValueError, match="FILE judges the latents of an autoencoder, but the denoiser draws pixels"):
        check_same_space("FILE", of, None)
    for other in ({**of, "sha256": "0" * 64}, {**of, "config": {"scale_factor": 0.6}}):
        with pytest.raises(ValueError, match="another autoencoder"):
            check_same_space("FILE", other, autoencoder)
