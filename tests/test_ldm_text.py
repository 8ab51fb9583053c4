"""Latent diffusion's own text encoder: its formula, diffusers' LDMBertModel as oracle, both layouts, full size."""

import re

import pytest
import torch
import torch.nn.functional as F
from golden_cases import assert_bijection, assert_close
from test_text import randomised
from torch import Tensor

from diffusion.checkpoint import build
from diffusion.models.text import EncoderBlock, TextTransformer
from diffusion.pretrained import ldm_text
from diffusion.text_conditioning import TextConditioner
from diffusion.tokenizer import WordPieceTokenizer

CONFIG = {"vocab_size": 120, "max_position_embeddings": 9, "d_model": 16, "encoder_ffn_dim": 40} | {
    "encoder_layers": 3,
    "encoder_attention_heads": 3,
    "head_dim": 4,
}
COMPVIS = [  # from the places in their two implementations: diffusers' name -> x-transformers'
    (r"model\.embed_tokens", "token_emb"),
    (r"model\.embed_positions", "pos_emb.emb"),
    (r"model\.layer_norm", "norm"),
    (r"model\.layers\.(\d+)\.self_attn_layer_norm", lambda m: f"attn_layers.layers.{2 * int(m[1])}.0"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj", lambda m: f"attn_layers.layers.{2 * int(m[1])}.1.to_{m[2]}"),
    (r"model\.layers\.(\d+)\.self_attn\.out_proj", lambda m: f"attn_layers.layers.{2 * int(m[1])}.1.to_out"),
    (r"model\.layers\.(\d+)\.final_layer_norm", lambda m: f"attn_layers.layers.{2 * int(m[1]) + 1}.0"),
    (r"model\.layers\.(\d+)\.fc1", lambda m: f"attn_layers.layers.{2 * int(m[1]) + 1}.1.net.0.0"),
    (r"model\.layers\.(\d+)\.fc2", lambda m: f"attn_layers.layers.{2 * int(m[1]) + 1}.1.net.2"),
]


def peer():
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    return randomised(LDMBertModel(LDMBertConfig(**CONFIG)))


def in_compvis_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in COMPVIS:
            name = re.sub(f"^{pattern}", replacement, name)
        renamed[name] = tensor
    return renamed


def in_layout(layout: str) -> dict[str, Tensor]:
    state = peer().state_dict()
    return state if layout == "diffusers" else in_compvis_names(state)


def test_diffusers_model_agrees_on_every_token():
    model = peer()
    net = ldm_text.load_text(model.state_dict(), head_channels=4).eval()
    ids = torch.randint(0, 120, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(ids)[0]
        assert_close(net.norm_out(net(ids)[-1]), theirs, 5e-5)
        recipe = TextConditioner(net, tokenizer=WordPieceTokenizer(9), layer="last", final_norm=True)
        assert_close(recipe(ids)["context"], theirs, 5e-5)


def test_heads_may_be_of_another_width_than_the_channels_and_without_biases():
    block = randomised(EncoderBlock(8, num_heads=3, head_channels=2, qkv_bias=False))
    assert block.qkv.bias is None and block.qkv.weight.shape == (18, 8) and block.out.weight.shape == (8, 6)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    h = F.layer_norm(x, (8,), block.norm_attention.weight, block.norm_attention.bias)
    heads = [
        ((q @ k.transpose(1, 2)) / 2**0.5).softmax(-1) @ v
        for q, k, v in zip(*((h @ w.T).split(2, dim=-1) for w in block.qkv.weight.chunk(3)), strict=True)
    ]
    x = x + torch.cat(heads, -1) @ block.out.weight.T + block.out.bias
    h = F.layer_norm(x, (8,), block.norm_feedforward.weight, block.norm_feedforward.bias)
    h = F.gelu(h @ block.expand.weight.T + block.expand.bias) @ block.contract.weight.T + block.contract.bias
    torch.testing.assert_close(block(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))), x + h)


@pytest.mark.parametrize("layout", ldm_text.LAYOUTS)
def test_both_layouts_name_the_same_weights_bit_for_bit(layout):
    state = in_layout(layout)
    assert ldm_text.layout_of(state) == layout
    weights = {name: tensor for name, tensor in state.items() if name not in ldm_text.HARMLESS_KEYS}
    assert len(state) - len(weights) == 2
    settings = ldm_text.shapes_config({name: tuple(tensor.shape) for name, tensor in state.items()}, head_channels=4)
    assert settings == ldm_text.text_config(peer().config.to_dict())
    assert_bijection(ldm_text.text_table(settings, layout), weights)
    first, other = (ldm_text.load_text(in_layout(name), head_channels=4).state_dict() for name in ldm_text.LAYOUTS)
    assert first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first)


def test_the_published_size_is_the_default():
    settings = ldm_text.text_config({})
    with torch.device("meta"):
        net = TextTransformer(**settings)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(542.90, abs=0.01)
    for layout in ldm_text.LAYOUTS:
        shapes = ldm_text.text_table(settings, layout).foreign_shapes
        assert ldm_text.shapes_config(shapes) == settings
    assert shapes["model.layers.31.self_attn.q_proj.weight"] == (512, 1280)


def test_other_tensors_and_other_settings_are_refused():
    assert ldm_text.layout_of({"text_model.embeddings.token_embedding.weight": None}) is None
    with pytest.raises(ValueError, match="no tensors of latent diffusion's text encoder"):
        ldm_text.shapes_config({})
    with pytest.raises(ValueError, match="attention of 12 channels has no heads of 64"):
        ldm_text.load_text(peer().state_dict())
    with pytest.raises(ValueError, match="activation_function='relu' is not supported; only 'gelu'"):
        ldm_text.text_config({"activation_function": "relu"})
    state = peer().state_dict()
    del state["model.layers.1.fc1.bias"]
    with pytest.raises(ValueError, match=r"1 missing, .*\n  missing     model.layers.1.fc1.bias \[40\]"):
        ldm_text.load_text(state, head_channels=4)


def test_it_is_rebuilt_from_plain_data_and_needs_its_vocabulary_for_captions_alone():
    node = {
        "_target_": "diffusion.conditioning.TextConditioner",
        "encoder": {"_target_": "diffusion.models.text.TextTransformer", **ldm_text.text_config(CONFIG)},
        "tokenizer": {"_target_": "diffusion.tokenizer.WordPieceTokenizer", "max_length": 9, "vocabulary": None},
        "frozen": True,
    }
    conditioner = build(node)
    prepared = torch.tensor([[101, 7, 8, 102, 0, 0, 0, 0, 0]])
    assert conditioner.null_like(prepared).tolist() == [[101, 102, 0, 0, 0, 0, 0, 0, 0]]
    assert conditioner(prepared)["context"].shape == (1, 9, 16)
    with pytest.raises(ValueError, match="tokenizer=FILE"):
        conditioner.prepare("a cat")
    with pytest.raises(ValueError, match="max_length=77, but the text transformer has 9 positions"):
        build({**node, "tokenizer": {"_target_": "diffusion.tokenizer.WordPieceTokenizer"}})
