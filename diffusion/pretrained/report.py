"""What should a person know about a file of weights before using it, in words and numbers?

From the header and a few tensors: a whole scan for NaN is done only if asked for.
"""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from diffusion.pretrained.places import Place, Recognised
from diffusion.pretrained.weight_files import WeightFile

SAMPLE_TENSORS, SAMPLE_VALUES = 24, 1024  # of the quick scan for NaN
SHOWN = 12  # names of keys listed
PARTS = {
    "net": "network",
    "autoencoder": "autoencoder",
    "conditioner": "text encoder",
    "classifier": "classifier",
}
PREDICTIONS = {
    "eps": "eps, the noise",
    "v": "v, the velocity",
    "x0": "x0, the image",
    "mean": "the mean of the next step",
}


def report(found: Recognised, *, nan: str = "sample") -> list[str]:
    """Lines about what was recognised. nan: "sample" looks into some tensors, "all" reads the file, "none" neither."""
    lines = [f"{found.path}: {found.title}"]
    lines += _table(_facts(found))
    if nan != "none":
        lines += _table([("NaN and infinity", scan(found.files, whole=nan == "all"))])
    for title, keys in (
        ("missing", found.missing),
        ("unexpected", found.unexpected),
        ("mis-shaped", found.misshaped),
    ):
        lines += _listed(title, keys)
    lines += _listed("harmless", found.harmless, shown=4)
    lines += [f"  note: {note}" for note in found.notes]
    lines += [f"  {line}" for line in advice(found)]
    return lines


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {name + ':':<18}{value}" for name, value in rows]


def _facts(found: Recognised) -> list[tuple[str, str]]:
    rows = [("family", found.family), ("layout", _layout(found)), ("precision", precision(found.files))]
    rows += [("parameters", parameters(found))]
    if found.kind in ("denoiser", "classifier") and "diffusion" in found.config:
        rows.append(("prediction", prediction(found)))
        rows.append(("schedule", schedule(found.config["diffusion"].get("schedule", {}))))
    if "shape" in found.facts:
        rows.append(("image size", _size(found)))
    if found.facts.get("num_classes"):
        rows.append(("classes", str(found.facts["num_classes"])))
    if (node := found.config.get("autoencoder")) and "scale_factor" in node:
        rows.append(("latent scale", str(node["scale_factor"])))
    if any("model_ema." in name for file in found.files for name in file):
        taken = "averaged" if found.places and "ema" in found.places[0].prefix else "raw"
        rows.append(("averages", f"raw and averaged weights are there; {taken} are taken (weights=raw or weights=ema)"))
    if found.absent:
        rows.append(("absent", ", ".join(PARTS[name] for name in found.absent)))
    if extras := sorted({extra for file in found.files for extra in file.extras}):
        rows.append(("beside the weights", ", ".join(extras)))
    return rows


def _layout(found: Recognised) -> str:
    containers = "/".join(sorted({file.container for file in found.files}))
    files = f", {len(found.files)} files" if len(found.files) > 1 else ""
    size = sum(bytes_of(file) for file in found.files)
    return f"{found.layout} ({containers}{files}, {size / 1e9:.2f} GB, {sum(map(len, found.files))} tensors)"


def bytes_of(file: WeightFile) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in file.values())


def _size(found: Recognised) -> str:
    by = found.facts.get("image_size_by_parameterization")
    if by:
        return " or ".join(f"{size}x{size} if it predicts {kind}" for kind, size in by.items())
    _, height, width = found.facts["shape"]
    return f"{height}x{width}"


def precision(files: Iterable[WeightFile]) -> str:
    """The types of the weights, and how much of them each has."""
    counts: Counter[str] = Counter()
    for file in files:
        for entry in file.values():
            counts[str(entry.dtype).removeprefix("torch.")] += math.prod(entry.shape)
    total = sum(counts.values()) or 1
    return ", ".join(
        name if count == total else f"{name} {100 * count / total:.1f}%"
        for name, count in counts.most_common()
        if count
    )


def parameters(found: Recognised) -> str:
    """Parameters by part, in millions."""
    if not found.places:
        return millions(sum(math.prod(entry.shape) for file in found.files for entry in file.values()))
    return ", ".join(f"{_named(place)} {millions(count_of(place))}" for place in found.places)


def count_of(place: Place) -> int:
    """Parameters of one part."""
    return sum(math.prod(shape) for shape in place.table.shapes.values())


def millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else str(count)


