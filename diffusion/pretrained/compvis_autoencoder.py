"""What are our autoencoders' weights called in CompVis' ldm and Stability's sgm, and which of our settings are theirs?

AutoencoderKL and VQModel (also VQModelInterface). Stable Diffusion checkpoints hold these names under the prefix
`first_stage_model.`, to be stripped first; the training loss's own tensors, `loss.`, are no part of the autoencoder.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.models.autoencoder import AutoencoderKL, SpatialAutoencoder
from diffusion.models.unet import Block
from diffusion.models.vq import VQAutoencoder
from diffusion.pretrained.keymap import CONV2D, SAME, STACKED, Config, KeyMap, Rule, Transform, renamed, without_memory

KL_DEFAULTS = {"ddconfig": Config.REQUIRED, "embed_dim": Config.REQUIRED}
VQ_DEFAULTS = KL_DEFAULTS | {"n_embed": Config.REQUIRED, "remap": None, "colorize_nlabels": None}
CODER_DEFAULTS = {
    "ch": Config.REQUIRED,
    "out_ch": Config.REQUIRED,
    "in_channels": Config.REQUIRED,
    "z_channels": Config.REQUIRED,
    "resolution": Config.REQUIRED,
    "num_res_blocks": Config.REQUIRED,
    "attn_resolutions": Config.REQUIRED,
    "ch_mult": (1, 2, 4, 8),
    "dropout": 0.0,
    "resamp_with_conv": True,
    "double_z": True,
    "give_pre_end": False,
    "tanh_out": False,
    "use_linear_attn": False,
    "attn_type": "vanilla",
}
# Training's own business, or a layout of indices that changes no number.
HARMLESS = {
    *("lossconfig", "loss_config", "ckpt_path", "ckpt_engine", "ignore_keys", "image_key", "input_key", "monitor"),
    *("batch_resize_range", "scheduler_config", "lr_g_factor", "sane_index_shape", "use_ema", "ema_decay"),
    *("optimizer_config", "learn_logvar", "max_batch_size"),
}
VANILLA = ("vanilla", "vanilla-xformers")  # the same numbers
RESIDUAL = {"norm_in": "norm1", "conv_in": "conv1", "norm_out": "norm2", "conv_out": "conv2", "skip": "nin_shortcut"}
STACKED_CONVS = Transform(
    lambda *parts: torch.cat([part.flatten(1) for part in parts]),
    lambda tensor: tuple(part[:, :, None, None] for part in tensor.chunk(3)),
)


def _read(config: Mapping[str, Any]) -> tuple[Config, Config]:
    quantises = "n_embed" in config
    what = "ldm's VQModel" if quantises else "ldm's AutoencoderKL"
    model = Config(what, config, VQ_DEFAULTS if quantises else KL_DEFAULTS | {"colorize_nlabels": None}, HARMLESS)
    model.only(colorize_nlabels=(None,))
    if quantises:
        model.only(remap=(None,))
    coder = Config(f"{what}'s ddconfig", model["ddconfig"], CODER_DEFAULTS, ())
    coder.only(double_z=(not quantises,), give_pre_end=(False,), use_linear_attn=(False,), attn_type=(*VANILLA, "none"))
    return model, coder


def autoencoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings for the keyword arguments of ldm's or sgm's AutoencoderKL or, if they have n_embed, VQModel.

    The scale factor is a setting of their latent diffusion model, not of these; see `load_autoencoder`.
    """
    model, coder = _read(config)
    levels = range(len(coder["ch_mult"]))
    last = len(levels) - 1
    attends = coder["attn_type"] != "none"
    # The encoder halves the resolution level by level, the decoder doubles the lowest one.
    down = [coder["resolution"] // 2**level for level in levels]
    up = [down[last] * 2 ** (last - level) for level in levels]
    return {
        "in_channels": coder["in_channels"],
        "out_channels": coder["out_ch"],
        "latent_channels": model["embed_dim"],
        "inner_channels": coder["z_channels"],
        "channels": coder["ch"],
        "stages": [_stage(coder, level, down[level], attends=attends) for level in levels],
        "up_stages": [_stage(coder, level, up[level], attends=attends) for level in levels],
        "middle": {"depth": 2, "attention": "self" if attends else "none"},
        "dropout": float(coder["dropout"]),
        "tanh": bool(coder["tanh_out"]),
        **({"num_codes": model["n_embed"]} if "n_embed" in config else {}),
    }


def _stage(coder: Config, level: int, resolution: int, *, attends: bool) -> dict[str, Any]:
    return {
        "depth": coder["num_res_blocks"],
        "channel_mult": coder["ch_mult"][level],
        "attention": "self" if attends and resolution in coder["attn_resolutions"] else "none",
        "resample": "conv" if coder["resamp_with_conv"] else "pool",
    }


def _build(config: Mapping[str, Any], **settings: Any) -> SpatialAutoencoder:
    return (VQAutoencoder if "n_embed" in config else AutoencoderKL)(**autoencoder_config(config), **settings)


def autoencoder_table(config: Mapping[str, Any]) -> KeyMap:
    """The two-way table for an autoencoder with these foreign keyword arguments."""
    with without_memory():
        net = _build(config)
    return KeyMap(net, _rules(net))


def load_autoencoder(
    config: Mapping[str, Any], state: Mapping[str, Tensor], *, scale_factor: float | None = None
) -> SpatialAutoencoder:
    """Our autoencoder with ldm's or sgm's weights.

    scale_factor: that of their latent diffusion model: 0.18215 for Stable Diffusion 1 and 2, 0.13025 for XL.
    """
    net = _build(config, scale_factor=scale_factor)
    net.load_state_dict(autoencoder_table(config).to_ours(state))
    return net


def export_autoencoder(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under ldm's and sgm's names."""
    return autoencoder_table(config).to_foreign(state)


def _rules(net: SpatialAutoencoder) -> Iterator[Rule]:
    for half, way, levels in (("encoder", "down", net.encoder.down), ("decoder", "up", net.decoder.up)):
        coder = getattr(net, half)
        for i, level in enumerate(levels):
            name = f"{half}.{way}.{i}"
            for j, block in enumerate(level.blocks):
                yield from _block_rules(block, f"{name}.blocks.{j}", f"{name}.block.{j}", f"{name}.attn.{j}")
            if level.resample is not None:
                yield from renamed(level.resample, f"{name}.resample", f"{name}.{way}sample", {"conv": "conv"})
        for i, block in enumerate(coder.middle):
            foreign = (f"{half}.mid.block_{i + 1}", f"{half}.mid.attn_{i + 1}")
            yield from _block_rules(block, f"{half}.middle.{i}", *foreign)
        for part in ("conv_in", "norm_out", "conv_out"):
            yield from renamed(getattr(coder, part), f"{half}.{part}", f"{half}.{part}", {"": ""})
    yield from latent_rules(net)


def latent_rules(net: SpatialAutoencoder) -> Iterator[Rule]:
    """What is between the halves is called alike by ldm, sgm and diffusers."""
    for ours, foreign in (("to_latent", "quant_conv"), ("from_latent", "post_quant_conv")):
        if getattr(net, ours) is not None:
            yield from renamed(getattr(net, ours), ours, foreign, {"": ""})
    if isinstance(net, VQAutoencoder):
        yield Rule("codebook.weight", ("quantize.embedding.weight",))


def _block_rules(block: Block, ours: str, residual: str, attention: str) -> Iterator[Rule]:
    yield from renamed(block.residual, f"{ours}.residual", residual, RESIDUAL)
    if block.attention is not None:
        yield from attention_rules(block.attention, f"{ours}.attention", attention)


def attention_rules(attention: nn.Module, ours: str, foreign: str) -> Iterator[Rule]:
    """ldm's AttnBlock: 1x1 convolutions for query, key, value and the way out."""
    for leaf, stacked, single in (("weight", STACKED_CONVS, CONV2D), ("bias", STACKED, SAME)):
        yield Rule(f"{ours}.qkv.{leaf}", tuple(f"{foreign}.{part}.{leaf}" for part in "qkv"), stacked)
        yield Rule(f"{ours}.out.{leaf}", (f"{foreign}.proj_out.{leaf}",), single)
        yield Rule(f"{ours}.norm.{leaf}", (f"{foreign}.norm.{leaf}",))
