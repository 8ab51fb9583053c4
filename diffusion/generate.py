"""From a model to samples: which labels, texts and seeds, in which batches, and at what precision.

Shared by sample.py and by the pictures made during training. Image i depends on `seed + i` alone.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.checkpoint import LoadedClassifier, LoadedModel, load_classifier, weights_hash
from diffusion.denoiser import NULL_LABEL
from diffusion.guidance import ClassifierGuidance, NoGuidance, is_noise, within
from diffusion.process import GaussianDiffusion
from diffusion.randomness import fold
from diffusion.sampling import SampleNoise, Sampler

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


# The settings of sample.py that ask for what a model's conditioner reads from the batch entry of that name.
ASKED_BY = {"label": "labels", "caption": "prompt", "image": "condition_image"}
NOUNS = {"labels": "classes", "prompt": "texts", "condition_image": "images"}
EXAMPLES = {"labels": "labels=[3,7]", "prompt": 'prompt="..."', "condition_image": "condition_image=FILE"}

Inputs = Mapping[str, Sequence[Any]]  # by batch entry ("caption", "label", "image"), a value a sample


class Batch(NamedTuple):
    """Finished samples: `images` (B, C, H, W) float32 on the CPU, made from `seeds`, of the classes `labels`."""

    seeds: list[int]
    labels: list[int] | None
    images: Tensor
    inputs: Inputs | None = None


class NonFiniteSamples(ValueError):
    """The sampler ended in values that are not numbers."""


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless `value` is at least 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def choose_labels(labels: Sequence[int] | int | None, num_samples: int, num_classes: int | None) -> list[int] | None:
    """Return a label for each sample: the given ones repeat, without any all classes take turns; None: no classes."""
    check_count("num_samples", num_samples)
    if num_classes is None:
        if labels is not None:
            raise ValueError(f"labels={labels} for a model without classes; leave labels out")
        return None
    given = list(range(num_classes)) if labels is None else [labels] if isinstance(labels, int) else list(labels)
    wrong = [x for x in given if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < num_classes]
    if wrong or not given:
        raise ValueError(
            f"labels={given} must be whole numbers from 0 to {num_classes - 1}, this model's classes"
            + (f"; {wrong} are not" if wrong else "; the list is empty")
        )
    return [given[i % len(given)] for i in range(num_samples)]


def choose_prompts(name: str, prompts: str | Sequence[str], num_samples: int) -> list[str]:
    """Return a text for each sample: the given ones repeat. Raises ValueError for what is not text."""
    given = list(prompts) if isinstance(prompts, list | tuple) else [prompts]
    wrong = [text for text in given if not isinstance(text, str)]
    if wrong or not given:
        what = f"; {wrong[0]!r} is none, quote it: '{name}=\"{wrong[0]}\"'" if wrong else "; the list is empty"
        raise ValueError(f"{name} must be a text or a list of texts{what}")
    return [given[i % len(given)] for i in range(num_samples)]


class Asked(NamedTuple):
    """What each sample is to show: classes for the network, inputs for the conditioner, and what to steer away from."""

    labels: list[int] | None
    inputs: dict[str, list[Any]] | None
    negative: dict[str, list[str]] | None
    condition_noise: float | None = None


def classes_of(net: nn.Module, conditioner: nn.Module | None) -> int | None:
    """Return how many classes the network knows, by itself or through its conditioner; None for none."""
    known = getattr(net, "num_classes", None)
    return getattr(conditioner, "num_classes", None) if known is None else known


def classes_asked(net: nn.Module, conditioner: nn.Module | None, guidance: Any) -> int | None:
    """Return how many classes a label may name: those of the network, or else those of the classifier that guides."""
    known = classes_of(net, conditioner)
    return guidance.num_classes if known is None and isinstance(guidance, ClassifierGuidance) else known


def choose_asked(model: LoadedModel, config: Mapping[str, Any], guidance: Any = None) -> Asked:
    """Read what sample.py is asked for by labels, texts and images, as this model and its guidance understand it.

    Images that come with labels are of those classes. Raises ValueError for a setting that the model does not listen
    to, and for one that it needs.
    """
    entries = () if model.conditioner is None else model.conditioner.entries
    num_classes = classes_asked(model.net, model.conditioner, guidance)
    if unknown := [entry for entry in entries if entry not in ASKED_BY]:
        raise ValueError(f"this model is conditioned on {unknown}, which no setting gives; call generate(inputs=...)")
    heard = [ASKED_BY[entry] for entry in entries]
    heard += ["labels"] if num_classes is not None and "labels" not in heard else []
    for key, needed in (
        ("labels", "labels"),
        ("prompt", "prompt"),
        ("negative_prompt", "prompt"),
        ("condition_image", "condition_image"),
    ):
        if config.get(key) is not None and needed not in heard:
            instead = f"it takes {' and '.join(EXAMPLES[name] for name in heard)}" if heard else "it takes no condition"
            raise ValueError(f"{key}={config[key]}, but this model was not trained with {NOUNS[needed]}; {instead}")
    for key in heard:
        if key != "labels" and config.get(key) is None:
            raise ValueError(f"this model draws what {NOUNS[key]} ask for; add {EXAMPLES[key]}")
    count, labels = config["num_samples"], config["labels"]
    check_count("num_samples", count)
    inputs: dict[str, list[Any]] = {}
    if "image" in entries:
        from diffusion.condition_images import choose_images  # the data sets' packages: only for those who need them

        inputs["image"], told = choose_images(
            config["condition_image"], count, model.facts["shape"], model.conditioner.low_size
        )
        labels = told if labels is None and num_classes is not None else labels
        if labels is None and num_classes is not None and model.conditioner.low_size is not None:
            raise ValueError("this model enlarges images of known classes, and the files tell none; add labels=[3,7]")
    labels = choose_labels(labels, count, num_classes)
    for entry in entries:
        if entry == "label":
            inputs[entry] = labels
        elif entry == "caption":
            inputs[entry] = choose_prompts("prompt", config["prompt"], count)
    negative = None
    if config.get("negative_prompt") is not None:
        negative = {"caption": choose_prompts("negative_prompt", config["negative_prompt"], count)}
    if (noise := config.get("condition_noise")) is not None:
        from diffusion.conditioning import check_noise

        check_noise("condition_noise", noise, getattr(model.conditioner, "train_noise", (0.0, 0.0)))
    return Asked(labels, inputs or None, negative, noise)


def choose_device(name: str) -> torch.device:
    """Return the named device; "auto" is the best one here. Raises ValueError where this machine has no such device."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name} cannot be used here ({reason}); use device=auto or device=cpu") from error
    return device


