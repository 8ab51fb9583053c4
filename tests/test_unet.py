"""The UNet itself: conditions, switches, errors. Parity with the original codebases is test_golden_networks."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from diffusion.models.attention import Attention, FeedForward, SelfAttention, SpatialTransformer, attend
from diffusion.models.layers import ResidualBlock, TokenLinear, timestep_embedding
from diffusion.models.unet import Stage, SuperResolutionUNet, UNet

STAGES = ({"depth": 1}, {"depth": 1, "channel_mult": 2, "attention": "self"})


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(**changes) -> UNet:
    """A small network whose zero-initialised layers are randomised, so that every branch shows in the output."""
    settings = {"in_channels": 3, "out_channels": 3, "channels": 16, "stages": STAGES, "norm_groups": 4, **changes}
    net = UNet(**settings)
    randomise(net)
    return net.eval()


def randomise(net: torch.nn.Module) -> None:
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def inputs(size=(8, 8), batch=2, channels=3):
    return torch.randn(batch, channels, *size), torch.tensor([3, 700][:batch])


def test_a_new_network_predicts_zero():
    x, t = inputs()
    net = UNet(3, 6, channels=16, stages=STAGES, norm_groups=4)
    assert net(x, t).shape == (2, 6, 8, 8)
    assert not net(x, t).any()


def test_stages_from_json_and_from_dataclasses_build_the_same_network():
    specs = (Stage(depth=2, attention=("self", "none")), Stage(depth=1, channel_mult=1.5, attention="cross"))
    plain = json.loads(json.dumps([vars(spec) for spec in specs]))
    common = {"channels": 16, "norm_groups": 4, "context_channels": 8}
    one, other = (UNet(stages=stages, **common).state_dict() for stages in (specs, plain))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}


def test_time_matters_and_fractional_timesteps_lie_between():
    net = tiny()
    x, _ = inputs()
    y = [net(x, torch.full((2,), t)) for t in (10, 10.5, 11)]
    assert not torch.allclose(y[0], y[2], atol=1e-4)
    assert (y[1] - y[0]).norm() < (y[2] - y[0]).norm()
    assert torch.equal(net(x, torch.tensor(10)), y[0])


def test_null_label_adds_nothing_and_labels_differ():
    net = tiny(num_classes=5)
    x, t = inputs()
    unconditional = tiny()
    unconditional.load_state_dict({k: v for k, v in net.state_dict().items() if "label" not in k})
    null = net(x, t, label=torch.tensor([-1, -1]))
    torch.testing.assert_close(null, unconditional(x, t))
    mixed = net(x, t, label=torch.tensor([-1, 3]))
    torch.testing.assert_close(mixed[0], null[0])
    assert not torch.allclose(mixed[1], null[1])


def test_null_label_sends_no_gradient_to_the_table():
    net = tiny(num_classes=5)
    x, t = inputs()
    net(x, t, label=torch.tensor([-1, 2])).square().sum().backward()
    touched = net.label_embedding.weight.grad.abs().sum(1) > 0
    assert touched.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("label", [[0, 5], [-2, 1]])
def test_labels_out_of_range_name_the_range(label):
    x, t = inputs()
    with pytest.raises(ValueError, match=r"classes 0 to 4 and -1 for no class"):
        tiny(num_classes=5)(x, t, label=torch.tensor(label))


def test_conditions_that_do_not_fit_the_network_are_errors():
    x, t = inputs()
    with pytest.raises(ValueError, match="built without num_classes"):
        tiny()(x, t, label=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="knows 5 classes; pass label"):
        tiny(num_classes=5)(x, t)
    with pytest.raises(ValueError, match="built without vector_channels"):
        tiny()(x, t, vector=torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"needs vector=\(B, 4\)"):
        tiny(vector_channels=4)(x, t)
    with pytest.raises(ValueError, match="takes 3 input channels, x and concat together, but got 5"):
        tiny()(x, t, concat=torch.randn(2, 2, 8, 8))


def test_label_vector_context_and_concat_work_together():
    stages = ({"depth": 1, "attention": "cross"}, {"depth": 1, "attention": "self"})
    net = tiny(in_channels=5, stages=stages, num_classes=3, vector_channels=6, context_channels=8, num_heads=2)
    x, t = inputs()
    condition = {
        "label": torch.tensor([0, 2]),
        "vector": torch.randn(2, 6),
        "context": torch.randn(2, 7, 8),
        "concat": torch.randn(2, 2, 8, 8),
    }
    base = net(x, t, **condition)
    for name, value in condition.items():
        changed = condition | {name: (value + 1) % 3 if name == "label" else value + 1}
        assert not torch.allclose(net(x, t, **changed), base, atol=1e-5), name
    torch.testing.assert_close(net(torch.cat([x, condition.pop("concat")], 1), t, **condition), base)


@pytest.mark.parametrize("kind", ["mlp", "linear", "identity"])
def test_vector_embeddings_of_each_kind(kind):
    width = 64 if kind == "identity" else 6
    net = tiny(vector_channels=width, vector_embedding=kind)
    x, t = inputs()
    assert not torch.allclose(net(x, t, vector=torch.randn(2, width)), net(x, t, vector=torch.zeros(2, width)))


def test_masked_context_tokens_do_not_matter():
    net = tiny(stages=({"depth": 1, "attention": "cross"},), context_channels=8)
    x, t = inputs()
    context, keep = torch.randn(2, 5, 8), torch.tensor([[True] * 3 + [False] * 2] * 2)
    other = context.clone()
    other[:, 3:] = 100.0
    torch.testing.assert_close(net(x, t, context=context, context_mask=keep), net(x, t, context=context[:, :3]))
    torch.testing.assert_close(
        net(x, t, context=other, context_mask=keep), net(x, t, context=context, context_mask=keep)
    )


@pytest.mark.parametrize("resample", ["conv", "pool", "residual"])
@pytest.mark.parametrize("modulation", ["scale_shift", "shift"])
def test_non_square_images_of_every_valid_size(resample, modulation):
    net = tiny(resample=resample, modulation=modulation)
    assert net.size_factor == 2
    for size in ((2, 2), (6, 10), (16, 4)):
        x, t = inputs(size)
        assert net(x, t).shape == x.shape


@pytest.mark.parametrize(
    ("size", "message"),
    [((9, 8), "H=9 is not a multiple of 2.*8 or 10"), ((8, 1), "W=1 is not a multiple of 2.*work: 2")],
)
def test_sizes_that_the_network_does_not_divide_name_the_nearest(size, message):
    x, t = inputs(size)
    with pytest.raises(ValueError, match=message):
        tiny()(x, t)


def test_any_size_can_be_allowed_where_convolutions_halve():
    net = tiny(resample="conv", stages=[{"depth": 1}] * 3)
    whole = inputs((8, 12))
    before = net(*whole)
    net.allow_any_size()
    assert net.size_factor == 1 and torch.equal(net(*whole), before)
    for size in ((9, 8), (5, 7), (1, 3), (10, 6)):
        x, t = inputs(size)
        assert net(x, t).shape == x.shape


@pytest.mark.parametrize("settings", [{"resample": "pool"}, {"resample": "residual"}, {"downsample_padding": 0}])
def test_other_ways_of_halving_take_whole_multiples_only(settings):
    net = tiny(**settings)
    net.allow_any_size()
    with pytest.raises(ValueError, match="H=9 is not a multiple of 2"):
        net(*inputs((9, 8)))


def test_odd_sizes_are_rounded_as_diffusers_rounds_them():
    from diffusers import UNet2DConditionModel

    from diffusion.pretrained.diffusers import load_unet

    plain = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    blocks = {
        "down_block_types": (*plain[0], "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", *plain[1]),
    }
    settings = {"block_out_channels": (32, 32, 64), "layers_per_block": 1, **blocks}
    peer = UNet2DConditionModel(**settings, cross_attention_dim=8, attention_head_dim=2).eval()
    net = load_unet(dict(peer.config), peer.state_dict()).eval()
    net.allow_any_size()
    for size in ((9, 8), (5, 11), (8, 8)):
        x, t = inputs(size, channels=4)
        context = torch.randn(2, 3, 8)
        with torch.no_grad():
            torch.testing.assert_close(net(x, t, context=context), peer(x, t, context).sample, atol=1e-5, rtol=1e-5)


def test_dropout_acts_only_in_training():
    net = tiny(dropout=0.5)
    x, t = inputs()
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


@pytest.mark.parametrize("resample", ["conv", "residual"])
def test_checkpointing_changes_no_gradient_even_with_dropout(resample):
    stages = ({"depth": 1, "attention": "self"}, {"depth": 1, "attention": "cross"})
    net = tiny(stages=stages, context_channels=8, dropout=0.3, resample=resample).train()
    x, t = inputs()
    context = torch.randn(2, 4, 8)
    gradients = []
    for net.checkpointing in (False, True):
        torch.manual_seed(1)
        net.zero_grad()
        net(x, t, context=context).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_checkpointing_stores_less():
    def stored(checkpointing: bool) -> int:
        net = tiny(checkpointing=checkpointing).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda s: sizes.append(s.numel()) or s, lambda s: s):
            net(*inputs((16, 16)))
        return sum(sizes)

    assert stored(True) < stored(False) / 2


def test_rescaled_residual_is_the_sum_over_root_two():
    one, other = (ResidualBlock(8, 8, norm_groups=2, residual_scale=scale) for scale in (1.0, math.sqrt(0.5)))
    randomise(one)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(other(x), one(x) / math.sqrt(2))
    a, b = (SelfAttention(8, norm_groups=2, residual_scale=scale) for scale in (1.0, math.sqrt(0.5)))
    randomise(a)
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(b(x), a(x) / math.sqrt(2))


def test_residual_block_is_its_formula():
    block = ResidualBlock(8, 16, embedding_channels=4, norm_groups=2)
    randomise(block)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    scale, shift = block.embedding(emb)[:, :, None, None].chunk(2, dim=1)
    h = block.conv_in(F.silu(block.norm_in(x)))
    h = block.conv_out(F.silu(block.norm_out(h) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, emb), block.skip(x) + h)


def test_attention_is_softmax_attention():
    attention = Attention(12, 5, num_heads=3, head_channels=2)
    x, context = torch.randn(2, 7, 12), torch.randn(2, 4, 5)
    heads = [
        layer.reshape(2, -1, 3, 2) for layer in (attention.query(x), attention.key(context), attention.value(context))
    ]
    weights = torch.einsum("bqhd,bkhd->bhqk", heads[0], heads[1]).div(math.sqrt(2)).softmax(-1)
    expected = attention.out(torch.einsum("bhqk,bkhd->bqhd", weights, heads[2]).flatten(2))
    torch.testing.assert_close(attention(x, context), expected)


def test_without_context_cross_attention_looks_at_the_image():
    attention = Attention(8, None, num_heads=2, head_channels=4)
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(attention(x), attention(x, x))


def test_head_count_and_head_width_give_the_same_layout():
    by_count = SelfAttention(16, num_heads=4, norm_groups=4)
    by_width = SelfAttention(16, head_channels=4, norm_groups=4)
    assert by_count.num_heads == by_width.num_heads == 4
    assert SelfAttention(16, norm_groups=4).num_heads == 1
    narrow = SpatialTransformer(16, None, num_heads=3, norm_groups=4)
    assert narrow.proj_in.out_features == 15
    assert SpatialTransformer(16, None, num_heads=2, head_channels=4, norm_groups=4).proj_in.out_features == 8


@pytest.mark.parametrize("heads", [{"num_heads": 3}, {"head_channels": 5}, {"num_heads": 0}, {"head_channels": 17}])
def test_heads_that_do_not_divide_the_channels_are_errors(heads):
    with pytest.raises(ValueError, match="16 channels"):
        SelfAttention(16, norm_groups=4, **heads)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": ()}, "stages is empty"),
        ({"stages": ({"dept": 1},)}, r"unknown stage settings \['dept'\]"),
        ({"stages": ({"attention": "both"},)}, "attention='both' is unknown"),
        ({"stages": ({"depth": 2, "attention": ("self",)},)}, "takes one value, or 2 or 3"),
        ({"modulation": "film"}, "modulation='film' is unknown"),
        ({"resample": "fir"}, "resample='fir' is unknown"),
        ({"norm_groups": 5}, "cannot be split into 5 normalisation groups"),
        ({"up_stages": ({"depth": 2}, {"depth": 1})}, "up_stages must have the depths"),
        ({"vector_channels": 3, "vector_embedding": "identity"}, "needs vector_channels=64"),
    ],
)
def test_settings_that_make_no_network_say_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_attention_can_be_set_block_by_block_and_differ_on_the_way_up():
    down = [{"depth": 2, "attention": ["self", "none"]}]
    up = [{"depth": 2, "attention": ["none", "none", "self"]}]
    net = tiny(stages=down, up_stages=up, middle={"depth": 1})
    assert [block.attention is not None for block in net.down[0].blocks] == [True, False]
    assert [block.attention is not None for block in net.up[0].blocks] == [False, False, True]
    assert [block.attention is not None for block in net.middle] == [False]
    x, t = inputs()
    assert net(x, t).shape == x.shape
    assert tiny(middle={"depth": 0})(x, t).shape == x.shape


def test_super_resolution_enlarges_its_low_resolution_image():
    net = SuperResolutionUNet(6, 3, channels=16, stages=STAGES, norm_groups=4)
    randomise(net)
    x, t = inputs()
    small = torch.randn(2, 3, 4, 4)
    large = F.interpolate(small, (8, 8), mode="bilinear")
    plain = tiny(in_channels=6)
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x, t, concat=small), plain(x, t, concat=large))


def test_timestep_embedding_with_frequency_shift_reaches_the_period():
    t = torch.tensor([0.0, 1.0, 250.5])
    table = timestep_embedding(t, 8, freq_shift=1.0)
    frequencies = 10_000 ** -(torch.arange(4) / 3)
    angles = t[:, None] * frequencies
    torch.testing.assert_close(table, torch.cat([angles.cos(), angles.sin()], 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [(2, 160), (1, 48), (3, 7)])
def test_token_linear_is_a_linear_layer(tokens, monkeypatch):
    monkeypatch.setattr(TokenLinear, "worthwhile", 0)
    layer = TokenLinear(24, 40)
    x = torch.randn(*tokens, 24, requires_grad=True)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    parameters = (x, layer.weight, layer.bias)
    for ours, theirs in zip(
        torch.autograd.grad(layer(x).square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_memory_format_of_input_and_weights_changes_no_output():
    net, (x, t) = tiny(), inputs()
    assert net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    y = net(x, t)
    torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last), t), y)
    torch.testing.assert_close(net.to(memory_format=torch.contiguous_format)(x, t), y)


def test_the_output_matches_with_and_without_gradients():
    net, (x, t) = tiny(stages=({"depth": 1, "attention": "cross"},), context_channels=8), inputs()
    context = torch.randn(2, 3, 8)
    with torch.no_grad():
        plain = net(x, t, context=context)
    torch.testing.assert_close(plain, net(x, t, context=context))


def test_inputs_are_never_overwritten():
    net, (x, t) = tiny(stages=({"depth": 1, "attention": "cross"},), context_channels=8), inputs()
    context = torch.randn(2, 3, 8)
    copies = x.clone(), context.clone()
    with torch.no_grad():
        net(x, t, context=context)
    assert torch.equal(x, copies[0]) and torch.equal(context, copies[1])


def test_it_builds_and_runs_on_the_meta_device():
    with torch.device("meta"):
        net = UNet(3, 3, channels=16, stages=STAGES, norm_groups=4, num_classes=4)
        x, t, label = torch.empty(2, 3, 8, 8), torch.empty(2), torch.empty(2, dtype=torch.int64)
        assert net(x, t, label=label).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_autocast_come_close(dtype):
    net, (x, t) = tiny(num_classes=4), inputs()
    label = torch.tensor([-1, 2])
    exact = net(x, t, label=label)
    with torch.autocast("cpu", dtype=dtype):
        mixed = net(x, t, label=label)
        mixed.float().square().mean().backward()
    torch.testing.assert_close(mixed.float(), exact, atol=0.05, rtol=0.05)
    half = net.to(dtype)(x.to(dtype), t, label=label)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.slow
def test_compiled_it_predicts_the_same_under_clean_names():
    net, (x, t) = tiny(num_classes=4), inputs()
    names, label = list(net.state_dict()), torch.tensor([-1, 2])
    expected = net(x, t, label=label)
    net.compile(fullgraph=True)
    torch.testing.assert_close(net(x, t, label=label), expected, atol=1e-4, rtol=1e-4)
    assert list(net.state_dict()) == names


def test_bfloat16_attention_by_rows_is_as_exact_as_the_fused_kernel():
    query, key, value = (torch.randn(2, 300, 3 * 16) for _ in range(3))
    exact = attend(query, key, value, 3)
    half = [tensor.bfloat16() for tensor in (query, key, value)]
    fused = attend(*half, 3).float()
    with torch.no_grad():
        by_rows = attend(*half, 3).float()
    assert (by_rows - exact).norm() < 2 * (fused - exact).norm()
    assert not torch.equal(by_rows, fused)


@pytest.mark.parametrize("kind", ["geglu", "gelu"])
def test_feed_forward_in_portions_is_the_whole(kind, monkeypatch):
    monkeypatch.setattr(FeedForward, "portion", 7)
    layer, x = FeedForward(8, kind), torch.randn(2, 10, 8)
    with torch.no_grad():
        portions = layer(x)
    torch.testing.assert_close(portions, layer(x))
