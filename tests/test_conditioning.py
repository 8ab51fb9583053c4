"""Conditioners: null and drop agree, inputs of another kind are refused, configs and weights rebuild them."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import assert_close, load
from safetensors.torch import load_file, save_file
from test_configs import ROOT, built, composed
from torch import Tensor, nn

from diffusion.checkpoint import build
from diffusion.conditioning import (
    ClassConditioner,
    Conditioner,
    ImageConditioner,
    JointConditioner,
    LowResolutionConditioner,
    TextConditioner,
    XLConditioner,
)
from diffusion.models.text import TextTransformer
from diffusion.models.vision import PatchEncoder
from diffusion.pretrained import compvis, transformers
from diffusion.tokenizer import _encoded

ENCODER = {"vocab_size": 300, "channels": 16, "num_layers": 3, "num_heads": 2, "max_length": 12}
CAPTIONS = ["a red circle", "two blue squares"]


def encoder(**changes) -> TextTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = TextTransformer(**ENCODER | changes)
        nn.init.normal_(net.norm_out.weight, 1.0, 0.2)
        nn.init.normal_(net.norm_out.bias, 0.0, 0.2)
    return net


def text(**settings) -> TextConditioner:
    return TextConditioner(encoder(**settings.pop("encoder", {})), **settings)


def images(count: int = 2, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def image_tokens() -> ImageConditioner:
    return ImageConditioner(PatchEncoder(16, 16, patch_size=8))


def xl() -> XLConditioner:
    texts = text(), text(encoder={"projection_channels": 10}, pooled=True, pad="zero")
    return XLConditioner(texts, size_channels=4)


BATCH = {"image": images(), "caption": CAPTIONS, "label": torch.tensor([3, 0]), "sizes": [[16, 8, 0, 0, 16, 8]] * 2}
KINDS = {
    "text": text,
    "text, trained from scratch": lambda: text(encoder={"causal": False}, masked=True, pad="zero"),
    "text, pooled": lambda: text(encoder={"projection_channels": 10}, pooled=True, layer="penultimate"),
    "text, weighed, in windows": lambda: text(emphasis=True, long_prompt="chunk", max_length=4, masked=True),
    "text, null is zeros": lambda: text(zero_null=True, encoder={"projection_channels": 10}, pooled=True, masked=True),
    "xl": xl,
    "class": lambda: ClassConditioner(5, 16),
    "image": image_tokens,
    "low resolution": lambda: LowResolutionConditioner(16, 4),
    "low resolution, kept": lambda: LowResolutionConditioner(16, 4, droppable=False),
    "joint": lambda: JointConditioner(
        [text(masked=True), ClassConditioner(5, 16), image_tokens(), LowResolutionConditioner(16, 4)]
    ),
}


@pytest.fixture(params=KINDS)
def conditioner(request) -> Conditioner:
    return KINDS[request.param]()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- what every conditioner keeps ------------------------------------------------------------------------------------


def test_the_condition_has_the_widths_and_rows_that_were_announced(conditioner):
    condition = conditioner(conditioner.prepare_batch(BATCH))
    assert conditioner.provides.keys() == condition.keys() - {"context_mask"}
    axes = {"context": 2, "vector": 1, "concat": 1}
    for name, width in conditioner.provides.items():
        assert condition[name].shape[0] == 2 and condition[name].shape[axes[name]] == width
    if "context_mask" in condition:
        assert condition["context_mask"].shape == condition["context"].shape[:2]


def test_dropped_rows_are_the_null_condition_and_others_are_untouched(conditioner):
    prepared = conditioner.prepare_batch(BATCH)
    given, null = conditioner(prepared), conditioner(conditioner.null_like(prepared))
    mixed = conditioner(prepared, torch.tensor([True, False]))
    assert mixed.keys() == given.keys() == null.keys()
    for name in mixed:
        torch.testing.assert_close(mixed[name][0], null[name][0])
        torch.testing.assert_close(mixed[name][1], given[name][1])
    assert same(conditioner(prepared, torch.tensor([False, False])), given)
    assert same(conditioner(prepared, torch.tensor([True, True])), null)


def test_a_condition_differs_from_null_unless_it_may_not_be_dropped(conditioner):
    prepared = conditioner.prepare_batch(BATCH)
    given, null = conditioner(prepared), conditioner(conditioner.null_like(prepared))
    kept = getattr(conditioner, "droppable", True) is False
    assert same(given, null) is kept


def test_in_half_precision_the_condition_is_almost_the_same(conditioner):
    with torch.no_grad():
        full = conditioner(conditioner.prepare_batch(BATCH), torch.tensor([True, False]))
        conditioner.to(torch.bfloat16)
        half = conditioner(conditioner.prepare_batch(BATCH), torch.tensor([True, False]))
    for name, value in full.items():
        assert_close(half[name].float(), value.float(), 0.05, name)


def test_a_row_does_not_depend_on_its_neighbours(conditioner):
    prepared = conditioner.prepare_batch(BATCH)
    both, one = conditioner(prepared), conditioner(prepared[1:])
    for name in both:
        torch.testing.assert_close(both[name][1:], one[name])


def test_every_trained_parameter_gets_a_gradient(conditioner):
    condition = conditioner(conditioner.prepare_batch(BATCH), torch.tensor([True, False]))
    total = sum(value.square().sum() for value in condition.values() if value.is_floating_point())
    if not list(conditioner.parameters()):
        assert not total.requires_grad
        return
    total.backward()
    for name, parameter in conditioner.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_batch_without_the_entry_is_refused_by_its_name(conditioner):
    with pytest.raises(ValueError, match=r"conditioned on `\w+`, but the data give only index"):
        conditioner.prepare_batch({"index": torch.tensor([0, 1])})


# --- text ------------------------------------------------------------------------------------------------------------


def test_null_is_the_empty_caption():
    for pad in ("end", "zero"):
        conditioner = text(pad=pad)
        prepared = conditioner.prepare(CAPTIONS)
        assert torch.equal(conditioner.null_like(prepared), conditioner.prepare(["", ""]))
        assert torch.equal(conditioner.null_like(prepared)[0], conditioner.tokenizer.empty)


def test_the_layer_and_its_norm_are_the_ones_asked_for():
    net = encoder()
    for layer, index in (("last", -1), ("penultimate", -2), (-4, 0)):
        for final_norm in (True, False):
            conditioner = TextConditioner(net, layer=layer, final_norm=final_norm)
            tokens = conditioner.prepare(CAPTIONS)
            state = net(tokens)[index]
            expected = net.norm_out(state) if final_norm else state
            assert torch.equal(conditioner(tokens)["context"], expected)
            pooled = TextConditioner(net, layer=layer, final_norm=final_norm, pooled=True)(tokens)
            assert torch.equal(pooled["context"], expected)
            assert torch.equal(pooled["vector"], net.pool(net.norm_out(net(tokens)[-1]), tokens))


def test_the_vector_is_the_projected_state_at_the_captions_end():
    conditioner = text(encoder={"projection_channels": 10}, pooled=True)
    assert conditioner.provides == {"context": 16, "vector": 10}
    tokens = conditioner.prepare(CAPTIONS)
    end = (tokens == conditioner.tokenizer.end).int().argmax(1)
    condition = conditioner(tokens)
    expected = conditioner.encoder.projection(condition["context"][torch.arange(2), end])
    assert torch.equal(condition["vector"], expected)


@pytest.mark.parametrize("pad", ["end", "zero"])
def test_the_mask_ends_with_the_first_end_and_padding_then_changes_nothing(pad):
    conditioner = text(encoder={"causal": False}, masked=True, pad=pad)
    tokens = conditioner.prepare(CAPTIONS)
    condition = conditioner(tokens)
    lengths = [2 + len(_encoded(caption)) for caption in CAPTIONS]
    assert condition["context_mask"].sum(1).tolist() == lengths
    other = torch.where(condition["context_mask"], tokens, 7)
    mask = condition["context_mask"]
    with torch.no_grad():
        states = conditioner.encoder(other, mask)
    assert torch.equal(conditioner.encoder.norm_out(states[-1])[mask], condition["context"][mask])


def test_a_shorter_context_is_the_beginning_of_a_causal_transformers():
    net = encoder()
    short, long = TextConditioner(net, max_length=6), TextConditioner(net)
    torch.testing.assert_close(
        short(short.prepare(CAPTIONS))["context"], long(long.prepare(CAPTIONS))["context"][:, :6]
    )


def test_a_frozen_encoder_stays_in_eval_mode_and_without_gradients():
    conditioner = text(frozen=True).train()
    assert conditioner.training and not conditioner.encoder.training and not conditioner.encoder.blocks[0].training
    assert not any(parameter.requires_grad for parameter in conditioner.parameters())
    assert not conditioner(conditioner.prepare(CAPTIONS))["context"].requires_grad
    assert text().train().encoder.training


def test_prompts_that_are_no_text_are_refused():
    conditioner = text()
    for values, shown in (
        (torch.tensor([3, 4]), r"a tensor \(2,\) of torch.int64"),
        ([3, 7], "caption 0 is not text: .*got 3"),
        (["a cat", None], "caption 1 is not text: .*got None"),
        (None, "got None"),
        (3, "got 3"),
    ):
        with pytest.raises(ValueError, match=f'{shown}.*prompt="..."') as error:
            conditioner.prepare(values)
        assert "conditioned on captions" in str(error.value)


def test_one_prompt_is_a_list_of_one():
    conditioner = text()
    assert torch.equal(conditioner.prepare("a red circle"), conditioner.prepare(["a red circle"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 13}, "max_length=13, but the text transformer has 12 positions"),
        ({"max_length": 2}, "max_length=2 leaves no room"),
        ({"pad": "eos"}, "pad='eos' is unknown; choose 'end' .* or 'zero'"),
        ({"layer": "first"}, "layer='first' is not one of a text transformer of 3 layers"),
        ({"layer": -5}, "layer=-5"),
        ({"layer": 1}, "layer=1"),
        ({"encoder": {"vocab_size": 2}}, "vocab_size=2 leaves no id"),
        ({"weights": "nowhere.safetensors"}, "there is no nowhere.safetensors"),
    ],
)
def test_impossible_text_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        text(**settings)


def test_weights_come_from_a_file_and_are_not_needed_to_rebuild(tmp_path):
    case = load("clip/clip_hf_quickgelu")
    save_file(case.group("weights"), tmp_path / "text.safetensors")
    node = {
        "_target_": "diffusion.conditioning.TextConditioner",
        "encoder": {
            "_target_": "diffusion.models.text.TextTransformer",
            **transformers.text_config(case.config, projected=True),
        },
        "frozen": True,
        "final_norm": True,
        "weights": str(tmp_path / "text.safetensors"),
    }
    allowed = {"diffusion.conditioning.TextConditioner", "diffusion.models.text.TextTransformer"}
    first = build(node, allowed)
    assert_close(first(case["in.input_ids"])["context"], case["out.last_hidden_state"], 5e-5)

    save_file(first.state_dict(), tmp_path / "ours.safetensors")
    (tmp_path / "text.safetensors").unlink()
    again = build({**node, "weights": None}, allowed)
    again.load_state_dict(load_file(tmp_path / "ours.safetensors"))
    assert same(first(case["in.input_ids"]), again(case["in.input_ids"]))


def test_nothing_is_read_on_the_meta_device():
    with torch.device("meta"):
        conditioner = text(weights="nowhere.safetensors", frozen=True)
    assert conditioner.encoder.norm_out.weight.is_meta


# --- classes ---------------------------------------------------------------------------------------------------------


def test_a_label_is_a_row_and_the_null_label_the_last_one():
    conditioner = ClassConditioner(4, 8)
    context = conditioner(conditioner.prepare([2, -1, 0]))["context"]
    assert context.shape == (3, 1, 8)
    assert torch.equal(context[:, 0], conditioner.embedding.weight[[2, 4, 0]])
    assert conditioner.num_classes == 4 and conditioner.entries == ("label",)


def test_the_class_token_conditions_latent_diffusions_network_as_its_context():
    case = load("unet/ldm_classcond_ctx")
    net = compvis.load_unet(case.config, case.group("weights")).eval()
    conditioner = ClassConditioner(2, case.config["context_dim"])
    rows = case["in.context"][:, :1]
    conditioner.embedding.weight.data[:2] = rows[:, 0]
    with torch.no_grad():
        condition = conditioner(conditioner.prepare([0, 1]))
        x, t, label = case["in.x"], case["in.timesteps"], case["in.y"]
        assert_close(net(x, t, label=label, **condition), net(x, t, label=label, context=rows), 1e-5)


def test_labels_that_are_none_are_refused():
    conditioner = ClassConditioner(4, 8)
    for values, message in (
        (["a cat"], "class labels, integers of 0 to 3, but got .'a cat'.; a text needs a model trained on captions"),
        ("a cat", "got 'a cat'"),
        (None, "got None"),
        (torch.tensor([0.5]), "of torch.float32"),
        (torch.tensor(3), "class labels"),
        ([0, 4], "labels from 0 to 4 given, but this model knows the classes 0 to 3 and -1"),
        ([-2, 1], "labels from -2 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            conditioner.prepare(values)
    for num_classes in (0, None):
        with pytest.raises(ValueError, match=f"num_classes={num_classes}; a class conditioner needs data with classes"):
            ClassConditioner(num_classes)


# --- images ----------------------------------------------------------------------------------------------------------


def test_an_absent_image_is_the_learned_token_everywhere():
    conditioner = image_tokens()
    prepared = conditioner.prepare(images())
    null = conditioner(conditioner.null_like(prepared))["context"]
    assert torch.equal(null, conditioner.null.expand(2, 4, 16))
    assert not torch.allclose(conditioner(torch.zeros_like(prepared))["context"], null)


def test_an_image_of_another_size_is_resized_to_the_encoders():
    conditioner = image_tokens()
    flat = torch.full((1, 3, 40, 24), 0.3)
    context = conditioner(conditioner.prepare(flat))["context"]
    torch.testing.assert_close(context, conditioner(torch.full((1, 3, 16, 16), 0.3))["context"])
    assert torch.equal(conditioner.prepare(list(images())), images())


def test_the_low_resolution_is_a_mean_over_blocks_and_comes_at_the_networks_size():
    x = images()
    conditioner = LowResolutionConditioner(16, 4, kernel="area")
    low = conditioner.prepare(x)
    torch.testing.assert_close(low, F.avg_pool2d(x, 4))
    concat = conditioner(low)["concat"]
    assert concat.shape == x.shape
    torch.testing.assert_close(concat, F.interpolate(low, (16, 16), mode="bilinear", align_corners=False))
    latent = LowResolutionConditioner(16, 4, kernel="area", size=4)
    assert torch.equal(latent(latent.prepare(x))["concat"], low)
    small = LowResolutionConditioner(16, 4, kernel="area", size=(2, 2))
    assert small(small.prepare(x))["concat"].shape == (2, 3, 2, 2)


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear", "area"])
def test_what_is_small_already_is_taken_as_it_is(kernel):
    conditioner = LowResolutionConditioner((16, 8), 4, kernel=kernel, blur=2.0)
    small = torch.rand(1, 3, 4, 2) * 2 - 1
    assert torch.equal(conditioner.prepare(small), small)
    reduced = conditioner.prepare(torch.rand(1, 3, 16, 8) * 2 - 1)
    assert reduced.shape == small.shape and reduced.abs().max() <= 1
    flat = torch.full((1, 3, 16, 8), 0.25)
    torch.testing.assert_close(conditioner.prepare(flat), torch.full((1, 3, 4, 2), 0.25))


def test_the_blur_is_gaussian():
    point = torch.full((1, 3, 33, 32), -1.0)
    point[:, :, 16, 16] = 1
    conditioner = LowResolutionConditioner((33, 16), 1, kernel="area", blur=1.5)
    blurred = (conditioner.prepare(point)[0, 0] + 1) / 2
    rows, total, at = blurred.sum(1), blurred.sum(), torch.arange(33.0) - 16
    assert total.item() == pytest.approx(0.5, abs=1e-4)  # the area of two columns is one
    assert ((rows * at**2).sum() / total).item() == pytest.approx(1.5**2, rel=0.05)
    torch.testing.assert_close(rows[16 + 2] / rows[16], torch.tensor(-0.5 * (2 / 1.5) ** 2).exp())


def test_the_overshoot_of_a_bicubic_kernel_is_cut_off():
    x = torch.ones(1, 3, 16, 16)
    x[..., 8:] = -1
    low = LowResolutionConditioner(16, 2, kernel="bicubic").prepare(x)
    raw = F.interpolate(x, (8, 8), mode="bicubic", antialias=True)
    assert raw.max() > 1.01 and torch.equal(low, raw.clamp(-1, 1))


def test_images_that_are_none_are_refused():
    for conditioner in (image_tokens(), LowResolutionConditioner(16, 4)):
        for values, message in (
            (["a cat"], "conditioned on images, a float tensor .* got .'a cat'."),
            (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "of torch.uint8"),
            (torch.zeros(3, 16, 16), r"got a tensor \(3, 16, 16\)"),
            (torch.zeros(2, 1, 16, 16), "images of 3 channels, but got 1"),
            (torch.full((2, 3, 16, 16), 128.0), r"must be in \[-1, 1\]; these are from 128 to 128"),
            (torch.full((2, 3, 16, 16), torch.nan), "from nan to nan"),
            ([torch.zeros(3, 16, 16), torch.zeros(3, 8, 8)], "must have one shape"),
            (None, "got None"),
        ):
            with pytest.raises(ValueError, match=message):
                conditioner.prepare(values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 3}, r"factor=3 does not divide image_size=\(16, 16\)"),
        ({"factor": 0}, "factor=0"),
        ({"kernel": "lanczos"}, "kernel='lanczos' is unknown; choose 'bicubic', 'bilinear' or 'area'"),
        ({"blur": -1.0}, "blur=-1.0"),
        ({"blur": 5.0}, "blur=5.0 is a standard deviation in pixels; choose 0 to a third of the image's side, 16"),
    ],
)
def test_impossible_low_resolutions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LowResolutionConditioner(16, **{"factor": 4} | settings)


# --- several at once -------------------------------------------------------------------------------------------------


def test_contexts_follow_one_another_and_unmasked_ones_are_seen_entirely():
    parts = [text(masked=True), ClassConditioner(5, 16)]
    joint = JointConditioner(parts)
    assert joint.entries == ("caption", "label") and joint.num_classes == 5
    condition = joint(joint.prepare_batch(BATCH))
    one, other = (part(part.prepare_batch(BATCH)) for part in parts)
    assert torch.equal(condition["context"], torch.cat([one["context"], other["context"]], dim=1))
    assert (
        torch.equal(condition["context_mask"][:, :12], one["context_mask"]) and condition["context_mask"][:, 12].all()
    )
    again = joint(joint.prepare([CAPTIONS, [3, 0]]))
    assert same(condition, again)


def test_vectors_and_channels_stand_side_by_side():
    parts = [text(pooled=True), text(pooled=True, encoder={"projection_channels": 3}, max_length=5)]
    joint = JointConditioner([*parts, LowResolutionConditioner(16, 4), LowResolutionConditioner(16, 2)])
    assert joint.provides == {"context": 16, "vector": 19, "concat": 6}
    condition = joint(joint.prepare_batch(BATCH))
    assert condition["vector"].shape == (2, 19) and condition["concat"].shape == (2, 6, 16, 16)
    assert condition["context"].shape == (2, 17, 16)


def test_prepared_inputs_of_several_move_and_are_cut_together():
    joint = JointConditioner([text(), ClassConditioner(5, 16)])
    prepared = joint.prepare_batch(BATCH)
    assert len(prepared) == 2 and len(prepared[:1].to("cpu")) == 1
    assert [len(part) for part in prepared[1:].parts] == [1, 1]


def test_conditioners_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="contexts of 16 and of 8 channels cannot follow one another"):
        JointConditioner([text(), ClassConditioner(5, 8)])
    with pytest.raises(ValueError, match="needs at least one conditioner"):
        JointConditioner([])
    with pytest.raises(ValueError, match="1 inputs for 2 conditioners; give one each"):
        JointConditioner([text(), ClassConditioner(5, 16)]).prepare([CAPTIONS])


# --- configs ---------------------------------------------------------------------------------------------------------

MILLIONS = {"clip_l": 123.06, "openclip_h": 352.98, "sdxl": 817.72, "ldm_text": 542.90, "text": 6.73}
MILLIONS |= {"image_tokens": 0.42}
TOKENS = ["class_token", "lowres_concat", "text_small"]


@pytest.mark.parametrize("option", [*MILLIONS, *TOKENS])
def test_every_conditioner_of_the_configs_is_built_from_plain_data(option):
    node = composed(f"conditioner={option}", "data=shapes")["conditioner"]
    with torch.device("meta"):
        conditioner = built(node)
    if option in MILLIONS:
        millions = sum(p.numel() for p in conditioner.parameters()) / 1e6
        assert millions == pytest.approx(MILLIONS[option], abs=0.01)
    frozen = bool(list(conditioner.parameters())) and not any(p.requires_grad for p in conditioner.parameters())
    assert frozen == (option in ("clip_l", "openclip_h", "sdxl"))
    with torch.device("meta"):
        again = build(node)
    assert again.state_dict().keys() == conditioner.state_dict().keys()


def test_no_conditioner_of_the_configs_is_left_out():
    files = {path.stem for path in (ROOT / "configs" / "conditioner").glob("*.yaml")}
    assert files == {*MILLIONS, *TOKENS, "none"}


def test_the_configs_fit_the_networks_that_they_are_for():
    for option, net in (("clip_l", "sd15"), ("openclip_h", "sd21"), ("sdxl", "sdxl")):
        config = composed(f"conditioner={option}", f"net={net}")
        with torch.device("meta"):
            conditioner, network = built(config["conditioner"]), built(config["net"])
        assert conditioner.provides["context"] == network.context_channels
        assert conditioner.provides.get("vector") == network.vector_channels
