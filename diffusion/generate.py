"""From a model to samples: which seeds, in which batches, told what, and at what precision.

Shared by sample.py, pipeline.py and the pictures made during training. Image i depends on `seed + i` alone.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.asked import Asked, check_count, choose_asked, choose_labels, classes_asked, classes_of
from diffusion.denoiser import NULL_LABEL, Denoiser
from diffusion.devices import HALF, choose_device, choose_dtype, half_weights, in_own_precision, resident
from diffusion.guidance import ClassifierGuidance, LogProbGrad
from diffusion.guiding import check_same_space, guidance_for, say_guidance, with_classifier
from diffusion.image_tasks import Begin, Source, begun, pasted, picture_task
from diffusion.process import GaussianDiffusion
from diffusion.randomness import fold
from diffusion.sampling import SampleNoise, Sampler

__all__ = [
    "Asked",
    "Batch",
    "Inputs",
    "NonFiniteSamples",
    "batches",
    "check_count",
    "check_same_space",
    "choose_asked",
    "choose_device",
    "choose_dtype",
    "choose_labels",
    "classes_asked",
    "classes_of",
    "conditions",
    "decoded",
    "generate",
    "guidance_for",
    "padded",
    "sampler_for",
    "say_guidance",
    "whole",
    "with_classifier",
]

Inputs = Mapping[str, Sequence[Any]]  # by batch entry ("caption", "label", "image"), a value a sample


class Batch(NamedTuple):
    """Finished samples: `images` (B, C, H, W) float32 on the CPU, made from `seeds`, of the classes `labels`."""

    seeds: list[int]
    labels: list[int] | None
    images: Tensor
    inputs: Inputs | None = None


class NonFiniteSamples(ValueError):
    """The sampler ended in values that are not numbers."""


def generate(
    net: nn.Module,
    diffusion: GaussianDiffusion,
    sampler: Sampler,
    guidance: Any,
    *,
    shape: Sequence[int],
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    inputs: Inputs | None = None,
    negative: Inputs | None = None,
    source: Source | None = None,
    condition_noise: float | None = None,
    conditioner: nn.Module | None = None,
    autoencoder: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    pad_to: int = 1,
    tile: int | None = None,
    offload: str | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Draw one batch (B, C, H, W), in [-1, 1] for pixels, as float32 on the CPU. Sample i depends on `seeds[i]` alone.

    `shape` is that of an image; with an `autoencoder` its latents are sampled and decoded, in tiles of `tile` latent
    pixels if large images must fit into memory. `source` are pictures to start from, to repaint or to edit. `labels`
    are for the network, if it knows classes, and for a classifier that guides (whose `guidance` comes from
    `with_classifier`).

    The modules are used as they are: call `.eval()` and `.to(device)` first, or let offload="sequential" move one at a
    time. The sampler's arithmetic is float32, or float64 (then the modules must be); in bfloat16 and float16 a float32
    network runs under autocast, and one with such weights as it is. Matrix kernels round differently for small and odd
    batches, by about 1e-6 an answer; `pad_to` fills the batch up to a multiple of itself with spare samples that are
    thrown away, and multiples of 16 were measured to agree bit for bit on CPUs. Raises ValueError for samples that are
    not finite.
    """
    wanted, given, device = len(seeds), source, torch.device(device)
    sampler = sampler_for(sampler, latents=autoencoder is not None)
    seeds, labels, inputs, negative = (padded_all(part, pad_to) for part in (seeds, labels, inputs, negative))
    source = None if source is None else source.chosen(partial(padded, multiple=pad_to))
    told = {"seeds": seeds, "condition_noise": condition_noise, "device": device, "dtype": state_dtype(dtype)}
    with resident(conditioner, device, offload):
        condition, null = conditions(net, conditioner, labels, inputs, negative, **told)
    noise = SampleNoise(seeds, device=device)
    x = noise.initial(shape if autoencoder is None else autoencoder.latent_shape(shape)).to(state_dtype(dtype))
    coding = {"autoencoder": autoencoder, "dtype": dtype, "tile": tile}
    with resident(autoencoder if source else None, device, offload):
        task = picture_task(net, len(x[0]), conditioner)
        begin = begun(source, diffusion, x, sampler.timesteps(diffusion.schedule), task=task, **coding)
    bound = partial(guidance, diffusion, in_own_precision(net), *with_picture(condition, null, begin))
    push = None
    if isinstance(guidance, ClassifierGuidance):
        push = guidance.log_prob_grad(diffusion, x, labels, num_classes=classes_of(net, conditioner))
    with resident(net, device, offload), autocast_for(net, device, dtype):
        x = walked(diffusion, sampler, bound, begin, noise, push, on_step=on_step)[:wanted]
    check_finite(x, half=dtype in HALF)
    with resident(autoencoder, device, offload):
        return pasted(decoded(latents=x, **coding), given)


