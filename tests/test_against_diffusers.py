"""Tiny Stable Diffusions that diffusers built and saved: our pictures are those of its pipelines, byte for byte or one.

Same prompt and negative prompt, same starting noise, classifier-free guidance of 7.5 and 20 steps; the grids are those
that diffusers makes of the published schedulers' configs.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sd_cases
import torch
from sd_cases import NEGATIVE, PROMPT, SIZE
from torch import Tensor

from diffusion.checkpoint import build
from diffusion.conversion.convert import convert
from diffusion.guidance import ClassifierFreeGuidance, TwoScaleGuidance
from diffusion.images import to_uint8
from diffusion.own_settings import own_sampler, sampler_node
from diffusion.pipeline import LatentDiffusion
from diffusion.sampler_list import of_scheduler
from diffusion.sampling import SampleNoise, Sampler

STEPS, SCALE, IMAGE_SCALE, STRENGTH = 20, 7.5, 1.5, 0.6
BYTE = 1 / 255  # of pictures in [0, 1]
CLOSE = BYTE / 50
FAMILIES = ["sd1", "sd2-v", "sdxl-base"]
PEERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
FAST = {  # those that are no slow tests
    *(("sd1", kind) for kind in PEERS),
    *(("sd2-v", "ddim"), ("sd2-v", "pndm"), ("sdxl-base", "euler")),
}


def some(names: Sequence[str], fast: Sequence[str] = ("sd1",)) -> list[Any]:
    """The names, all that are not in `fast` marked as slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def cases(names: list[str], kinds: Any = PEERS, fast: Any = FAST) -> list[Any]:
    """(name, kind), all that are not in `fast` marked as slow."""
    pairs = [(name, kind) for name in names for kind in kinds]
    return [pytest.param(*pair, marks=() if pair in fast else pytest.mark.slow) for pair in pairs]


def scheduler(name: str, kind: str) -> dict[str, Any]:
    """The model's published scheduler_config.json as another scheduler reads it."""
    return {**sd_cases.KINDS[name].scheduler, "_class_name": PEERS[kind]}


@functools.cache
def sampler(name: str, kind: str) -> Sampler:
    """The sampler that does what this scheduler does with the model's published config."""
    config = scheduler(name, kind)
    words = own_sampler({"sampler": of_scheduler(config)[0], "scheduler": config})
    node = sampler_node(*words, f"sampler.num_steps={STEPS}")
    return build(node, {node["_target_"]})


def load(path: Path) -> LatentDiffusion:
    return LatentDiffusion.load(path, device="cpu", dtype="float32", silent=True)


@functools.cache
def model(name: str) -> LatentDiffusion:
    return load(sd_cases.folder(name))


def starts(*seeds: int) -> Tensor:
    """What our sampler starts from with these seeds."""
    return SampleNoise(seeds).initial((4, SIZE // 8, SIZE // 8))


def theirs(name: str, kind: str, *, pipeline: str | None = None, **asked: Any) -> Tensor:
    """diffusers' pictures (B, 3, H, W) in [0, 1]."""
    import diffusers

    pipe = sd_cases.peer(name, pipeline)
    pipe.scheduler = getattr(diffusers, PEERS[kind]).from_config(sd_cases.KINDS[name].scheduler)
    common = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "pt"}
    return pipe(**{"prompt": PROMPT, "negative_prompt": NEGATIVE, **common, **asked}).images


def ours(name: str, kind: str, **asked: Any) -> Tensor:
    """Our pictures, likewise."""
    asked = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": SCALE, **asked}
    return (model(name)(**asked, sampler=sampler(name, kind)) / 2 + 0.5).clamp(0, 1)


def assert_same(got: Tensor, expected: Tensor, within: float = CLOSE) -> None:
    """Equal pixel by pixel, within a fiftieth of a byte's step unless told otherwise."""
    assert got.shape == expected.shape
    error = (got - expected).abs() * 255
    largest, mean = error.max().item(), error.mean().item()
    print(f"off by {largest:.4f} of 255 at most, {mean:.5f} on average")
    assert largest <= 255 * within, f"off by {largest:.2f} of 255 at most, {mean:.3f} on average"


# --- text to image ---------------------------------------------------------------------------------------------------


SQUARE = {"height": SIZE, "width": SIZE}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), cases(FAMILIES))
def test_the_picture_of_a_prompt_is_that_of_diffusers(name, kind):
    expected = theirs(name, kind, latents=starts(0), **SQUARE)
    assert_same(ours(name, kind, **SQUARE), expected, BYTE if starts_lower(name, kind) else CLOSE)


