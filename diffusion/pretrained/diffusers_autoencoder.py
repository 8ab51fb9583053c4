"""What are our autoencoders' weights called in huggingface/diffusers, and which of our settings are its config's?

For AutoencoderKL and, if the config says `_class_name: VQModel` or counts codes, VQModel.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from diffusion.models.autoencoder import AutoencoderKL, SpatialAutoencoder
from diffusion.models.vq import VQAutoencoder
from diffusion.pretrained.compvis_autoencoder import latent_rules
from diffusion.pretrained.diffusers import block_rules, level_rules
from diffusion.pretrained.keymap import Config, KeyMap, Rule, renamed, without_memory

SHARED_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
}
KL_DEFAULTS = SHARED_DEFAULTS | {
    "latent_channels": 4,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
VQ_DEFAULTS = SHARED_DEFAULTS | {
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
    "norm_type": "group",
    "lookup_from_codebook": False,
}
# Metadata, and settings that only guide callers.
HARMLESS = ("sample_size", "force_upcast", "_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")
ATTENTION = {"DownEncoderBlock2D": "none", "AttnDownEncoderBlock2D": "self"}
UP_ATTENTION = {"UpDecoderBlock2D": "none", "AttnUpDecoderBlock2D": "self"}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _quantises(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") == "VQModel" or "num_vq_embeddings" in config


def _read(config: Mapping[str, Any]) -> Config:
    quantises = _quantises(config)
    what = "diffusers' VQModel" if quantises else "diffusers' AutoencoderKL"
    read = Config(what, config, VQ_DEFAULTS if quantises else KL_DEFAULTS, HARMLESS)
    read.only(act_fn=("silu", "swish"))
    if quantises:
        read.only(norm_type=("group",), lookup_from_codebook=(False,))
    levels = len(read["block_out_channels"])
    for name, known in (("down_block_types", ATTENTION), ("up_block_types", UP_ATTENTION)):
        if len(read[name]) != levels:
            raise ValueError(f"{name} has {len(read[name])} entries, but block_out_channels has {levels}")
        if unknown := [kind for kind in read[name] if kind not in known]:
            raise ValueError(f"{name} with {unknown[0]!r} is not supported; only {', '.join(known)}")
    return read


def autoencoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings for an AutoencoderKL's or VQModel's config, its scaling and shift of latents included."""
    read = _read(config)
    quantises = _quantises(config)
    stages = [_stage(read, level, up=False) for level in range(len(read["block_out_channels"]))]
    settings = {
        "in_channels": read["in_channels"],
        "out_channels": read["out_channels"],
        "latent_channels": read["latent_channels"],
        "channels": read["block_out_channels"][0],
        "stages": stages,
        "up_stages": [_stage(read, level, up=True) for level in range(len(stages))],
        "middle": {"depth": 2, "attention": "self" if read["mid_block_add_attention"] else "none"},
        "norm_groups": read["norm_num_groups"],
    }
    if quantises:
        width = read["vq_embed_dim"] or read["latent_channels"]
        codes = {"num_codes": read["num_vq_embeddings"], "scale_factor": read["scaling_factor"]}
        return settings | codes | {"latent_channels": width, "inner_channels": read["latent_channels"]}
    projections = {"encoder_projection": read["use_quant_conv"], "decoder_projection": read["use_post_quant_conv"]}
    return settings | projections | _normalisation(read)


def _stage(read: Config, level: int, *, up: bool) -> dict[str, Any]:
    widths = read["block_out_channels"]
    block = read["up_block_types"][len(widths) - 1 - level] if up else read["down_block_types"][level]
    return {
        "depth": read["layers_per_block"],
        "channel_mult": widths[level] / widths[0],
        "attention": (UP_ATTENTION if up else ATTENTION)[block],
    }


def _normalisation(read: Config) -> dict[str, Any]:
    """Their pipelines compute (z - mean) * scaling_factor / std, or (z - shift_factor) * scaling_factor."""
    mean, std, shift, scale = (read[name] for name in ("latents_mean", "latents_std", "shift_factor", "scaling_factor"))
    if (mean is None) != (std is None) or (mean is not None and shift is not None):
        raise ValueError(
            f"latents_mean={mean!r}, latents_std={std!r}, shift_factor={shift!r} is not supported; only latents_mean "
            "with latents_std, or shift_factor, or none of them"
        )
    if mean is None:
        return {"scale_factor": scale, "shift": 0.0 if shift is None else shift}
    mean, std = (list(value) if isinstance(value, Sequence) else [value] for value in (mean, std))
    return {"scale_factor": [scale / s for s in std], "shift": mean}


def _build(config: Mapping[str, Any]) -> SpatialAutoencoder:
    return (VQAutoencoder if _quantises(config) else AutoencoderKL)(**autoencoder_config(config))


def autoencoder_table(config: Mapping[str, Any]) -> KeyMap:
    """The two-way table for an autoencoder with this config, in today's names; see `renew_names` for older ones."""
    with without_memory():
        net = _build(config)
    return KeyMap(net, _rules(net))


def renew_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with today's names of attention layers; uploads before 2023 say query, key, value and proj_attn."""
    renewed = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        owner, _, part = module.rpartition(".")
        renewed[f"{owner}.{OLD_NAMES[part]}.{leaf}" if part in OLD_NAMES and "attentions" in owner else name] = tensor
    return renewed


def load_autoencoder(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> SpatialAutoencoder:
    """Our autoencoder with diffusers' weights, in today's or older names."""
    net = _build(config)
    net.load_state_dict(autoencoder_table(config).to_ours(renew_names(state)))
    return net


def export_autoencoder(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under diffusers' names of today."""
    return autoencoder_table(config).to_foreign(state)


def _rules(net: SpatialAutoencoder) -> Iterator[Rule]:
    for i, level in enumerate(net.encoder.down):
        yield from level_rules(level, f"encoder.down.{i}", f"encoder.down_blocks.{i}", "downsamplers.0", linear=True)
    for i, level in enumerate(net.decoder.up):
        foreign = f"decoder.up_blocks.{len(net.decoder.up) - 1 - i}"
        yield from level_rules(level, f"decoder.up.{i}", foreign, "upsamplers.0", linear=True)
    for half in ("encoder", "decoder"):
        coder = getattr(net, half)
        for i, block in enumerate(coder.middle):
            yield from block_rules(block, f"{half}.middle.{i}", f"{half}.mid_block", i, linear=True)
        for ours, foreign in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            yield from renamed(getattr(coder, ours), f"{half}.{ours}", f"{half}.{foreign}", {"": ""})
    yield from latent_rules(net)
