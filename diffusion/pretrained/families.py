"""Which published models are there, and what must be known of each that its weights do not say?

One record a family. What shapes tell is read from them (`architecture.py`), so fine-tunes and models of other sizes
are covered, too; a family says how many heads, which schedule, which scale of latents, what to sample with.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLIP_TOKENS = 49408
LDM_BETAS = (0.00085, 0.012)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A published model and its kin.

    betas: first and last, linear in their square roots. parameterization None: both kinds were published, with the same
    shapes. averaged: whether the original code samples with the averaged weights where a file holds both.
    """

    name: str
    title: str
    image_size: int
    context_channels: int | None = None
    in_channels: int = 4
    parameterization: str | None = "eps"
    betas: tuple[float, float] = LDM_BETAS
    scale_factor: float = 0.18215
    latent_channels: int = 4
    task: str = "text-to-image"
    guidance_scale: float = 7.5
    sampler: str = "ldm_ddim"
    averaged: bool = False
    size_factor: int = 8


XL = {"scale_factor": 0.13025, "guidance_scale": 5.0, "sampler": "sgm_euler", "image_size": 1024}
LDM = {"image_size": 256, "averaged": True}
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(name="sd1", title="Stable Diffusion 1", image_size=512, context_channels=768),
        Family(
            name="sd1-inpainting",
            title="Stable Diffusion 1 inpainting",
            image_size=512,
            context_channels=768,
            in_channels=9,
            task="inpainting",
        ),
        Family(
            name="instruct-pix2pix",
            title="InstructPix2Pix",
            image_size=512,
            context_channels=768,
            in_channels=8,
            task="instruct-pix2pix",
            averaged=True,
        ),
        Family(
            name="sd2",
            title="Stable Diffusion 2",
            image_size=768,
            context_channels=1024,
            parameterization=None,
        ),
        Family(
            name="sd2-inpainting",
            title="Stable Diffusion 2 inpainting",
            image_size=512,
            context_channels=1024,
            in_channels=9,
            task="inpainting",
        ),
        Family(name="sdxl-base", title="Stable Diffusion XL base", context_channels=2048, **XL),
        Family(name="sdxl-refiner", title="Stable Diffusion XL refiner", context_channels=1280, **XL),
        Family(
            name="sdxl-inpainting",
            title="Stable Diffusion XL inpainting",
            context_channels=2048,
            in_channels=9,
            task="inpainting",
            **XL,
        ),
        Family(
            name="sdxl-pix2pix",
            title="InstructPix2Pix on Stable Diffusion XL",
            context_channels=2048,
            in_channels=8,
            task="instruct-pix2pix",
            **XL,
        ),
        Family(
            name="ldm-text",
            title="latent diffusion's text-to-image model",
            context_channels=1280,
            guidance_scale=5.0,
            **LDM,
        ),
        Family(
            name="ldm-class",
            title="latent diffusion's class-conditional model",
            context_channels=512,
            in_channels=3,
            betas=(0.0015, 0.0195),
            scale_factor=1.0,
            latent_channels=3,
            task="class",
            guidance_scale=1.5,
            size_factor=4,
            **LDM,
        ),
        Family(
            name="ldm",
            title="a latent diffusion model without conditions",
            in_channels=3,
            betas=(0.0015, 0.0195),
            scale_factor=1.0,
            latent_channels=3,
            task="class",
            guidance_scale=1.0,
            size_factor=4,
            **LDM,
        ),
    )
}
# Stable Diffusion 2 was published as eps at 512 and as v at 768; the shapes are the same.
SIZES_BY_PARAMETERIZATION = {"eps": 512, "v": 768}
BY_CHANNELS = {  # the tasks of one architecture, told apart by the input channels beside the latents'
    "sd1": {0: "sd1", 5: "sd1-inpainting", 4: "instruct-pix2pix"},
    "sd2": {0: "sd2", 5: "sd2-inpainting"},
    "sdxl-base": {0: "sdxl-base", 5: "sdxl-inpainting", 4: "sdxl-pix2pix"},
    "sdxl-refiner": {0: "sdxl-refiner"},
    "ldm-text": {0: "ldm-text"},
    "ldm-class": {0: "ldm-class"},
    "ldm": {0: "ldm"},
}
KNOWN_CHANNELS = {  # published with further input channels, but no task of ours
    ("sd2", 1): "Stable Diffusion 2 depth (a depth map as fifth channel)",
    ("sd2", 3): "Stable Diffusion's x4 upscaler (a small image as further channels)",
}


