"""How is one of our networks described and named for huggingface/diffusers?

The config.json of its UNets and autoencoders, read from our modules and checked by reading them back; the tables are
those of `diffusers` and `diffusers_autoencoder`.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from diffusion.models.attention import SelfAttention, SpatialTransformer
from diffusion.models.autoencoder import AutoencoderKL, SpatialAutoencoder
from diffusion.models.layers import EmbeddingMLP, ResidualBlock
from diffusion.models.stages import Block, Level
from diffusion.models.unet import UNet
from diffusion.models.vq import VQAutoencoder
from diffusion.pretrained import diffusers, diffusers_autoencoder
from diffusion.pretrained.compare import check_same
from diffusion.pretrained.export_compvis import first_residual, layout, level_width
from diffusion.pretrained.keymap import KeyMap

WHAT = "diffusers"


def unet_json(
    net: nn.Module, *, linear_projections: bool | None = None, sample_size: int | None = None, sized_text: bool = False
) -> dict[str, Any]:
    """The config.json of the UNet2DConditionModel or UNet2DModel that is this network; ValueError where none is.

    linear_projections: see `export_compvis.unet_kwargs`. sample_size: of the images or latents it was trained on.
    sized_text: whether its vector is XL's, of pooled text and sizes.
    """
    if type(net) is not UNet:
        raise ValueError(f"{WHAT} has no {type(net).__name__}; only a UNet can be written in its names")
    transforms = any(isinstance(m, SpatialTransformer) for m in net.modules())
    conditional = transforms or net.context_channels is not None or len(net.middle) == 1
    config = {
        "_class_name": "UNet2DConditionModel" if conditional else "UNet2DModel",
        "sample_size": sample_size,
        "in_channels": net.in_channels,
        "out_channels": net.out_channels,
        "block_out_channels": [level_width(level) for level in net.down],
        "layers_per_block": _one([len(level.blocks) for level in net.down]),
        "norm_num_groups": net.norm_out.num_groups,
        "norm_eps": net.norm_out.eps,
        "resnet_time_scale_shift": "scale_shift" if first_residual(net).scale_shift else "default",
        "freq_shift": _whole(net.freq_shift),
        "flip_sin_to_cos": True,
        "dropout": first_residual(net).dropout,
        "downsample_padding": next((m.padding for m in _resamples(net.down) if hasattr(m, "padding")), 1),
        **_embeddings(net, sized_text=sized_text),
        **(_conditional(net, linear_projections) if conditional else _unconditional(net)),
    }
    check_same(net, UNet, diffusers.unet_config(config), WHAT)
    return config


def unet_table(net: nn.Module, config: dict[str, Any]) -> KeyMap:
    """The two-way table of names for a UNet of ours with its `unet_json`; on the meta device is enough."""
    return diffusers.unet_table(config)


DOWN = {"self": "AttnDownBlock2D", "cross": "CrossAttnDownBlock2D"}
UP = {"self": "AttnUpBlock2D", "cross": "CrossAttnUpBlock2D"}


def _block_types(net: UNet) -> dict[str, Any]:
    """The kinds of blocks of either way, and what is said of the middle whatever the class."""
    plain = {False: ("DownBlock2D", "UpBlock2D"), True: ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
    down = [DOWN.get(_kind(level), plain[_leaves_by_residual(level)][0]) for level in net.down]
    up = [UP.get(_kind(level), plain[_leaves_by_residual(level)][1]) for level in net.up]
    scale = next((block.residual.residual_scale for block in net.middle), 1.0)
    return {"down_block_types": down, "up_block_types": up[::-1], "mid_block_scale_factor": _whole(1 / scale)}


def _conditional(net: UNet, linear: bool | None) -> dict[str, Any]:
    transformers = [m for m in net.modules() if isinstance(m, SpatialTransformer)]
    crossed = any(isinstance(block.attention, SpatialTransformer) for block in net.middle)
    down, up = ([_depths(level.blocks) for level in levels] for levels in (net.down, net.up[::-1]))
    if crossed and _attention(net.down[-1]) is None:
        down[-1] = _depths(net.middle)
    config = {
        **_block_types(net),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if crossed else "UNetMidBlock2D" if len(net.middle) else None,
        "attention_head_dim": _one(_head_numbers(net)),
        "cross_attention_dim": net.context_channels or 1280,
        "transformer_layers_per_block": _one(down),
        "only_cross_attention": _one([_only_cross(level) for level in net.down]),
        "use_linear_projection": {layout(m)[1] for m in transformers} == {64} if linear is None else linear,
    }
    crosses = [_kind(level) == "cross" for level in net.up[::-1]]
    if any(one != other and crossing for one, other, crossing in zip(up, down[::-1], crosses, strict=True)):
        config["reverse_transformer_layers_per_block"] = up
    return config


def _head_numbers(net: UNet) -> list[int]:
    """`attention_head_dim`: the heads of transformers by level, the width of a head elsewhere by position."""
    numbers: dict[int, int] = {}
    last = len(net.down) - 1
    for level, blocks in enumerate(net.up):
        if (attention := _attention(blocks)) is not None:
            crossed = isinstance(attention, SpatialTransformer)
            numbers.setdefault(level if crossed else last - level, layout(attention)[0 if crossed else 1])
    for level, blocks in enumerate(net.down):
        if (attention := _attention(blocks)) is not None:
            numbers[level] = layout(attention)[0 if isinstance(attention, SpatialTransformer) else 1]
    if (middle := next((b.attention for b in net.middle if b.attention is not None), None)) is not None:
        numbers.setdefault(last, layout(middle)[0 if isinstance(middle, SpatialTransformer) else 1])
    widths = {layout(m)[1] for m in net.modules() if isinstance(m, SpatialTransformer)}
    if len(set(numbers.values())) > 1 and len(widths) == 1:  # as published: what a level without attention would have
        width = widths.pop()
        return [numbers.get(i, max(1, level_width(level) // width)) for i, level in enumerate(net.down)]
    return [numbers.get(i, next(iter(numbers.values()), 8)) for i in range(len(net.down))]


def _unconditional(net: UNet) -> dict[str, Any]:
    widths = {layout(m)[1] for m in net.modules() if isinstance(m, SelfAttention)}
    left = {
        way: any(_leaves_by_residual(level) for level in levels if _kind(level) == "self")
        for way, levels in (("downsample_type", net.down), ("upsample_type", net.up))
    }
    return {
        **_block_types(net),
        "mid_block_type": "UNetMidBlock2D" if len(net.middle) else None,
        "add_attention": any(block.attention is not None for block in net.middle),
        "attn_norm_num_groups": net.norm_out.num_groups,
        "attention_head_dim": widths.pop() if len(widths) == 1 else None if widths else 8,
        **{way: "resnet" if residual else "conv" for way, residual in left.items()},
    }


def _embeddings(net: UNet, *, sized_text: bool) -> dict[str, Any]:
    config: dict[str, Any] = {"num_class_embeds": net.num_classes}
    if (width := net.time_embedding.linear_out.out_features) != 4 * level_width(net.down[0]):
        config["time_embedding_dim"] = width
    vector = net.vector_embedding
    if vector is None:
        return config
    if isinstance(vector, EmbeddingMLP) and sized_text:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    else:
        kinds = {EmbeddingMLP: "projection", nn.Linear: "simple_projection", nn.Identity: "identity"}
        config["class_embed_type"] = kinds[type(vector)]
    return config | {"projection_class_embeddings_input_dim": net.vector_channels}


def _attention(level: Level) -> nn.Module | None:
    return next((block.attention for block in level.blocks if block.attention is not None), None)


def _kind(level: Level) -> str:
    attention = _attention(level)
    return "none" if attention is None else "cross" if isinstance(attention, SpatialTransformer) else "self"


def _leaves_by_residual(level: Level) -> bool:
    return isinstance(level.resample, ResidualBlock)


def _depths(blocks: Sequence[Block]) -> int | list[int]:
    """Transformer blocks of each attention, as one number where all are equal."""
    found = [len(block.attention.blocks) for block in blocks if isinstance(block.attention, SpatialTransformer)]
    return found if len(set(found)) > 1 else found[0] if found else 1


def _only_cross(level: Level) -> bool:
    attention = _attention(level)
    return isinstance(attention, SpatialTransformer) and not attention.blocks[0].attends_itself


def _resamples(levels: Sequence[Level]) -> list[nn.Module]:
    return [level.resample for level in levels if level.resample is not None]


def _one(values: list[Any]) -> Any:
    """A single value where all are equal, as diffusers' configs are written."""
    return values[0] if all(value == values[0] for value in values) else values


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# autoencoders


