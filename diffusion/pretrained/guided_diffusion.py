"""What are our UNet's weights called in openai/guided-diffusion, and which of our settings are its constructor's?

`unet_config` reads the keyword arguments of its UNetModel or SuperResModel, `unet_table` maps the names both ways.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from diffusion.models.attention import SpatialTransformer
from diffusion.models.layers import EmbeddingMLP, ResidualBlock
from diffusion.models.stages import CHANNEL_MULTS, Block, StageNetwork
from diffusion.models.unet import SuperResolutionUNet, UNet
from diffusion.pretrained.keymap import CONV1D, CONV2D, Config, KeyMap, Rule, heads_outermost, renamed, without_memory

DEFAULTS = {
    "in_channels": Config.REQUIRED,
    "model_channels": Config.REQUIRED,
    "out_channels": Config.REQUIRED,
    "num_res_blocks": Config.REQUIRED,
    "attention_resolutions": Config.REQUIRED,
    "dropout": 0,
    "channel_mult": (1, 2, 4, 8),
    "conv_resample": True,
    "dims": 2,
    "num_classes": None,
    "use_checkpoint": False,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
HARMLESS = ("image_size", "use_fp16")
FLAG_DEFAULTS = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "learn_sigma": False,
    "class_cond": False,
    "use_scale_shift_norm": True,
}

RESIDUAL = {
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
}
SELF_ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
TRANSFORMER = {"norm": "norm", "proj_in": "proj_in", "proj_out": "proj_out"}
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
TRANSFORMER_BLOCK = {
    "norm_self": "norm1",
    "norm_cross": "norm2",
    "norm_feedforward": "norm3",
    "feedforward.expand": "ff.net.0.proj",
    "feedforward.contract": "ff.net.2",
    **{f"self_attention.{ours}": f"attn1.{theirs}" for ours, theirs in ATTENTION.items()},
    **{f"cross_attention.{ours}": f"attn2.{theirs}" for ours, theirs in ATTENTION.items()},
}


def unet_config(config: Mapping[str, Any], *, super_resolution: bool = False) -> dict[str, Any]:
    """Our `UNet` settings for the keyword arguments of guided-diffusion's UNetModel (or SuperResModel)."""
    read = Config("guided-diffusion's UNetModel", config, DEFAULTS, HARMLESS)
    read.only(dims=(2,))
    upsample_heads = read["num_heads"] if read["num_heads_upsample"] == -1 else read["num_heads_upsample"]
    return {
        "in_channels": read["in_channels"] * (2 if super_resolution else 1),
        "out_channels": read["out_channels"],
        "up_stages": stages(read, upsample_heads),
        "num_classes": read["num_classes"],
        **way_down_config(read),
    }


def way_down_config(read: Config) -> dict[str, Any]:
    """Our settings that networks with and without a way up share."""
    down = stages(read, read["num_heads"])
    return {
        "channels": read["model_channels"],
        "stages": down,
        "middle": {**down[-1], "depth": 2, "attention": "self"},
        "modulation": "scale_shift" if read["use_scale_shift_norm"] else "shift",
        "resample": "residual" if read["resblock_updown"] else "conv" if read["conv_resample"] else "pool",
        "dropout": float(read["dropout"]),
        "checkpointing": bool(read["use_checkpoint"]),
    }


def stages(read: Config, num_heads: int) -> list[dict[str, Any]]:
    """The resolutions of either way, with this many heads unless their width is fixed."""
    width = read["num_head_channels"]
    heads = {"num_heads": num_heads} if width == -1 else {"head_channels": width}
    return [
        {
            "depth": read["num_res_blocks"],
            "channel_mult": int(mult * read["model_channels"]) / read["model_channels"],
            "attention": "self" if 2**level in read["attention_resolutions"] else "none",
            **heads,
        }
        for level, mult in enumerate(read["channel_mult"])
    ]


def kwargs_from_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """UNetModel's keyword arguments from the command-line flags that guided-diffusion's README gives with a checkpoint.

    Flags of the diffusion process are ignored. Sizes without a `channel_mult` of their own take guided-diffusion's.
    """
    read = {**FLAG_DEFAULTS, **flags}
    size, mult = read["image_size"], read["channel_mult"]
    given = [float(m) if "." in m else int(m) for m in mult.split(",")] if mult else default_mults(size)
    names = set(DEFAULTS) - {"attention_resolutions", "channel_mult", "in_channels", "num_classes"}
    return {name: read[name] for name in names & set(read)} | {
        "in_channels": 3,
        "model_channels": read["num_channels"],
        "out_channels": 6 if read["learn_sigma"] else 3,
        "channel_mult": tuple(given),
        "attention_resolutions": downsamplings(size, read["attention_resolutions"]),
        "num_classes": 1000 if read["class_cond"] else None,
    }


def default_mults(image_size: int) -> tuple[float, ...]:
    """The widths that guided-diffusion gives networks for images of this size."""
    if image_size not in CHANNEL_MULTS:
        known = ", ".join(map(str, CHANNEL_MULTS))
        raise ValueError(f"image_size={image_size} has no default channel_mult; only {known}")
    return CHANNEL_MULTS[image_size]