def structure(net: Mapping[str, Any], *, towers: list[str], linear: bool, vocabulary: str | None = None) -> str:
    """Which architecture a denoiser of latents is: a key of `BY_CHANNELS`.

    net: our settings. towers: layouts of the text encoders beside it ("transformers", "open_clip"). linear: whether its
    transformers project linearly. vocabulary: "class" or "bert" where the condition is no CLIP's.
    """
    context, vector = net["context_channels"], net.get("vector_channels")
    if vocabulary in ("class", "bert"):
        return {"class": "ldm-class", "bert": "ldm-text"}[vocabulary]
    if vector is not None:
        alone = towers == ["open_clip"] or (not towers and context == FAMILIES["sdxl-refiner"].context_channels)
        return "sdxl-refiner" if alone else "sdxl-base"
    if context is None:
        return "ldm"
    if context in (768, 1024):
        return {768: "sd1", 1024: "sd2"}[context]
    if not towers and context == 1280 and not linear:
        return "ldm-text"
    if not towers and context == 512 and not linear:
        return "ldm-class"
    if towers:
        return "sd2" if towers == ["open_clip"] else "sd1"
    return "sd2" if linear else "sd1"


def scaled_linear(betas: tuple[float, float], num_train_timesteps: int = 1000) -> dict[str, Any]:
    """The config node of a schedule that is linear in the square roots of its betas."""
    return {
        "_target_": "diffusion.schedule.scaled_linear",
        "num_train_timesteps": num_train_timesteps,
        "beta_start": betas[0],
        "beta_end": betas[1],
    }


def diffusion_node(schedule: Mapping[str, Any], parameterization: str | None, variance: str | None = None) -> dict:
    """The config node of a process."""
    return {
        "_target_": "diffusion.process.GaussianDiffusion",
        "schedule": dict(schedule),
        "parameterization": parameterization or "eps",
        "variance": variance or "posterior",
    }


# ---------------------------------------------------------------------------------------------------------------------
# text encoders: the config nodes of the families' own

TEXT_TARGET = "diffusion.models.text.TextTransformer"
CLIP_L = {"channels": 768, "num_layers": 12, "num_heads": 12, "activation": "quick_gelu"}
CLIP_H = {"channels": 1024, "num_layers": 24, "num_heads": 16, "activation": "gelu"}
CLIP_G = {"channels": 1280, "num_layers": 32, "num_heads": 20, "activation": "gelu", "projection_channels": 1280}


