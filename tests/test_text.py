"""The text transformer: closed forms, live transformers and open_clip models as oracles, files, refusals by name."""

import math

import pytest
import torch
from golden_cases import assert_close
from safetensors.torch import save_file
from torch import nn

from diffusion.models.text import EncoderBlock, TextTransformer
from diffusion.models.vision import PatchEncoder
from diffusion.pretrained import open_clip, transformers
from diffusion.pretrained.text_files import find_towers, load_text_weights
from diffusion.tokenizer import ClipTokenizer

TINY = {"vocab_size": 50, "channels": 16, "num_layers": 2, "num_heads": 2, "max_length": 9}


def randomised(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    return net.eval()


def tiny(**changes) -> TextTransformer:
    return randomised(TextTransformer(**TINY | changes))


def tokens(batch: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(1))


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_a_later_token_changes_no_earlier_state_of_a_causal_transformer(masked):
    net, ids = tiny(), tokens()
    mask = torch.ones_like(ids, dtype=torch.bool) if masked else None
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 7) % 50
    for before, after in zip(net(ids, mask), net(changed, mask), strict=True):
        assert torch.equal(before[:, :5], after[:, :5])
        assert not torch.isclose(before[:, 5:], after[:, 5:]).all()


def test_every_token_sees_all_others_without_the_causal_mask():
    net, ids = tiny(causal=False), tokens()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 7) % 50
    assert (net(ids)[-1] - net(changed)[-1]).abs().amax(dim=-1).min() > 1e-3


def test_a_transformer_without_positions_is_equivariant_under_permutation():
    net, ids = tiny(causal=False), tokens()
    nn.init.zeros_(net.position_embedding.weight)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(net(ids[:, order])[-1], net(ids)[-1][:, order])


@pytest.mark.parametrize("causal", [False, True])
def test_what_the_mask_hides_changes_nothing_that_is_seen(causal):
    net, ids = tiny(causal=causal), tokens()
    mask = torch.arange(9) < torch.tensor([3, 9, 6])[:, None]
    changed = torch.where(mask, ids, (ids + 11) % 50)
    seen, other = net(ids, mask)[-1], net(changed, mask)[-1]
    assert torch.equal(seen[mask], other[mask])
    assert torch.allclose(net(ids[:1, :3])[-1], seen[:1, :3], atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_a_sample_that_may_look_at_nothing_gives_no_nan(causal):
    net, ids = tiny(causal=causal), tokens()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1] = False
    assert net(ids, mask)[-1].isfinite().all()
    assert torch.allclose(net(ids, mask)[-1][[0, 2]], net(ids)[-1][[0, 2]], atol=1e-6)


def test_one_block_is_the_formula_of_the_paper():
    block = randomised(EncoderBlock(8, num_heads=2, activation="quick_gelu"))
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(3))
    h = torch.nn.functional.layer_norm(x, (8,), block.norm_attention.weight, block.norm_attention.bias)
    q, k, v = (h @ w.T + b for w, b in zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3), strict=True))
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)
        scores = scores + torch.full((5, 5), -torch.inf).triu(1)
        heads.append(scores.softmax(-1) @ v[..., part])
    x1 = x + torch.cat(heads, -1) @ block.out.weight.T + block.out.bias
    h = torch.nn.functional.layer_norm(x1, (8,), block.norm_feedforward.weight, block.norm_feedforward.bias)
    h = h @ block.expand.weight.T + block.expand.bias
    h = h / (1 + torch.exp(-1.702 * h))
    expected = x1 + h @ block.contract.weight.T + block.contract.bias
    torch.testing.assert_close(block(x, causal=True), expected)


def test_the_pooled_state_is_the_first_end():
    net = tiny()
    ids = torch.tensor([[3, 49, 4, 49], [49, 1, 2, 3], [5, 6, 7, 8]])
    last = torch.arange(12.0).view(3, 4, 1)
    assert net.pool(last, ids).flatten().tolist() == [1.0, 4.0, 11.0]
    assert net.pool(last, ids, end=4).flatten().tolist() == [2.0, 4.0, 8.0]