def starts_lower(name: str, kind: str) -> bool:
    """Whether diffusers starts from noise of the first level's variance, a hair below our 1: all but leading grids."""
    return kind in ("lms", "euler") and scheduler(name, kind).get("timestep_spacing") != "leading"


@pytest.mark.parametrize("kind", some(["lms", "euler"], fast=["euler"]))
def test_the_picture_is_closer_still_from_a_start_of_the_first_levels_variance(kind):
    at = model("sd1").diffusion.schedule.level(999)
    expected = theirs("sd1", kind, latents=starts(0) / at.sigma, **SQUARE)
    assert_same(ours("sd1", kind, **SQUARE), expected)


@pytest.mark.parametrize("name", some(FAMILIES))
def test_pictures_of_a_batch_without_a_negative_prompt_are_those_of_diffusers(name):
    asked = {"prompt": [PROMPT, ""], "negative_prompt": None, **SQUARE}
    expected = theirs(name, "ddim", latents=starts(5, 6), **asked)
    assert_same(ours(name, "ddim", seed=5, batch_size=2, **asked), expected)


@pytest.mark.parametrize("name", some(FAMILIES))
def test_the_peers_picture_hangs_on_all_that_it_is_asked_and_is_neither_flat_nor_saturated(name):
    drawn = {"latents": starts(0), "num_inference_steps": 5, **SQUARE}
    base = theirs(name, "ddim", **drawn)
    assert base.std() > 0.1
    assert ((base == 0) | (base == 1)).float().mean() < 0.1
    for change in ({"prompt": "a cat"}, {"negative_prompt": "ugly"}, {"guidance_scale": 7.0}, {"latents": starts(1)}):
        assert (theirs(name, "ddim", **{**drawn, **change}) - base).abs().max() > 4 * BYTE, change


RESCALED = ClassifierFreeGuidance(SCALE, rescale=0.7)
SETTINGS = {  # what is asked of us and of diffusers, by name
    "sd1, wide": ("sd1", {"height": SIZE, "width": 2 * SIZE}, {}, {}),
    "sd1, odd": ("sd1", {"height": SIZE + 8, "width": SIZE + 24}, {}, {}),
    # Without guidance: diffusers reads the negative prompt from the usual layer all the same.
    "sd1, last layer but one": ("sd1", {"guidance_scale": 1.0}, {"clip_skip": 2}, {"clip_skip": 1}),
    "sd1, rescaled": ("sd1", {}, {"guidance": RESCALED}, {"guidance_rescale": 0.7}),
    "sd2-v, rescaled": ("sd2-v", {}, {"guidance": RESCALED}, {"guidance_rescale": 0.7}),
    "sd2-v, odd": ("sd2-v", {"height": SIZE + 8, "width": SIZE + 24}, {}, {}),
    "sdxl-base, empty negative prompt": ("sdxl-base", {"negative_prompt": ""}, {}, {}),
    "sdxl-base, last layer but two": ("sdxl-base", {"guidance_scale": 1.0}, {"clip_skip": 3}, {"clip_skip": 1}),
    "sdxl-base, cropped": (
        "sdxl-base",
        {},
        {"original_size": [100, 120], "crop": [8, 16]},
        # What it is told when a negative prompt is given is the same.
        {"original_size": (100, 120), "crops_coords_top_left": (8, 16)}
        | {"negative_original_size": (100, 120), "negative_crops_coords_top_left": (8, 16)}
        | {"negative_target_size": (SIZE, SIZE)},
    ),
    "sdxl-base, odd": ("sdxl-base", {"height": SIZE + 8, "width": SIZE + 24}, {}, {}),
}


