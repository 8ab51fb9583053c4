"""Do the autoencoder's losses agree with closed forms, with LDM's own code, and with torch's?"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion.autoencoder_losses import (
    AdversarialLoss,
    AutoencoderLoss,
    adaptive_weight,
    annealed,
    codebook_usage,
    discriminator_loss,
    generator_loss,
    kl_to_standard_normal,
)
from diffusion.models.discriminator import ActNorm, PatchDiscriminator


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# KL and likelihood


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4)])
def test_kl_is_torchs_summed_over_an_image(shape):
    mean, logvar = draw(*shape), draw(*shape, seed=1)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    got = kl_to_standard_normal(mean, logvar)
    assert got.shape == (3, 4)
    torch.testing.assert_close(got, kl.flatten(2).sum(2) if len(shape) == 4 else kl)


def test_the_sum_over_channels_is_ldms_kl():
    mean, logvar = draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1)
    ldm = 0.5 * torch.sum(mean**2 + logvar.exp() - 1.0 - logvar, dim=[1, 2, 3])
    torch.testing.assert_close(kl_to_standard_normal(mean, logvar).sum(1), ldm)


def test_the_gaussian_loss_with_kl_weight_one_is_minus_the_evidence_bound():
    x, reconstruction, mean, logvar = draw(2, 1, 4, 4), draw(2, 1, 4, 4, seed=1), draw(2, 3, seed=2), draw(2, 3, seed=3)
    loss = AutoencoderLoss("gaussian", kl_weight=1.0, log_variance=-0.7)
    likelihood = torch.distributions.Normal(reconstruction, math.exp(-0.35)).log_prob(x).sum((1, 2, 3))
    bound = (likelihood - kl_to_standard_normal(mean, logvar).sum(1)).mean()
    torch.testing.assert_close(loss(x, reconstruction, mean=mean, logvar=logvar).loss, -bound)


def test_the_best_log_variance_is_that_of_the_errors():
    x, reconstruction = draw(8, 1, 6, 6), 3 * draw(8, 1, 6, 6, seed=1)
    loss = AutoencoderLoss("gaussian", learn_log_variance=True)
    with torch.no_grad():
        loss.log_variance.copy_((x - reconstruction).square().mean().log())
    loss(x, reconstruction).loss.backward()
    assert abs(float(loss.log_variance.grad)) < 1e-4


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("log_variance", [0.0, 0.5])
def test_the_loss_is_that_of_ldms_code(kind, log_variance):
    """LDM's LPIPSWithDiscriminator, its first pass: perceptual distance added to every value, sums over a batch."""
    x, reconstruction, mean, logvar = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1), draw(2, 4, 2, 2), draw(2, 4, 2, 2)
    distance = torch.tensor([0.3, 0.8])
    loss = AutoencoderLoss(
        kind, kl_weight=1e-3, perceptual=lambda a, b: distance, perceptual_weight=0.7, log_variance=log_variance
    )
    error = (x - reconstruction).abs() if kind == "l1" else (x - reconstruction).square()
    error = error + 0.7 * distance[:, None, None, None]
    nll = torch.sum(error / math.exp(log_variance) + log_variance) / len(x)
    kl = torch.sum(0.5 * torch.sum(mean**2 + logvar.exp() - 1.0 - logvar, dim=[1, 2, 3])) / len(x)
    terms = loss(x, reconstruction, mean=mean, logvar=logvar)
    torch.testing.assert_close(terms.nll, nll)
    torch.testing.assert_close(terms.loss, nll + 1e-3 * kl)
    torch.testing.assert_close(terms.kl.sum(), kl)


def test_vqgans_loss_is_a_mean_plus_the_codebooks():
    x, reconstruction, codebook = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1), torch.tensor(0.6)
    terms = AutoencoderLoss("l1", reduction="mean", codebook_weight=0.5)(x, reconstruction, codebook=codebook)
    torch.testing.assert_close(terms.loss, (x - reconstruction).abs().mean() + 0.3)
    assert terms.kl is None and terms.codebook == codebook


def test_the_kls_weight_rises_to_its_full_value():
    loss = AutoencoderLoss(kl_weight=2.0, kl_warmup_steps=4)
    assert [loss.kl_weight_at(step) for step in (0, 1, 3, 4, 100)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert annealed(2.0, 0, 0) == 2.0


def test_losses_are_float32_whatever_the_network_answers():
    x = draw(2, 1, 4, 4)
    terms = AutoencoderLoss()(x, x.half(), mean=draw(2, 3).half(), logvar=draw(2, 3).half())
    assert terms.loss.dtype == terms.kl.dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [{"kind": "l3"}, {"reduction": "max"}, {"kl_weight": -1.0}, {"kl_warmup_steps": -1}, {"codebook_weight": math.nan}],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=rf"loss\.{next(iter(settings))} must be"):
        AutoencoderLoss(**settings)


# ---------------------------------------------------------------------------------------------------------------------
# the discriminator's part


def test_hinge_and_vanilla_losses_are_tamings():
    real, fake = draw(4, 1, 3, 3), draw(4, 1, 3, 3, seed=1)
    hinge = 0.5 * (torch.mean(F.relu(1.0 - real)) + torch.mean(F.relu(1.0 + fake)))
    vanilla = 0.5 * (torch.mean(F.softplus(-real)) + torch.mean(F.softplus(fake)))
    torch.testing.assert_close(discriminator_loss("hinge", real, fake), hinge)
    torch.testing.assert_close(discriminator_loss("vanilla", real, fake), vanilla)
    torch.testing.assert_close(generator_loss(fake), -fake.mean())