def test_a_new_transformer_is_initialised_as_clips():
    net = TextTransformer(4000, 128, num_layers=8, num_heads=4, projection_channels=64)
    block = net.blocks[3]
    expected = {
        net.token_embedding.weight: 0.02,
        net.position_embedding.weight: 0.01,
        block.qkv.weight: 128**-0.5,
        block.out.weight: 128**-0.5 * 16**-0.5,
        block.expand.weight: 256**-0.5,
        block.contract.weight: 128**-0.5 * 16**-0.5,
        net.projection.weight: 128**-0.5,
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=0.05) and abs(weight.mean().item()) < 0.1 * std
    assert all(not layer.bias.any() for layer in (block.qkv, block.out, block.expand, block.contract))


def test_a_patch_encoder_gives_one_token_a_patch_in_reading_order():
    net = randomised(PatchEncoder(8, 16, patch_size=8, num_layers=0))
    nn.init.zeros_(net.position_embedding)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    swapped = torch.cat([x[..., 8:], x[..., :8]], dim=-1)
    torch.testing.assert_close(net(swapped), net(x)[:, [1, 0, 3, 2]])
    assert net(torch.zeros(1, 3, 40, 24)).shape == (1, 4, 8)


# --- oracles ---------------------------------------------------------------------------------------------------------

CAPTIONS = ["a small red circle on a white background", "", "two dogs, playing!", "word " * 30]


@pytest.mark.parametrize("settings", [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "intermediate_size": 40}])
@pytest.mark.parametrize("projected", [False, True])
def test_live_clip_text_models_of_transformers_agree_on_the_tokenizers_tokens(settings, projected):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 20}
    config = CLIPTextConfig(**sizes | {"intermediate_size": 64, "projection_dim": 12} | settings)
    peer = randomised((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))
    weights = peer.state_dict()
    if not projected:  # transformers 5 leaves the first part of released names out
        weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}
    net = transformers.load_text(config.to_dict(), weights).eval()
    ids = ClipTokenizer(20, pad="end")(["a cat", *CAPTIONS[:3]])
    with torch.no_grad():
        theirs = peer(ids, output_hidden_states=True)
        ours = net(ids)
        last = net.norm_out(ours[-1])
        assert_close(last, theirs.last_hidden_state, 5e-5)
        for k, (state, expected) in enumerate(zip(ours, theirs.hidden_states, strict=True)):
            assert_close(state, expected, 5e-5, f"hidden state {k}")
        pooled = net.pool(last, ids, end=49407)
        if projected:
            assert_close(net.projection(pooled), theirs.text_embeds, 5e-5)
        else:
            assert_close(pooled, theirs.pooler_output, 5e-5)