def walked(
    diffusion: GaussianDiffusion,
    sampler: Sampler,
    bound: Callable[[], Denoiser],
    begin: Begin,
    noise: SampleNoise,
    push: LogProbGrad | None,
    *,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Return the last state of the samples that `begin` describes; without timesteps that is their start."""
    x = begin.x
    if begin.timesteps:
        along = {"timesteps": begin.timesteps, "project": begin.project, "log_prob_grad": push}
        for state in sampler.states(diffusion, bound(), x, noise=noise, **along):
            x = state.x
            if on_step is not None:
                on_step()
    if push is not None:
        push.check()
    return x


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the sampler's arithmetic for a network that computes in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_for(net: nn.Module, device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Run a float32 network in half precision; one whose weights are in half precision needs nothing."""
    if dtype not in HALF or half_weights(net) is not None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def check_finite(x: Tensor, *, half: bool) -> None:
    """Raise NonFiniteSamples where a sampler ended in values that are not numbers."""
    if broken := int((~x.isfinite()).flatten(1).any(1).sum()):
        hint = "try dtype=float32" if half else "the checkpoint may be that of a run that diverged"
        raise NonFiniteSamples(f"{broken} of {len(x)} samples are not finite; {hint}")


def with_picture(
    condition: dict[str, Tensor], null: dict[str, Tensor], begin: Begin
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the conditions with the channels that a network reads of a picture, before those of a conditioner."""
    if begin.concat is None:
        return condition, null

    def joined(told: dict[str, Tensor], picture: Tensor) -> dict[str, Tensor]:
        return told | {"concat": torch.cat([picture, told["concat"]], dim=1) if "concat" in told else picture}

    away = begin.null_concat
    if away is None and "concat" not in null:  # inpainting: both halves of guidance see the picture
        return joined(condition, begin.concat), null
    return joined(condition, begin.concat), joined(null, begin.concat if away is None else away)


def conditions(
    net: nn.Module,
    conditioner: nn.Module | None,
    labels: Sequence[int] | None,
    inputs: Inputs | None,
    negative: Inputs | None,
    *,
    seeds: Sequence[int],
    condition_noise: float | None = None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what the network is told of each sample, and what it is told of none: {"label", "context", ...} twice.

    Noise on a condition, of the level `condition_noise` or else the conditioner's own, depends on `seeds[i]` alone.
    """

    def prepared_of(values: Inputs) -> Any:
        noise = SampleNoise([fold(seed, "condition") for seed in seeds])
        return conditioner.corrupted(conditioner.prepare_batch(stacked(values)), noise, condition_noise)

    condition: dict[str, Tensor] = {}
    null: dict[str, Tensor] = {}
    if labels is not None and getattr(net, "num_classes", 0) is not None:
        condition["label"] = torch.tensor(labels, device=device)
        null["label"] = torch.full_like(condition["label"], NULL_LABEL)
    if conditioner is not None:
        with torch.no_grad():
            prepared = prepared_of(inputs)
            if negative:
                prepared, away = conditioner.alike(prepared, prepared_of({**inputs, **negative}))
                told, away = conditioner(prepared), conditioner(away)
            else:
                told = conditioner(prepared)
                away = conditioner(prepared, torch.ones(len(prepared), dtype=torch.bool, device=device))
        condition |= {name: value.to(dtype) if value.is_floating_point() else value for name, value in told.items()}
        null |= {name: value.to(dtype) if value.is_floating_point() else value for name, value in away.items()}
    return condition, null


def stacked(inputs: Inputs) -> dict[str, Any]:
    """Return inputs as a batch holds them: images as one tensor (B, C, H, W) in [-1, 1], texts and labels as they are.

    Images of bytes, as many samples of an earlier model are kept, become floats here.
    """
    batch: dict[str, Any] = {}
    for name, values in inputs.items():
        batch[name] = torch.stack(list(values)) if isinstance(values[0], Tensor) else list(values)
        if isinstance(values[0], Tensor) and batch[name].dtype == torch.uint8:
            batch[name] = batch[name].float() / 127.5 - 1
    return batch


def sampler_for(sampler: Sampler, *, latents: bool) -> Sampler:
    """Return the sampler as it is for images, and without clipping for latents, which know no bounds."""
    if not latents or sampler.clip is None:
        return sampler
    if sampler.clip != "auto":
        raise ValueError(
            f"sampler.clip={sampler.clip} would cut latents off, which have no range such as [-1, 1]; "
            "set sampler.clip=auto or sampler.clip=null"
        )
    return replace(sampler, clip=None)


@torch.no_grad()
def decoded(
    autoencoder: nn.Module | None, latents: Tensor, *, dtype: torch.dtype = torch.float32, tile: int | None = None
) -> Tensor:
    """Decode one latent after the other, so that an image depends neither on its batch nor on the memory for it.

    What overflows in half precision is decoded again in float32, with a warning. Without an autoencoder the samples
    are images already.
    """
    if autoencoder is None:
        return latents.float().cpu()
    dtype = half_weights(autoencoder) or dtype
    how = {} if tile is None else {"tile": tile, "overlap": min(8, tile // 4)}
    safely = partial(autoencoder.decode_safely, dtype=dtype, **how)
    decode = safely if dtype in HALF else partial(autoencoder.decode, **how)
    return torch.cat([decode(z).float().cpu() for z in latents.split(1)])


def padded_all(values: Sequence[Any] | Inputs | None, multiple: int) -> Any:
    """Pad a sequence, or every sequence of a mapping; None stays None."""
    if values is None:
        return None
    if isinstance(values, Mapping):
        return {name: padded(column, multiple) for name, column in values.items()}
    return padded(values, multiple)


def padded(values: Sequence[Any], multiple: int) -> list[Any]:
    """Repeat the last value until the length is a multiple of `multiple`."""
    check_count("pad_to", multiple)
    return [*values, *[values[-1]] * (-len(values) % multiple)]


def whole(batch_size: int, pad_to: int) -> int:
    """Return a batch size raised to the next multiple of `pad_to`: a smaller batch would cost as much."""
    check_count("batch_size", batch_size)
    check_count("pad_to", pad_to)
    return batch_size + -batch_size % pad_to


def batches(
    net: nn.Module,
    diffusion: GaussianDiffusion,
    sampler: Sampler,
    guidance: Any,
    *,
    num_samples: int,
    batch_size: int,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    inputs: Inputs | None = None,
    negative: Inputs | None = None,
    source: Source | None = None,
    pad_to: int = 1,
    numbers: Iterable[int] | None = None,
    on_step: Callable[[int], None] | None = None,
    **settings: Any,
) -> Iterator[Batch]:
    """Draw `num_samples` samples, seeded seed, seed + 1, ..., a batch at a time; `settings` are those of `generate`.

    `numbers` asks for some of the batches; whichever these are, batch i holds the samples from i times
    `whole(batch_size, pad_to)` on. `on_step` gets the number of samples that made a step.
    """
    starts = range(0, num_samples, whole(batch_size, pad_to))
    for start in starts if numbers is None else (starts[number] for number in numbers):
        some = slice(start, min(start + starts.step, num_samples))
        seeds = list(range(seed + some.start, seed + some.stop))
        asked = {
            "labels": None if labels is None else list(labels[some]),
            "inputs": None if inputs is None else {name: list(values[some]) for name, values in inputs.items()},
            "negative": None if negative is None else {name: list(values[some]) for name, values in negative.items()},
        }
        asked["source"] = None if source is None else source.chosen(lambda values, some=some: list(values[some]))
        count = None if on_step is None else partial(on_step, len(seeds))
        images = generate(
            net, diffusion, sampler, guidance, seeds=seeds, **asked, pad_to=pad_to, on_step=count, **settings
        )
        yield Batch(seeds, asked["labels"], images, asked["inputs"])