@pytest.mark.parametrize("case", some(SETTINGS, fast=["sd1, odd", "sd1, last layer but one", "sd2-v, rescaled"]))
def test_what_else_may_be_asked_means_the_same_to_diffusers(case, monkeypatch):
    from transformers import CLIPTextModel

    if "final_layer_norm" in dict(sd_cases.peer("sd1").text_encoder.named_children()):
        # transformers 5 has moved what diffusers' clip_skip looks for.
        monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    name, both, us, them = SETTINGS[case]
    both = {**SQUARE, **both}
    latents = SampleNoise([0]).initial((4, both["height"] // 8, both["width"] // 8))
    plain, expected = (theirs(name, "ddim", latents=latents, **(both | more)) for more in ({}, them))
    assert not them or (expected - plain).abs().max() > BYTE
    assert_same(ours(name, "ddim", **both, **us), expected)


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": True}
SCHEDULERS = {
    "sd1, DPM-Solver++": ("sd1", scheduler("sd1", "dpmpp_2m")),
    "sd2-v, zero terminal SNR": ("sd2-v", {**scheduler("sd2-v", "ddim"), **ZERO_SNR}),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_a_folder_is_sampled_as_its_scheduler_config_says(case, tmp_path):
    import diffusers

    name, config = SCHEDULERS[case]
    for part in sd_cases.folder(name).iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "scheduler").unlink()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    asked = {"negative_prompt": NEGATIVE, "guidance_scale": SCALE, **SQUARE}
    pipe = sd_cases.peer(name)
    pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    expected = pipe(PROMPT, latents=starts(0), num_inference_steps=STEPS, output_type="pt", **asked).images
    assert_same((load(tmp_path)(PROMPT, num_steps=STEPS, **asked) / 2 + 0.5).clamp(0, 1), expected)


# --- from pictures ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The picture and its mask as files, as ours takes them."""
    from PIL import Image

    image, white = to_uint8(sd_cases.picture()[None])[0], sd_cases.mask()[0].byte().numpy() * 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(white).save(tmp_path / "mask.png")
    return {"image": str(tmp_path / "image.png"), "mask": str(tmp_path / "mask.png")}


@pytest.fixture
def same_noise(monkeypatch) -> None:
    """The pipelines that start from pictures draw their noise themselves: let it be what ours draws for seed 0."""
    import diffusers.pipelines as pipelines

    for name in ("img2img", "inpaint"):
        for module in (
            getattr(pipelines.stable_diffusion, f"pipeline_stable_diffusion_{name}"),
            getattr(pipelines.stable_diffusion_xl, f"pipeline_stable_diffusion_xl_{name}"),
        ):
            monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: starts(0))


@pytest.fixture
def fresh_history(monkeypatch) -> None:
    """Two peers take it that steps were made before the picture's: LMS sums the first of four coefficients alone, and
    PNDM asks twice at the second timestep of the whole grid. Let them begin where the picture does.
    """
    import diffusers
    from diffusers.pipelines import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

    def begin(scheduler, index):
        scheduler.sigmas, scheduler.timesteps = scheduler.sigmas[index:], scheduler.timesteps[index:]
        scheduler._begin_index = 0

    monkeypatch.setattr(diffusers.LMSDiscreteScheduler, "set_begin_index", begin)
    for pipeline in (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline):
        plain = pipeline.get_timesteps

        def cut(self, num_inference_steps, strength, *rest, plain=plain, **named):
            if not isinstance(self.scheduler, diffusers.PNDMScheduler):
                return plain(self, num_inference_steps, strength, *rest, **named)
            kept = int(num_inference_steps * strength)
            first, *others = self.scheduler.timesteps.unique().flip(0)[-kept:]
            return torch.stack([first, others[0], *others]), kept

        monkeypatch.setattr(pipeline, "get_timesteps", cut)


def pipeline(name: str, task: str) -> str:
    """The pipeline that does the task with a model's parts."""
    return f"StableDiffusion{'XL' * name.startswith('sdxl')}{task}Pipeline"


@pytest.mark.parametrize(("name", "kind"), cases([*FAMILIES, "sdxl-refiner"], fast={("sd1", "ddim"), ("sd1", "lms")}))
def test_image_to_image_is_that_of_diffusers(name, kind, files, same_noise, fresh_history):
    picture = sd_cases.picture()[None] / 2 + 0.5
    expected = theirs(name, kind, pipeline=pipeline(name, "Img2Img"), image=picture, strength=STRENGTH)
    assert_same(ours(name, kind, image=files["image"], strength=STRENGTH), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strength"),
    cases(["sd1", "sd1-inpainting", "sdxl-base"], [1.0, STRENGTH], {("sd1", STRENGTH), ("sd1-inpainting", 1.0)}),
)
def test_inpainting_is_that_of_diffusers(name, strength, files, same_noise):
    picture, mask = sd_cases.picture()[None] / 2 + 0.5, sd_cases.mask()[None]
    asked = {"image": picture, "mask_image": mask, "strength": strength, **SQUARE}
    expected = theirs(name, "ddim", pipeline=pipeline(name, "Inpaint"), **asked)
    assert_same(ours(name, "ddim", **files, strength=strength, paste=False), expected)


@pytest.mark.slow
def test_editing_by_instruction_is_that_of_diffusers(files):
    name, picture = "instruct-pix2pix", sd_cases.picture()[None] / 2 + 0.5
    expected = theirs(name, "ddim", image=picture, latents=starts(0), image_guidance_scale=IMAGE_SCALE)
    guidance = TwoScaleGuidance(SCALE, IMAGE_SCALE)
    assert_same(ours(name, "ddim", image=files["image"], guidance=guidance), expected)


# --- the same weights in other files ---------------------------------------------------------------------------------


def drawn(pipe: Any) -> Tensor:
    """A picture of four steps by a pipeline of diffusers, whatever it starts from."""
    picture, task = sd_cases.picture()[None] / 2 + 0.5, type(pipe).__name__
    asked = {"image": picture} if any(word in task for word in ("Img2Img", "Inpaint", "Pix2Pix")) else dict(SQUARE)
    asked |= {"mask_image": sd_cases.mask()[None], **SQUARE} if "Inpaint" in task else {}
    asked |= {"num_inference_steps": 4, "guidance_scale": SCALE, "output_type": "pt"}
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, negative_prompt=NEGATIVE, generator=torch.Generator().manual_seed(0), **asked).images