@pytest.mark.parametrize(
    ("quick_gelu", "settings"), [(False, {}), (True, {"no_causal_mask": True}), (False, {"norm_kwargs": {"eps": 1e-3}})]
)
def test_live_open_clip_text_towers_agree_on_the_tokenizers_tokens(quick_gelu, settings):
    from open_clip.model import _build_text_tower

    config = {"embed_dim": 12, "quick_gelu": quick_gelu}
    config["text_cfg"] = {"context_length": 20, "width": 16, "heads": 4, "layers": 3, "mlp_ratio": 2.5} | settings
    peer = randomised(_build_text_tower(12, config["text_cfg"], quick_gelu))
    net = open_clip.load_text(config, peer.state_dict()).eval()
    with pytest.warns(UserWarning, match="cut off"):
        ids = ClipTokenizer(20, pad="zero")(CAPTIONS)
    with torch.no_grad():
        last = net.norm_out(net(ids)[-1])
        assert_close(net.projection(net.pool(last, ids)), peer(ids), 5e-5)
        peer.output_tokens = True
        assert_close(last, peer(ids)[1], 5e-5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_every_layer_is_open_clips_in_whatever_order_it_keeps_its_batch(batch_first):
    from open_clip.model import _build_text_tower
    from open_clip.transformer import Transformer

    config = {"embed_dim": 12, "text_cfg": {"context_length": 20, "width": 16, "heads": 4, "layers": 3}}
    peer = randomised(_build_text_tower(12, config["text_cfg"], quick_gelu=False))
    stack = Transformer(16, 3, 4, batch_first=batch_first).eval()
    stack.load_state_dict(peer.transformer.state_dict())
    net = open_clip.load_text(config, peer.state_dict()).eval()
    ids = ClipTokenizer(20, pad="zero")(["a cat", *CAPTIONS[:3]])
    with torch.no_grad():
        ours = net(ids)
        x = peer.token_embedding(ids) + peer.positional_embedding[:20]
        x = x if batch_first else x.transpose(0, 1)  # open_clip 2.24 to 2.26 changed this without a word
        for number, block in enumerate(stack.resblocks, 1):
            x = block(x, attn_mask=peer.attn_mask)
            assert_close(ours[number], x if batch_first else x.transpose(0, 1), 5e-5, f"layer {number}")
        last = peer.forward_intermediates(ids, output_fmt="NLC", normalize_intermediates=True)
        for state, expected in zip(ours[1:], last["text_intermediates"], strict=True):
            assert_close(net.norm_out(state), expected, 5e-5)


def test_open_clips_whole_models_compile_to_the_published_sizes():
    from open_clip import get_model_config

    for name, millions in (("ViT-L-14", 123.65), ("ViT-H-14", 354.03), ("ViT-bigG-14", 694.66)):
        with torch.device("meta"):
            net = TextTransformer(**open_clip.text_config(get_model_config(name)))
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


# --- files -----------------------------------------------------------------------------------------------------------

FOREIGN = {
    "transformers": {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"max_position_embeddings": 9, "intermediate_size": 64, "projection_dim": 12},
    "open_clip": {
        "embed_dim": 12,
        "quick_gelu": True,
        "text_cfg": {"vocab_size": 50, "width": 16, "layers": 2, "heads": 2, "context_length": 9},
    },
}


def foreign(net: TextTransformer, layout: str) -> dict[str, torch.Tensor]:
    module = {"transformers": transformers, "open_clip": open_clip}[layout]
    return module.export_text(FOREIGN[layout], net.state_dict())


def equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def variants(net: TextTransformer) -> dict[str, dict[str, torch.Tensor]]:
    """Files that hold this transformer, as they are found in the world."""
    theirs, clip = foreign(net, "transformers"), foreign(net, "open_clip")
    ids, scale = torch.arange(9)[None], torch.tensor(4.6)
    unet = {"model.diffusion_model.out.weight": torch.zeros(3)}
    first = {f"cond_stage_model.transformer.{key}": tensor for key, tensor in theirs.items()}
    second = {f"cond_stage_model.model.{key}": tensor for key, tensor in clip.items()}
    return {
        "a text_encoder folder's": theirs,
        "transformers 5's in memory": {key.removeprefix("text_model."): tensor for key, tensor in theirs.items()},
        "a whole CLIP of transformers": theirs
        | {"logit_scale": scale, "vision_model.post_layernorm.weight": scale[None], "visual_projection.weight": ids},
        "Stable Diffusion 1": first | unet | {"cond_stage_model.transformer.text_model.embeddings.position_ids": ids},
        "Stable Diffusion 2": second | unet | {"cond_stage_model.model.logit_scale": scale},
        "a whole CLIP of open_clip": clip | {"logit_scale": scale, "visual.proj": ids, "attn_mask": ids},
        "a custom CLIP of open_clip": {f"text.{key}": tensor for key, tensor in clip.items()} | {"logit_scale": scale},
        "one of our models": {f"conditioner.encoder.{key}": value for key, value in net.state_dict().items()}
        | {"conv_in.weight": ids},
    }


KINDS = list(variants(tiny(projection_channels=12)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_transformer_is_found_in_a_file_of_any_kind(kind, tmp_path):
    source = tiny(projection_channels=12)
    path = tmp_path / "model.safetensors"
    save_file({key: tensor.clone().contiguous() for key, tensor in variants(source)[kind].items()}, path)
    net = TextTransformer(**TINY, projection_channels=12)
    unused = load_text_weights(net, path)
    assert equal(net, source)
    harmless = ("logit_scale", "position_ids", "attn_mask")
    assert all(name.rpartition(".")[2] in harmless for name in unused)

    bare = TextTransformer(**TINY)
    more = load_text_weights(bare, str(path))
    assert torch.equal(bare.blocks[1].qkv.weight, source.blocks[1].qkv.weight)
    assert [name for name in set(more) - set(unused) if "projection" in name] and len(more) == len(unused) + 1


def test_of_two_text_transformers_the_one_of_the_right_size_is_read(tmp_path):
    small, large = tiny(), tiny(channels=32)
    state = {f"conditioner.embedders.0.transformer.{k}": v for k, v in foreign(small, "transformers").items()}
    text_cfg = FOREIGN["open_clip"]["text_cfg"] | {"width": 32}
    named = open_clip.export_text({"embed_dim": 0, "text_cfg": text_cfg}, large.state_dict())
    state |= {f"conditioner.embedders.1.model.{k}": v for k, v in named.items()}
    path = tmp_path / "xl.safetensors"
    save_file(state, path)
    assert len(find_towers({key: tuple(tensor.shape) for key, tensor in state.items()})) == 2
    for source in (small, large):
        net = TextTransformer(**TINY | {"channels": source.channels})
        load_text_weights(net, path)
        assert equal(net, source)
    with pytest.raises(ValueError, match=r"holds 0 text transformers of 48 channels .*16 channels.*32 channels"):
        load_text_weights(TextTransformer(**TINY | {"channels": 48}), path)


def test_half_precision_weights_are_read_exactly(tmp_path):
    source = tiny().half()
    save_file(foreign(source, "transformers"), tmp_path / "half.safetensors")
    net = TextTransformer(**TINY)
    load_text_weights(net, tmp_path / "half.safetensors")
    assert net.norm_out.weight.dtype == torch.float32 and equal(net.half(), source)


def test_a_file_that_does_not_fit_is_reported_completely(tmp_path):
    state = {key: value for key, value in foreign(tiny(), "transformers").items() if ".layers.1." not in key}
    state["text_model.surprise.weight"] = torch.zeros(2)
    state["text_model.final_layer_norm.bias"] = torch.zeros(17)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as error:
        load_text_weights(TextTransformer(**TINY), tmp_path / "a.safetensors")
    text = str(error.value)
    assert "transformers names: 1 layers of 16 channels" in text and "the encoder has 2 layers" in text
    assert "16 missing, 1 unexpected, 1 mis-shaped" in text
    for name in ("encoder.layers.1.mlp.fc2.bias", "surprise.weight [2]", "final_layer_norm.bias [17], expected [16]"):
        assert name in text


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10" + bytes(20))
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    net = TextTransformer(**TINY)
    for name, message in (
        ("absent.safetensors", "there is no .*absent"),
        ("", "is a folder; name the .safetensors file"),
        ("model.ckpt", "is no .safetensors file"),
        ("broken.safetensors", "broken.safetensors is no readable safetensors file"),
        ("unet.safetensors", "holds no text transformer in the names of transformers"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text_weights(net, tmp_path / name)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported; only 'quick_gelu' or 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"depth": 3}, "takes no depth"),
    ],
)
def test_settings_of_transformers_that_we_cannot_honour_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        transformers.text_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"text_cfg": {}}, "lacks embed_dim"),
        ({"embed_dim": 8, "text_cfg": {"pool_type": "last"}}, "pool_type='last' is not supported; only 'argmax'"),
        ({"embed_dim": 8, "text_cfg": {"embed_cls": True}}, "embed_cls=True"),
        ({"embed_dim": 8, "text_cfg": {"hf_model_name": "roberta-base"}}, "hf_model_name='roberta-base'"),
        ({"embed_dim": 8, "text_cfg": {"norm_kwargs": {"bias": False}}}, "norm_kwargs"),
        ({"embed_dim": 8, "text_cfg": {"depth": 3}}, "takes no depth"),
    ],
)
def test_settings_of_open_clip_that_we_cannot_honour_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        open_clip.text_config(config)


