"""The noisy classifier: a UNet's way down to the bit, heads against their formulas, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from diffusion.losses import classifier_loss
from diffusion.models.classifier import POOLS, AttentionPool, AveragePool, Classifier, LevelPool
from diffusion.models.stages import Block, Stage
from diffusion.models.unet import UNet

STAGES = [{"depth": 1, "channel_mult": 1}, {"depth": 2, "channel_mult": 2, "attention": "self"}]
SMALL = {"channels": 8, "norm_groups": 4, "num_heads": 2, "stages": STAGES}
NORM = {"norm_groups": 4, "norm_eps": 1e-5}


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)
    return net.eval()


def small(pool: str = "attention", **changes) -> Classifier:
    settings = {"in_channels": 3, "num_classes": 7, "image_size": 8, "pool": pool, "pool_channels": 16}
    return randomised(Classifier(**{**settings, **SMALL, **changes}))


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(seed))


T = torch.tensor([3, 700])


# ---------------------------------------------------------------------------------------------------------------------
# the way down


@pytest.mark.parametrize("resample", ["conv", "pool", "residual"])
@pytest.mark.parametrize("modulation", ["scale_shift", "shift"])
def test_the_way_down_is_the_unets_name_by_name_and_bit_by_bit(resample, modulation):
    settings = {**SMALL, "resample": resample, "modulation": modulation}
    unet = randomised(UNet(3, 3, **settings))
    classifier = small(**{**settings, "pool": "adaptive"})
    shared = {name: value for name, value in unet.state_dict().items() if name in classifier.state_dict()}
    assert set(classifier.state_dict()) - set(shared) == {n for n in classifier.state_dict() if n.startswith("head.")}
    classifier.load_state_dict(shared, strict=False)
    seen = {}
    for net in (unet, classifier):
        net.middle[-1].register_forward_hook(lambda module, args, out, net=net: seen.update({net: out.clone()}))
        with torch.no_grad():
            net(images(), T)
    assert torch.equal(seen[unet], seen[classifier])


@pytest.mark.parametrize("pool", POOLS)
def test_with_and_without_gradients_and_with_checkpointing_the_numbers_are_the_same(pool):
    net = small(pool)
    x = images().requires_grad_()
    logits = net(x, T)
    logits.square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(net(x, T), logits)
    again = images().requires_grad_()
    net.checkpointing = True
    calls = []
    net.middle[0].residual.register_forward_hook(lambda *args: calls.append(1))
    net.zero_grad()
    net(again, T).square().sum().backward()
    assert len(calls) == 2  # run once more on the way back
    torch.testing.assert_close(again.grad, x.grad)


@pytest.mark.parametrize("pool", POOLS)
def test_the_gradient_of_the_image_is_that_of_finite_differences_though_the_weights_are_frozen(pool):
    net = small(pool).double().requires_grad_(False)
    x = images(1, 3, 8, 8).double().requires_grad_()
    direction = images(1, 3, 8, 8, seed=2).double()

    def log_p(x):
        return net(x, T[:1]).log_softmax(-1)[:, 4].sum()

    (gradient,) = torch.autograd.grad(log_p(x), x)
    step = 1e-5
    with torch.no_grad():
        slope = (log_p(x + step * direction) - log_p(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-8)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("pool", POOLS)
def test_samples_do_not_see_each_other_and_time_is_heard(pool):
    net = small(pool)
    with torch.no_grad():
        both = net(images(), T)
        torch.testing.assert_close(both[1:], net(images()[1:], T[1:]), rtol=1e-4, atol=1e-4)
        assert (net(images(), T) - net(images(), T.flip(0))).abs().min() > 0
        torch.testing.assert_close(net(images(), torch.tensor(3)), net(images(), torch.tensor([3, 3])))
        assert net(images(), torch.tensor([3.5, 700.25])).shape == (2, 7)


@pytest.mark.parametrize("pool", POOLS)
def test_half_precision_stays_half_and_latents_may_have_any_number_of_channels(pool):
    net = small(pool, in_channels=4).bfloat16()
    assert net(images(2, 4, 8, 8).bfloat16(), T).dtype == torch.bfloat16


def test_the_convolutions_are_kept_in_channels_last():
    assert small().conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_fresh_adaptive_head_says_that_all_classes_are_alike():
    net = Classifier(3, 7, image_size=8, pool="adaptive", **SMALL)
    assert torch.equal(net(images(), T), torch.zeros(2, 7))


# ---------------------------------------------------------------------------------------------------------------------
# heads


def test_the_average_pool_is_its_formula():
    head, h = randomised(AveragePool(8, 5, **NORM)), images(2, 8, 4, 4)
    normed = F.group_norm(h, 4, head.norm.weight, head.norm.bias)
    expected = (normed * normed.sigmoid()).mean((2, 3)) @ head.out.weight.T + head.out.bias
    torch.testing.assert_close(head(h), expected)


def test_the_attention_pool_is_the_first_token_of_attention_of_all_to_all():
    head, h = randomised(AttentionPool(8, 5, size=3, num_heads=2, head_channels=None, **NORM)), images(2, 8, 3, 3)
    pixels = F.silu(head.norm(h)).flatten(2).transpose(1, 2)
    tokens = torch.cat([pixels.mean(1, keepdim=True), pixels], dim=1) + head.position
    oracle = nn.MultiheadAttention(8, 2, batch_first=True)
    oracle.in_proj_weight.data, oracle.in_proj_bias.data = head.qkv.weight.data, head.qkv.bias.data
    nn.init.eye_(oracle.out_proj.weight)
    nn.init.zeros_(oracle.out_proj.bias)
    torch.testing.assert_close(head(h), head.out(oracle(tokens, tokens, tokens)[0][:, 0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pool", "normed"), [("spatial", False), ("spatial_v2", True)])
def test_the_level_pools_read_the_means_after_every_part_and_after_the_middle(pool, normed):
    net = small(pool)
    seen = []
    parts = [net.conv_in, *net._way_down(), net.middle[-1]]
    for part in parts:
        part.register_forward_hook(lambda module, args, out: seen.append(out.mean((2, 3))))
    with torch.no_grad():
        logits = net(images(), T)
    assert [part for part in parts if isinstance(part, Block)] == [*net.down[0].blocks, *net.down[1].blocks, parts[-1]]
    hidden = net.head.hidden(torch.cat(seen, dim=1))
    hidden = F.silu(net.head.norm(hidden)) if normed else F.relu(hidden)
    torch.testing.assert_close(logits, net.head.out(hidden))
    assert isinstance(net.head, LevelPool) and net.head.hidden.in_features == 8 + 8 + 8 + 16 + 16 + 16


def test_the_attention_pools_heads_are_the_last_stages():
    stages = [STAGES[0], {**STAGES[1], "head_channels": 4}]
    assert small(stages=stages).head.num_heads == 4
    assert small().head.num_heads == 2
    assert small(stages=[Stage(depth=1)], num_heads=None, head_channels=2).head.num_heads == 4


@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_other_pools_take_other_sizes(pool):
    assert small(pool)(images(2, 3, 12, 6), T).shape == (2, 7)


# ---------------------------------------------------------------------------------------------------------------------
# the loss


@pytest.mark.parametrize("classes", [3, 5, 6, 40])
def test_the_loss_is_the_cross_entropy_and_the_accuracies_are_torchmetrics(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(64, classes, generator=generator)
    label = torch.randint(classes, (64,), generator=generator)
    terms = classifier_loss(logits, label)
    by_hand = logits.exp().sum(1).log() - logits[torch.arange(64), label]
    torch.testing.assert_close(terms.loss, by_hand)
    for values, k in ((terms.top1, 1), (terms.top5, min(5, classes))):
        expected = multiclass_accuracy(logits, label, num_classes=classes, top_k=k, average="micro")
        assert float(values.mean()) == pytest.approx(float(expected))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_network_that_says_nothing_is_never_right(value):
    terms = classifier_loss(torch.full((4, 10), value), torch.tensor([0, 1, 8, 9]))
    assert terms.top1.sum() == terms.top5.sum() == 0


def test_half_precision_logits_have_their_loss_in_single():
    terms = classifier_loss(torch.randn(4, 10).bfloat16(), torch.zeros(4, dtype=torch.long))
    assert terms.loss.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# what it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "max"}, "pool='max' is unknown; choose one of 'adaptive', 'attention', 'spatial', 'spatial_v2'"),
        ({"num_classes": None}, "needs classes, got num_classes=None"),
        ({"num_classes": 0}, "needs classes, got num_classes=0"),
        ({"image_size": 9}, "H=9 is not a multiple of 2"),
        ({"stages": []}, "stages is empty"),
        ({"stages": [{"dept": 1}]}, "unknown stage settings"),
        ({"modulation": "film"}, "modulation='film' is unknown"),
        ({"resample": "max"}, "resample='max' is unknown"),
        ({"norm_groups": 3}, "8 channels cannot be split into 3"),
        ({"num_heads": 3}, "cannot split 16 channels into 3 heads"),
        ({"pool": "spatial_v2", "pool_channels": 10}, "10 channels cannot be split into 4"),
    ],
)
def test_settings_that_make_no_classifier_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 8, 8), "takes images of 3 channels, but got 1"),
        ((2, 3, 8, 9), "W=9 is not a multiple of 2.*the nearest sizes that work: 8 or 10"),
        ((2, 3, 16, 16), "attention pool takes 8x8, but got 16x16"),
        ((2, 3, 4, 8), "attention pool takes 8x8, but got 4x8"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_both_numbers(shape, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(shape), T)
