"""What lies beside the weights in a folder that diffusers loads: its pipeline, scheduler and tokenizers, as JSON?

Published folders of Stable Diffusion 1, 2 and XL are the models of it; nothing here imports diffusers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion.models.text import TextTransformer
from diffusion.pretrained import transformers
from diffusion.pretrained.compare import check_same
from diffusion.process import GaussianDiffusion
from diffusion.schedule import linear, scaled_linear
from diffusion.tokenizer import VOCAB_SIZE, ClipTokenizer, clip_vocabulary

VERSION = "0.30.0"  # of diffusers, whose settings these are
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
PIPELINES = {  # by task, for one text encoder and for XL
    "text-to-image": ("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    "inpainting": ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"),
    "instruct-pix2pix": ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"),
}
REFINER = "StableDiffusionXLImg2ImgPipeline"


def scheduler_json(
    diffusion: GaussianDiffusion, *, published: Mapping[str, Any] | None, latent: bool
) -> dict[str, Any]:
    """The scheduler_config.json of a process; ValueError for one that diffusers does not know.

    published: the config that the model came with, if it came from such a folder, whose settings of sampling are kept.
    latent: whether it is a model of latents, which are never clipped and of which Stable Diffusion's habits are those
    of all published ones; models of pixels get the trailing spacing that ours are sampled with.
    """
    if diffusion.parameterization not in PREDICTIONS or diffusion.time_scale != 1:
        raise ValueError(
            f"diffusers has no process with parameterization={diffusion.parameterization} and "
            f"time_scale={diffusion.time_scale:g}, which this model has"
        )
    habits: dict[str, Any]
    if published and "_class_name" in published:
        habits = {key: value for key, value in published.items() if key not in SCHEDULE_KEYS}
    elif diffusion.learned_variance:
        habits = {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "clip_sample": not latent}
    elif latent:
        habits = {
            "_class_name": "DDIMScheduler",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        }
    else:
        habits = {"_class_name": "DDIMScheduler", "clip_sample": True, "timestep_spacing": "trailing"}
    if diffusion.schedule.zero_terminal_snr:
        habits |= {"timestep_spacing": "trailing"}
    return {
        "_diffusers_version": VERSION,
        **habits,
        "prediction_type": PREDICTIONS[diffusion.parameterization],
        **_betas(diffusion.schedule.betas, published or {}),
    }


SCHEDULE_KEYS = (
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "rescale_betas_zero_snr"),
    "prediction_type",
)


def _betas(betas: torch.Tensor, published: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule by the name it has there where it has one, else as a list of numbers."""
    count = len(betas)
    for name, make in (("scaled_linear", scaled_linear), ("linear", linear)):
        ends = {"beta_start": round(float(betas[0]), 12), "beta_end": round(float(betas[-1]), 12)}
        if torch.allclose(make(count, reference_steps=None, **ends).betas, betas, rtol=1e-9, atol=0):
            return {"num_train_timesteps": count, "beta_schedule": name, "trained_betas": None, **ends}
    if published.get("rescale_betas_zero_snr"):
        return {key: published[key] for key in SCHEDULE_KEYS if key in published and key != "prediction_type"}
    return {"num_train_timesteps": count, "trained_betas": betas.tolist()}


def pipeline_json(
    *,
    task: str,
    texts: Mapping[str, TextTransformer],
    unet: str,
    autoencoder: str | None,
    scheduler: str,
    labels: bool = False,
    zero_null: bool = False,
) -> dict[str, Any] | None:
    """The model_index.json for these parts; None where diffusers has no pipeline for them.

    texts: encoders by folder. unet, autoencoder and scheduler: names of diffusers' classes. labels: whether the network
    needs a class. zero_null: whether XL's null condition is zeros.
    """
    parts: dict[str, Any] = {"scheduler": ["diffusers", scheduler], "unet": ["diffusers", unet]}
    if autoencoder is not None:
        parts["vae" if texts else "vqvae"] = ["diffusers", autoencoder]
    for name, encoder in texts.items():
        kind = "CLIPTextModel" if encoder.projection is None else "CLIPTextModelWithProjection"
        parts[name] = ["transformers", kind]
        parts[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if not texts:
        if unet != "UNet2DModel" or labels:
            return None
        kind = "LDMPipeline" if autoencoder else "DDPMPipeline" if scheduler == "DDPMScheduler" else "DDIMPipeline"
        return {"_class_name": kind, "_diffusers_version": VERSION, **parts}
    if "text_encoder_2" in texts:
        absent = {name: [None, None] for name in ("text_encoder", "tokenizer") if name not in parts}
        kind = REFINER if absent else PIPELINES[task][1]
        parts |= absent | {"force_zeros_for_empty_prompt": zero_null}
        if absent:
            parts["requires_aesthetics_score"] = True
    else:
        kind = PIPELINES[task][0]
        parts |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return {"_class_name": kind, "_diffusers_version": VERSION, **parts}


def text_json(encoder: TextTransformer) -> dict[str, Any]:
    """The config.json of the CLIPTextModel, or CLIPTextModelWithProjection, that is this encoder; or ValueError."""
    block = encoder.blocks[0]
    projected = encoder.projection is not None
    config = {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": encoder.vocab_size,
        "hidden_size": encoder.channels,
        "intermediate_size": block.expand.out_features,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.num_heads,
        "max_position_embeddings": encoder.max_length,
        "hidden_act": block.activation,
        "layer_norm_eps": encoder.norm_out.eps,
        "projection_dim": encoder.projection_channels or encoder.channels,
        "attention_dropout": 0.0,
        "bos_token_id": VOCAB_SIZE - 2,
        "eos_token_id": VOCAB_SIZE - 1,
        "pad_token_id": 1,
    }
    check_same(encoder, TextTransformer, transformers.text_config(config), "transformers")
    return config


def write_tokenizer(folder: Path, tokenizer: ClipTokenizer) -> None:
    """Write the files of transformers' CLIPTokenizer that gives the same ids; ValueError where none does."""
    if tokenizer.num_words != VOCAB_SIZE - 2:
        raise ValueError(
            f"transformers has no tokenizer with CLIP's words folded into {tokenizer.num_words + 2}, as this model's"
        )
    ids, merges = clip_vocabulary()
    start, end = "<|startoftext|>", "<|endoftext|>"
    pad = end if tokenizer.padding == tokenizer.end else next(word for word, i in ids.items() if i == tokenizer.padding)
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    write_json(folder / "vocab.json", ids, indent=None)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write a JSON file into a folder that is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