def test_a_projection_is_there_where_open_clip_has_one():
    for text, embed_dim, expected in (({}, 24, 24), ({"proj_type": "none"}, 24, None), ({}, 0, None)):
        config = open_clip.text_config({"embed_dim": embed_dim, "text_cfg": text})
        assert config["projection_channels"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "16 channels cannot be split into 3 heads"),
        ({"activation": "relu"}, "activation='relu' is unknown; choose one of quick_gelu, gelu"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TextTransformer(**TINY | changes)


def test_tokens_that_are_none_are_refused():
    net = tiny()
    for ids, message in (
        (torch.zeros(1, 10, dtype=torch.long), "10 tokens a caption, but this text transformer has 9 positions"),
        (torch.zeros(9, dtype=torch.long), r"tokens must be \(B, L\) integers, got \(9,\)"),
        (torch.zeros(1, 9), "of torch.float32"),
        (torch.tensor([[3, 50]]), "token ids from 3 to 50 given, but the vocabulary has 50"),
        (torch.tensor([[-1, 5]]), "token ids from -1 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            net(ids)


def test_a_patch_size_that_leaves_a_rest_is_refused():
    with pytest.raises(ValueError, match="patch_size=5 does not divide image_size=16"):
        PatchEncoder(8, 16, patch_size=5)
