"""What are our text transformer's weights called in mlfoundations/open_clip, and which settings are its config's?

For the text half of a CLIP model. Stable Diffusion 2 checkpoints hold these names below `cond_stage_model.model.`,
SDXL's below `conditioner.embedders.1.model.`; open_clip's own files also hold the image half, `visual.*`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from diffusion.models.text import TextTransformer
from diffusion.pretrained.keymap import Config, KeyMap, Rule, Transform, renamed, without_memory

MODEL_DEFAULTS = {"embed_dim": Config.REQUIRED, "text_cfg": Config.REQUIRED, "quick_gelu": False}
MODEL_HARMLESS = ("vision_cfg", "init_logit_scale", "init_logit_bias", "output_dict", "custom_text", "cast_dtype")
DEFAULTS = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "ls_init_value": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "use_pad_mask": False,
    "final_ln_after_pool": False,
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "hf_model_name": None,
}
# The tokenizer's, the shape of their outputs, and what serves only settings that are refused.
HARMLESS = (
    *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "output_tokens", "pad_id", "eos_id"),
    *("correct_cls_mask", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
)
# Not the text transformer's: the temperature and offset of CLIP's loss, and the causal mask of old releases.
HARMLESS_KEYS = ("logit_scale", "logit_bias", "attn_mask")
BLOCK = {
    "norm_attention": "ln_1",
    "out": "attn.out_proj",
    "norm_feedforward": "ln_2",
    "expand": "mlp.c_fc",
    "contract": "mlp.c_proj",
}
TRANSPOSED = Transform(lambda tensor: tensor.T, lambda tensor: (tensor.T,))


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our `TextTransformer` settings for open_clip's {"embed_dim", "text_cfg", ...}, its model_configs/*.json."""
    model = Config("open_clip's CLIP", config, MODEL_DEFAULTS, MODEL_HARMLESS)
    read = Config("open_clip's text tower", model["text_cfg"], DEFAULTS, HARMLESS)
    read.only(
        ls_init_value=(None,),
        embed_cls=(False,),
        use_pad_mask=(False,),
        final_ln_after_pool=(False,),
        pool_type=("argmax",),
        proj_bias=(False,),
        proj_type=("linear", "none"),
        act_kwargs=(None, {}),
        block_type=(None, "default"),
        qk_norm=(False,),
        scaled_cosine_attn=(False,),
        scale_heads=(False,),
        scale_attn_inner=(False,),
        scale_attn=(False,),
        scale_fc=(False,),
        hf_model_name=(None, ""),
    )
    norm = read["norm_kwargs"] or {}
    if unknown := set(norm) - {"eps"}:
        raise ValueError(f"open_clip's text tower with norm_kwargs={norm} is not supported ({unknown}); only eps")
    projected = read["proj_type"] == "linear" and model["embed_dim"]
    return {
        "vocab_size": read["vocab_size"],
        "channels": read["width"],
        "num_layers": read["layers"],
        "num_heads": read["heads"],
        "max_length": read["context_length"],
        "hidden_channels": int(read["width"] * read["mlp_ratio"]),
        "activation": "quick_gelu" if model["quick_gelu"] else "gelu",
        "causal": not read["no_causal_mask"],
        "projection_channels": model["embed_dim"] if projected else None,
        "norm_eps": norm.get("eps", 1e-5),
    }


def text_rules(net: TextTransformer) -> Iterator[Rule]:
    """Their packed projection is ours; their text_projection is applied from the right, so it is ours transposed."""
    yield Rule("token_embedding.weight", ("token_embedding.weight",))
    yield Rule("position_embedding.weight", ("positional_embedding",))
    for i, block in enumerate(net.blocks):
        theirs = f"transformer.resblocks.{i}"
        for leaf in ("weight", "bias"):
            yield Rule(f"blocks.{i}.qkv.{leaf}", (f"{theirs}.attn.in_proj_{leaf}",))
        for ours, name in BLOCK.items():
            yield from renamed(getattr(block, ours), f"blocks.{i}.{ours}", f"{theirs}.{name}", {"": ""})
    yield from renamed(net.norm_out, "norm_out", "ln_final", {"": ""})
    if net.projection is not None:
        yield Rule("projection.weight", ("text_projection",), TRANSPOSED)


def text_table(config: Mapping[str, Any]) -> KeyMap:
    """The two-way table for a text tower with this config."""
    with without_memory():
        net = TextTransformer(**text_config(config))
    return KeyMap(net, text_rules(net))


def load_text(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> TextTransformer:
    """Our text transformer with their weights; `HARMLESS_KEYS` and the image half `visual.*` are left out."""
    net = TextTransformer(**text_config(config))
    text = {name: tensor for name, tensor in state.items() if name not in HARMLESS_KEYS}
    net.load_state_dict(text_table(config).to_ours({k: v for k, v in text.items() if not k.startswith("visual.")}))
    return net


def export_text(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under their names; the loss's `logit_scale`, which we do not hold, is not among them."""
    return text_table(config).to_foreign(state)
