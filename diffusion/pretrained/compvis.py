"""What are our UNet's weights called in CompVis' ldm and Stability's sgm, and which of our settings are theirs?

Stable Diffusion checkpoints hold these names under the prefix `model.diffusion_model.`, to be stripped first.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusion.models.unet import UNet
from diffusion.pretrained import guided_diffusion
from diffusion.pretrained.keymap import Config, KeyMap, without_memory

DEFAULTS = guided_diffusion.DEFAULTS | {
    "num_heads": -1,
    "use_spatial_transformer": None,
    "transformer_depth": 1,
    "transformer_depth_middle": None,
    "context_dim": None,
    "n_embed": None,
    "legacy": True,
    "disable_self_attentions": None,
    "num_attention_blocks": None,
    "disable_middle_self_attn": False,
    "disable_middle_transformer": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
HARMLESS = ("image_size", "use_fp16", "use_bf16", "spatial_transformer_attn_type", "offload_to_cpu")


def _read(config: Mapping[str, Any]) -> Config:
    read = Config("ldm's or sgm's UNetModel", config, DEFAULTS, HARMLESS)
    read.only(dims=(2,), n_embed=(None,))
    if read["num_heads"] == -1 and read["num_head_channels"] == -1:
        raise ValueError("ldm's or sgm's UNetModel needs num_heads or num_head_channels; neither is set")
    if read["channel_mult"][0] != 1:
        raise ValueError(
            f"ldm's UNetModel cannot run with channel_mult={read['channel_mult']}: its first entry must be 1"
        )
    if any(mult != int(mult) for mult in read["channel_mult"]):
        raise ValueError(
            f"ldm's UNetModel cannot run with channel_mult={read['channel_mult']}: its entries must be whole numbers"
        )
    return read


def _uses_transformers(read: Config) -> bool:
    """sgm knows no other attention and takes no image_size; ldm uses transformers only if told to."""
    given = read["use_spatial_transformer"]
    return "image_size" not in read.values if given is None else bool(given)


def unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our `UNet` settings for the keyword arguments of ldm's (also stablediffusion's) or sgm's UNetModel.

    num_classes "sequential" becomes a vector embedding of adm_in_channels, "continuous" one of a single number,
    "timestep" one of `timestep_embedding(y, model_channels)`, which the caller computes.
    """
    read = _read(config)
    stages = [_stage(read, level, up=False) for level in range(len(read["channel_mult"]))]
    up_stages = [_stage(read, level, up=True) for level in range(len(read["channel_mult"]))]
    return {
        "in_channels": read["in_channels"],
        "out_channels": read["out_channels"],
        "channels": read["model_channels"],
        "stages": stages,
        "up_stages": up_stages,
        "middle": _middle(read),
        "context_channels": _context_channels(read),
        "modulation": "scale_shift" if read["use_scale_shift_norm"] else "shift",
        "resample": "residual" if read["resblock_updown"] else "conv" if read["conv_resample"] else "pool",
        "dropout": float(read["dropout"]),
        "checkpointing": bool(read["use_checkpoint"]),
        **_class_settings(read),
    }


def _stage(read: Config, level: int, *, up: bool) -> dict[str, Any]:
    depth = _per_level(read, "num_res_blocks", level)
    kind = "cross" if _uses_transformers(read) else "self"
    attention: str | list[str] = kind if 2**level in read["attention_resolutions"] else "none"
    if attention != "none" and read["num_attention_blocks"] is not None:
        attention = [kind if i < read["num_attention_blocks"][level] else "none" for i in range(depth + 1)]
    disabled = read["disable_self_attentions"]
    return {
        "depth": depth,
        "channel_mult": read["channel_mult"][level],
        "attention": attention,
        "transformer_depth": _per_level(read, "transformer_depth", level),
        "self_attention": not (disabled is not None and disabled[level]),
        **_heads(read, read["channel_mult"][level] * read["model_channels"], up=up),
    }


def _middle(read: Config) -> dict[str, Any]:
    last = len(read["channel_mult"]) - 1
    depth = read["transformer_depth_middle"]
    kind = "cross" if _uses_transformers(read) else "self"
    return {
        "depth": 2,
        "channel_mult": read["channel_mult"][last],
        "attention": "none" if read["disable_middle_transformer"] else kind,
        "transformer_depth": _per_level(read, "transformer_depth", last) if depth is None else depth,
        "self_attention": not read["disable_middle_self_attn"],
        **_heads(read, read["channel_mult"][last] * read["model_channels"], up=False),
    }


def _heads(read: Config, width: int, *, up: bool) -> dict[str, int]:
    """Their head arithmetic: a fixed head width wins, `num_heads_upsample` counts only in ADM's attention of old."""
    head_channels, num_heads = read["num_head_channels"], read["num_heads"]
    if _uses_transformers(read):
        heads = num_heads if head_channels == -1 else width // head_channels
        fills_width = head_channels == -1 or (read["legacy"] and not _is_sgm(read))
        return {"num_heads": heads, "head_channels": width // heads if fills_width else head_channels}
    if head_channels != -1:
        return {"head_channels": head_channels}
    if not read["legacy"]:
        return {"head_channels": width // num_heads}
    return {"num_heads": read["num_heads_upsample"] if up and read["num_heads_upsample"] != -1 else num_heads}


def _is_sgm(read: Config) -> bool:
    return read["use_spatial_transformer"] is None and "image_size" not in read.values


def _per_level(read: Config, name: str, level: int) -> int:
    value = read[name]
    return value if isinstance(value, int) else value[level]


def _context_channels(read: Config) -> int | None:
    value = read["context_dim"]
    if not isinstance(value, int) and value is not None:
        if len(set(value)) != 1:
            raise ValueError(
                f"context_dim={list(value)} means a list of contexts of different widths; only one width is supported"
            )
        value = value[0]
    if value is not None and not _uses_transformers(read):
        raise ValueError("context_dim without use_spatial_transformer: ldm refuses this config too")
    return value


def _class_settings(read: Config) -> dict[str, Any]:
    kind = read["num_classes"]
    if kind is None or isinstance(kind, int):
        return {"num_classes": kind}
    if kind == "sequential":
        return {"vector_channels": read["adm_in_channels"]}
    if kind == "timestep":
        return {"vector_channels": read["model_channels"]}
    if kind == "continuous":
        return {"vector_channels": 1, "vector_embedding": "linear"}
    raise ValueError(
        f"num_classes={kind!r} is not supported; only None, an integer, 'sequential', 'timestep' or 'continuous'"
    )


def unet_table(config: Mapping[str, Any]) -> KeyMap:
    """The two-way table for a network with these foreign keyword arguments."""
    read = _read(config)
    with without_memory():
        net = UNet(**unet_config(config))
    rules = guided_diffusion.unet_rules(
        net,
        new_attention_order=read["use_new_attention_order"],
        linear_projections=read["use_linear_in_transformer"],
        vector_prefix={"sequential": "label_emb.0", "timestep": "label_emb.1"}.get(read["num_classes"], "label_emb"),
    )
    return KeyMap(net, rules)


def load_unet(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> UNet:
    """Our network with ldm's or sgm's weights."""
    net = UNet(**unet_config(config))
    net.load_state_dict(unet_table(config).to_ours(state))
    return net


def export_unet(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under ldm's and sgm's names."""
    return unet_table(config).to_foreign(state)
