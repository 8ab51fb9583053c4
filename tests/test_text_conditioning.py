"""Text conditions of Stable Diffusion 1, 2 and XL and of latent diffusion: recipes, clip_skip, windows, emphasis."""

import pytest
import torch
from golden_cases import assert_close, load, names
from safetensors.torch import save_file
from test_conditioning import same
from test_text import randomised
from torch import Tensor

from diffusion.checkpoint import build
from diffusion.conditioner import JointInput
from diffusion.conditioning import ClassConditioner, JointConditioner
from diffusion.generate import generate
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.models.attention import Attention
from diffusion.models.text import TextTransformer
from diffusion.models.unet import UNet
from diffusion.pretrained import open_clip, transformers
from diffusion.process import GaussianDiffusion
from diffusion.sampling import Sampler
from diffusion.schedule import linear
from diffusion.text_conditioning import TextConditioner, XLConditioner, emphasised, text_parts
from diffusion.tokenizer import _encoded

OUTPUT = 5e-5
SIZES = {"vocab_size": 300, "channels": 16, "num_layers": 3, "num_heads": 2, "max_length": 12}
LONG = "a red circle, two blue squares and one very small green triangle on a white background"
CAPTIONS = ["a red circle", LONG, ""]


def text(projection: int | None = None, **settings) -> TextConditioner:
    return TextConditioner(randomised(TextTransformer(**SIZES, projection_channels=projection)), **settings)


def xl(**settings) -> XLConditioner:
    recipe = {"layer": "penultimate", "final_norm": False}
    last = text(8, pooled=True, pad="zero", **recipe)
    with torch.no_grad():
        last.encoder.token_embedding.weight.mul_(-1)
    return XLConditioner([text(**recipe), last], **{"size_channels": 4, "image_size": 64} | settings)


def refiner(**settings) -> XLConditioner:
    last = text(8, pooled=True, pad="zero", layer="penultimate", final_norm=False)
    return XLConditioner([last], **{"size_channels": 4, "aesthetic": True, "zero_null": False} | settings)


# --- the recipes, on the peers' outputs ------------------------------------------------------------------------------


def golden(name: str) -> tuple[TextTransformer, dict[str, Tensor], Tensor, bool]:
    case = load(name)
    layout = open_clip if "text_cfg" in case.config else transformers
    net = layout.load_text(case.config, case.group("weights")).eval()
    return net, case.group("out"), case["in.input_ids"], layout is open_clip


@pytest.mark.parametrize("name", names("clip/*"))
def test_stable_diffusion_1_reads_the_last_state_after_its_norm(name):
    net, out, ids, _ = golden(name)
    last = out["last_ln_final"] if "last_ln_final" in out else out["last_hidden_state"]
    assert_close(TextConditioner(net, pad="end", layer="last", final_norm=True)(ids)["context"], last, OUTPUT)


@pytest.mark.parametrize("name", [name for name in names("clip/*") if not name.endswith(".hf")])
def test_stable_diffusion_2_reads_the_penultimate_state_after_the_last_norm(name):
    net, out, ids, _ = golden(name)
    conditioner = TextConditioner(net, pad="zero", layer="penultimate", final_norm=True)
    normed = out["penultimate_ln_final"] if "penultimate_ln_final" in out else out["penultimate_final_ln"]
    assert_close(conditioner(ids)["context"], normed, OUTPUT)
    skipped = TextConditioner(net, pad="end", layer="last", final_norm=True, clip_skip=2)  # Stable Diffusion 1's
    assert_close(skipped(ids)["context"], normed, OUTPUT)