def test_the_vanilla_loss_is_half_the_cross_entropy():
    real, fake = draw(4, 1, 3, 3), draw(4, 1, 3, 3, seed=1)
    logits, truth = torch.cat([real, fake]), torch.cat([torch.ones_like(real), torch.zeros_like(fake)])
    entropy = F.binary_cross_entropy_with_logits(logits, truth)
    torch.testing.assert_close(discriminator_loss("vanilla", real, fake), entropy)


def test_the_adaptive_weight_makes_both_gradients_equally_long():
    layer = nn.Linear(3, 2)
    y = layer(draw(4, 3))
    nll, gan = y.square().sum(), 1e-2 * y.sin().sum()
    weight = adaptive_weight(nll, gan, layer.weight)
    lengths = [torch.autograd.grad(term, layer.weight, retain_graph=True)[0].norm() for term in (nll, weight * gan)]
    torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-2, atol=0)  # LDM's 1e-4 in the denominator
    assert not weight.requires_grad


def test_the_adaptive_weight_is_bounded_where_the_discriminator_does_not_care():
    layer = nn.Linear(3, 2)
    y = layer(draw(4, 3))
    assert adaptive_weight(1e3 * y.square().sum(), 0 * y.sum(), layer.weight) == 1e4


@pytest.mark.parametrize("settings", [{"kind": "wasserstein"}, {"weight": -1.0}, {"weight": math.inf}, {"start": -1}])
def test_an_adversarial_loss_that_makes_no_sense_is_refused(settings):
    with pytest.raises(ValueError, match=r"loss\.adversarial"):
        AdversarialLoss(**settings)


def test_the_adversary_begins_at_its_step():
    gan = AdversarialLoss(start=3)
    assert [gan.begun(step) for step in (0, 2, 3, 4)] == [False, False, True, True]


@pytest.mark.parametrize(("counts", "usage", "perplexity"), [([4, 0, 0, 0], 0.25, 1.0), ([3, 3, 3, 3], 1.0, 4.0)])
def test_usage_and_perplexity_of_a_codebook(counts, usage, perplexity):
    got = codebook_usage(torch.tensor(counts))
    assert [float(value) for value in got] == pytest.approx([usage, perplexity])


def test_a_codebook_that_was_never_asked_has_no_usage():
    assert float(codebook_usage(torch.zeros(4, dtype=torch.long))[0]) == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# the discriminator


def receptive_field(net, size):
    """Count the input pixels of a row that the logit in the middle depends on."""
    x = draw(1, 3, size, size).double().requires_grad_()
    logits = net.double()(x)
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    return int((x.grad[0].abs().sum((0, 1)) > 0).sum())


@pytest.mark.parametrize(("num_layers", "patch"), [(3, 70), (2, 34), (1, 16)])
def test_a_logit_sees_the_patch_that_pix2pix_says(num_layers, patch):
    net = PatchDiscriminator(3, channels=4, num_layers=num_layers, norm="none")
    assert receptive_field(net, 160) == patch


def test_the_discriminator_is_tamings():
    """Layer by layer what taming's NLayerDiscriminator builds from (input_nc=3, ndf=64, n_layers=3)."""
    layers = PatchDiscriminator(3).layers
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0], c.bias is not None) for c in convolutions] == [
        (3, 64, 2, True), (64, 128, 2, False), (128, 256, 2, False), (256, 512, 1, False), (512, 1, 1, True)
    ]  # fmt: skip
    assert sum(p.numel() for p in layers.parameters()) == 2_765_633
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["Conv2d", "LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3, "Conv2d"]


def test_the_discriminators_weights_begin_small():
    torch.manual_seed(0)
    net = PatchDiscriminator(3)
    for layer in net.requires_grad_(False).layers:
        if isinstance(layer, nn.Conv2d):
            assert float(layer.weight.std()) == pytest.approx(0.02, rel=0.1)
        if isinstance(layer, nn.BatchNorm2d):
            assert float(layer.weight.mean()) == pytest.approx(1.0, abs=0.01)
            assert float(layer.weight.std()) == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_smallest_image_leaves_one_logit_and_a_smaller_one_is_refused(num_layers):
    net = PatchDiscriminator(1, channels=2, num_layers=num_layers, norm="none")
    assert net(draw(1, 1, net.min_size, net.min_size)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=rf"at least {net.min_size} pixels a side, these have"):
        net(draw(1, 1, net.min_size, net.min_size - 1))


@pytest.mark.parametrize("settings", [{"norm": "layer"}, {"num_layers": 0}, {"channels": 0}])
def test_a_discriminator_that_cannot_be_is_refused(settings):
    with pytest.raises(ValueError, match="discriminator"):
        PatchDiscriminator(3, **settings)


def test_act_norm_fits_its_first_batch_and_only_that():
    norm = ActNorm(3)
    first = 4 * draw(8, 3, 5, 5) + 2
    y = norm(first)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm(first + 1).mean((0, 2, 3)), norm.scale.flatten())


def test_act_norm_takes_what_a_checkpoint_brings_instead_of_its_first_batch():
    norm, other = ActNorm(3), ActNorm(3)
    norm(draw(8, 3, 5, 5))
    other.load_state_dict(norm.state_dict())
    other(100 * draw(8, 3, 5, 5, seed=1))
    torch.testing.assert_close(other.shift, norm.shift)
