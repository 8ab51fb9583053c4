"""What is left to decide when a model is loaded and sample.py's settings are read: all that can be wrong, found now.

What is decided for the user is said on stderr.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffusion.asked import check_count, choose_asked, choose_shape, classes_of
from diffusion.checkpoint import LoadedModel, settle
from diffusion.devices import check_offload, choose_device, choose_dtype
from diffusion.generate import sampler_for, whole
from diffusion.guiding import guidance_for, say_guidance, with_classifier, with_two_scales
from diffusion.image_tasks import Source, count_moves, picture_task, tail
from diffusion.probing import PARAMETERIZATIONS, answer_to_noise, likely
from diffusion.process import GaussianDiffusion
from diffusion.sampling import Sampler
from diffusion.text_conditioning import text_parts

TEXT_OPTIONS = ("clip_skip", "long_prompt", "emphasis")
LARGE, TILE = 128 * 128, 64  # latents of more pixels than that are decoded in tiles of that size: 1024x1024 for f8


def is_published(model: LoadedModel) -> bool:
    """Say whether these are published weights, or converted ones: those say what they are for."""
    return "task" in model.facts


def prepared(
    model: LoadedModel,
    sampler: Sampler,
    guidance: Any,
    config: Mapping[str, Any],
    *,
    device: torch.device | None = None,
    silent: bool = False,
    ask_network: bool = True,
) -> tuple[LoadedModel, dict[str, Any]]:
    """Put a model on its device, and return it with what `generate.batches` is to be told of these settings.

    `config` is sample.py's. `ask_network` asks published weights what they predict, see `with_parameterization`. Raises
    ValueError for all that cannot be, before the first step.
    """
    for name in ("num_samples", "batch_size", "pad_to", "tile"):
        check_count(name, 1 if config[name] is None and name == "tile" else config[name])
    check_offload(config.get("offload"))
    device = choose_device(config["device"]) if device is None else device
    dtype = choose_dtype(config["dtype"], device, published=is_published(model))
    set_text_options(model.conditioner, config)
    shape = choose_shape(model, config)
    sampler_for(sampler, latents=model.autoencoder is not None)
    sampler.timesteps(model.diffusion.schedule)
    guidance = guidance_ready(model, guidance, config, shape=shape, device=device, dtype=dtype)
    asked = choose_asked(model, config, guidance, shape=shape)
    conditional = classes_of(model.net, model.conditioner) is not None or asked.inputs is not None
    place(model, device, dtype, offload=config.get("offload"))
    if ask_network:
        said = {"given": config.get("parameterization"), "silent": silent}
        found = with_parameterization(model, device, dtype, offload=config.get("offload"), **said)
        if found.facts["shape"] != model.facts["shape"]:  # what a network predicts tells its images' size, too
            return prepared(found, sampler, guidance, config, device=device, silent=silent, ask_network=False)
        model = found
    if not silent:
        say_guidance(guidance, sampler, model.diffusion)
        check_steps(sampler, model.diffusion, asked.source)
        say_decided(config, asked.source, device, dtype)
    return model, {
        **asked._asdict(),
        "guidance": guidance_for(guidance, conditional=conditional, condition_drop=model.facts["condition_drop"]),
        "conditioner": model.conditioner,
        "autoencoder": model.autoencoder,
        "device": device,
        "dtype": dtype,
        "batch_size": whole(config["batch_size"], config["pad_to"]),
        "offload": config.get("offload"),
        "tile": choose_tile(config["tile"], model.autoencoder, shape, silent=silent),
        **{name: config[name] for name in ("num_samples", "seed", "pad_to")},
    }


def guidance_ready(
    model: LoadedModel,
    guidance: Any,
    config: Mapping[str, Any],
    *,
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """Return guidance with its classifier, if it has one, and by two scales for a model that edits pictures."""
    guidance = with_classifier(
        guidance,
        model.diffusion,
        shape=shape,
        num_classes=classes_of(model.net, model.conditioner),
        autoencoder=model.autoencoder,
        device=device,
        dtype=dtype,
        buildable=config["buildable"],
    )
    channels = shape[0] if model.autoencoder is None else model.autoencoder.latent_channels
    task = picture_task(model.net, channels, model.conditioner)
    return with_two_scales(guidance, task, config.get("image_guidance_scale"))


def count_steps(sampler: Sampler, diffusion: GaussianDiffusion, source: Source | None) -> int:
    """Return how many moves a sampler makes from such pictures, or from noise."""
    return count_moves(tail(sampler.timesteps(diffusion.schedule), source and source.strength))


def say_decided(config: Mapping[str, Any], source: Source | None, device: torch.device, dtype: torch.dtype) -> None:
    """Say on stderr what was decided for the user: half precision, and how far back to noise a picture is sent."""
    if config["dtype"] == "auto" and dtype != torch.float32:
        print(f"dtype={str(dtype).removeprefix('torch.')} on {device}; dtype=float32 is more exact", file=sys.stderr)
    if source is not None and config.get("strength") is None and source.strength is not None:
        print(f"strength={source.strength:g}, the part of the way back to noise that image= is sent", file=sys.stderr)


def check_steps(sampler: Sampler, diffusion: GaussianDiffusion, source: Source | None) -> None:
    """Warn where a strength above 0 is less than one step of the grid."""
    if source is not None and source.strength and not count_steps(sampler, diffusion, source):
        warnings.warn(
            f"strength={source.strength} of {count_steps(sampler, diffusion, None)} steps is less than one: the "
            "picture stays as it is; take more steps or a greater strength",
            stacklevel=2,
        )


def place(model: LoadedModel, device: torch.device, dtype: torch.dtype, *, offload: str | None = None) -> None:
    """Move a model's parts to the device, or, to be moved one by one later, to the CPU, in their precision.

    Published weights are computed in half precision as such; networks of ours keep float32 weights, under autocast.
    """
    if dtype in (torch.bfloat16, torch.float16) and not is_published(model):
        dtype = torch.float32
    move = settle if is_published(model) else nn.Module.to
    for module in (model.net, model.conditioner, model.autoencoder):
        if module is not None:
            move(module, device if offload is None else torch.device("cpu"), dtype)


def _text_parts(conditioner: nn.Module | None) -> list[nn.Module]:
    return [] if conditioner is None else text_parts(conditioner)


def set_text_options(conditioner: nn.Module | None, config: Mapping[str, Any]) -> None:
    """Set clip_skip, long_prompt and emphasis where they are asked for; ValueError for a model that reads no text."""
    asked = {name: config[name] for name in TEXT_OPTIONS if config.get(name) not in (None, False)}
    parts = _text_parts(conditioner)
    if asked and not parts:
        given = " ".join(f"{name}={value}" for name, value in asked.items())
        raise ValueError(f"{given} is for models that read text through CLIP, and this is none; leave it out")
    for part in parts:
        for name, value in asked.items():
            setattr(part, name, value)


@contextlib.contextmanager
def text_options_kept(conditioner: nn.Module | None) -> Iterator[None]:
    """Put a conditioner's text options back in the end."""
    before = [(part, name, getattr(part, name)) for part in _text_parts(conditioner) for name in TEXT_OPTIONS]
    try:
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def choose_tile(tile: int | None, autoencoder: nn.Module | None, shape: Sequence[int], *, silent: bool) -> int | None:
    """Return the tiles, in latent pixels, to decode in: those asked for, or some for images of more than `LARGE`."""
    if tile is not None or autoencoder is None:
        return tile
    height, width = autoencoder.latent_shape(shape)[1:]
    if height * width <= LARGE:
        return None
    if not silent:
        print(
            f"tile={TILE}: {shape[2]}x{shape[1]} is decoded in tiles; tile=100000 decodes it at once", file=sys.stderr
        )
    return TILE


