"""How many bits does a pixel of images cost that a denoiser has not seen? The variational bound, in bits per dimension.

    uv run python -m diffusion.evaluation.bits_per_dim checkpoint=FILE data=digits
    uv run python -m diffusion.evaluation.bits_per_dim checkpoint=FILE data=image_folder data.root=DIR num_images=1000

prints one line of JSON: `bits_per_dim` with its `standard_error` over the images, and what it consists of, as
guided-diffusion's image_nll.py has it: `prior`, `vb` (the sum of all other terms), and the mean squared errors `mse`
(of eps) and `x0_mse` over the steps. The images, evenly spaced in the data set's order, are taken as 8-bit ones. One
network call a step and image: num_steps=100 takes guided-diffusion's stride through the chain in place of all of it.
Further settings: see SETTINGS; `data.NAME=VALUE` are those of the data set.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from diffusion.checkpoint import LoadedModel, load_model
from diffusion.cli import read_words, run_words
from diffusion.denoiser import denoiser
from diffusion.files import atomic_write
from diffusion.generate import check_count, choose_device, conditions
from diffusion.guidance import clip_x0
from diffusion.likelihood import BitsPerDim
from diffusion.likelihood import bits_per_dim as bound
from diffusion.progress import WorkBar
from diffusion.randomness import fold
from diffusion.sampling import SampleNoise

SETTINGS = {
    "checkpoint": None,  # a denoiser of pixels
    "data": None,  # a data set of configs/data
    "split": "val",  # or train
    "num_images": 1000,  # at most; 0: all there are
    "batch_size": 64,
    "num_steps": None,  # 250, "10,15,20", ...; without it, the whole chain
    "clip": True,  # the believed x0 to [-1, 1], as the papers do
    "seed": 0,  # of the noise, one stream an image
    "device": "auto",
    "out": None,  # an .npz file for the terms of each step and the bound of each image
}


def bits_per_dim(
    model: LoadedModel,
    images: Any,
    seed: int = 0,
    *,
    num_images: int | None = None,
    batch_size: int = 64,
    num_steps: int | str | None = None,
    clip: bool = True,
    device: torch.device | str = "cpu",
    out: str | Path | None = None,
    on_images: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate the bound on `images`, an `ImageSet` such as a datamodule's `val_set`, and return what JSON can hold.

    `num_images` evenly spaced ones are taken, None all. `num_steps` None is the whole chain, else guided-diffusion's
    stride through it. Conditional models are told each image's own condition. The noise on an image depends on `seed`
    and its number in the set alone. `out` gets, by step, the means `vb`, `mse` and `x0_mse` at `timesteps`, noisiest
    first, and `bits_per_dim` by image. `on_images` is told after each batch how many images it had. Raises ValueError
    for a model of latents, whose bound is not one of pixels, and for images that do not fit the model.
    """
    check_model(model, images)
    chosen = evenly_spaced(len(images), len(images) if num_images is None else num_images)
    check_count("batch_size", batch_size)
    device = torch.device(device)
    for module in (model.net, model.conditioner):
        if module is not None:
            module.to(device).eval()
    schedule = model.diffusion.schedule
    grid = None if num_steps is None else schedule.timesteps(str(num_steps))
    totals, priors, sums = [], [], 0.0
    for start in range(0, len(chosen), batch_size):
        found = _batch(model, images, chosen[start : start + batch_size], seed, grid, clip=clip, device=device)
        totals.append(found.total.double().cpu())
        priors.append(found.prior.double().cpu())
        sums = sums + torch.stack([part.double().sum(0).cpu() for part in (found.vlb, found.eps_mse, found.x0_mse)])
        if on_images is not None:
            on_images(len(found.total))
    total, prior, terms = torch.cat(totals), torch.cat(priors), sums / len(chosen)
    timesteps = range(schedule.num_train_timesteps - 1, -1, -1) if grid is None else grid[:-1]
    if out is not None:
        save_terms(out, total, terms, timesteps)
    return {
        "bits_per_dim": total.mean().item(),
        "standard_error": total.std().item() / math.sqrt(len(total)) if len(total) > 1 else None,
        "prior": prior.mean().item(),
        "vb": terms[0].sum().item(),
        "mse": terms[1].mean().item(),
        "x0_mse": terms[2].mean().item(),
        "num_images": len(chosen),
        "of_images": len(images),
        "num_steps": len(timesteps),
        "clip": clip,
        "seed": seed,
        "weights": model.weights,
        "step": model.step,
    }