@pytest.mark.parametrize("name", names("clip/*"))
def test_xl_reads_penultimate_states_without_a_norm_and_the_projected_end(name):
    net, out, ids, theirs = golden(name)
    recipe = {"layer": "penultimate", "final_norm": False}
    first, last = TextConditioner(net, **recipe), TextConditioner(net, **recipe, pooled=True, pad="zero")
    conditioner = XLConditioner([first, last], size_channels=6)
    sizes = torch.tensor([[512.0, 768.0, 0.0, 8.0, 1024.0, 1024.0]]).expand(len(ids), -1)
    condition = conditioner(JointInput((ids, ids, sizes)))
    assert_close(condition["context"], torch.cat([out["penultimate_raw"]] * 2, dim=2), OUTPUT)
    pooled = out["encode_text"] if theirs else out["text_embeds"]
    assert_close(condition["vector"][:, : pooled.shape[1]], pooled, OUTPUT)
    assert condition["vector"].shape[1] == conditioner.provides["vector"] == pooled.shape[1] + 36


@pytest.mark.parametrize("aesthetic", [False, True])
def test_xl_is_what_transformers_and_diffusers_make_of_prompts_and_sizes(aesthetic):
    from diffusers.models.embeddings import Timesteps
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape = {"num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 49408, "eos_token_id": 49407}
    one = CLIPTextConfig(hidden_size=8, intermediate_size=32, **shape)
    two = CLIPTextConfig(hidden_size=16, intermediate_size=64, hidden_act="gelu", projection_dim=12, **shape)
    peers = [randomised(CLIPTextModel(one)), randomised(CLIPTextModelWithProjection(two))]
    recipe = {"layer": "penultimate", "final_norm": False}
    texts = []
    for peer, pad, pooled in zip(peers, ("end", "zero"), (False, True), strict=True):
        weights = peer.state_dict()
        if not pooled:
            weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in weights.items()}
        net = transformers.load_text(peer.config.to_dict(), weights).eval()
        texts.append(TextConditioner(net, pad=pad, pooled=pooled, **recipe))
    texts, peers = (texts[1:], peers[1:]) if aesthetic else (texts, peers)
    conditioner = XLConditioner(texts, aesthetic=aesthetic)
    numbers = conditioner.sizes_of(768, 1344, original=(600, 800), crop=(16, 0))
    assert numbers == ([600, 800, 16, 0, 6.0] if aesthetic else [600, 800, 16, 0, 768, 1344])
    prompts = ["a red circle", "two dogs, playing!"]
    with torch.no_grad():
        condition = conditioner(conditioner.prepare(prompts, numbers))
        ids = [part.prepare(prompts) for part in texts]
        answers = [peer(i, output_hidden_states=True) for peer, i in zip(peers, ids, strict=True)]
    context = torch.cat([answer.hidden_states[-2] for answer in answers], dim=-1)
    assert_close(condition["context"], context, OUTPUT)
    sinusoids = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.tensor(numbers))
    vector = torch.cat([answers[-1].text_embeds, sinusoids.reshape(1, -1).expand(2, -1)], dim=1)
    assert_close(condition["vector"], vector, OUTPUT)


# --- clip_skip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("layer", "trained"), [("last", 1), ("penultimate", 2)])
def test_clip_skip_counts_layers_from_the_end_and_never_fewer_than_in_training(layer, trained, pooled):
    conditioner = text(layer=layer, pooled=pooled)
    net, tokens = conditioner.encoder, conditioner.prepare(CAPTIONS[:1])
    before = conditioner(tokens)
    for skip in (1, 2, 3):
        conditioner.clip_skip = skip
        condition = conditioner(tokens)
        state = net(tokens)[-max(trained, skip)]
        assert torch.equal(condition["context"], net.norm_out(state))
        if pooled:  # of the last layer, whatever the context is of
            assert torch.equal(condition["vector"], before["vector"])
    conditioner.clip_skip = 1
    assert same(conditioner(tokens), before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("clip_skip", 0, r"clip_skip=0; choose 1 \(as trained\) to 3"),
        ("clip_skip", 4, "clip_skip=4"),
        ("clip_skip", True, "clip_skip=True"),
        ("clip_skip", 1.0, "clip_skip=1.0"),
        ("long_prompt", "split", "long_prompt='split' is unknown; choose 'cut' or 'chunk'"),
        ("emphasis", "a1111", "emphasis='a1111'; choose true or false"),
    ],
)
def test_settings_that_make_no_sense_are_refused_early_and_late(name, value, message):
    with pytest.raises(ValueError, match=message):
        text(**{name: value})
    for conditioner in (text(), xl()):
        before = getattr(conditioner, name)
        with pytest.raises(ValueError, match=message):
            setattr(conditioner, name, value)
        assert getattr(conditioner, name) == before