def with_parameterization(
    model: LoadedModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    offload: str | None = None,
    given: str | None = None,
    silent: bool = False,
) -> LoadedModel:
    """Return the model with what its network predicts, if only the network itself can tell; warn where it contradicts.

    Asks it once, about a small image of noise: for published weights that predict eps or v alone.
    """
    said = model.diffusion.parameterization
    if not is_published(model) or said not in PARAMETERIZATIONS or getattr(model.net, "num_classes", None) is not None:
        return model
    found = answer_to_noise(model, device, dtype, offload)
    answer, how = likely(found), f"its answer to noise is {found:.2f} alike; 1 is eps, 0 is v"
    recognised = getattr(model, "recognised", None)
    if recognised is not None and recognised.parameterization is None:
        said = answer if given is None else given
        if given is None and not silent:
            print(f"parameterization={answer}, as the network answers, since no file says ({how})", file=sys.stderr)
        model = as_predicting(model, said)
    if answer != said and not silent:
        warnings.warn(
            f"this model is sampled as predicting {said}, but its network answers as one that predicts {answer} "
            f"({how}): try parameterization={answer}",
            stacklevel=2,
        )
    return model


def as_predicting(model: LoadedModel, parameterization: str) -> LoadedModel:
    """Return the model with another parameterization, and with the size of images that goes with it, if any does."""
    size = model.facts.get("image_size_by_parameterization", {}).get(parameterization)
    shape = model.facts["shape"] if size is None else [model.facts["shape"][0], size, size]
    diffusion = replace(model.diffusion, parameterization=parameterization)
    return replace(model, diffusion=diffusion, facts={**model.facts, "shape": shape})
