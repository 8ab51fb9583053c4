"""What is each sample asked to show? The settings of sample.py, read as a model understands them, and checked."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from diffusion.checkpoint import LoadedModel
from diffusion.guidance import ClassifierGuidance
from diffusion.image_tasks import Source, check_source, choose_strength, picture_task

# The settings of sample.py that ask for what a model's conditioner reads from the batch entry of that name.
ASKED_BY = {"label": "labels", "caption": "prompt", "image": "condition_image"}
NOUNS = {"labels": "classes", "prompt": "texts", "condition_image": "images"}
EXAMPLES = {"labels": "labels=[3,7]", "prompt": 'prompt="..."', "condition_image": "condition_image=FILE"}
KNOWN = ("sizes",)  # entries that follow from other settings


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
    """What each sample is to show: classes for the network, inputs for the conditioner, and what to steer away from.

    `shape` (C, H, W) is that of the samples, `source` the pictures that they start from.
    """

    labels: list[int] | None
    inputs: dict[str, list[Any]] | None
    negative: dict[str, list[Any]] | None
    condition_noise: float | None = None
    shape: tuple[int, ...] = ()
    source: Source | None = None


def classes_of(net: nn.Module, conditioner: nn.Module | None) -> int | None:
    """Return how many classes the network knows, by itself or through its conditioner; None for none."""
    known = getattr(net, "num_classes", None)
    return getattr(conditioner, "num_classes", None) if known is None else known


def classes_asked(net: nn.Module, conditioner: nn.Module | None, guidance: Any) -> int | None:
    """Return how many classes a label may name: those of the network, or else those of the classifier that guides."""
    known = classes_of(net, conditioner)
    return guidance.num_classes if known is None and isinstance(guidance, ClassifierGuidance) else known


def choose_asked(
    model: LoadedModel, config: Mapping[str, Any], guidance: Any = None, *, shape: Sequence[int] | None = None
) -> Asked:
    """Read what sample.py is asked for by labels, texts and images, as this model and its guidance understand it.

    Images that come with labels are of those classes. `shape` (C, H, W) is what `choose_shape` says. Raises ValueError
    for a setting that the model does not listen to, and for one that it needs.
    """
    shape = tuple(choose_shape(model, config) if shape is None else shape)
    conditioner = model.conditioner
    entries = () if conditioner is None else conditioner.entries
    num_classes = classes_asked(model.net, conditioner, guidance)
    _check_heard(entries, config, num_classes)
    count, labels = config["num_samples"], config["labels"]
    check_count("num_samples", count)
    inputs: dict[str, list[Any]] = {}
    if "image" in entries:
        from diffusion.condition_images import choose_images  # the data sets' packages: only for those who need them

        inputs["image"], told = choose_images(config["condition_image"], count, shape, conditioner.low_size)
        labels = told if labels is None and num_classes is not None else labels
        if labels is None and num_classes is not None and conditioner.low_size is not None:
            raise ValueError("this model enlarges images of known classes, and the files tell none; add labels=[3,7]")
    labels = choose_labels(labels, count, num_classes)
    negative: dict[str, list[Any]] = {}
    for entry in entries:
        if entry == "label":
            inputs[entry] = labels
        elif entry == "caption":
            inputs[entry] = choose_prompts("prompt", config["prompt"], count)
            if config.get("negative_prompt") is not None:
                negative[entry] = choose_prompts("negative_prompt", config["negative_prompt"], count)
        elif entry == "sizes":
            inputs[entry] = [choose_sizes(conditioner, config, shape)] * count
            if config.get("negative_prompt") is not None:
                negative[entry] = [choose_sizes(conditioner, config, shape, negative=True)] * count
    return Asked(
        labels,
        inputs or None,
        negative or None,
        _noise_asked(conditioner, config),
        shape,
        _source(model, config, shape),
    )


def _check_heard(entries: Sequence[str], config: Mapping[str, Any], num_classes: int | None) -> None:
    """Raise ValueError for what a model that reads these batch entries is asked in vain, or is not asked and needs."""
    if unknown := [entry for entry in entries if entry not in (*ASKED_BY, *KNOWN)]:
        raise ValueError(f"this model is conditioned on {unknown}, which no setting gives; call generate(inputs=...)")
    heard = [ASKED_BY[entry] for entry in entries if entry in ASKED_BY]
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
    for key in ("original_size", "crop"):
        if config.get(key) is not None and "sizes" not in entries:
            raise ValueError(f"{key}={config[key]}, but this model was not trained with sizes; leave {key} out")


def _noise_asked(conditioner: nn.Module | None, config: Mapping[str, Any]) -> float | None:
    """Return the level of noise on the condition, after checks."""
    noise = config.get("condition_noise")
    if noise is not None:
        from diffusion.conditioning import check_noise

        check_noise("condition_noise", noise, getattr(conditioner, "train_noise", (0.0, 0.0)))
    return noise


# ---------------------------------------------------------------------------------------------------------------------
# sizes and pictures


def choose_shape(model: LoadedModel, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape (C, H, W) to draw: height and width, else those of the picture to start from, else the model's.

    Raises ValueError, naming the nearest that work, for sizes that the network or the autoencoder cannot halve, and for
    a picture much larger than the model was trained on.
    """
    channels, *trained = model.facts["shape"]
    unit = getattr(model.net, "size_factor", 1) * getattr(getattr(model, "autoencoder", None), "size_factor", 1)
    size = [config.get("height"), config.get("width")]
    for name, side in zip(("height", "width"), size, strict=True):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1 or side % unit):
            raise ValueError(f"{name}={side} must be a multiple of {unit} for this model; {_nearest(side, unit)}")
    if None in size and config.get("image") is not None:
        from diffusion.condition_images import picture_size

        trained = picture_size(config["image"], trained, unit)
    return (channels, *(wanted or usual for wanted, usual in zip(size, trained, strict=True)))


