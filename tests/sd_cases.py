"""Tiny Stable Diffusions that diffusers itself built and saved: what is compared with it, and with files of its layout.

`folder(name)` is a folder in diffusers' layout, one a test session; `peer(name)` its pipeline. The random weights are
scaled so that the pictures are neither flat nor saturated and hang on the prompt, which the tests of the cases check.
"""

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.tokenizer import clip_vocabulary

SIZE = 64  # of the pictures, in pixels; the autoencoders reduce by 8 as the real ones do
PROMPT = "a photograph of an astronaut riding a horse, 4k"
NEGATIVE = "blurry, low quality"

# The schedulers' configs as they are published beside the weights.
TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
PNDM = {
    "_class_name": "PNDMScheduler",
    **TRAINED,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
DDIM_V = {
    "_class_name": "DDIMScheduler",
    **TRAINED,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
EULER_XL = {
    "_class_name": "EulerDiscreteScheduler",
    **TRAINED,
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

UNET_1 = {  # 8 heads whatever the width, projections by convolution
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
UNET_2 = {  # heads of width 64, linear projections
    **UNET_1,
    "block_out_channels": (64, 64, 128),
    "attention_head_dim": (1, 1, 2),
    "use_linear_projection": True,
}
UNET_XL = {
    **UNET_2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 64 + 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 64,
}
CLIP_L = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1, "hidden_act": "quick_gelu"}
OPENCLIP_H = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "hidden_act": "gelu"}
BIG_G = {**OPENCLIP_H, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 64}
END, ZERO = (
    "<|endoftext|>",
    "!",
)  # what tokenizers fill up with; a prompt with a "!" is another one to transformers then


@dataclass(frozen=True)
class Kind:
    """How diffusers builds one of them; `texts` are a text encoder's config and its tokenizer's padding each."""

    pipeline: str
    unet: dict[str, Any]
    texts: dict[str, tuple[dict[str, Any], str]]
    scheduler: dict[str, Any]
    vae: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


TEXT_1 = {"": (CLIP_L, END)}
TEXT_2 = {"": (OPENCLIP_H, ZERO)}
TEXT_XL = {"": (CLIP_L, END), "_2": (BIG_G, ZERO)}
SAFETY = {"requires_safety_checker": False, "safety_checker": None, "feature_extractor": None}
XL = {"scheduler": EULER_XL, "vae": {"scaling_factor": 0.13025}}
REFINER = {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
UNET_REFINER = {"cross_attention_dim": 128, "projection_class_embeddings_input_dim": 5 * 256 + 64}
KINDS = {
    "sd1": Kind("StableDiffusionPipeline", UNET_1, TEXT_1, PNDM, extra=SAFETY),
    "sd2-v": Kind("StableDiffusionPipeline", UNET_2, TEXT_2, DDIM_V, extra=SAFETY),
    "sdxl-base": Kind(
        "StableDiffusionXLPipeline", UNET_XL, TEXT_XL, **XL, extra={"force_zeros_for_empty_prompt": True}
    ),
    "sdxl-refiner": Kind(
        "StableDiffusionXLImg2ImgPipeline",
        {**UNET_XL, **UNET_REFINER},
        {"_2": (BIG_G, ZERO)},
        **XL,
        extra={**REFINER, "force_zeros_for_empty_prompt": False},
    ),
    "sd1-inpainting": Kind("StableDiffusionInpaintPipeline", {**UNET_1, "in_channels": 9}, TEXT_1, PNDM, extra=SAFETY),
    "instruct-pix2pix": Kind(
        "StableDiffusionInstructPix2PixPipeline", {**UNET_1, "in_channels": 8}, TEXT_1, PNDM, extra=SAFETY
    ),
}
NAMES = tuple(KINDS)


# --- folders ---------------------------------------------------------------------------------------------------------


@functools.cache
def scratch() -> Path:
    """A folder of this test session."""
    path = Path(tempfile.mkdtemp(prefix="sd_cases_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def folder(
    name: str = "sd1", *, dtype: str = "float32", variant: str | None = None, max_shard_size: str | None = None
) -> Path:
    """The folder of one of `NAMES`, saved by diffusers with safetensors; do not write into it, copy it first."""
    path = scratch() / "-".join(filter(None, (name, dtype, variant, max_shard_size)))
    if (path / "model_index.json").exists():
        return path
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    built(name).to(getattr(torch, dtype)).save_pretrained(path, variant=variant, **shards)
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(KINDS[name].scheduler, indent=2))
    vocab, merges = clip_vocabulary()
    for place in path.glob("tokenizer*"):  # as published folders hold it; transformers 5 writes tokenizer.json alone
        (place / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
        (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return path


@functools.cache
def single_file(name: str = "sd1", *, dtype: str = "keep") -> Path:
    """The same model as one file in CompVis' names, which our own `convert` writes."""
    from diffusion.conversion.convert import convert

    path = scratch() / f"{name}-{dtype}.safetensors"
    return convert(folder(name), path, layout="compvis", dtype=dtype, say=lambda line: None)


@functools.cache
def peer(name: str = "sd1", pipeline: str | None = None) -> Any:
    """diffusers' pipeline loaded from `folder(name)`, silent; `pipeline` names another class for the same parts."""
    import diffusers

    silence()
    kind = KINDS[name]
    if pipeline in (None, kind.pipeline):
        pipe = getattr(diffusers, kind.pipeline).from_pretrained(folder(name))
    else:
        told = {key: value for key, value in kind.extra.items() if key.startswith("requires")}
        pipe = getattr(diffusers, pipeline)(**peer(name).components, **told)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def starts(num_samples: int = 1, seed: int = 0, size: int = SIZE) -> Tensor:
    """Standard normal latents (B, 4, size / 8, size / 8), for both sides."""
    return torch.randn((num_samples, 4, size // 8, size // 8), generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 0, size: int = SIZE) -> Tensor:
    """A smooth random picture (3, size, size) in [-1, 1] whose bytes are exact."""
    coarse = torch.rand((1, 3, size // 8, size // 8), generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return (smooth[0].clamp(0, 1) * 255).round() / 127.5 - 1


def mask(size: int = SIZE) -> Tensor:
    """A mask (1, size, size) of zeros and, what is to be repainted, ones; its edges cut through latent pixels."""
    white = torch.zeros(1, size, size)
    white[:, size // 4 + 3 : size - size // 4 + 5, size // 8 : size // 2 + 2] = 1
    return white


def silence() -> None:
    """Progress bars and advice of the peers off."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


# --- building --------------------------------------------------------------------------------------------------------


def built(name: str) -> Any:
    """The pipeline with its random weights, as diffusers puts it together."""
    import diffusers

    silence()
    kind, parts = KINDS[name], {}
    for number, (end, (config, pad)) in enumerate(kind.texts.items()):
        parts |= {f"text_encoder{end}": text_encoder(config, seed=number), f"tokenizer{end}": tokenizer(pad)}
    return getattr(diffusers, kind.pipeline)(
        unet=unet(kind.unet),
        vae=autoencoder(kind.vae),
        scheduler=getattr(diffusers, kind.scheduler["_class_name"]).from_config(kind.scheduler),
        **parts,
        **kind.extra,
    )


def unet(config: dict[str, Any], *, seed: int = 0) -> nn.Module:
    """A UNet whose answers have about the size of noise and change with the context by as much."""
    from diffusers import UNet2DConditionModel

    net = scaled(UNet2DConditionModel(sample_size=SIZE // 8, **config), seed=seed)
    with torch.no_grad():
        for module_name, module in net.named_modules():
            if module_name.endswith("attn2.to_out.0"):
                module.weight *= 3.0
    return net


def autoencoder(config: dict[str, Any], *, seed: int = 1) -> nn.Module:
    """A VAE of f8 whose pictures mostly stay within [-1, 1]."""
    from diffusers import AutoencoderKL

    settings = {
        "block_out_channels": (32, 32, 32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "sample_size": SIZE,
    }
    vae = scaled(AutoencoderKL(**settings, **config), seed=seed)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.5
        vae.encoder.conv_out.weight *= 9.0  # latents of pictures are spread by about 1 / scaling_factor
        vae.quant_conv.weight[4:] *= 0.01  # and hardly by themselves, as in the published ones: a draw is the mean
        vae.quant_conv.bias[4:] = -18.0
    return vae


def text_encoder(config: dict[str, Any], *, seed: int = 0) -> nn.Module:
    """A CLIP text model, with a projection if the config names its width."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if "projection_dim" in config else CLIPTextModel
    ids = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    settings = {"intermediate_size": 4 * config["hidden_size"], "vocab_size": 49408, "max_position_embeddings": 77}
    return scaled(kind(CLIPTextConfig(**settings, **config, **ids)), seed=10 + seed)


def tokenizer(pad: str) -> Any:
    """transformers' CLIP tokenizer that fills up with this token."""
    from transformers import CLIPTokenizer

    vocab, merges = clip_vocabulary()
    return CLIPTokenizer(
        vocab=vocab, merges=[tuple(merge.split()) for merge in merges], pad_token=pad, model_max_length=77
    )


@torch.no_grad()
def scaled(module: nn.Module, *, seed: int, gain: float = 1.0) -> nn.Module:
    """Weights that keep the size of what flows through them, norms near 1, small biases, all different."""
    draws = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        if "embedding" in name and value.ndim == 2 and "time" not in name and "add_" not in name:
            value.normal_(0, 0.5, generator=draws)
        elif value.ndim > 1:
            value.normal_(0, gain / value[0].numel() ** 0.5, generator=draws)
        else:
            value.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.05, generator=draws)
    return module.eval()
