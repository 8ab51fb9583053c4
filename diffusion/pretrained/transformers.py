"""What are our text transformer's weights called in huggingface/transformers, and which settings are its config's?

For CLIPTextModel and CLIPTextModelWithProjection under the names of released files, with `text_model.`. Stable
Diffusion 1 holds them below `cond_stage_model.transformer.`, SDXL below `conditioner.embedders.0.transformer.`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from diffusion.models.text import TextTransformer
from diffusion.pretrained.keymap import STACKED, Config, KeyMap, Rule, renamed, without_memory

DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "architectures": None,
}
# Metadata, what an untrained model starts from, and what only the tokenizer or the caller's choice of outputs needs.
HARMLESS = (
    *("_name_or_path", "model_type", "transformers_version", "torch_dtype", "dtype", "problem_type"),
    *("initializer_range", "initializer_factor", "dropout", "use_cache", "gradient_checkpointing"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "is_encoder_decoder"),
    *("output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward"),
)
# Not the text transformer's weights: the numbers 0 to 76, and the temperature of a whole CLIP's loss.
HARMLESS_KEYS = ("text_model.embeddings.position_ids", "logit_scale")
BLOCK = {
    "norm_attention": "layer_norm1",
    "out": "self_attn.out_proj",
    "norm_feedforward": "layer_norm2",
    "expand": "mlp.fc1",
    "contract": "mlp.fc2",
}


def text_config(config: Mapping[str, Any], *, projected: bool | None = None) -> dict[str, Any]:
    """Our `TextTransformer` settings for a CLIPTextConfig, as a dict or the config.json of a `text_encoder` folder.

    projected: whether the weights have a text_projection; by default, whether `architectures` says WithProjection.
    """
    read = Config("transformers' CLIPTextModel", config, DEFAULTS, HARMLESS)
    read.only(hidden_act=("quick_gelu", "gelu"), attention_dropout=(0.0, 0))
    if projected is None:
        projected = "CLIPTextModelWithProjection" in (read["architectures"] or ())
    return {
        "vocab_size": read["vocab_size"],
        "channels": read["hidden_size"],
        "num_layers": read["num_hidden_layers"],
        "num_heads": read["num_attention_heads"],
        "max_length": read["max_position_embeddings"],
        "hidden_channels": read["intermediate_size"],
        "activation": read["hidden_act"],
        "projection_channels": read["projection_dim"] if projected else None,
        "norm_eps": read["layer_norm_eps"],
    }


def text_rules(net: TextTransformer) -> Iterator[Rule]:
    """Three projections of the attention are one of ours."""
    embeddings = "text_model.embeddings"
    yield Rule("token_embedding.weight", (f"{embeddings}.token_embedding.weight",))
    yield Rule("position_embedding.weight", (f"{embeddings}.position_embedding.weight",))
    for i, block in enumerate(net.blocks):
        theirs = f"text_model.encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            parts = tuple(f"{theirs}.self_attn.{part}_proj.{leaf}" for part in "qkv")
            yield Rule(f"blocks.{i}.qkv.{leaf}", parts, STACKED)
        for ours, name in BLOCK.items():
            yield from renamed(getattr(block, ours), f"blocks.{i}.{ours}", f"{theirs}.{name}", {"": ""})
    yield from renamed(net.norm_out, "norm_out", "text_model.final_layer_norm", {"": ""})
    if net.projection is not None:
        yield Rule("projection.weight", ("text_projection.weight",))


def text_table(config: Mapping[str, Any], *, projected: bool | None = None) -> KeyMap:
    """The two-way table for a text model with this config."""
    with without_memory():
        net = TextTransformer(**text_config(config, projected=projected))
    return KeyMap(net, text_rules(net))


def load_text(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> TextTransformer:
    """Our text transformer with their weights; `HARMLESS_KEYS` are left out, a text_projection is used if there."""
    weights = {name: tensor for name, tensor in state.items() if name not in HARMLESS_KEYS}
    projected = "text_projection.weight" in weights
    net = TextTransformer(**text_config(config, projected=projected))
    net.load_state_dict(text_table(config, projected=projected).to_ours(weights))
    return net


def export_text(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under their names."""
    return text_table(config, projected="projection.weight" in state).to_foreign(state)
