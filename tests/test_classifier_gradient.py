"""The gradient that a classifier guides by: its precision, what it leaves behind, and which classifiers are refused."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from golden_cases import assert_close, load, names
from guidance_cases import LABELS, SHAPE, Labelled, Small, T, Unconditional, drawn, exact
from oracles import normal
from torch import Tensor, nn

from diffusion.checkpoint import weights_hash
from diffusion.generate import check_same_space
from diffusion.guidance import ClassifierGuidance, LogProbGrad, NonFiniteGradient
from diffusion.pretrained.guided_diffusion_classifier import load_classifier as foreign_classifier
from diffusion.process import GaussianDiffusion
from diffusion.schedule import cosine, linear


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
