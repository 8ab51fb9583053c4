"""How does a run get its latents from a folder, and how does `task=cache_latents` fill one and prove that it is right?

Both write the same files with the same code, `diffusion/data/latent_cache.py`. What a cache cannot hold: random crops,
which are other pixels in each epoch. Mirrors are kept beside the images, at twice the size; the draw from q(z|x), the
scale of the latents and the dropping of conditions stay in the training step.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from diffusion.conditioner import Conditioner
from diffusion.data.base import ImageData
from diffusion.data.latent_cache import cached
from diffusion.data.latents import Latents
from diffusion.latents import encode_moments
from diffusion.run_folder import first_process
from diffusion.stored_condition import stored_entries, why_not_stored

CACHE_LATENTS = "diffusion.training.cached_latents.cache_latents"  # as configs/task/cache_latents.yaml names it
CHECKED = 64  # samples of a set that are encoded again
# Largest differences, relative to values above 1: by what is stored, and on an accelerator, which encodes in float16.
TOLERANCE = {"float32": 1e-3, "float16": 5e-3}
TOLERANCE_ON_DEVICE = 3e-2
SECONDS_TIMED = 2.0


def with_cache(data: LightningDataModule, task: LightningModule, config: Mapping[str, Any]) -> LightningDataModule:
    """Let the data come from the folder `latent_cache`, which is filled first where it is empty; None changes nothing.

    Raises ValueError for a run without latents, and for a cache, or `data=latents`, made of something else.
    """
    folder = config.get("latent_cache")
    if not folder and not isinstance(data, Latents):
        return data
    what = f"latent_cache={folder}" if folder else "data=latents"
    mend = "set latent_cache=null" if folder else "choose data with images"
    autoencoder, conditioner = getattr(task, "autoencoder", None), getattr(task, "conditioner", None)
    if autoencoder is None or autoencoder is task.net:
        raise ValueError(
            f"{what}, but this run learns no latents; {mend}, or choose autoencoder=trained autoencoder.checkpoint=FILE"
        )
    if conditioner is not None and "image" in conditioner.entries:
        raise ValueError(f"the conditioner reads images, which {what} does not keep; {mend}")
    if isinstance(data, Latents):
        if folder:
            raise ValueError("data=latents reads latents from data.root; leave latent_cache out")
        data.check(autoencoder, conditioner)
        return data
    text = conditioner if _keeps_text(conditioner, config) else None
    how = {"dtype": config.get("latent_dtype"), "settings": config["data"]}
    return cached(data, autoencoder, folder, conditioner=text, **how)


def _keeps_text(conditioner: Conditioner | None, config: Mapping[str, Any]) -> bool:
    return conditioner is not None and bool(config.get("latent_text", True)) and why_not_stored(conditioner) is None


def cache_latents(config: Mapping[str, Any], build: Callable[[str], Any]) -> Path:
    """Fill the folder `latents_dir` for the composed run, check it against encoding on the fly, and say what it saves.

    `build(name)` builds a node of the config. Raises ValueError where the cache differs from what is encoded now.
    """
    folder = Path(config["latents_dir"]).expanduser()
    if not config.get("autoencoder"):
        raise ValueError("this run has no autoencoder; choose one: autoencoder=trained autoencoder.checkpoint=FILE")
    data, autoencoder = build("data"), build("autoencoder").requires_grad_(False)
    if isinstance(data, Latents):
        raise ValueError("data=latents are latents already; choose the images that are to be encoded")
    conditioner = build("conditioner") if config.get("conditioner") else None
    reason = None if conditioner is None else why_not_stored(conditioner)
    if reason is not None and first_process():
        print(f"captions are kept as texts, not encoded: of the conditioner, {reason}", file=sys.stderr)
    text = conditioner if _keeps_text(conditioner, config) else None
    how = {"dtype": config.get("latent_dtype"), "settings": config["data"]}
    cached(data, autoencoder, folder, conditioner=text, **how)
    if not first_process():  # of several, the first has filled the folder, and says so
        return folder
    size = sum(path.stat().st_size for path in folder.iterdir())
    counts = " + ".join(str(len(images)) for images in (data.train_set, data.val_set))
    kept = "latents and text embeddings" if text is not None else "latents"
    print(f"{folder} holds the {kept} of {counts} images, {size / 1e6:,.2f} MB")
    difference = check(data, autoencoder, text)
    print(f"encoded again: {CHECKED} samples of each set or all, largest difference {difference:.2g}")
    slow, fast = speeds(data, autoencoder, text)
    print(f"encoding on the fly {slow:,.0f} images/s, from the cache {fast:,.0f} images/s: {fast / slow:.1f} times")
    print(f"train on it: uv run train.py ... data=latents data.root={folder}")
    return folder


def check(data: ImageData, autoencoder: nn.Module, conditioner: Conditioner | None) -> float:
    """Encode a few evenly spaced samples anew, mirrored ones too, and return the largest difference from the cache.

    Differences are relative to values above 1. Raises ValueError beyond the tolerance, naming entry and sample.
    """
    device = _device()
    largest = 0.0
    for name, images in (("train", data.train_set), ("val", data.val_set)):
        served = data.served[name]
        tolerance = TOLERANCE[served.table.columns["moments"].dtype]
        tolerance = tolerance if device.type == "cpu" else max(tolerance, TOLERANCE_ON_DEVICE)
        indices = sorted({number * len(images) // CHECKED for number in range(CHECKED)})
        for mirrored in (False, True) if images.horizontal_flip else (False,):
            sides = torch.full((len(indices),), mirrored)
            stored = served.samples(indices, sides)
            for entry, fresh in encoded(images.samples(indices, sides), autoencoder, conditioner, device).items():
                difference = ((stored[entry].float() - fresh).abs() / fresh.abs().clamp(min=1)).flatten(1).amax(1)
                worst = int(difference.argmax())
                largest = max(largest, float(difference[worst]))
                if not difference[worst] <= tolerance:
                    raise ValueError(
                        f"the cache is not what is encoded now: {entry} of sample {indices[worst]} of the {name} set "
                        f"differs by {difference[worst]:.3g} (allowed: {tolerance:g}); delete it and build it anew"
                    )
    return largest


def encoded(
    batch: Mapping[str, Any], autoencoder: nn.Module, conditioner: Conditioner | None, device: torch.device
) -> dict[str, Tensor]:
    """Return what a training step without a cache makes of a batch: "moments" and the condition, on the CPU."""
    found = {"moments": encode_moments(autoencoder.to(device), batch["image"].to(device))}
    if conditioner is not None:
        found |= stored_entries(conditioner.to(device), batch)
    return {name: value.float().cpu() for name, value in found.items()}


def speeds(data: ImageData, autoencoder: nn.Module, conditioner: Conditioner | None) -> tuple[float, float]:
    """Time loading and encoding a batch against reading it from the cache; return both in images a second."""
    images, served, device = data.train_set, data.served["train"], _device()
    size = min(data.batch_size, len(images))
    batches = [range(start, start + size) for start in range(0, len(images) - size + 1, size)]

    def images_a_second(make: Callable[[range], Any]) -> float:
        make(batches[0])
        count, since = 0, time.perf_counter()
        while time.perf_counter() - since < SECONDS_TIMED:
            make(batches[count % len(batches)])
            count += 1
        return count * size / (time.perf_counter() - since)

    slow = images_a_second(lambda rows: encoded(images.samples(rows), autoencoder, conditioner, device))
    return slow, images_a_second(lambda rows: served.samples(rows))


def _device() -> torch.device:
    return torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu")