def _batch(
    model: LoadedModel,
    images: Any,
    numbers: Sequence[int],
    seed: int,
    grid: Sequence[int] | None,
    *,
    clip: bool,
    device: torch.device,
) -> BitsPerDim:
    """The bound of some images, and all its terms."""
    batch, conditioner = images.samples(numbers), model.conditioner
    seeds = [fold(seed, "bits", number) for number in numbers]
    labels = None if getattr(model.net, "num_classes", None) is None else batch["label"].tolist()
    inputs = {entry: batch[entry] for entry in (() if conditioner is None else conditioner.entries)}
    told = {"seeds": seeds, "device": device, "dtype": torch.float32}
    condition, _ = conditions(model.net, conditioner, labels, inputs, None, **told)
    denoise = denoiser(model.diffusion, model.net, **condition)
    if clip:
        denoise = clip_x0(denoise, model.diffusion.schedule.level)
    x0 = batch["image"].to(device)
    return bound(model.diffusion, denoise, x0, noise=SampleNoise(seeds, device), timesteps=grid)


def check_model(model: LoadedModel, images: Any) -> None:
    """Raise ValueError unless this model says what such images cost, naming what does not fit."""
    if model.autoencoder is not None:
        raise ValueError(f"{model.path} draws latents, whose bound is none of pixels; take a model of pixels")
    sample = images.samples([0])
    shape, wanted = list(sample["image"].shape[1:]), list(model.facts["shape"])
    if shape != wanted:
        raise ValueError(
            f"the images are {shape} (C, H, W), but {model.path} is a model of {wanted}; "
            "set data.channels and data.image_size so"
        )
    entries = set(model.conditioner.entries if model.conditioner is not None else ())
    if getattr(model.net, "num_classes", None) is not None:
        entries.add("label")
    if lacking := sorted(entries - sample.keys()):
        raise ValueError(f"{model.path} is told {' and '.join(lacking)} of an image, which these data do not give")


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Return `wanted` numbers below `count`, or all of them: the beginning of a sorted set is one class alone."""
    check_count("num_images", wanted)
    wanted = min(wanted, count)
    return [i * count // wanted for i in range(wanted)]


def save_terms(path: str | Path, total: Tensor, terms: Tensor, timesteps: Sequence[int]) -> None:
    """Write the bound of each image, and the means of its terms by step."""
    arrays = dict(zip(("vb", "mse", "x0_mse"), terms.numpy(), strict=True))
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(file, bits_per_dim=total.numpy(), timesteps=np.array(timesteps), **arrays)


def read_settings(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the command's words: its own settings, and those of the data set."""
    of_data = [word for word in arguments if word.startswith("data.") and "=" in word]
    settings = read_words([word for word in arguments if word not in of_data], SETTINGS)
    pairs = (word.removeprefix("data.").split("=", 1) for word in of_data)
    return settings, {name: yaml.safe_load(value) for name, value in pairs}


def open_images(settings: Mapping[str, Any], data_settings: Mapping[str, Any], facts: Mapping[str, Any]) -> Any:
    """Return the images that the command names, of the model's size and classes unless it says otherwise."""
    from diffusion.data.named import open_data

    if settings["split"] not in ("train", "val"):
        raise ValueError(f"split={settings['split']} must be train or val")
    channels, image_size, _ = facts["shape"]
    as_trained = {"channels": channels, "image_size": image_size, "num_classes": facts["num_classes"]}
    data = open_data(settings["data"], as_trained | dict(data_settings))
    # Not as training shows them: without mirrors and crops, which `samples` leaves out.
    return data.train_set if settings["split"] == "train" else data.val_set


def main(arguments: Sequence[str]) -> None:
    """Evaluate what the `name=value` words say, with progress on stderr, and print the result as one line of JSON."""
    settings, data_settings = read_settings(arguments)
    for name in ("checkpoint", "data"):
        if settings[name] is None:
            raise ValueError(f"give the denoiser and the data: {name}=..., such as checkpoint=FILE data=digits")
    model = load_model(settings["checkpoint"])
    images = open_images(settings, data_settings, model.facts)
    wanted = min(settings["num_images"] or len(images), len(images))
    with WorkBar(wanted, doing="evaluating", done="evaluated") as bar:
        result = bits_per_dim(
            model,
            images,
            settings["seed"],
            num_images=wanted,
            **{name: settings[name] for name in ("batch_size", "num_steps", "clip", "out")},
            device=choose_device(settings["device"]),
            on_images=bar.advance,
        )
    about = {name: settings[name] for name in ("checkpoint", "data", "split")}
    print(json.dumps(result | about))


if __name__ == "__main__":
    run_words(main, __doc__)