def encoder_node(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config node of a text transformer."""
    return {"_target_": TEXT_TARGET, "vocab_size": CLIP_TOKENS, "max_length": 77, **settings}


def text_node(
    encoder: Mapping[str, Any], *, pad: str, layer: str = "last", final_norm: bool = True, **more: Any
) -> dict:
    """The config node of a frozen text conditioner."""
    return {
        "_target_": "diffusion.conditioning.TextConditioner",
        "encoder": dict(encoder),
        "pad": pad,
        "layer": layer,
        "final_norm": final_norm,
        "frozen": True,
        **more,
    }


def sd1_text(encoder: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Stable Diffusion 1 reads the last state after the norm, and pads with the end token."""
    return text_node(encoder or encoder_node(CLIP_L), pad="end")


def sd2_text(encoder: Mapping[str, Any] | None = None, *, whole: bool | None = None) -> dict[str, Any]:
    """Stable Diffusion 2 reads the last state but one after the norm, and pads with 0.

    whole: whether the encoder has the last layer, which only original files keep; None: all but a ViT-H of one less.
    """
    if whole is None:
        short = (CLIP_H["channels"], CLIP_H["num_layers"] - 1)
        whole = encoder is None or (encoder["channels"], encoder["num_layers"]) != short
    layer = "penultimate" if whole else "last"
    return text_node(encoder or encoder_node(CLIP_H), pad="zero", layer=layer)


def xl_text(first: Mapping[str, Any] | None = None, second: Mapping[str, Any] | None = None, **more: Any) -> dict:
    """XL base reads the last states but one of two encoders, without norm, and the second's pooled text."""
    texts = [
        text_node(first or encoder_node(CLIP_L), pad="end", layer="penultimate", final_norm=False),
        _pooled_text(second),
    ]
    return _sized(texts, zero_null=True, aesthetic=False) | more


def refiner_text(encoder: Mapping[str, Any] | None = None, **more: Any) -> dict:
    """XL's refiner has the second encoder alone and an aesthetic score in place of the target size."""
    return _sized([_pooled_text(encoder)], zero_null=False, aesthetic=True) | more


def _pooled_text(encoder: Mapping[str, Any] | None) -> dict[str, Any]:
    encoder = encoder or encoder_node(CLIP_G)
    return text_node(encoder, pad="zero", layer="penultimate", final_norm=False, pooled=True)


def _sized(texts: list[dict], *, zero_null: bool, aesthetic: bool) -> dict[str, Any]:
    return {
        "_target_": "diffusion.text_conditioning.XLConditioner",
        "texts": texts,
        "size_channels": 256,
        "aesthetic": aesthetic,
        "zero_null": zero_null,
    }


BERT = {
    "vocab_size": 30522,
    "channels": 1280,
    "num_layers": 32,
    "num_heads": 8,
    "head_channels": 64,
    "max_length": 77,
    "hidden_channels": 5120,
    "qkv_bias": False,
    "activation": "gelu",
    "causal": False,
}


def bert_text(encoder: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Latent diffusion's text-to-image model reads the last state of its own encoder, whose words are a file apart."""
    encoder = encoder or {"_target_": TEXT_TARGET, **BERT}
    length = encoder["max_length"]
    tokenizer = {"_target_": "diffusion.tokenizer.WordPieceTokenizer", "max_length": length, "vocabulary": None}
    return text_node(encoder, pad="zero", tokenizer=tokenizer)


def class_node(num_classes: int, channels: int) -> dict[str, Any]:
    """The config node of latent diffusion's class embedding."""
    return {
        "_target_": "diffusion.conditioning.ClassConditioner",
        "num_classes": num_classes,
        "channels": channels,
    }


def facts_of(
    family: Family, *, image_size: int | None = None, num_classes: int | None = None, told: bool = True
) -> dict[str, Any]:
    """What sampling must know beside the configs. told: whether it is known what the network predicts."""
    size = family.image_size if image_size is None else image_size
    facts = {
        "shape": [3, size, size],
        "num_classes": num_classes,
        "class_names": None,
        "condition_drop": 0.1,
        "task": family.task,
        "guidance_scale": family.guidance_scale,
        "sampler": family.sampler,
    }
    if family.name.startswith("sdxl"):
        facts["sizes"] = {"original_size": [size, size], "crop": [0, 0], "target_size": [size, size]}
    if not told:
        facts["image_size_by_parameterization"] = dict(SIZES_BY_PARAMETERIZATION)
    return facts


def heads(width: int, *, linear: bool, family: str, channels: int = 320) -> dict[str, int]:
    """How many heads attention of this width has, which weights do not tell: the family's convention.

    channels: the network's first width. Latent diffusion's class-conditional model of 192 has one head, its others and
    those without conditions heads of width 32.
    """
    if family in ("ldm-class", "ldm"):
        return {"num_heads": 1} if channels == 192 or width % 32 else {"head_channels": 32}
    if not linear:
        return {"num_heads": 8 if width % 8 == 0 else math.gcd(width, 8)}
    return {"head_channels": 64} if width % 64 == 0 else {"num_heads": 1}


def autoencoder_node(scale_factor: float) -> dict[str, Any]:
    """The config node of Stable Diffusion's autoencoder."""
    return {
        "_target_": "diffusion.models.autoencoder.AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "channels": 128,
        "stages": [{"depth": 2, "channel_mult": mult} for mult in (1, 2, 4, 4)],
        "scale_factor": scale_factor,
    }


def title_of(family: Family, settings: Mapping[str, Any]) -> str:
    """The family's, with a word for sizes that were not published."""
    published = {"ldm-class": 192, "ldm": 224, "sdxl-refiner": 384}.get(family.name, 320)
    context = family.context_channels
    if settings["channels"] == published and settings["context_channels"] == context:
        return family.title
    return f"{family.title} of other sizes ({settings['channels']} channels, context {settings['context_channels']})"
