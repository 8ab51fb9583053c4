"""How is one of our networks described and named for CompVis' ldm and Stability's sgm?

Settings of their constructors, read from our modules and checked by reading them back; the tables are `compvis`'s.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from diffusion.models.attention import SelfAttention, SpatialTransformer
from diffusion.models.autoencoder import AutoencoderKL, SpatialAutoencoder
from diffusion.models.layers import ResidualBlock
from diffusion.models.stages import Block, Level
from diffusion.models.unet import UNet
from diffusion.models.vq import VQAutoencoder
from diffusion.pretrained import compvis, compvis_autoencoder
from diffusion.pretrained.compare import check_same
from diffusion.pretrained.keymap import KeyMap

WHAT = "CompVis' code"


def unet_kwargs(net: nn.Module, *, linear_projections: bool | None = None) -> dict[str, Any]:
    """The keyword arguments of ldm's UNetModel that make this network; ValueError where there are none.

    linear_projections: how its transformers project, which changes names and shapes and no number; None decides as
    Stable Diffusion does: linear where heads have one width, by convolution where each level has as many heads.
    """
    if type(net) is not UNet:
        raise ValueError(f"{WHAT} has no {type(net).__name__}; only a UNet can be written in its names")
    attentions = [m for m in net.modules() if isinstance(m, SelfAttention | SpatialTransformer)]
    transformers = any(isinstance(m, SpatialTransformer) for m in attentions)
    heads = _heads(attentions)
    linear = "num_head_channels" in heads if linear_projections is None else linear_projections
    levels = range(len(net.down))
    kwargs = {
        "image_size": 32,
        "in_channels": net.in_channels,
        "out_channels": net.out_channels,
        "model_channels": net.channels,
        "num_res_blocks": [len(level.blocks) for level in net.down],
        "attention_resolutions": [2**i for i in levels if any(b.attention is not None for b in net.up[i].blocks)],
        "channel_mult": [_exact(level_width(net.down[i]) / net.channels) for i in levels],
        "legacy": False,
        "use_scale_shift_norm": first_residual(net).scale_shift,
        "resblock_updown": any(isinstance(level.resample, ResidualBlock) for level in net.down),
        "conv_resample": all(getattr(level.resample, "conv", 0) is not None for level in net.down),
        "dropout": first_residual(net).dropout,
        "use_spatial_transformer": transformers,
        **heads,
        **_classes(net),
    }
    if transformers:
        kwargs |= {
            "context_dim": net.context_channels,
            "transformer_depth": [_depth(level.blocks) for level in net.up],
            "transformer_depth_middle": _depth(net.middle),
            "use_linear_in_transformer": linear,
        }
    check_same(net, UNet, compvis.unet_config(kwargs), WHAT)
    return kwargs


def unet_table(net: nn.Module, *, linear_projections: bool | None = None) -> KeyMap:
    """The two-way table of names for a UNet of ours; on the meta device is enough."""
    return compvis.unet_table(unet_kwargs(net, linear_projections=linear_projections))


def layout(attention: SelfAttention | SpatialTransformer) -> tuple[int, int]:
    """Number and width of an attention's heads."""
    if isinstance(attention, SelfAttention):
        return attention.num_heads, attention.out.in_features // attention.num_heads
    count = attention.blocks[0].self_attention.num_heads if len(attention.blocks) else 1
    return count, attention.proj_in.out_features // count


def _heads(attentions: list[SelfAttention | SpatialTransformer]) -> dict[str, int]:
    """ldm has as many heads everywhere, or heads of one width everywhere; 64 is the width that its kin chose."""
    counts, widths = ({layout(attention)[i] for attention in attentions} for i in (0, 1))
    if not attentions:
        return {"num_heads": 1}
    if len(widths) == 1 and (widths == {64} or len(counts) > 1):
        return {"num_head_channels": widths.pop()}
    if len(counts) == 1:
        return {"num_heads": counts.pop()}
    raise ValueError(
        f"{WHAT} has one number of heads or one width of heads in a whole network, and this one has {sorted(counts)} "
        f"heads of widths {sorted(widths)}"
    )