def _nearest(side: Any, unit: int) -> str:
    if isinstance(side, bool) or not isinstance(side, int):
        return f"give a whole number, {8 * unit} say"
    below = max(side // unit * unit, 0)
    return f"the nearest that work: {' or '.join(str(near) for near in (below, below + unit) if near)}"


def choose_sizes(
    conditioner: nn.Module, config: Mapping[str, Any], shape: Sequence[int], *, negative: bool = False
) -> list[float]:
    """Return what Stable Diffusion XL is told of a picture's sizes, by original_size and crop if they are asked for."""
    told = {"crop": [0, 0], "original": list(shape[-2:])}
    for name, key, least in (("original_size", "original", 1), ("crop", "crop", 0)):
        if (given := config.get(name)) is None:
            continue
        pair = list(given) if isinstance(given, list | tuple) else []
        if len(pair) != 2 or any(isinstance(x, bool) or not isinstance(x, int) or x < least for x in pair):
            meaning = "[height, width]" if name == "original_size" else "[top, left]"
            raise ValueError(f"{name}={given} must be {meaning} in whole pixels from {least} on")
        told[key] = pair
    return conditioner.sizes_of(*shape[-2:], **told, negative=negative)


def _source(model: LoadedModel, config: Mapping[str, Any], shape: Sequence[int]) -> Source | None:
    """Return the pictures that the samples start from, if any are asked for."""
    autoencoder = getattr(model, "autoencoder", None)
    channels = shape[0] if autoencoder is None else autoencoder.latent_channels
    task = picture_task(model.net, channels, model.conditioner)
    images, masks = config.get("image"), config.get("mask")
    if images is None:
        for name in ("mask", "strength"):
            if config.get(name) is not None:
                raise ValueError(f"{name}={config[name]} says what to do with a picture; add image=FILE")
        check_source(None, task)
        return None
    from diffusion.condition_images import choose_pictures

    pictures, masks = choose_pictures(images, masks, config["num_samples"], shape)
    strength = choose_strength(config.get("strength"), task, masked=masks is not None)
    source = Source(pictures, masks, strength, paste=bool(config.get("paste", True)))
    check_source(source, task)
    return source
