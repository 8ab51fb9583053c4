"""What are our text transformer's weights called in latent diffusion's text-to-image model, which trained its own?

CompVis holds x-transformers' names below `cond_stage_model.transformer.`; a folder of diffusers those of LDMBertModel
in `bert/`. Its captions are word pieces of BERT's vocabulary (`tokenizer.WordPieceTokenizer`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from diffusion.models.text import TextTransformer
from diffusion.pretrained import transformers
from diffusion.pretrained.keymap import STACKED, Config, KeyMap, Rule, renamed, without_memory

LAYOUTS = ("compvis", "diffusers")
HEAD_CHANNELS = 64  # x-transformers' default, which no published model changes
DEFAULTS = {  # of diffusers' LDMBertConfig
    "vocab_size": 30522,
    "max_position_embeddings": 77,
    "encoder_layers": 32,
    "encoder_ffn_dim": 5120,
    "encoder_attention_heads": 8,
    "head_dim": 64,
    "activation_function": "gelu",
    "d_model": 1280,
}
# What serves training alone, and what that class keeps and never reads.
HARMLESS = (
    *(
        "attention_dropout",
        "activation_dropout",
        "encoder_layerdrop",
        "classifier_dropout",
        "init_std",
        "architectures",
    ),
    *("scale_embedding", "num_hidden_layers"),
    *transformers.HARMLESS,
)
HARMLESS_KEYS = ("to_logits.weight", "to_logits.bias")  # the head of its training on text
NAMES = {  # ours -> theirs, by layout; {a} and {f} are the places of attention and perceptron in CompVis's one list
    "compvis": {
        "token_embedding": "token_emb",
        "position_embedding": "pos_emb.emb",
        "norm_out": "norm",
        "norm_attention": "attn_layers.layers.{a}.0",
        "qkv": "attn_layers.layers.{a}.1.to_{part}",
        "out": "attn_layers.layers.{a}.1.to_out",
        "norm_feedforward": "attn_layers.layers.{f}.0",
        "expand": "attn_layers.layers.{f}.1.net.0.0",
        "contract": "attn_layers.layers.{f}.1.net.2",
    },
    "diffusers": {
        "token_embedding": "model.embed_tokens",
        "position_embedding": "model.embed_positions",
        "norm_out": "model.layer_norm",
        "norm_attention": "model.layers.{i}.self_attn_layer_norm",
        "qkv": "model.layers.{i}.self_attn.{part}_proj",
        "out": "model.layers.{i}.self_attn.out_proj",
        "norm_feedforward": "model.layers.{i}.final_layer_norm",
        "expand": "model.layers.{i}.fc1",
        "contract": "model.layers.{i}.fc2",
    },
}


def layout_of(shapes: Mapping[str, Any]) -> str | None:
    """The layout of an encoder's names, without what they are below of; None for no encoder of this kind."""
    found = (layout for layout in LAYOUTS if f"{_theirs(layout, 'qkv', 0, 'q')}.weight" in shapes)
    return next(found, None)


def shapes_config(shapes: Mapping[str, tuple[int, ...]], *, head_channels: int = HEAD_CHANNELS) -> dict[str, Any]:
    """Our `TextTransformer` settings by the shapes of an encoder's tensors, of which the width of a head is no part."""
    layout = layout_of(shapes)
    if layout is None:
        raise ValueError("these are no tensors of latent diffusion's text encoder (token_emb, attn_layers.layers.0...)")
    vocab_size, channels = shapes[f"{_theirs(layout, 'token_embedding')}.weight"]
    count = 0
    while f"{_theirs(layout, 'qkv', count, 'q')}.weight" in shapes:
        count += 1
    inner = shapes[f"{_theirs(layout, 'qkv', 0, 'q')}.weight"][0]
    if inner % head_channels:
        raise ValueError(f"attention of {inner} channels has no heads of {head_channels}; choose another head_channels")
    return {
        "vocab_size": vocab_size,
        "channels": channels,
        "num_layers": count,
        "num_heads": inner // head_channels,
        "head_channels": head_channels,
        "max_length": shapes[f"{_theirs(layout, 'position_embedding')}.weight"][0],
        "hidden_channels": shapes[f"{_theirs(layout, 'expand', 0)}.weight"][0],
        **OURS,
    }


OURS = {"qkv_bias": False, "activation": "gelu", "causal": False}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our `TextTransformer` settings for diffusers' LDMBertConfig, as a dict or the config.json of a `bert` folder."""
    read = Config("diffusers' LDMBertModel", config, DEFAULTS, HARMLESS)
    read.only(activation_function=("gelu",))
    return {
        "vocab_size": read["vocab_size"],
        "channels": read["d_model"],
        "num_layers": read["encoder_layers"],
        "num_heads": read["encoder_attention_heads"],
        "head_channels": read["head_dim"],
        "max_length": read["max_position_embeddings"],
        "hidden_channels": read["encoder_ffn_dim"],
        **OURS,
    }


def text_rules(net: TextTransformer, layout: str) -> Iterator[Rule]:
    """Three projections of the attention are one of ours."""
    for ours in ("token_embedding", "position_embedding", "norm_out"):
        yield from renamed(getattr(net, ours), ours, _theirs(layout, ours), {"": ""})
    for i, block in enumerate(net.blocks):
        parts = tuple(f"{_theirs(layout, 'qkv', i, part)}.weight" for part in "qkv")
        yield Rule(f"blocks.{i}.qkv.weight", parts, STACKED)
        for ours in ("norm_attention", "out", "norm_feedforward", "expand", "contract"):
            yield from renamed(getattr(block, ours), f"blocks.{i}.{ours}", _theirs(layout, ours, i), {"": ""})


def _theirs(layout: str, ours: str, i: int = 0, part: str = "") -> str:
    return NAMES[layout][ours].format(i=i, a=2 * i, f=2 * i + 1, part=part)


def text_table(settings: Mapping[str, Any], layout: str) -> KeyMap:
    """The two-way table for an encoder with these settings of ours."""
    with without_memory():
        net = TextTransformer(**settings)
    return KeyMap(net, text_rules(net, layout))


def load_text(state: Mapping[str, Tensor], *, head_channels: int = HEAD_CHANNELS) -> TextTransformer:
    """Our text transformer with their weights, in either layout; `HARMLESS_KEYS` are left out."""
    weights = {name: tensor for name, tensor in state.items() if name not in HARMLESS_KEYS}
    settings = shapes_config(
        {name: tuple(tensor.shape) for name, tensor in weights.items()}, head_channels=head_channels
    )
    net = TextTransformer(**settings)
    net.load_state_dict(text_table(settings, layout_of(weights)).to_ours(weights))
    return net