def choose_dtype(name: str) -> torch.dtype:
    """Return the dtype of this name, one of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def with_classifier(
    guidance: Any,
    diffusion: GaussianDiffusion,
    *,
    shape: Sequence[int],
    num_classes: int | None,
    autoencoder: nn.Module | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    buildable: Sequence[str] = (),
) -> Any:
    """Return classifier guidance with its classifier loaded and fit for a denoiser; any other guidance as it is.

    The denoiser is told by its `diffusion`, the `shape` (C, H, W) of its images, its `num_classes` if it has classes,
    and its `autoencoder`. The classifier computes in float32, or in float64 if that is `dtype`. Raises ValueError for
    a file that holds no classifier and for a classifier of other images, latents, noise or classes.
    """
    if not isinstance(guidance, ClassifierGuidance):
        return guidance
    if guidance.classifier is None and guidance.classifier_checkpoint is not None:
        loaded = load_classifier(guidance.classifier_checkpoint, device=device, buildable=buildable)
        loaded.net.to(torch.float64 if dtype == torch.float64 else torch.float32)
        guidance = replace(guidance, classifier=loaded)
    if isinstance(guidance.classifier, LoadedClassifier):
        check_same_space(guidance.name, guidance.classifier.parts.get("autoencoder"), autoencoder)
    guidance.check(
        diffusion, shape if autoencoder is None else autoencoder.latent_shape(shape), num_classes=num_classes
    )
    return guidance


def check_same_space(name: str, latents_of: Mapping[str, Any] | None, autoencoder: nn.Module | None) -> None:
    """Raise ValueError unless a classifier judges what the denoiser draws: pixels, or latents of one autoencoder.

    `latents_of` is what the classifier's file says about its autoencoder, None for one that judges pixels.
    """
    spaces = ["pixels" if of is None else "the latents of an autoencoder" for of in (latents_of, autoencoder)]
    if spaces[0] != spaces[1]:
        raise ValueError(
            f"{name} judges {spaces[0]}, but the denoiser draws {spaces[1]}; train a classifier on {spaces[1]}"
        )
    if latents_of is None:
        return
    config = latents_of["config"]
    theirs = (latents_of["sha256"][:12], config.get("scale_factor"), config.get("shift", 0.0))
    ours = (weights_hash(autoencoder)[:12], autoencoder.scale_factor, autoencoder.shift)
    if theirs != ours:
        worded = ["weights {}, scale_factor={} shift={}".format(*of) for of in (theirs, ours)]
        raise ValueError(
            f"{name} judges latents of another autoencoder ({worded[0]}) than the denoiser's ({worded[1]}); train "
            "both on the same one"
        )


def say_guidance(guidance: Any, sampler: Sampler, diffusion: GaussianDiffusion) -> None:
    """Say on stderr, where a classifier guides, in which form the sampler lets it, and at which timesteps not."""
    if not isinstance(guidance, ClassifierGuidance):
        return
    form, noise = "shifts the mean (DDPM)", []
    if not sampler.shifts_mean:
        form = "bends the score (DDIM, ODE solvers)"
        grid = sampler.timesteps(diffusion.schedule)[:-1]
        noise = [t for t in grid if within(guidance.interval, t) and is_noise(diffusion.schedule.level(t))]
    where = f", but not at timestep {', '.join(map(str, noise))}, which is noise only" if noise else ""
    print(f"{guidance.name} guides: it {form}, classifier_scale={guidance.classifier_scale:g}{where}", file=sys.stderr)


def guidance_for(guidance: Any, *, conditional: bool, condition_drop: float) -> Any:
    """Return the guidance to use with such a model, with a warning where it cannot do what it is for."""
    if getattr(guidance, "guidance_scale", 1) == 1:
        return guidance
    if not conditional:
        if isinstance(guidance, ClassifierGuidance):
            warnings.warn("this model has no condition: sampling with the classifier's guidance alone", stacklevel=1)
            return replace(guidance, guidance_scale=1.0)
        warnings.warn("this model has no condition to guide towards: sampling without guidance", stacklevel=1)
        return NoGuidance()
    if not condition_drop:
        warnings.warn(
            f"guidance_scale={guidance.guidance_scale}, but this model was trained without condition drop: what it "
            "answers without a condition means nothing, so guidance will hurt. Use guidance=none, or train with "
            "task.condition_drop=0.1",
            stacklevel=1,
        )
    return guidance


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
    condition_noise: float | None = None,
    conditioner: nn.Module | None = None,
    autoencoder: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    pad_to: int = 1,
    tile: int | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Draw one batch (B, C, H, W), in [-1, 1] for pixels, as float32 on the CPU. Sample i depends on `seeds[i]` alone.

    `shape` is that of an image; with an `autoencoder` its latents are sampled and decoded, in tiles of `tile` latent
    pixels if large images must fit into memory. The modules are used as they
    are (call `.eval()` and `.to(device)` first); in bfloat16 and float16 the network runs under autocast while the
    sampler's arithmetic stays float32; float64 needs modules in float64. Matrix kernels round differently for small
    and odd batches, by about 1e-6 an answer; `pad_to` fills the batch up to a multiple of itself with spare samples
    that are thrown away, and multiples of 16 were measured to agree bit for bit on CPUs. `labels` are for the network,
    if it knows classes, and for a classifier that guides (whose `guidance` comes from `with_classifier`). Raises
    ValueError for samples that are not finite.
    """
    wanted = len(seeds)
    sampler = sampler_for(sampler, latents=autoencoder is not None)
    seeds, labels, inputs, negative = (padded_all(part, pad_to) for part in (seeds, labels, inputs, negative))
    device = torch.device(device)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    told = {"seeds": seeds, "condition_noise": condition_noise}
    condition, null = conditions(net, conditioner, labels, inputs, negative, **told, device=device, dtype=state_dtype)
    denoise = guidance(diffusion, net, condition, null)
    noise = SampleNoise(seeds, device=device)
    x = noise.initial(shape if autoencoder is None else autoencoder.latent_shape(shape)).to(state_dtype)
    push = None
    if isinstance(guidance, ClassifierGuidance):
        push = guidance.log_prob_grad(diffusion, x, labels, num_classes=classes_of(net, conditioner))
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, dtype) if half else contextlib.nullcontext():
        for state in sampler.states(diffusion, denoise, x, noise=noise, log_prob_grad=push):
            x = state.x
            if on_step is not None:
                on_step()
    if push is not None:
        push.check()
    x = x[:wanted]
    if broken := int((~x.isfinite()).flatten(1).any(1).sum()):
        hint = "try dtype=float32" if half else "the checkpoint may be that of a run that diverged"
        raise NonFiniteSamples(f"{broken} of {len(x)} samples are not finite; {hint}")
    return x.float().cpu() if autoencoder is None else decoded(autoencoder, x, dtype=dtype, tile=tile)


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
            told = conditioner(prepared)
            if negative:
                away = conditioner(prepared_of({**inputs, **negative}))
            else:
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
    autoencoder: nn.Module, latents: Tensor, *, dtype: torch.dtype = torch.float32, tile: int | None = None
) -> Tensor:
    """Decode one latent after the other, so that an image depends neither on its batch nor on the memory for it.

    What overflows in half precision is decoded again in float32, with a warning.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    how = {} if tile is None else {"tile": tile, "overlap": min(8, tile // 4)}
    decode = partial(autoencoder.decode_safely, dtype=dtype, **how) if half else partial(autoencoder.decode, **how)
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
        count = None if on_step is None else partial(on_step, len(seeds))
        images = generate(
            net, diffusion, sampler, guidance, seeds=seeds, **asked, pad_to=pad_to, on_step=count, **settings
        )
        yield Batch(seeds, asked["labels"], images, asked["inputs"])
