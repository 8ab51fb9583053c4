"""From samples to a folder: which files hold them, and what does each say about how it was made?

Behind sample.py; the samples themselves come from diffusion/generate.py.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from diffusion.checkpoint import LoadedModel, atomic_write, git_commit, package_version
from diffusion.generate import (
    Batch,
    batches,
    check_count,
    choose_asked,
    choose_device,
    choose_dtype,
    classes_of,
    guidance_for,
    sampler_for,
    say_guidance,
    with_classifier,
)
from diffusion.images import grid, label_layout, save_npz, save_png, to_uint8
from diffusion.sampling import Sampler


def sample_to_folder(model: LoadedModel, sampler: Sampler, guidance: Any, config: Mapping[str, Any]) -> Path:
    """Do what configs/sample.yaml says and return the folder: grid.png, samples.npz, images/*.png, config.yaml.

    `config` is the resolved config; it goes into every picture, with the checkpoint's hash. All that can be wrong with
    it is found before the first step, the folder included.
    """
    for name in ("num_samples", "batch_size", "pad_to", "tile"):
        check_count(name, 1 if config[name] is None and name == "tile" else config[name])
    device, dtype = choose_device(config["device"]), choose_dtype(config["dtype"])
    guidance = with_classifier(
        guidance,
        model.diffusion,
        shape=model.facts["shape"],
        num_classes=classes_of(model.net, model.conditioner),
        autoencoder=model.autoencoder,
        device=device,
        dtype=dtype,
        buildable=config["buildable"],
    )
    asked = choose_asked(model, config, guidance)
    for module in (model.net, model.conditioner, model.autoencoder):
        if module is not None:
            module.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    conditional = classes_of(model.net, model.conditioner) is not None or asked.inputs is not None
    known = {"conditional": conditional, "condition_drop": model.facts["condition_drop"]}
    sampler_for(sampler, latents=model.autoencoder is not None)
    num_steps = len(sampler.timesteps(model.diffusion.schedule)) - 1
    out_dir = Path(config["out_dir"])
    if (out_dir / "samples.npz").exists() and not config["overwrite"]:
        raise ValueError(f"{out_dir} already holds samples; choose another out_dir, or overwrite=true")
    with atomic_write(out_dir / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")

    say_guidance(guidance, sampler)
    made_by = {**provenance(model, config), "device": str(device)}
    pictures: list[np.ndarray] = []
    with _progress(num_steps * -(-config["num_samples"] // config["batch_size"])) as on_step:
        for batch in batches(
            model.net,
            model.diffusion,
            sampler,
            guidance_for(guidance, **known),
            num_samples=config["num_samples"],
            batch_size=config["batch_size"],
            seed=config["seed"],
            **asked._asdict(),
            shape=model.facts["shape"],
            conditioner=model.conditioner,
            autoencoder=model.autoencoder,
            device=device,
            dtype=dtype,
            pad_to=config["pad_to"],
            tile=config["tile"],
            on_step=on_step,
        ):
            save_pictures(batch, out_dir / "images", made_by, first=len(pictures))
            pictures.extend(to_uint8(batch.images))
    images = np.stack(pictures)
    save_npz(out_dir / "samples.npz", images, asked.labels)
    columns, captions = label_layout(asked.labels, model.facts["class_names"])
    captions = (asked.inputs or {}).get("caption", captions)
    save_png(grid(images, columns, captions=captions), out_dir / "grid.png", made_by)
    return out_dir


def save_pictures(batch: Batch, folder: Path, made_by: Mapping[str, Any], *, first: int) -> None:
    """Write a batch as 000000.png, ... from `first` on, each with its own seed, label and prompt in its text."""
    prompts = (batch.inputs or {}).get("caption")
    for i, image in enumerate(to_uint8(batch.images)):
        own = {"seed": batch.seeds[i], "label": None if batch.labels is None else batch.labels[i]}
        own |= {} if prompts is None else {"prompt": prompts[i]}
        save_png(image, folder / f"{first + i:06d}.png", {**own, **made_by})


def provenance(model: LoadedModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that makes a sample what it is, but its own seed, label and prompt."""
    asked = {name: config[name] for name in ("negative_prompt", "condition_image") if config.get(name) is not None}
    parts = {f"{name}_sha256": part["sha256"] for name, part in model.parts.items()}
    if classifier := config["guidance"].get("classifier_checkpoint"):
        parts["classifier_sha256"] = file_hash(classifier)
    return {
        **asked,
        **parts,
        "checkpoint": str(model.path),
        "checkpoint_sha256": file_hash(model.path),
        "weights": model.weights,
        "step": model.step,
        "sampler": config["sampler"],
        "guidance": config["guidance"],
        "dtype": config["dtype"],
        "pad_to": config["pad_to"],
        "tile": config["tile"],
        "package_version": package_version(),
        "git_commit": git_commit(),
        "torch_version": str(torch.__version__),
    }


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Show a bar with the time left on stderr; yield what advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda: bar.advance(task)