def _named(place: Place) -> str:
    head = place.part.split(".")[0]
    if place.part.endswith(".embedding"):
        return "classes"
    number = [word for word in place.part.split(".") if word.isdigit()]
    return f"{PARTS.get(head, head)}{f' {int(number[0]) + 1}' if number else ''}"


def prediction(found: Recognised) -> str:
    """What the network predicts, or how to find out."""
    if found.parameterization is not None:
        return PREDICTIONS.get(found.parameterization, found.parameterization)
    return (
        "not told by the file: eps and v have the same shapes. sample.py asks the network itself before it starts; "
        "parameterization=eps or parameterization=v decides"
    )


def schedule(node: dict[str, Any]) -> str:
    """A schedule's config node in words."""
    name = str(node.get("_target_", "unknown")).rsplit(".", 1)[-1]
    if name == "zero_terminal_snr":
        return f"{schedule(node['schedule'])}, rescaled to end in pure noise"
    if "betas" in node:
        return f"its own {len(node['betas'])} betas"
    ends = f", beta {node['beta_start']} to {node['beta_end']}" if "beta_start" in node else ""
    return f"{name} of {node.get('num_train_timesteps', 1000)} steps{ends}"


def scan(files: Iterable[WeightFile], *, whole: bool = False) -> str:
    """Say which tensors hold NaN or infinity: all of them read, or some values of some."""
    bad, seen = [], 0
    for file in files:
        names = [name for name, entry in file.items() if entry.dtype.is_floating_point and math.prod(entry.shape)]
        step = 1 if whole else max(1, len(names) // SAMPLE_TENSORS)
        for name in names[::step]:
            values = file.read(name).flatten()
            values = values if whole else values[:SAMPLE_VALUES]
            values = values.float() if values.dtype.itemsize < 2 else values
            seen += 1
            if not bool(torch.isfinite(values).all()):
                bad.append(name)
    where = f"{seen} tensors read whole" if whole else f"the start of {seen} tensors looked at; nan=all reads the file"
    if not bad:
        return f"none ({where})"
    return f"in {len(bad)} tensors, such as {', '.join(bad[:4])} ({where})"


def _listed(title: str, keys: tuple[str, ...], *, shown: int = SHOWN) -> list[str]:
    if not keys:
        return []
    more = f", and {len(keys) - shown} more" if len(keys) > shown else ""
    if title == "harmless":
        return [f"  {len(keys)} harmless extra keys: {', '.join(keys[:shown])}{more}"]
    return [
        f"  {len(keys)} {title} keys:",
        *(f"    {key}" for key in keys[:shown]),
        *([f"    {more[2:]}"] if more else []),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# what to do with it


def advice(found: Recognised) -> list[str]:
    """Commands for this file."""
    if not found.fits:
        return ["it cannot be used as it is: every key must fit"]
    match found.kind:
        case "lora" | "textual-inversion":
            return ["it is no model by itself; applying it to one is not supported yet"]
        case "autoencoder":
            return [f'use it: uv run sample.py checkpoint=MODEL vae={_quoted(found.path)} prompt="..."']
        case "text":
            return [f'use it: uv run sample.py checkpoint=MODEL text_encoder={_quoted(found.path)} prompt="..."']
        case "classifier":
            use = f"guidance=classifier guidance.classifier_checkpoint={_quoted(found.path)}"
            return [f"use it: uv run sample.py checkpoint=MODEL {use}"]
    given = {"autoencoder": "vae=FILE", "conditioner": "text_encoder=FILE"}
    words = [given[name] for name in found.absent]
    return [f"sample: {' '.join(['uv run sample.py', f'checkpoint={_quoted(found.path)}', *_task(found), *words])}"]


def _task(found: Recognised) -> list[str]:
    conditioner = found.config.get("conditioner") or {}
    prompt = ['prompt="..."'] if {"encoder", "texts"} & set(conditioner) else []
    prompt += ["tokenizer=vocab.txt"] if isinstance(conditioner.get("tokenizer"), dict) else []
    match found.facts.get("task"):
        case "inpainting":
            return [*prompt, "image=FILE", "mask=FILE"]
        case "instruct-pix2pix":
            return [*prompt, "image=FILE"]
    if found.family == "sdxl-refiner":
        return [*prompt, "image=FILE", "strength=0.3"]
    if "LowResolution" in str(conditioner.get("_target_")):
        return ["condition_image=FILE"]
    return prompt or (["labels=[0,1]"] if found.facts.get("num_classes") else [])


def _quoted(path: Path) -> str:
    text = str(path)
    return f"'{text}'" if any(c in text for c in " ()&;$,=[]{}") else text
