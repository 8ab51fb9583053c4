"""What are our UNet's weights called in huggingface/diffusers, and which of our settings are its config's?

For UNet2DConditionModel, and for UNet2DModel if the config says `_class_name: UNet2DModel`, as its config.json does.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.models.attention import SpatialTransformer
from diffusion.models.layers import EmbeddingMLP, ResidualBlock, timestep_embedding
from diffusion.models.unet import Block, UNet
from diffusion.pretrained.guided_diffusion import transformer_rules
from diffusion.pretrained.keymap import STACKED, SWAPPED_HALVES, Config, KeyMap, Rule, renamed, without_memory

SHARED_DEFAULTS = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "dropout": 0.0,
    "act_fn": "silu",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "class_embed_type": None,
    "num_class_embeds": None,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "freq_shift": 0,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
CONDITION_DEFAULTS = SHARED_DEFAULTS | {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
}
UNCONDITIONED_DEFAULTS = SHARED_DEFAULTS | {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "block_out_channels": (224, 448, 672, 896),
    "downsample_type": "conv",
    "upsample_type": "conv",
    "attn_norm_num_groups": None,
    "add_attention": True,
}
# Metadata, and settings that only guide callers, change no number we compute, or serve blocks that we refuse anyway.
HARMLESS = (
    "sample_size",
    "upcast_attention",
    "addition_time_embed_dim",
    "addition_embed_type_num_heads",
    "mid_block_only_cross_attention",
    "num_train_timesteps",
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "_use_default_values",
)
# Block type -> (attention, whether the stage is left by a residual block).
BLOCKS = {
    "DownBlock2D": ("none", False),
    "AttnDownBlock2D": ("self", False),
    "CrossAttnDownBlock2D": ("cross", False),
    "ResnetDownsampleBlock2D": ("none", True),
    "UpBlock2D": ("none", False),
    "AttnUpBlock2D": ("self", False),
    "CrossAttnUpBlock2D": ("cross", False),
    "ResnetUpsampleBlock2D": ("none", True),
}
RESIDUAL = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "embedding": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "conv_shortcut",
}


def unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our `UNet` settings for a UNet2DConditionModel's or UNet2DModel's config.

    An addition_embed_type "text_time" (SDXL) becomes a vector embedding; `sdxl_vector` computes the vector. A
    class_embed_type "timestep" takes `timestep_embedding(class_labels, block_out_channels[0])` as its vector.
    """
    read = _read(config)
    channels = read["block_out_channels"][0]
    levels = range(len(read["block_out_channels"]))
    return {
        "in_channels": read["in_channels"],
        "out_channels": read["out_channels"],
        "channels": channels,
        "stages": [_stage(read, level, up=False) for level in levels],
        "up_stages": [_stage(read, level, up=True) for level in levels],
        "middle": _middle(read),
        "context_channels": _context_channels(read) if _is_conditional(read) else None,
        "modulation": "scale_shift" if read["resnet_time_scale_shift"] == "scale_shift" else "shift",
        "dropout": float(read["dropout"]),
        "norm_groups": read["norm_num_groups"],
        "norm_eps": read["norm_eps"],
        "embedding_channels": read["time_embedding_dim"] or 4 * channels,
        "freq_shift": float(read["freq_shift"]),
        "downsample_padding": read["downsample_padding"],
        **_class_settings(read),
    }


def sdxl_vector(text_embeds: Tensor, time_ids: Tensor, addition_time_embed_dim: int = 256) -> Tensor:
    """SDXL's vector (B, D + 6 * addition_time_embed_dim) from the pooled text (B, D) and the sizes and crops (B, 6)."""
    sizes = timestep_embedding(time_ids.flatten(), addition_time_embed_dim).reshape(len(time_ids), -1)
    return torch.cat([text_embeds, sizes.to(text_embeds.dtype)], dim=1)


def _read(config: Mapping[str, Any]) -> Config:
    conditional = config.get("_class_name", "UNet2DConditionModel") != "UNet2DModel"
    what = "diffusers' UNet2DConditionModel" if conditional else "diffusers' UNet2DModel"
    read = Config(what, config, CONDITION_DEFAULTS if conditional else UNCONDITIONED_DEFAULTS, HARMLESS)
    read.only(
        center_input_sample=(False,),
        act_fn=("silu", "swish"),
        time_embedding_type=("positional",),
        resnet_time_scale_shift=("default", "scale_shift"),
        downsample_padding=(0, 1),
    )
    (_check_conditional if conditional else _check_unconditioned)(read)
    _check_lists(read)
    return read


