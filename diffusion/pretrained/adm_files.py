"""Which of guided-diffusion's networks is in a file, and what of it do the weights not say?

Published ones are known by their widths and depths; of others, the number of heads and the order of the rows of
attention are assumed, and said.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusion.pretrained import architecture, families, guided_diffusion
from diffusion.pretrained.guided_diffusion_classifier import classifier_rules
from diffusion.pretrained.guided_diffusion_files import published
from diffusion.pretrained.keymap import KeyMap
from diffusion.pretrained.places import Place, Recognised, Shapes, compared, template
from diffusion.pretrained.weight_files import WeightFile

LINEAR = {
    "_target_": "diffusion.schedule.linear",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "reference_steps": 1000,
}
COSINE = {"_target_": "diffusion.schedule.cosine", "num_train_timesteps": 1000, "s": 0.008, "max_beta": 0.999}


@dataclass(frozen=True)
class Known:
    """A published network: its recipe, the images' size, and what its weights do not tell."""

    recipe: str
    image_size: int
    heads: Mapping[str, int]
    schedule: Mapping[str, Any]
    factor: int | None = None  # of an upsampler


WIDE = {"head_channels": 64}
Sizes = tuple[int, int, tuple[float, ...], int, int]  # in_channels, channels, widths, depth, levels with attention
KNOWN: Mapping[Sizes, Known] = {
    (3, 192, (1, 2, 3, 4), 3, 3): Known("adm_imagenet64", 64, WIDE, COSINE),
    (3, 256, (1, 1, 2, 3, 4), 2, 3): Known("adm_imagenet128", 128, {"num_heads": 4}, LINEAR),
    (3, 256, (1, 1, 2, 2, 4, 4), 2, 3): Known("adm_imagenet256", 256, WIDE, LINEAR),
    (3, 256, (0.5, 1, 1, 2, 2, 4, 4), 2, 3): Known("adm_imagenet512", 512, WIDE, LINEAR),
    (6, 192, (1, 1, 2, 2, 4, 4), 2, 3): Known("adm_upsample_64_256", 256, {"num_heads": 4}, LINEAR, 4),
    (6, 192, (1, 1, 2, 2, 4, 4), 2, 2): Known("adm_upsample_128_512", 512, WIDE, LINEAR, 4),
}
CLASSIFIERS: Mapping[tuple[tuple[float, ...], int], Known] = {
    ((1, 2, 3, 4), 4): Known("imagenet64_classifier", 64, WIDE, COSINE),
    ((1, 1, 2, 3, 4), 2): Known("imagenet128_classifier", 128, WIDE, LINEAR),
    ((1, 1, 2, 2, 4, 4), 2): Known("imagenet256_classifier", 256, WIDE, LINEAR),
    ((0.5, 1, 1, 2, 2, 4, 4), 2): Known("imagenet512_classifier", 512, WIDE, LINEAR),
}
ASSUMED = "neither head counts nor the order of attention's rows can be told from the weights; assumed are "


def is_classifier(shapes: Shapes) -> bool:
    """Whether a UNet's way down ends in a classifier's head."""
    return not architecture.numbers(shapes, "output_blocks") and any(name.startswith("out.") for name in shapes)


def _heads(width: int, _: str) -> dict[str, int]:
    return dict(WIDE) if width % 64 == 0 else {"num_heads": 1}