def test_settings_reach_every_text_of_a_conditioner():
    whole = xl()
    whole.clip_skip, whole.long_prompt, whole.emphasis = 3, "chunk", True
    for part in whole.texts:
        assert (part.clip_skip, part.long_prompt, part.emphasis) == (3, "chunk", True)
    assert text_parts(whole) == list(whole.texts)
    alone = text()
    assert text_parts(JointConditioner([ClassConditioner(3, 16), alone])) == [alone] == text_parts(alone)
    assert text_parts(ClassConditioner(3, 16)) == []


# --- long prompts ----------------------------------------------------------------------------------------------------


def windowed(ids: tuple[int, ...], conditioner: TextConditioner) -> dict[str, Tensor]:
    """The condition of one window of ids."""
    return conditioner(torch.tensor([conditioner.tokenizer.padded(ids)]))


@pytest.mark.parametrize("masked", [False, True])
def test_windows_follow_one_another_and_a_shorter_row_hides_what_it_lacks(masked):
    conditioner = text(long_prompt="chunk", masked=masked, pooled=True)
    ids = _encoded(LONG)
    alone = [windowed(part, conditioner) for part in (ids[:4], ids[4:14], ids[14:])]  # the first ends at the comma
    condition = conditioner(conditioner.prepare(CAPTIONS))
    assert condition["context"].shape == (3, 36, 16)
    assert torch.allclose(condition["context"][1], torch.cat([one["context"][0] for one in alone]), atol=1e-6)
    assert torch.allclose(condition["vector"][1], alone[0]["vector"][0], atol=1e-6)
    seen = condition["context_mask"]
    assert not seen[[0, 2], 12:].any() and seen[1].sum() == (6 + 12 + 5 if masked else 36)
    for row in (0, 2):
        one = windowed(_encoded(CAPTIONS[row]), conditioner)
        assert torch.allclose(condition["context"][row, :12], one["context"][0], atol=1e-6)
        assert torch.allclose(condition["vector"][row], one["vector"][0], atol=1e-6)
        assert seen[row, :12].all() or masked


def test_short_prompts_are_the_same_in_windows():
    plain, chunked = text(), text(long_prompt="chunk")
    assert torch.equal(plain.prepare(CAPTIONS[:1]), chunked.prepare(CAPTIONS[:1]))
    assert torch.equal(plain.prepare([""]), chunked.prepare([""]))
    assert same(plain(plain.prepare(CAPTIONS[:1])), chunked(chunked.prepare(CAPTIONS[:1])))


def test_without_a_condition_one_window_is_seen():
    for conditioner in (text(long_prompt="chunk"), text(long_prompt="chunk", emphasis=True)):
        prepared = conditioner.prepare(["a (red:1.5) circle", LONG, ""])
        null = conditioner(conditioner.null_like(prepared))
        assert same(null, conditioner(prepared, torch.ones(3, dtype=torch.bool)))
        empty = windowed((), conditioner)["context"]
        assert torch.allclose(null["context"][:, :12], empty.expand(3, -1, -1), atol=1e-6)
        assert null["context_mask"][:, :12].all() and not null["context_mask"][:, 12:].any()