def _check_conditional(read: Config) -> None:
    read.only(
        encoder_hid_dim=(None,),
        encoder_hid_dim_type=(None,),
        num_attention_heads=(None,),
        dual_cross_attention=(False,),
        addition_embed_type=(None, "text_time"),
        resnet_skip_time_act=(False,),
        resnet_out_scale_factor=(1.0, 1),
        time_embedding_act_fn=(None,),
        timestep_post_act=(None,),
        time_cond_proj_dim=(None,),
        conv_in_kernel=(3,),
        conv_out_kernel=(3,),
        attention_type=("default",),
        class_embeddings_concat=(False,),
        cross_attention_norm=(None,),
        mid_block_type=("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        class_embed_type=(None, "timestep", "identity", "projection", "simple_projection"),
    )
    if read["addition_embed_type"] and read["class_embed_type"]:
        raise ValueError("addition_embed_type and class_embed_type together are not supported; only one of them")
    if read["addition_embed_type"] and not read["flip_sin_to_cos"]:
        raise ValueError("addition_embed_type 'text_time' with flip_sin_to_cos=False is not supported; only with True")


def _check_unconditioned(read: Config) -> None:
    read.only(
        downsample_type=("conv", "resnet"),
        upsample_type=("conv", "resnet"),
        mid_block_type=("UNetMidBlock2D", None),
        class_embed_type=(None, "timestep", "identity"),
    )
    groups = read["attn_norm_num_groups"]
    if groups is None and read["resnet_time_scale_shift"] == "default":
        groups = read["norm_num_groups"]
    if read["add_attention"] and groups != read["norm_num_groups"]:
        raise ValueError(
            f"attn_norm_num_groups={read['attn_norm_num_groups']} is not supported; only {read['norm_num_groups']}, "
            "the norm_num_groups (with scale_shift write it out: diffusers' None means no normalisation there)"
        )


def _check_lists(read: Config) -> None:
    levels = len(read["block_out_channels"])
    for name in ("down_block_types", "up_block_types"):
        if len(read[name]) != levels:
            raise ValueError(f"{name} has {len(read[name])} entries, but block_out_channels has {levels}")
        for kind in read[name]:
            if kind.removeprefix("UNetRes") not in BLOCKS:
                raise ValueError(f"{name} with {kind!r} is not supported; only {', '.join(BLOCKS)}")
    if not isinstance(read["norm_num_groups"], int):
        raise ValueError(f"norm_num_groups={read['norm_num_groups']!r} is not supported; only a number")


def _is_conditional(read: Config) -> bool:
    return "cross_attention_dim" in read.values


def _at(value: Any, index: int) -> Any:
    """A setting that is one for all levels or a sequence of them."""
    return value[index] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _stage(read: Config, level: int, *, up: bool) -> dict[str, Any]:
    position = len(read["block_out_channels"]) - 1 - level if up else level
    block = read["up_block_types" if up else "down_block_types"][position].removeprefix("UNetRes")
    attention, residual = BLOCKS[block]
    if not _is_conditional(read) and attention == "self":
        residual = read["upsample_type" if up else "downsample_type"] == "resnet"
    depth = _at(read["layers_per_block"], level)
    stage = {
        "depth": depth,
        "channel_mult": read["block_out_channels"][level] / read["block_out_channels"][0],
        "attention": attention,
        "resample": "residual" if residual else "conv",
        **_heads(read, attention, level, position),
    }
    if attention == "cross":
        stage["transformer_depth"] = _transformer_depth(read, level, position, up=up)
        stage["self_attention"] = not _at(read["only_cross_attention"], level)
    return stage


def _heads(read: Config, attention: str, level: int, position: int) -> dict[str, int]:
    """`attention_head_dim` is the number of heads in transformers, the width of a head elsewhere.

    The latter is not mirrored on the way up (their loop indexes it by `position`), the former is.
    """
    dim, width = read["attention_head_dim"], read["block_out_channels"][level]
    if attention == "cross":
        return {"num_heads": _at(dim, level)}
    if attention == "self":
        dim = _at(dim, position)
        return {"num_heads": 1} if dim is None else {"num_heads": width // dim, "head_channels": dim}
    return {}


def _transformer_depth(read: Config, level: int, position: int, *, up: bool) -> int | list[int]:
    reverse = read["reverse_transformer_layers_per_block"]
    depth = _at(reverse, position) if up and reverse is not None else _at(read["transformer_layers_per_block"], level)
    return list(depth) if isinstance(depth, Sequence) else depth


def _middle(read: Config) -> dict[str, Any]:
    last = len(read["block_out_channels"]) - 1
    kind, attention, depth = read["mid_block_type"], "none", 2
    if kind is None:
        depth = 0
    elif kind == "UNetMidBlock2DCrossAttn":
        attention = "cross"
    elif _is_conditional(read):
        depth = 1
    elif read["add_attention"]:
        attention = "self"
    middle = {
        "depth": depth,
        "channel_mult": read["block_out_channels"][last] / read["block_out_channels"][0],
        "attention": attention,
        "residual_scale": 1 / read["mid_block_scale_factor"],
        **_heads(read, attention, last, last),
    }
    if attention == "cross":
        transformer_depth = _at(read["transformer_layers_per_block"], last)
        middle["transformer_depth"] = _at(transformer_depth, 0)
    return middle


def _context_channels(read: Config) -> int | None:
    widths = {_at(read["cross_attention_dim"], level) for level in range(len(read["block_out_channels"]))}
    if len(widths) != 1:
        raise ValueError(f"cross_attention_dim={read['cross_attention_dim']} is not supported; only one width for all")
    return widths.pop()


def _class_settings(read: Config) -> dict[str, Any]:
    kind, emb = read["class_embed_type"], read["time_embedding_dim"] or 4 * read["block_out_channels"][0]
    settings: dict[str, Any] = {"num_classes": read["num_class_embeds"] if kind is None else None}
    if kind == "timestep":
        settings |= {"vector_channels": read["block_out_channels"][0]}
    elif kind == "identity":
        settings |= {"vector_channels": emb, "vector_embedding": "identity"}
    elif kind is not None or (_is_conditional(read) and read["addition_embed_type"]):
        settings |= {"vector_channels": read["projection_class_embeddings_input_dim"]}
        settings |= {"vector_embedding": "linear" if kind == "simple_projection" else "mlp"}
    return settings


def unet_table(config: Mapping[str, Any]) -> KeyMap:
    """The two-way table for a network with this config."""
    read = _read(config)
    with without_memory():
        net = UNet(**unet_config(config))
    return KeyMap(net, _unet_rules(net, read))


def load_unet(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> UNet:
    """Our network with diffusers' weights."""
    net = UNet(**unet_config(config))
    net.load_state_dict(unet_table(config).to_ours(state))
    return net


def export_unet(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under diffusers' names."""
    return unet_table(config).to_foreign(state)


def _unet_rules(net: UNet, read: Config) -> Iterator[Rule]:
    linear = _is_conditional(read) and read["use_linear_projection"]
    mlp = {"linear_in": "linear_1", "linear_out": "linear_2"}
    # Sines before cosines on their side is a matter of the first layer's columns on ours.
    order = {} if read["flip_sin_to_cos"] else {"linear_in.weight": SWAPPED_HALVES}
    yield from renamed(net.time_embedding, "time_embedding", "time_embedding", mlp, order)
    if net.label_embedding is not None:
        yield Rule("label_embedding.weight", ("class_embedding.weight",))
    if net.vector_embedding is not None:
        foreign = "class_embedding" if read["class_embed_type"] else "add_embedding"
        names = mlp if isinstance(net.vector_embedding, EmbeddingMLP) else {"": ""}
        yield from renamed(net.vector_embedding, "vector_embedding", foreign, names)
    yield from renamed(net.conv_in, "conv_in", "conv_in", {"": ""})
    for i, level in enumerate(net.down):
        yield from level_rules(level, f"down.{i}", f"down_blocks.{i}", "downsamplers.0", linear=linear)
    for i, block in enumerate(net.middle):
        yield from block_rules(block, f"middle.{i}", "mid_block", i, linear=linear)
    for i, level in enumerate(net.up):
        foreign = f"up_blocks.{len(net.up) - 1 - i}"
        yield from level_rules(level, f"up.{i}", foreign, "upsamplers.0", linear=linear)
    yield from renamed(net.norm_out, "norm_out", "conv_norm_out", {"": ""})
    yield from renamed(net.conv_out, "conv_out", "conv_out", {"": ""})


def level_rules(level: nn.Module, ours: str, foreign: str, resample: str, *, linear: bool) -> Iterator[Rule]:
    """One resolution on one way, and the module that leaves it, if any, called `resample`."""
    for i, block in enumerate(level.blocks):
        yield from block_rules(block, f"{ours}.blocks.{i}", foreign, i, linear=linear)
    if level.resample is not None:
        names = RESIDUAL if isinstance(level.resample, ResidualBlock) else {"conv": "conv"}
        yield from renamed(level.resample, f"{ours}.resample", f"{foreign}.{resample}", names)


def block_rules(block: Block, ours: str, foreign: str, number: int, *, linear: bool) -> Iterator[Rule]:
    """A residual block and its attention, if any; `linear` says how transformers project."""
    yield from renamed(block.residual, f"{ours}.residual", f"{foreign}.resnets.{number}", RESIDUAL)
    if block.attention is None:
        return
    ours, foreign = f"{ours}.attention", f"{foreign}.attentions.{number}"
    if isinstance(block.attention, SpatialTransformer):
        yield from transformer_rules(block.attention, ours, foreign, linear_projections=linear)
        return
    for leaf in ("weight", "bias"):
        yield Rule(f"{ours}.norm.{leaf}", (f"{foreign}.group_norm.{leaf}",))
        yield Rule(f"{ours}.qkv.{leaf}", tuple(f"{foreign}.to_{part}.{leaf}" for part in "qkv"), STACKED)
        yield Rule(f"{ours}.out.{leaf}", (f"{foreign}.to_out.0.{leaf}",))