@pytest.mark.parametrize("name", some(sd_cases.NAMES))
def test_diffusers_draws_the_same_from_our_single_file_and_from_our_folder_of_that(name, tmp_path):
    import diffusers

    kind = getattr(diffusers, sd_cases.KINDS[name].pipeline)
    expected, file = drawn(kind.from_pretrained(sd_cases.folder(name))), sd_cases.single_file(name)
    single = kind.from_single_file(str(file), config=str(sd_cases.folder(name)), local_files_only=True)
    assert torch.equal(drawn(single), expected)
    back = convert(file, tmp_path / "folder", layout="diffusers", say=lambda line: None)
    assert torch.equal(drawn(kind.from_pretrained(back)), expected)


@pytest.mark.parametrize("name", some(sd_cases.NAMES))
def test_a_single_file_is_the_same_model_as_its_folder(name):
    single, whole = load(sd_cases.single_file(name)), model(name)
    assert (single.diffusion.parameterization, single.sampler) == (whole.diffusion.parameterization, whole.sampler)
    for part in ("net", "autoencoder", "conditioner"):
        one, other = (getattr(pipe, part).state_dict() for pipe in (single, whole))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_folder_of_sharded_variants_draws_what_its_weights_in_half_precision_would():
    whole = load(sd_cases.folder("sd1", dtype="float16"))
    parts = load(sd_cases.folder("sd1", dtype="float16", variant="fp16", max_shard_size="2MB"))
    pictures = [pipe(PROMPT, num_steps=3, **SQUARE) for pipe in (whole, parts)]
    assert torch.equal(*pictures)
    change = (pictures[0] - model("sd1")(PROMPT, num_steps=3, **SQUARE)).abs().max()
    assert 0 < change < 0.1