@pytest.mark.parametrize("make", [text, xl, lambda **kind: JointConditioner([text(**kind), ClassConditioner(5, 16)])])
@pytest.mark.parametrize("emphasis", [False, True])
def test_two_prepared_inputs_become_equally_long_and_mean_the_same(make, emphasis):
    conditioner = make() if make is xl else make(long_prompt="chunk", emphasis=emphasis)
    conditioner.long_prompt, conditioner.emphasis = "chunk", emphasis
    values = [CAPTIONS[:1], [3]] if isinstance(conditioner, JointConditioner) else CAPTIONS[:1]
    others = [[LONG], [1]] if isinstance(conditioner, JointConditioner) else [LONG]
    one, other = conditioner.prepare(values), conditioner.prepare(others)
    for swapped in (False, True):
        pair = conditioner.alike(*((other, one) if swapped else (one, other)))
        short, long = (conditioner(part) for part in (reversed(pair) if swapped else pair))
        assert {name: value.shape for name, value in short.items()} == {n: v.shape for n, v in long.items()}
        before, kept = conditioner(one), short["context_mask"][0]
        assert torch.equal(short["context"][0, kept], before["context"][0])
        assert torch.equal(long["context"], conditioner(other)["context"])
        assert short["context"].isfinite().all()  # what is hidden must be finite, too: 0 times NaN is NaN
        if "vector" in short:
            assert torch.equal(short["vector"], before["vector"])
    again = conditioner.alike(one, one)
    assert all(same(conditioner(part), conditioner(one)) for part in again)


def test_a_row_does_not_depend_on_how_long_its_neighbours_are():
    for conditioner in (text(long_prompt="chunk"), xl()):
        conditioner.long_prompt = "chunk"
        together, alone = conditioner(conditioner.prepare(CAPTIONS)), conditioner(conditioner.prepare(CAPTIONS[:1]))
        seen = together["context_mask"][0]
        assert torch.allclose(together["context"][0, seen], alone["context"][0], atol=1e-6)


def test_a_network_sees_of_a_row_only_its_own_windows():
    net = randomised(Attention(8, 16, num_heads=2, head_channels=4))
    conditioner = text(long_prompt="chunk")
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = conditioner(conditioner.prepare(CAPTIONS))
        alone = conditioner(conditioner.prepare(CAPTIONS[:1]))
        assert "context_mask" not in alone
        seen = net(x, together["context"], mask=together["context_mask"])[:1]
        assert torch.allclose(seen, net(x[:1], alone["context"]), atol=1e-5)


# --- emphasis --------------------------------------------------------------------------------------------------------


def test_weights_scale_states_and_the_mean_stays():
    plain, weighing = text(), text(emphasis=True)
    ids, weights = weighing.prepare(["a (red:1.5) [circle]", "a red circle"]).parts
    assert torch.equal(ids, plain.prepare(["a red circle"] * 2))
    assert weights[0].tolist() == pytest.approx([1, 1, 1.5, 1 / 1.1, *[1] * 8]) and (weights[1] == 1).all()
    before = plain(ids)["context"]
    after = weighing(JointInput((ids, weights)))["context"]
    assert torch.equal(after[1], before[1])
    expected = before[0] * weights[0, :, None]
    torch.testing.assert_close(after[0], expected * before[0].mean() / expected.mean())
    torch.testing.assert_close(after[0].mean(), before[0].mean())
    assert same(weighing(weighing.prepare([LONG[:12]])), plain(plain.prepare([LONG[:12]])))


def test_each_window_keeps_its_own_mean():
    context = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)) + 1
    weights = torch.tensor([[1.0, 2.0, 1.0, 1.0], [1.0, 0.0, 0.5, 1.0]])
    both = emphasised(context, weights)
    for i in range(2):
        torch.testing.assert_close(both[i], emphasised(context[i : i + 1], weights[i : i + 1])[0])
        torch.testing.assert_close(both[i].mean(), context[i].mean())
    assert torch.equal(both[1, 1], torch.zeros(3))
    assert torch.equal(emphasised(context * 0, torch.ones(2, 4)), context * 0)


def test_emphasis_is_off_by_default_and_brackets_then_words():
    conditioner = text()
    assert torch.equal(conditioner.prepare("(red:1.5)")[0, 1:-1][: len(_encoded("(red:1.5)"))], folded("(red:1.5)"))