def downsamplings(image_size: int, resolutions: str) -> tuple[int, ...]:
    """Factors from a flag's resolutions such as "32,16,8"."""
    return tuple(image_size // int(resolution) for resolution in resolutions.split(","))


def unet_table(config: Mapping[str, Any], *, super_resolution: bool = False) -> KeyMap:
    """The two-way table for a network with these foreign keyword arguments."""
    with without_memory():
        net = UNet(**unet_config(config, super_resolution=super_resolution))
    return KeyMap(net, unet_rules(net, new_attention_order=config.get("use_new_attention_order", False)))


def load_unet(config: Mapping[str, Any], state: Mapping[str, Tensor], *, super_resolution: bool = False) -> UNet:
    """Our network with guided-diffusion's weights; a `SuperResolutionUNet` for its SuperResModel."""
    net = (SuperResolutionUNet if super_resolution else UNet)(**unet_config(config, super_resolution=super_resolution))
    net.load_state_dict(unet_table(config, super_resolution=super_resolution).to_ours(state))
    return net


def export_unet(
    config: Mapping[str, Any], state: Mapping[str, Tensor], *, super_resolution: bool = False
) -> dict[str, Tensor]:
    """Our state dict under guided-diffusion's names."""
    return unet_table(config, super_resolution=super_resolution).to_foreign(state)


def unet_rules(
    net: UNet, *, new_attention_order: bool = False, linear_projections: bool = False, vector_prefix: str = "label_emb"
) -> Iterator[Rule]:
    """Rules for the names that guided-diffusion, ldm and sgm share: blocks numbered as the forward pass meets them."""
    facts = {"new_attention_order": new_attention_order, "linear_projections": linear_projections}
    yield from way_down_rules(net, **facts)
    if net.label_embedding is not None:
        yield Rule("label_embedding.weight", ("label_emb.weight",))
    if net.vector_embedding is not None:
        names = {"linear_in": "0", "linear_out": "2"} if isinstance(net.vector_embedding, EmbeddingMLP) else {"": ""}
        yield from renamed(net.vector_embedding, "vector_embedding", vector_prefix, names)
    number = 0
    for i, level in reversed(list(enumerate(net.up))):
        for j, block in enumerate(level.blocks):
            yield from block_rules(block, f"up.{i}.blocks.{j}", f"output_blocks.{number}", **facts)
            number += 1
        if level.resample is not None:
            position = 1 if block.attention is None else 2
            foreign = f"output_blocks.{number - 1}.{position}"
            yield from resample_rules(level.resample, f"up.{i}.resample", foreign, "conv")
    yield from renamed(net.norm_out, "norm_out", "out.0", {"": ""})
    yield from renamed(net.conv_out, "conv_out", "out.2", {"": ""})


def way_down_rules(net: StageNetwork, **facts: bool) -> Iterator[Rule]:
    """Rules for the time embedding, the first convolution, the levels of the way down and the middle."""
    yield from renamed(net.time_embedding, "time_embedding", "time_embed", {"linear_in": "0", "linear_out": "2"})
    yield from renamed(net.conv_in, "conv_in", "input_blocks.0.0", {"": ""})
    number = 1
    for i, level in enumerate(net.down):
        for j, block in enumerate(level.blocks):
            yield from block_rules(block, f"down.{i}.blocks.{j}", f"input_blocks.{number}", **facts)
            number += 1
        if level.resample is not None:
            yield from resample_rules(level.resample, f"down.{i}.resample", f"input_blocks.{number}.0", "op")
            number += 1
    yield from middle_rules(net.middle, **facts)


def block_rules(block: Block, ours: str, foreign: str, **facts: bool) -> Iterator[Rule]:
    """A residual block at position 0 of the foreign sequence and its attention, if any, at 1."""
    yield from renamed(block.residual, f"{ours}.residual", f"{foreign}.0", RESIDUAL)
    if block.attention is not None:
        yield from attention_rules(block.attention, f"{ours}.attention", f"{foreign}.1", **facts)


def middle_rules(middle: nn.ModuleList, **facts: bool) -> Iterator[Rule]:
    """The middle's flat foreign sequence: residual blocks at even positions, attentions (or nothing) at odd ones."""
    for i, block in enumerate(middle):
        yield from renamed(block.residual, f"middle.{i}.residual", f"middle_block.{2 * i}", RESIDUAL)
        if block.attention is not None:
            foreign = f"middle_block.{2 * i + 1}"
            yield from attention_rules(block.attention, f"middle.{i}.attention", foreign, **facts)


def resample_rules(resample: nn.Module, ours: str, foreign: str, conv: str) -> Iterator[Rule]:
    """A BigGAN block, a convolution called `conv`, or nothing."""
    names = RESIDUAL if isinstance(resample, ResidualBlock) else {"conv": conv}
    yield from renamed(resample, ours, foreign, names)


def attention_rules(
    attention: nn.Module,
    ours: str,
    foreign: str,
    *,
    new_attention_order: bool = False,
    linear_projections: bool = False,
) -> Iterator[Rule]:
    """Either kind of attention; the two facts are those that only the foreign weights know."""
    if isinstance(attention, SpatialTransformer):
        yield from transformer_rules(attention, ours, foreign, linear_projections=linear_projections)
        return
    transforms = {"qkv.weight": CONV1D, "out.weight": CONV1D}
    if not new_attention_order:
        transforms["qkv.weight"] = heads_outermost(attention.num_heads, CONV1D)
        transforms["qkv.bias"] = heads_outermost(attention.num_heads)
    yield from renamed(attention, ours, foreign, SELF_ATTENTION, transforms)


def transformer_rules(
    transformer: SpatialTransformer, ours: str, foreign: str, *, linear_projections: bool
) -> Iterator[Rule]:
    """ldm, sgm and diffusers name a spatial transformer alike; its projections are linear or 1x1 convolutions."""
    projection = {} if linear_projections else {"proj_in.weight": CONV2D, "proj_out.weight": CONV2D}
    blocks = {"": ""}
    for i, _ in enumerate(transformer.blocks):
        blocks |= {f"blocks.{i}.{part}": f"transformer_blocks.{i}.{name}" for part, name in TRANSFORMER_BLOCK.items()}
    yield from renamed(transformer, ours, foreign, TRANSFORMER | blocks, projection)
