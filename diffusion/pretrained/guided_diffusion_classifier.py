"""What are our classifier's weights called in openai/guided-diffusion, and which settings are its constructor's?

`classifier_config` reads the keyword arguments of its EncoderUNetModel, `classifier_table` maps the names both ways.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from diffusion.models.classifier import POOLS, Classifier
from diffusion.pretrained.guided_diffusion import (
    DEFAULTS,
    HARMLESS,
    default_mults,
    downsamplings,
    way_down_config,
    way_down_rules,
)
from diffusion.pretrained.keymap import CONV1D, CONV2D, SAME, TRANSPOSED, Config, KeyMap, Rule, renamed, without_memory

CLASSIFIER_DEFAULTS = {
    **{name: default for name, default in DEFAULTS.items() if name != "num_classes"},
    "image_size": Config.REQUIRED,
    "pool": "adaptive",
}
CLASSIFIER_FLAG_DEFAULTS = {
    "image_size": 64,
    "classifier_use_fp16": False,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
HEADS = {  # by `pool`: what the head's layers are called below "out", and how their weights are shaped
    "adaptive": {"norm": ("0", SAME), "out": ("3", CONV2D)},
    "attention": {"norm": ("0", SAME), "qkv": ("2.qkv_proj", CONV1D), "out": ("2.c_proj", CONV1D)},
    "spatial": {"hidden": ("0", SAME), "out": ("2", SAME)},
    "spatial_v2": {"hidden": ("0", SAME), "norm": ("1", SAME), "out": ("3", SAME)},
}


def classifier_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our `Classifier` settings for the keyword arguments of guided-diffusion's EncoderUNetModel."""
    read = Config("guided-diffusion's EncoderUNetModel", config, CLASSIFIER_DEFAULTS, set(HARMLESS) - {"image_size"})
    read.only(dims=(2,), pool=POOLS)
    if read["pool"] == "attention" and read["num_head_channels"] == -1:
        raise ValueError(
            "EncoderUNetModel with pool='attention' needs num_head_channels, the width of the pool's heads"
        )
    return {
        "in_channels": read["in_channels"],
        "num_classes": read["out_channels"],
        "image_size": read["image_size"],
        "pool": read["pool"],
        **way_down_config(read),
    }


def classifier_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """EncoderUNetModel's keyword arguments from the `classifier_*` flags that guided-diffusion's README gives.

    Flags of other things are ignored. Its classifiers have 1000 classes and heads of width 64.
    """
    read = {**CLASSIFIER_FLAG_DEFAULTS, **flags}
    size = read["image_size"]
    return {
        "image_size": size,
        "in_channels": 3,
        "model_channels": read["classifier_width"],
        "out_channels": 1000,
        "num_res_blocks": read["classifier_depth"],
        "attention_resolutions": downsamplings(size, read["classifier_attention_resolutions"]),
        "channel_mult": default_mults(size),
        "use_fp16": read["classifier_use_fp16"],
        "num_head_channels": 64,
        "use_scale_shift_norm": read["classifier_use_scale_shift_norm"],
        "resblock_updown": read["classifier_resblock_updown"],
        "pool": read["classifier_pool"],
    }


def classifier_table(config: Mapping[str, Any]) -> KeyMap:
    """The two-way table for a classifier with these foreign keyword arguments."""
    with without_memory():
        net = Classifier(**classifier_config(config))
    return KeyMap(net, classifier_rules(net, new_attention_order=config.get("use_new_attention_order", False)))


def load_classifier(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Classifier:
    """Our classifier with guided-diffusion's weights."""
    net = Classifier(**classifier_config(config))
    net.load_state_dict(classifier_table(config).to_ours(state))
    return net


def export_classifier(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under guided-diffusion's names."""
    return classifier_table(config).to_foreign(state)


def classifier_rules(net: Classifier, *, new_attention_order: bool = False) -> Iterator[Rule]:
    """Rules for all tensors; the pool's attention has the new order of its rows, whatever the blocks have."""
    yield from way_down_rules(net, new_attention_order=new_attention_order)
    if net.pool == "attention":
        yield Rule("head.position", ("out.2.positional_embedding",), TRANSPOSED)
    for name, layer in net.head.named_children():
        foreign, transform = HEADS[net.pool][name]
        yield from renamed(layer, f"head.{name}", f"out.{foreign}", {"": ""}, {"weight": transform})