def autoencoder_json(net: nn.Module, *, sample_size: int | None = None) -> dict[str, Any]:
    """The config.json of the AutoencoderKL or VQModel that is this one; ValueError where none is."""
    if not isinstance(net, SpatialAutoencoder):
        raise ValueError(f"{WHAT} has no {type(net).__name__}; only AutoencoderKL and VQAutoencoder have names there")
    down = [_attention(level) is not None for level in net.encoder.down]
    up = [_attention(level) is not None for level in net.decoder.up]
    config = {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "in_channels": net.in_channels,
        "out_channels": net.out_channels,
        "latent_channels": net.latent_channels,
        "block_out_channels": [level_width(level) for level in net.encoder.down],
        "layers_per_block": len(net.encoder.down[0].blocks),
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in up[::-1]],
        "norm_num_groups": net.encoder.norm_out.num_groups,
        "mid_block_add_attention": any(block.attention is not None for block in net.encoder.middle),
        **_latents(net),
    }
    build = AutoencoderKL
    if isinstance(net, VQAutoencoder):
        build = VQAutoencoder
        inner = net.decoder.conv_in.in_channels
        config |= {"_class_name": "VQModel", "num_vq_embeddings": net.num_codes, "latent_channels": inner}
        config["vq_embed_dim"] = net.latent_channels
    else:
        projections = {"use_quant_conv": net.to_latent, "use_post_quant_conv": net.from_latent}
        config |= {name: module is not None for name, module in projections.items()}
    check_same(net, build, diffusers_autoencoder.autoencoder_config(config), WHAT)
    return config


def _latents(net: SpatialAutoencoder) -> dict[str, Any]:
    """Our scale_factor and shift as their settings."""
    scale, shift = 1.0 if net.scale_factor is None else net.scale_factor, net.shift
    if isinstance(net, VQAutoencoder):
        if isinstance(scale, Sequence) or shift:
            raise ValueError(f"{WHAT}' VQModel has one scale for all latent channels and no shift; this one has more")
        return {"scaling_factor": scale}
    if not isinstance(scale, Sequence) and not isinstance(shift, Sequence):
        return {"scaling_factor": scale, **({"shift_factor": shift} if shift else {})}
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * net.latent_channels
    shifts = list(shift) if isinstance(shift, Sequence) else [shift] * net.latent_channels
    return {"scaling_factor": 1.0, "latents_mean": shifts, "latents_std": [1 / s for s in scales]}


def autoencoder_table(net: nn.Module, config: dict[str, Any]) -> KeyMap:
    """The two-way table of names for an autoencoder of ours with its `autoencoder_json`."""
    return diffusers_autoencoder.autoencoder_table(config)
