"""The UNet and its blocks against outputs and gradients of the original codebases, in whatever configs they carry."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case, assert_bijection, assert_close, key_configs, key_list, key_lists, load, names
from torch import nn

from diffusion.model_file import tensors_hash
from diffusion.models.attention import Attention, FeedForward, SelfAttention, SpatialTransformer
from diffusion.models.layers import Downsample, ResidualBlock, Upsample, timestep_embedding
from diffusion.models.unet import UNet
from diffusion.pretrained import compvis, diffusers, export_compvis, export_diffusers, guided_diffusion
from diffusion.pretrained.compare import differences
from diffusion.pretrained.keymap import CONV2D, STACKED, KeyMap, Rule, Transform, renamed

OUTPUT, GRADIENT = 5e-5, 3e-4  # of the tensor's scale; a second run of the peers themselves differs by up to 1.5e-5
UNETS = names("adm/unet_*") + names("adm/superres*") + names("unet/*") + names("two_layouts/unet_*")
LDM_TWINS = [name.removesuffix(".ldm") for name in names("two_layouts/unet_*.ldm")]
# Of the same networks as diffusers saved them: config, and the SHA-256 of names, types, shapes and values.
DIFFUSERS_TWINS = json.loads((Path(__file__).parent / "golden/two_layouts/diffusers_hashes.json").read_text())


def layout(case: Case):
    """The module of foreign names that a case speaks, and its keyword arguments."""
    if case.name.startswith("adm/"):
        return guided_diffusion, {"super_resolution": "superres" in case.name}
    return (diffusers, {}) if case.name.endswith(".diffusers") else (compvis, {})


def arguments(case: Case) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """x, t and the condition in our vocabulary."""
    given = case.group("in")
    x = given["x"] if "x" in given else given["sample"]
    t = given["timesteps"] if "timesteps" in given else given["timestep"]
    condition = {}
    for name, ours in (("context", "context"), ("encoder_hidden_states", "context"), ("low_res", "concat")):
        if name in given:
            condition[ours] = given[name]
    if "y" in given or "class_labels" in given:
        y = given["y"] if "y" in given else given["class_labels"]
        condition["vector" if y.is_floating_point() else "label"] = y
    if "text_embeds" in given:
        width = case.config["addition_time_embed_dim"]
        condition["vector"] = diffusers.sdxl_vector(given["text_embeds"], given["time_ids"], width)
    return x, t, condition


@pytest.mark.parametrize("name", UNETS)
def test_unet_outputs_and_gradients_are_the_peers(name):
    case = load(name)
    module, facts = layout(case)
    net = module.load_unet(case.config, case.group("weights"), **facts).eval()
    x, t, condition = arguments(case)
    for tensor in (x, *condition.values()):
        tensor.requires_grad_(tensor.is_floating_point())

    outputs = case.group("out")
    for key, timesteps in (("y", t), ("y_float_t", t), ("y_int_t", case.group("in").get("timesteps_int"))):
        if key in outputs:
            with torch.no_grad():
                assert_close(net(x, timesteps, **condition), outputs[key], OUTPUT, f"{key} without gradients")
            y = net(x, timesteps, **condition)
            assert_close(y, outputs[key], OUTPUT, key)
            if key != "y_int_t":
                net.zero_grad()
                y.square().sum().backward()
    for key, gradient in outputs.items():
        if key.startswith("grad_x"):
            assert_close(x.grad, gradient, GRADIENT, key)
        elif key.startswith("grad_context"):
            assert_close(condition["context"].grad, gradient, GRADIENT, key)


@pytest.mark.parametrize("name", UNETS)
def test_unet_table_is_a_bijection_bit_for_bit(name):
    case = load(name)
    module, facts = layout(case)
    weights = case.group("weights")
    assert_bijection(module.unet_table(case.config, **facts), weights)


@pytest.mark.parametrize("name", LDM_TWINS)
def test_a_network_in_ldms_names_becomes_what_diffusers_saved_of_the_same_one(name):
    case = load(f"{name}.ldm")
    stored = {key.removeprefix("weights."): t for key, t in case.tensors.items() if key.startswith("weights.")}
    ours = compvis.unet_table(case.config).to_ours(stored)
    twin = DIFFUSERS_TWINS[name.rsplit("/", 1)[1]]
    theirs = diffusers.unet_table(twin["config"]).to_foreign(ours)
    assert (
        tensors_hash((k, theirs[k].dtype, tuple(theirs[k].shape), [theirs[k]]) for k in sorted(theirs))
        == twin["sha256"]
    )


@pytest.mark.parametrize("name", LDM_TWINS)
def test_a_network_is_described_to_either_code_as_its_own_constructor_was_called(name):
    case, twin = load(f"{name}.ldm"), DIFFUSERS_TWINS[name.rsplit("/", 1)[1]]["config"]
    with torch.device("meta"):
        net = UNet(**compvis.unet_config(case.config))
    linear = twin.get("use_linear_projection", False)
    sized = twin.get("addition_embed_type") == "text_time"
    table = export_compvis.unet_table(net, linear_projections=linear)
    assert table.foreign_shapes == compvis.unet_table(case.config).foreign_shapes
    config = export_diffusers.unet_json(net, linear_projections=linear, sized_text=sized)
    assert diffusers.unet_table(config).foreign_shapes == diffusers.unet_table(twin).foreign_shapes
    assert differences(UNet(**diffusers.unet_config(config)), UNet(**diffusers.unet_config(twin))) == []


def test_timestep_embedding_is_guided_diffusions():
    case = load("adm/timestep_embedding")
    for key, theirs in case.group("out").items():
        dim, _, period = key.removeprefix("emb_dim").partition("_maxperiod")
        ours = timestep_embedding(case["in.t"], int(dim), max_period=float(period or 10_000))
        assert_close(ours, theirs, 1e-6, key)


# --- single blocks ---------------------------------------------------------------------------------------------------

QKV_CONVS = Transform(
    lambda *parts: torch.cat([part.flatten(1) for part in parts]),
    lambda tensor: tuple(part[:, :, None, None] for part in tensor.chunk(3)),
)
VAE_RESNET = {"norm_in": "norm1", "conv_in": "conv1", "norm_out": "norm2", "conv_out": "conv2", "skip": "nin_shortcut"}


def residual(kwargs: dict):
    block = ResidualBlock(
        kwargs["channels"],
        kwargs.get("out_channels") or kwargs["channels"],
        embedding_channels=kwargs["emb_channels"],
        modulation="scale_shift" if kwargs.get("use_scale_shift_norm") else "shift",
        resample="up" if kwargs.get("up") else "down" if kwargs.get("down") else None,
        skip_kernel=3 if kwargs.get("use_conv") else 1,
    )
    return block, renamed(block, "", "", guided_diffusion.RESIDUAL)


def self_attention(kwargs: dict):
    width = kwargs.get("num_head_channels", -1)
    heads = {"head_channels": width} if width != -1 else {"num_heads": kwargs.get("num_heads", 1)}
    block = SelfAttention(kwargs["channels"], **heads)
    order = kwargs.get("use_new_attention_order", False)
    return block, guided_diffusion.attention_rules(block, "", "", new_attention_order=order)


def spatial_transformer(kwargs: dict):
    context = kwargs["context_dim"]
    block = SpatialTransformer(
        kwargs["in_channels"],
        context[0] if isinstance(context, list) else context,
        depth=kwargs["depth"],
        num_heads=kwargs["n_heads"],
        head_channels=kwargs["d_head"],
        self_attention=not kwargs.get("disable_self_attn", False),
    )
    linear = kwargs.get("use_linear", False)
    return block, guided_diffusion.transformer_rules(block, "", "", linear_projections=linear)


def cross_attention(kwargs: dict):
    heads = {"num_heads": kwargs["heads"], "head_channels": kwargs["dim_head"]}
    block = Attention(kwargs["query_dim"], kwargs.get("context_dim"), **heads)
    return block, renamed(block, "", "", guided_diffusion.ATTENTION)


def feed_forward(kwargs: dict):
    glu = kwargs.get("glu", False)
    block = FeedForward(kwargs["dim"], "geglu" if glu else "gelu", mult=kwargs.get("mult", 4))
    return block, renamed(block, "", "", {"expand": "net.0.proj" if glu else "net.0.0", "contract": "net.2"})


def vae_resnet(kwargs: dict):
    block = ResidualBlock(kwargs["in_channels"], kwargs["out_channels"], norm_eps=1e-6)
    return block, renamed(block, "", "", VAE_RESNET)


def vae_attention(kwargs: dict):
    block = SelfAttention(kwargs["in_channels"], norm_eps=1e-6)
    rules = [Rule("qkv.weight", ("q.weight", "k.weight", "v.weight"), QKV_CONVS)]
    rules += [Rule("qkv.bias", ("q.bias", "k.bias", "v.bias"), STACKED)]
    rules += [Rule("out.weight", ("proj_out.weight",), CONV2D), Rule("out.bias", ("proj_out.bias",))]
    return block, rules + [Rule(f"norm.{leaf}", (f"norm.{leaf}",)) for leaf in ("weight", "bias")]


def vae_downsample(kwargs: dict):
    block = Downsample(kwargs["in_channels"], padding=0)
    return block, renamed(block, "", "", {"conv": "conv"})


def vae_upsample(kwargs: dict):
    block = Upsample(kwargs["in_channels"])
    return block, renamed(block, "", "", {"conv": "conv"})


BLOCKS = {
    "ResBlock": residual,
    "AttentionBlock": self_attention,
    "attention.SpatialTransformer": spatial_transformer,
    "attention.CrossAttention": cross_attention,
    "attention.FeedForward": feed_forward,
    "diffusionmodules.model.ResnetBlock": vae_resnet,
    "diffusionmodules.model.AttnBlock": vae_attention,
    "diffusionmodules.model.Downsample": vae_downsample,
    "diffusionmodules.model.Upsample": vae_upsample,
}
CASES = [
    (name, block)
    for name in names("blocks/*")
    for block, spec in load(name).config["blocks"].items()
    if spec["class"] in BLOCKS
]


@pytest.mark.parametrize(("name", "block"), CASES)
def test_block_outputs_are_the_peers_also_where_the_epsilon_matters(name, block):
    case = load(name)
    spec = case.config["blocks"][block]
    module, rules = BLOCKS[spec["class"]](spec["kwargs"])
    module.load_state_dict(KeyMap(module, rules).to_ours(case.group(f"weights.{block}")))
    given = case.group(f"in.{block}")
    x = given.pop("x")
    if "emb" in given:
        given["embedding"] = F.silu(given.pop("emb"))
    for key, scale in (("y", 1.0), ("y_small", 0.002)):
        expected = case[f"out.{block}.{key}"]
        for memory in (torch.contiguous_format, torch.channels_last) if x.ndim == 4 else (torch.contiguous_format,):
            y = module.eval()((x * scale).contiguous(memory_format=memory), **given)
            assert_close(y, expected, OUTPUT, f"{block} {key} {memory}")
            with torch.no_grad():
                y = module((x * scale).contiguous(memory_format=memory), **given)
            assert_close(y, expected, OUTPUT, f"{block} {key} {memory} without gradients")


def test_the_epsilon_probe_can_tell_a_wrong_epsilon():
    case = load("blocks/adm")
    module, rules = residual(case.config["blocks"]["resblock_ssn"]["kwargs"])
    module.load_state_dict(KeyMap(module, rules).to_ours(case.group("weights.resblock_ssn")))
    for norm in module.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.eps = 1e-6
    x, emb = case["in.resblock_ssn.x"], F.silu(case["in.resblock_ssn.emb"])
    with pytest.raises(AssertionError, match="off by"):
        assert_close(module(x * 0.002, emb), case["out.resblock_ssn.y_small"], OUTPUT)


# --- full-size names -------------------------------------------------------------------------------------------------


def full_size_names(name: str, prefix: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the UNet in one list of keys; a delta list changes a few of its base's."""
    base, _, delta = name.partition("+")
    shapes = {}
    for part in filter(None, (base, delta)):
        shapes |= key_list(part)
    return {k.removeprefix(prefix): tuple(v[:-1]) for k, v in shapes.items() if k.startswith(prefix)}