def folded(caption: str) -> Tensor:
    return torch.tensor([i % 298 for i in _encoded(caption)])


# --- XL --------------------------------------------------------------------------------------------------------------


def test_xl_without_a_caption_is_zeros_but_for_the_sizes():
    conditioner = xl()
    prepared = conditioner.prepare_batch({"caption": CAPTIONS[:1] * 2, "sizes": [[64, 32, 0, 0, 64, 32]] * 2})
    given = conditioner(prepared)
    null = conditioner(conditioner.null_like(prepared))
    assert not null["context"].any() and not null["vector"][:, :8].any()
    assert torch.equal(null["vector"][:, 8:], given["vector"][:, 8:])
    half = conditioner(prepared, torch.tensor([True, False]))
    assert same({n: v[:1] for n, v in half.items()}, {n: v[:1] for n, v in null.items()})
    assert torch.equal(half["context"][1], given["context"][1])
    empty = conditioner(conditioner.prepare([""], [64, 32, 0, 0, 64, 32]))
    assert empty["context"].any()  # an empty negative prompt is no missing one


def test_xl_may_take_the_empty_caption_for_no_caption():
    conditioner = xl(zero_null=False)
    prepared = conditioner.prepare(CAPTIONS[:1])
    null, empty = conditioner(conditioner.null_like(prepared)), conditioner(conditioner.prepare([""]))
    assert same(null, empty)


def test_the_refiner_is_told_a_score_and_steered_away_from_a_low_one():
    conditioner = refiner()
    assert conditioner.sizes_of(64, 32) == [64, 32, 0, 0, 6.0]
    assert conditioner.sizes_of(64, 32, negative=True) == [64, 32, 0, 0, 2.5]
    assert conditioner.sizes_of(64, 32, score=7, negative=True)[-1] == 7.0
    prepared = conditioner.prepare("a cat", conditioner.sizes_of(64, 32))
    null = conditioner.prepare("", conditioner.sizes_of(64, 32, negative=True))
    assert same(conditioner(conditioner.null_like(prepared)), conditioner(null))
    assert conditioner.provides == {"context": 16, "vector": 8 + 20}


@pytest.mark.filterwarnings("ignore:captions longer")
def test_sizes_default_to_the_models_own_and_one_row_serves_all():
    conditioner = xl(image_size=(64, 32))
    default = conditioner.prepare(CAPTIONS[:2])
    assert default.parts[-1].tolist() == [[64, 32, 0, 0, 64, 32]] * 2
    assert conditioner.entries == ("caption", "sizes") and len(default) == 2
    assert same(conditioner(default), conditioner(conditioner.prepare(CAPTIONS[:2], [64, 32, 0, 0, 64, 32])))


@pytest.mark.filterwarnings("ignore:captions longer")
def test_xl_refuses_what_it_cannot_use():
    conditioner = xl()
    for sizes in ([64, 64], [[64] * 6] * 3, [64] * 5):
        with pytest.raises(ValueError, match=r"sizes must be 6 numbers a sample .*height and width asked for"):
            conditioner.prepare(CAPTIONS[:2], sizes)
    with pytest.raises(ValueError, match="an aesthetic score"):
        refiner().prepare("a cat", [64] * 6)
    with pytest.raises(ValueError, match="conditioned on `sizes`, but the data give only caption"):
        conditioner.prepare_batch({"caption": ["a cat"]})
    for pooled in ((True, False), (True, True), (False, False)):
        with pytest.raises(ValueError, match="vector from its last text transformer: set pooled=True there and only"):
            XLConditioner([text(pooled=p) for p in pooled])
    with pytest.raises(ValueError, match="one max_length"):
        XLConditioner([text(max_length=6), text(pooled=True)])