def recognise_denoiser(file: WeightFile) -> Recognised:
    """A denoiser of pixels, or an upsampler, in guided-diffusion's names."""
    shapes = file.shapes
    settings = _read(file, lambda: architecture.unet_settings(shapes, _heads))
    known = KNOWN.get(_sizes(settings))
    notes: list[str] = []
    if known is not None and known.recipe == "adm_imagenet256" and settings["num_classes"] is None:
        known = replace(known, recipe="adm_imagenet256_unconditional")
    if known is not None:
        settings = architecture.unet_settings(shapes, lambda _width, _kind: dict(known.heads))
    order = published(known.recipe).new_attention_order if known else False
    upsamples = settings["in_channels"] == 6 and known is not None and known.factor is not None
    image = 3 if upsamples else settings["in_channels"]
    target = "SuperResolutionUNet" if upsamples else "UNet"
    net = {"_target_": f"diffusion.models.unet.{target}", **settings}
    module = template(net, file.path)
    table = KeyMap(module, guided_diffusion.unet_rules(module, new_attention_order=order))
    variance = "learned" if settings["out_channels"] == 2 * image else "posterior"
    config = {"net": net, "diffusion": families.diffusion_node(known.schedule if known else LINEAR, "eps", variance)}
    if upsamples:
        config["conditioner"] = _small_image(known)
    size = known.image_size if known else 2 ** (len(settings["stages"]) + 2)
    if known is None:
        notes.append(f"{ASSUMED}heads of 64 channels, the old order, a linear schedule and images of {size}x{size}")
    return compared(
        Recognised(
            path=file.path,
            layout="guided-diffusion",
            kind="denoiser",
            family=known.recipe if known else "custom",
            title=f"guided-diffusion's {known.recipe}" if known else "a denoiser of pixels in guided-diffusion's names",
            config=config,
            facts=_facts(image, size, settings["num_classes"]),
            places=(Place("net", file, "", table),),
            parameterization="eps",
            notes=tuple(notes),
            files=(file,),
        )
    )


def _read(file: WeightFile, read: Any) -> dict[str, Any]:
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{file.path} has names of guided-diffusion, but is damaged or incomplete: {error}") from error


def _sizes(settings: Mapping[str, Any]) -> Sizes:
    stages = settings["stages"]
    widths = tuple(stage["channel_mult"] for stage in stages)
    attends = sum(stage["attention"] != "none" for stage in stages)
    return settings["in_channels"], settings["channels"], widths, stages[0]["depth"], attends


def _facts(channels: int, size: int, num_classes: int | None) -> dict[str, Any]:
    return {
        "shape": [channels, size, size],
        "num_classes": num_classes,
        "class_names": None,
        "condition_drop": 0.0,
        "task": "class",
    }


def _small_image(known: Known) -> dict[str, Any]:
    """The upsamplers' condition: the image averaged over squares, which the network enlarges itself."""
    return {
        "_target_": "diffusion.conditioning.LowResolutionConditioner",
        "image_size": known.image_size,
        "factor": known.factor,
        "channels": 3,
        "size": known.image_size // known.factor,
        "kernel": "area",
    }


def recognise_classifier(file: WeightFile) -> Recognised:
    """A classifier of noisy images in guided-diffusion's names."""
    shapes = file.shapes
    settings = _read(file, lambda: architecture.classifier_settings(shapes, _heads))
    mults = tuple(stage["channel_mult"] for stage in settings["stages"])
    known = CLASSIFIERS.get((mults, settings["stages"][0]["depth"]))
    node = {"_target_": "diffusion.models.classifier.Classifier", **settings}
    module = template(node, file.path)
    order = published(known.recipe).new_attention_order if known else False
    table = KeyMap(module, classifier_rules(module, new_attention_order=order))
    schedule = known.schedule if known else LINEAR
    size = settings["image_size"]
    return compared(
        Recognised(
            path=file.path,
            layout="guided-diffusion",
            kind="classifier",
            family=known.recipe if known else "custom",
            title=f"guided-diffusion's {known.recipe}" if known else "a classifier in guided-diffusion's names",
            config={"classifier": node, "diffusion": families.diffusion_node(schedule, "eps", "posterior")},
            facts=_facts(settings["in_channels"], size, settings["num_classes"]),
            places=(Place("classifier", file, "", table),),
            parameterization="eps",
            notes=() if known else (f"{ASSUMED}heads of 64 channels, the old order and a linear schedule",),
            files=(file,),
        )
    )
