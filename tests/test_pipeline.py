"""The pipeline as a whole and by hand; precision, offloading, and what is decided for the user."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_cases import autoencoder
from PIL import Image
from torch import nn

from diffusion.denoiser import denoiser
from diffusion.devices import choose_device, choose_dtype, half_weights, in_own_precision, resident
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.images import to_pil, to_uint8
from diffusion.models.text import TextTransformer
from diffusion.models.unet import UNet
from diffusion.own_settings import with_own_settings
from diffusion.pipeline import LatentDiffusion
from diffusion.prepare import (
    TILE,
    choose_tile,
    count_steps,
    prepared,
    say_decided,
    set_text_options,
    text_options_kept,
    with_parameterization,
)
from diffusion.probing import answer_to_noise, likely
from diffusion.process import GaussianDiffusion
from diffusion.sampling import SampleNoise, Sampler
from diffusion.schedule import scaled_linear
from diffusion.text_conditioning import TextConditioner, XLConditioner

CPU = torch.device("cpu")
SIZE = 16
FACTS = {"shape": [3, SIZE, SIZE], "num_classes": None, "class_names": None, "condition_drop": 0.1}
PUBLISHED = {**FACTS, "task": "text-to-image", "sampler": "ldm_ddim", "guidance_scale": 7.5}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.05
            middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(middle, spread, generator=draws)
    return module.eval()


def texts(**settings) -> TextConditioner:
    encoder = TextTransformer(vocab_size=4096, channels=16, num_layers=3, num_heads=2, max_length=12)
    return randomised(TextConditioner(encoder, **settings), 1)


def unet(**settings) -> UNet:
    stages = [{"depth": 1}, {"depth": 1, "attention": "cross"}]
    own = {"channels": 16, "norm_groups": 8, "num_heads": 2, "context_channels": 16, "stages": stages}
    return randomised(UNet(**{"in_channels": 2, "out_channels": 2, **own, **settings}))


def pipeline(**parts) -> LatentDiffusion:
    own = {"autoencoder": autoencoder(seed=4, scale_factor=0.5), "conditioner": texts(), "net": unet()}
    made = {
        "diffusion": GaussianDiffusion(scaled_linear(), "eps"),
        "facts": PUBLISHED,
        "sampler": Sampler(4, clip=None),
    }
    return LatentDiffusion(**{**own, **made, **parts})


def config(**changes) -> dict:
    from diffusion.pipeline import UNSAID

    return {**UNSAID, "device": "cpu", "dtype": "float32", "prompt": "a fox", "num_samples": 1, **changes}


# --- as a whole and by hand ------------------------------------------------------------------------------------------


def test_a_call_is_the_loop_that_the_docstring_writes_out():
    pipe = pipeline()
    images = pipe("a red fox", seed=3, guidance_scale=5.0)
    condition, null = pipe.told("a red fox")
    denoise = ClassifierFreeGuidance(5.0)(pipe.diffusion, pipe.net, condition, null)
    noise = SampleNoise([3])
    x = noise.initial(pipe.autoencoder.latent_shape((3, SIZE, SIZE)))
    for state in pipe.sampler.states(pipe.diffusion, denoise, x, noise=noise):
        x = state.x
    assert torch.equal(pipe.decode(x), images)
    assert images.shape == (1, 3, SIZE, SIZE) and images.dtype == torch.float32


def test_the_parts_can_be_used_without_the_pipeline():
    pipe = pipeline()
    prepared = pipe.conditioner.prepare(["a red fox"])
    context = pipe.conditioner(prepared)["context"]
    x = SampleNoise([0]).initial((2, 8, 8))
    for state in Sampler(4, clip=None).states(
        pipe.diffusion, denoiser(pipe.diffusion, pipe.net, context=context), x, noise=SampleNoise([0])
    ):
        x = state.x
    with torch.no_grad():
        by_hand = pipe.autoencoder.decode(x)
    assert torch.equal(by_hand, pipe("a red fox", guidance_scale=1.0))


def test_pictures_depend_on_their_seed_prompt_and_negative_prompt():
    pipe = pipeline()
    both = pipe(["a red fox", "two cats"], seed=7)
    assert both.shape[0] == 2
    assert torch.equal(both[1:], pipe("two cats", seed=8))
    assert not torch.equal(both[:1], pipe("a red fox", seed=8))
    assert not torch.equal(both[:1], pipe("a red fox", seed=7, negative_prompt="grey"))
    torch.testing.assert_close(both[:1], pipe("a red fox", seed=7, negative_prompt=""))
    assert pipe("a red fox", num_samples=3).shape[0] == 3


def test_an_empty_prompt_is_the_null_condition():
    pipe = pipeline()
    condition, null = pipe.told("")
    assert torch.equal(condition["context"], null["context"])
    assert pipe("").isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(24, 16), (16, 32)])
def test_height_and_width_are_the_pictures(height, width):
    assert pipeline()("a fox", height=height, width=width).shape == (1, 3, height, width)


def test_a_size_that_does_not_divide_names_the_nearest():
    with pytest.raises(ValueError, match=r"height=18 must be a multiple of 4 for this model; .* 16 or 20"):
        pipeline()("a fox", height=18)


def test_num_steps_and_samplers_are_a_calls_to_choose():
    pipe, steps = pipeline(), []
    pipe("a fox", num_steps=2, on_step=steps.append)
    assert steps == [1, 1]
    other = pipe("a fox", sampler=Sampler(3, "dpmpp_2m", clip=None))
    assert not torch.equal(other, pipe("a fox", num_steps=3))


def test_a_setting_that_there_is_not_is_an_error():
    with pytest.raises(ValueError, match="there is no stepps; the settings are prompt"):
        pipeline()("a fox", stepps=3)
    with pytest.raises(ValueError, match="not trained with classes"):
        pipeline()("a fox", labels=[1])


def test_pictures_are_given_as_files_or_as_images(tmp_path):
    pipe, draws = pipeline(), torch.Generator().manual_seed(0)
    image = to_pil(torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8, generator=draws).numpy())
    image.save(tmp_path / "a.png")
    got = pipe("a fox", image=image, strength=0.5)
    assert torch.equal(got, pipe("a fox", image=str(tmp_path / "a.png"), strength=0.5))
    assert not torch.equal(got, pipe("a fox", image=image, strength=0.75))
    assert torch.equal(pipe("a fox", image=image), pipe("a fox", image=image, strength=0.75))
    mask = Image.new("L", (SIZE, SIZE), 255)
    torch.testing.assert_close(pipe("a fox", image=image, mask=mask), pipe("a fox"))
    black = Image.new("L", (SIZE, SIZE), 0)
    assert (
        to_uint8(pipe("a fox", image=[image, image], mask=[mask, black], num_samples=2))[1] == np.array(image)
    ).all()


def test_pictures_go_through_the_pipeline_in_both_directions():
    pipe = pipeline()
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = pipe.encode(images)
    torch.testing.assert_close(latents, pipe.autoencoder.encode(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pipe.decode(latents), pipe.autoencoder.decode(latents), atol=1e-5, rtol=1e-5)


# --- text options and sizes ------------------------------------------------------------------------------------------


def test_text_options_hold_for_one_call():
    pipe = pipeline()
    plain = pipe("a (red:1.5) fox")
    skipped = pipe("a (red:1.5) fox", clip_skip=2)
    weighed = pipe("a (red:1.5) fox", emphasis=True)
    assert not torch.equal(plain, skipped) and not torch.equal(plain, weighed)
    assert pipe.conditioner.clip_skip == 1 and not pipe.conditioner.emphasis
    assert torch.equal(pipe("a (red:1.5) fox"), plain)


def test_a_long_prompt_in_chunks_meets_a_short_negative_one():
    pipe = pipeline()
    long = "a fox " * 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunked = pipe(long, negative_prompt="grey", long_prompt="chunk")
    with pytest.warns(UserWarning, match="cut off"):
        cut = pipe(long, negative_prompt="grey")
    assert not torch.equal(chunked, cut)


def test_text_options_of_a_model_without_text_are_an_error():
    with pytest.raises(ValueError, match="clip_skip=2 is for models that read text"):
        set_text_options(None, {"clip_skip": 2})
    set_text_options(None, {"clip_skip": None, "emphasis": False})
    with text_options_kept(None):
        pass


def xl() -> LatentDiffusion:
    kind = {"vocab_size": 4096, "num_layers": 2, "num_heads": 2, "max_length": 12}
    first = TextConditioner(TextTransformer(channels=16, **kind), layer="penultimate", final_norm=False)
    encoder = TextTransformer(channels=8, projection_channels=8, **kind)
    second = TextConditioner(encoder, layer="penultimate", final_norm=False, pad="zero", pooled=True)
    conditioner = randomised(XLConditioner([first, second], size_channels=4), 2)
    net = unet(context_channels=24, vector_channels=8 + 6 * 4)
    return pipeline(net=net, conditioner=conditioner)


def test_xl_is_told_the_sizes():
    pipe = xl()
    plain = pipe("a fox")
    assert torch.equal(pipe("a fox", original_size=[SIZE, SIZE], crop=[0, 0]), plain)
    assert not torch.equal(pipe("a fox", crop=[0, 200]), plain)
    assert not torch.equal(pipe("a fox", original_size=[64, 64]), plain)
    told = pipe.told("a fox", shape=(3, 24, 32))[0]["vector"][0, 8:].view(6, 4)
    assert torch.equal(told[0], told[4]) and torch.equal(told[1], told[5]) and torch.equal(told[2], told[3])
    assert not torch.equal(told[0], told[1])


@pytest.mark.parametrize("wrong", [{"crop": [1]}, {"crop": [-1, 0]}, {"original_size": [0, 4]}, {"crop": "no"}])
def test_sizes_that_are_none_are_an_error(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be"):
        xl()("a fox", **wrong)


def test_sizes_for_a_model_without_them_are_an_error():
    with pytest.raises(ValueError, match=r"crop=\[0, 0\], but this model was not trained with sizes"):
        pipeline()("a fox", crop=[0, 0])


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_computed_as_such_and_the_sampler_in_float32(dtype):
    reference = pipeline()("a red fox")
    pipe, seen = pipeline().to("cpu", dtype), []
    assert {half_weights(part) for part in (pipe.net, pipe.autoencoder, pipe.conditioner)} == {dtype}

    def watch(module, given):
        seen.append((given[0].dtype, torch.is_autocast_enabled("cpu")))

    pipe.net.register_forward_pre_hook(watch)
    images = pipe("a red fox")
    assert set(seen) == {(dtype, False)}
    assert images.dtype == torch.float32 and 0 < (images - reference).abs().mean() < 0.05


def test_networks_of_ours_keep_their_weights_in_float32():
    pipe = pipeline(facts=FACTS).to("cpu", torch.bfloat16)
    assert half_weights(pipe.net) is None
    assert pipe("a fox").isfinite().all()


def test_a_half_precision_autoencoder_that_overflows_is_asked_again_in_float32():
    pipe = pipeline().to("cpu", torch.float16)
    with torch.no_grad():
        pipe.autoencoder.decoder.conv_out.weight *= 1e5
    with pytest.warns(UserWarning, match="overflowed float16 in the autoencoder"):
        images = pipe.decode(torch.ones(1, 2, 8, 8))
    assert images.isfinite().all() and next(pipe.autoencoder.parameters()).dtype == torch.float16


def test_an_autoencoder_with_half_weights_codes_what_it_is_given():
    pipe = pipeline()
    latents, images = torch.ones(1, 2, 8, 8), torch.zeros(1, 3, SIZE, SIZE)
    expected = pipe.decode(latents), pipe.encode(images)
    pipe.autoencoder.to(torch.bfloat16)
    got = pipe.decode(latents), pipe.encode(images)
    for ours, reference in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, reference, atol=0.1, rtol=0)


def test_a_network_with_half_weights_takes_what_it_is_given():
    net = unet().to(torch.bfloat16)
    x, context = torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 16)
    assert in_own_precision(net)(x, torch.tensor([5]), context=context).dtype == torch.bfloat16
    plain = unet()
    assert in_own_precision(plain) is plain


def test_dtype_auto_is_float32_but_for_published_weights_on_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    assert choose_dtype("auto", CPU, published=True) == choose_dtype("auto", gpu) == torch.float32
    for knows, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, knows=knows, **kwargs: knows)
        assert choose_dtype("auto", gpu, published=True) == expected
    assert choose_dtype("float16", gpu) == torch.float16
    with pytest.raises(ValueError, match="dtype must be auto or one of float32"):
        choose_dtype("half")


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="device=nonsense cannot be used here"):
        choose_device("nonsense")


# --- one part at a time ----------------------------------------------------------------------------------------------


class Moving(nn.Module):
    """Notes where it is moved to."""

    def __init__(self, name: str, log: list) -> None:
        super().__init__()
        self.name, self.log = name, log

    def to(self, device, *args):
        self.log.append((self.name, str(device)))
        return self


def test_sequential_offload_has_one_part_on_the_device_at_a_time():
    log: list[tuple[str, str]] = []
    gpu = torch.device("cuda")
    for name in ("text", "net"):
        with resident(Moving(name, log), gpu, "sequential"):
            assert log[-1] == (name, "cuda")
        with resident(Moving(name, log), gpu, None), resident(None, gpu, "sequential"):
            pass
    assert log == [("text", "cuda"), ("text", "cpu"), ("net", "cuda"), ("net", "cpu")]


def test_offloading_changes_no_picture_and_leaves_all_parts_on_the_cpu(monkeypatch):
    pipe, seen = pipeline(), []
    for name in ("conditioner", "net", "autoencoder"):
        part = getattr(pipe, name)

        def moved_to(*where, move=part.to, name=name, **how):
            seen.append((name, *map(str, where)))
            return move(*where, **how)

        monkeypatch.setattr(part, "to", moved_to)
    expected = pipe("a fox")
    seen.clear()
    assert torch.equal(pipe("a fox", offload="sequential"), expected)
    moved = [name for name, *where in seen if len(where) == 1]
    assert moved == ["conditioner"] * 2 + ["net"] * 2 + ["autoencoder"] * 2
    with pytest.raises(ValueError, match="offload must be sequential or null, got 'disk'"):
        pipe("a fox", offload="disk")


def test_large_pictures_are_decoded_in_tiles(capsys):
    coder = SimpleNamespace(latent_shape=lambda shape: (4, shape[1] // 8, shape[2] // 8))
    assert choose_tile(None, coder, (3, 1024, 1024), silent=False) is None
    assert choose_tile(32, coder, (3, 4096, 4096), silent=False) == 32
    assert choose_tile(None, None, (3, 4096, 4096), silent=False) is None
    assert capsys.readouterr().err == ""
    assert choose_tile(None, coder, (3, 1024, 1088), silent=False) == TILE
    assert "1088x1024 is decoded in tiles" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu_the_picture_is_that_of_the_cpu_offloaded_or_not(dtype):
    expected = pipeline()("a fox")
    pipe = pipeline().to("cuda", dtype)
    images = pipe("a fox")
    assert (images - expected).abs().mean() < (1e-4 if dtype == torch.float32 else 0.03)
    torch.testing.assert_close(pipe("a fox", offload="sequential"), images, atol=1e-3, rtol=0)
    assert next(pipe.net.parameters()).device.type == "cpu"


# --- what the network predicts ---------------------------------------------------------------------------------------


class Answers(nn.Module):
    """Answers what a perfect network would of data that are one picture: eps or v."""

    size_factor, num_classes, in_channels = 8, None, 2

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight, self.calls = kind, nn.Parameter(torch.ones(1)), 0

    def forward(self, x, t, *, context=None, concat=None):
        self.calls += 1
        at = scaled_linear().level(t).to(x)
        x0 = torch.linspace(-1, 1, x[0].numel()).view_as(x[0]).expand_as(x)
        eps = (x - at.alpha * x0) / at.sigma
        return eps if self.kind == "eps" else at.alpha * eps - at.sigma * x0


def predicting(answers: str, said: str, recognised: str | None = "eps") -> LatentDiffusion:
    diffusion = GaussianDiffusion(scaled_linear(), said)
    sizes = {"image_size_by_parameterization": {"eps": 16, "v": 24}}
    told = {"recognised": SimpleNamespace(parameterization=recognised), "facts": {**PUBLISHED, **sizes}}
    return pipeline(net=Answers(answers), diffusion=diffusion, **told)


@pytest.mark.parametrize(("kind", "low", "high"), [("eps", 0.95, 1.0), ("v", -0.5, 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_answer_to_noise_tells_eps_from_v(kind, low, high, dtype):
    assert low < answer_to_noise(predicting(kind, "eps"), CPU, dtype) <= high


def test_an_answer_is_taken_for_what_it_is_nearer_to():
    assert [likely(value) for value in (1.0, 0.8, 0.2, 0.0, -0.6)] == ["eps", "eps", "v", "v", "v"]


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_what_no_file_says_the_network_is_asked_once(kind, capsys):
    model = predicting(kind, "eps", None)
    found = with_parameterization(model, CPU, torch.float32)
    assert found.diffusion.parameterization == kind and model.net.calls == 1
    assert f"parameterization={kind}, as the network answers" in capsys.readouterr().err
    assert found.facts["shape"][1] == {"eps": 16, "v": 24}[kind]


@pytest.mark.parametrize(("answers", "said"), [("eps", "v"), ("v", "eps")])
def test_a_wrong_parameterization_warns_before_minutes_are_spent(answers, said):
    with pytest.warns(UserWarning, match=f"as predicting {said}, .* try parameterization={answers}"):
        found = with_parameterization(predicting(answers, said, said), CPU, torch.float32)
    assert found.diffusion.parameterization == said
    with pytest.warns(UserWarning, match=f"try parameterization={answers}"):
        with_parameterization(predicting(answers, "eps", None), CPU, torch.float32, given=said)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_a_right_parameterization_is_not_talked_about(kind, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_parameterization(predicting(kind, kind, kind), CPU, torch.float32)
        found = with_parameterization(predicting(kind, "eps", None), CPU, torch.float32, given=kind)
    assert found.diffusion.parameterization == kind and capsys.readouterr().err == ""


def test_models_of_ours_are_not_asked():
    model = replace(predicting("v", "eps"), facts=FACTS)
    assert with_parameterization(model, CPU, torch.float32) is model and model.net.calls == 0


def test_the_size_that_goes_with_the_answer_is_drawn():
    model, told = prepared(predicting("v", "eps", None), Sampler(2, clip=None), ClassifierFreeGuidance(2.0), config())
    assert told["shape"] == (3, 24, 24) and model.diffusion.parameterization == "v"


@pytest.mark.parametrize("extra", [3, 2])
def test_networks_that_read_pictures_are_shown_a_blank_one(extra):
    class Reading(Answers):
        in_channels = 2 + extra

        def forward(self, x, t, *, concat, context=None):
            assert concat.shape[1] == extra
            return super().forward(x, t, context=context)

    model = replace(predicting("eps", "eps"), net=Reading("eps"))
    assert answer_to_noise(model, CPU, torch.float32) > 0.95


# --- a model's own settings ------------------------------------------------------------------------------------------


def own(*typed: str, facts=PUBLISHED):
    guidance = {"_target_": "diffusion.guidance.ClassifierFreeGuidance", "guidance_scale": 2.0, "rescale": 0.0}
    given = {"sampler": {"num_steps": 50, "spacing": "trailing"}, "guidance": guidance, "prompt": "a fox"}
    return with_own_settings(given, SimpleNamespace(facts=facts), typed)


def test_a_published_model_brings_its_sampler_and_scale_along(capsys):
    found = own()
    assert found["sampler"]["spacing"] == "ldm" and found["sampler"]["num_steps"] == 50
    assert found["guidance"]["guidance_scale"] == 7.5
    assert "this model's own settings: sampler=ldm_ddim guidance.guidance_scale=7.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "spacing", "steps", "scale"),
    [
        (("sampler.num_steps=20",), "ldm", 20, 7.5),
        (("sampler=ddim",), "trailing", 50, 7.5),
        (("guidance.guidance_scale=3",), "ldm", 50, 2.0),
        (("guidance=none", "++sampler.num_steps=20", "sampler=ddim"), "trailing", 50, 2.0),
    ],
)
def test_what_was_typed_wins_value_by_value(typed, spacing, steps, scale):
    found = own(*typed)
    assert (found["sampler"]["spacing"], found["sampler"]["num_steps"]) == (spacing, steps)
    assert found["guidance"]["guidance_scale"] == scale


def test_a_model_of_train_py_brings_nothing_along(capsys):
    assert own(facts=FACTS)["guidance"]["guidance_scale"] == 2.0 and capsys.readouterr().err == ""


def test_what_is_decided_is_said_once_on_stderr(capsys):
    image = Image.new("RGB", (SIZE, SIZE), "red")
    model = predicting("eps", "eps")
    asked = {"image": image, "num_samples": 1}
    prepared(model, Sampler(8, clip=None), ClassifierFreeGuidance(2.0), config(**asked), silent=True)
    assert capsys.readouterr().err == ""
    prepared(model, Sampler(8, clip=None), ClassifierFreeGuidance(2.0), config(**asked))
    assert capsys.readouterr().err == "strength=0.75, the part of the way back to noise that image= is sent\n"
    prepared(model, Sampler(8, clip=None), ClassifierFreeGuidance(2.0), config(**asked, strength=0.5))
    assert capsys.readouterr().err == ""


def test_a_strength_of_less_than_a_step_warns_and_leaves_the_picture():
    pipe, image = pipeline(), Image.new("RGB", (SIZE, SIZE), "red")
    _, told = prepared(pipe, pipe.sampler, ClassifierFreeGuidance(2.0), config(image=image, strength=0.5))
    assert count_steps(pipe.sampler, pipe.diffusion, told["source"]) == 2
    model = predicting("eps", "eps")
    with pytest.warns(UserWarning, match=r"strength=0\.2 of 4 steps is less than one"):
        prepared(model, pipe.sampler, ClassifierFreeGuidance(2.0), config(image=image, strength=0.2))
    same = pipe("a fox", image=image, strength=0.2)
    torch.testing.assert_close(same, pipe("two cats", image=image, strength=0.0))


def test_half_precision_by_itself_is_said(capsys):
    say_decided({"dtype": "auto"}, None, torch.device("cuda"), torch.bfloat16)
    assert capsys.readouterr().err == "dtype=bfloat16 on cuda; dtype=float32 is more exact\n"
    say_decided({"dtype": "bfloat16"}, None, torch.device("cuda"), torch.bfloat16)
    assert capsys.readouterr().err == ""