def first_residual(net: nn.Module) -> ResidualBlock:
    return next(m for m in net.modules() if isinstance(m, ResidualBlock))


def level_width(level: Level) -> int:
    return level.blocks[-1].residual.conv_out.out_channels


def _depth(blocks: Iterable[Block]) -> int:
    """The most transformer blocks in one attention; ldm has one number a level."""
    return max((len(b.attention.blocks) for b in blocks if isinstance(b.attention, SpatialTransformer)), default=1)


def _exact(ratio: float) -> float | int:
    return int(ratio) if ratio == int(ratio) else ratio


def _classes(net: UNet) -> dict[str, Any]:
    if net.vector_embedding is None:
        return {"num_classes": net.num_classes}
    if net.num_classes is not None:
        raise ValueError(f"{WHAT} has no network with both classes and a vector condition, as this one has")
    if isinstance(net.vector_embedding, nn.Linear):
        return {"num_classes": "continuous"}
    return {"num_classes": "sequential", "adm_in_channels": net.vector_channels}


# ---------------------------------------------------------------------------------------------------------------------
# autoencoders


def autoencoder_kwargs(net: nn.Module) -> dict[str, Any]:
    """The keyword arguments of ldm's AutoencoderKL or VQModel that make this one; ValueError where there are none."""
    if not isinstance(net, SpatialAutoencoder):
        raise ValueError(f"{WHAT} has no {type(net).__name__}; only AutoencoderKL and VQAutoencoder have names there")
    encoder, levels = net.encoder, range(len(net.encoder.down))
    resolution = 2 ** (len(levels) + 4)
    attends = [any(b.attention is not None for b in level.blocks) for level in encoder.down]
    width = encoder.conv_in.out_channels
    inner = net.decoder.conv_in.in_channels
    ddconfig = {
        "double_z": net.doubled,
        "z_channels": inner,
        "resolution": resolution,
        "in_channels": net.in_channels,
        "out_ch": net.out_channels,
        "ch": width,
        "ch_mult": [_exact(level_width(level) / width) for level in encoder.down],
        "num_res_blocks": len(encoder.down[0].blocks),
        "attn_resolutions": [resolution // 2**i for i in levels if attends[i]],
        "attn_type": "vanilla" if any(b.attention is not None for b in encoder.middle) else "none",
        "resamp_with_conv": all(getattr(level.resample, "conv", 0) is not None for level in encoder.down),
        "dropout": first_residual(encoder).dropout,
        "tanh_out": bool(getattr(net.decoder, "tanh", False)),
    }
    kwargs = {"ddconfig": ddconfig, "embed_dim": net.latent_channels}
    if isinstance(net, VQAutoencoder):
        kwargs["n_embed"] = len(net.codebook.weight)
    build = VQAutoencoder if isinstance(net, VQAutoencoder) else AutoencoderKL
    check_same(net, build, compvis_autoencoder.autoencoder_config(kwargs), WHAT)
    return kwargs


def autoencoder_table(net: nn.Module) -> KeyMap:
    """The two-way table of names for an autoencoder of ours; on the meta device is enough."""
    return compvis_autoencoder.autoencoder_table(autoencoder_kwargs(net))


# ---------------------------------------------------------------------------------------------------------------------
# the buffers of a schedule, which ldm's files hold


def schedule_buffers(betas: torch.Tensor) -> dict[str, torch.Tensor]:
    """What ldm's DDPM registers of a schedule (T,), in its names, float32 computed in float64."""
    betas = betas.double()
    alphas = 1 - betas
    cumprod = torch.cumprod(alphas, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), cumprod[:-1]])
    variance = betas * (1 - previous) / (1 - cumprod)
    buffers = {
        "betas": betas,
        "alphas_cumprod": cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - cumprod).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - cumprod).log(),
        "sqrt_recip_alphas_cumprod": (1 / cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / cumprod - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - cumprod),
        "posterior_mean_coef2": (1 - previous) * alphas.sqrt() / (1 - cumprod),
    }
    return {name: values.float() for name, values in buffers.items()}