def unet_lists() -> list[str]:
    stems = key_lists()
    adm = [stem for stem in stems if stem.startswith("adm_") and "classifier" not in stem]
    base = {True: "sd15_diffusers", False: "sd15_checkpoint"}
    deltas = [f"{base['_diffusers_' in stem]}+{stem}" for stem in stems if stem.endswith("_delta")]
    return adm + [stem for stem in stems if stem.endswith(("_checkpoint", "_diffusers"))] + deltas


@pytest.mark.parametrize("name", unet_lists())
def test_full_size_names_and_shapes_match_one_to_one(name):
    configs = key_configs()
    base, _, delta = name.partition("+")
    if name.startswith("adm_"):
        prefix, table = "", guided_diffusion.unet_table(guided_diffusion.kwargs_from_flags(configs[name]))
    elif base.endswith("_diffusers"):
        config = configs[delta] if delta else configs[base]["unet"]
        prefix, table = "unet/", diffusers.unet_table(config)
    else:
        config = configs[base] | (configs[delta] if delta else {})
        prefix, table = "model.diffusion_model.", compvis.unet_table(config)
    expected = full_size_names(name, prefix)
    assert table.foreign_shapes == expected

    theirs = {key: torch.empty(shape, device="meta") for key, shape in expected.items()}
    back = table.to_foreign(table.to_ours(theirs))
    assert {key: tuple(tensor.shape) for key, tensor in back.items()} == expected