def test_xl_in_half_precision_is_almost_the_same():
    conditioner = xl()
    prepared = conditioner.prepare(CAPTIONS[:1])
    with torch.no_grad():
        full, half = conditioner(prepared), conditioner.to(torch.bfloat16)(prepared)
        null = conditioner(conditioner.null_like(prepared))
    for name in full:
        assert half[name].dtype == null[name].dtype == torch.bfloat16
        assert_close(half[name].float(), full[name], 0.05, name)


def test_xl_is_rebuilt_from_plain_data():
    encoder = {"_target_": "diffusion.models.text.TextTransformer", **SIZES}
    target = {"_target_": "diffusion.conditioning.TextConditioner", "layer": "penultimate", "final_norm": False}
    second = {**target, "encoder": {**encoder, "projection_channels": 8}, "pooled": True, "pad": "zero"}
    node = {
        "_target_": "diffusion.text_conditioning.XLConditioner",
        "texts": [{**target, "encoder": encoder}, second],
        "size_channels": 4,
        "image_size": 64,
    }
    first, again = xl(), build(node)
    again.load_state_dict(first.state_dict())
    assert {key.split(".")[:3][2] for key in first.state_dict()} == {"encoder"}
    assert same(first(first.prepare(CAPTIONS[:1])), again(again.prepare(CAPTIONS[:1])))


def test_xl_reads_both_texts_from_one_file(tmp_path):
    source = xl()
    small = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    first = transformers.export_text(
        small | {"max_position_embeddings": 12, "intermediate_size": 64}, source.texts[0].encoder.state_dict()
    )
    wide = randomised(TextTransformer(**SIZES | {"channels": 32}, projection_channels=8))
    text_cfg = {"vocab_size": 300, "width": 32, "layers": 3, "heads": 2, "context_length": 12}
    second = open_clip.export_text({"embed_dim": 8, "text_cfg": text_cfg, "quick_gelu": True}, wide.state_dict())
    state = {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in first.items()}
    save_file(
        state | {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()},
        tmp_path / "xl.safetensors",
    )
    texts = [
        TextConditioner(TextTransformer(**SIZES)),
        TextConditioner(TextTransformer(**SIZES | {"channels": 32}, projection_channels=8), pooled=True),
    ]
    XLConditioner(texts, weights=tmp_path / "xl.safetensors")
    for conditioner, encoder in zip(texts, (source.texts[0].encoder, wide), strict=True):
        wanted, found = encoder.state_dict(), conditioner.encoder.state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("make", [text, xl])
@pytest.mark.parametrize("negative", [None, "ugly", LONG])
def test_a_sample_does_not_depend_on_how_long_other_prompts_of_its_batch_are(make, negative):
    conditioner = make().double()
    conditioner.long_prompt, conditioner.emphasis = "chunk", True
    widths = {f"{name}_channels": width for name, width in conditioner.provides.items()}
    stages = [{"depth": 1, "channel_mult": 1, "attention": "cross"}]
    net = randomised(UNet(3, 3, channels=8, stages=stages, num_heads=2, norm_groups=4, **widths)).double()
    diffusion = GaussianDiffusion(linear(1000), "eps")

    def images(captions: list[str], seeds: list[int]) -> Tensor:
        sizes = {"sizes": [[8, 8, 0, 0, 8, 8]] * len(seeds)} if make is xl else {}
        away = None if negative is None else {"caption": [negative] * len(seeds), **sizes}
        given = {"inputs": {"caption": captions, **sizes}, "negative": away, "conditioner": conditioner}
        sampler, guidance = Sampler(num_steps=2), ClassifierFreeGuidance(3.0)
        exact = {"dtype": torch.float64}  # guidance at a high noise level enlarges what is rounded
        return generate(net, diffusion, sampler, guidance, shape=(3, 8, 8), seeds=seeds, **given, **exact)

    both = images(["a (red:1.3) circle", LONG], [0, 1])
    assert_close(images(["a (red:1.3) circle"], [0]), both[:1], 1e-5)
    assert_close(images([LONG], [1]), both[1:], 1e-5)
    assert not torch.allclose(images([LONG[:-20]], [1]), both[1:], atol=1e-4)
