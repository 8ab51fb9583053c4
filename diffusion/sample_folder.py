"""From samples to a folder: which files hold them, and what does each say about how it was made?

Behind sample.py; the samples themselves come from diffusion/generate.py.
"""

import contextlib
import hashlib
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    whole,
    with_classifier,
)
from diffusion.images import grid, label_layout, save_npz, save_png, to_uint8
from diffusion.processes import Stopped, Team
from diffusion.progress import WorkBar
from diffusion.sample_parts import Parts
from diffusion.sampling import Sampler

GRID = 100  # pictures in grid.png, at most
# What may differ between the batches of one run: the same command with another version of the code, or a moved file.
VERSIONS = ("package_version", "git_commit", "torch_version", "checkpoint")


def sample_to_folder(
    model: LoadedModel, sampler: Sampler, guidance: Any, config: Mapping[str, Any], team: Team | None = None
) -> Path:
    """Do what configs/sample.yaml says and return the folder: grid.png, samples.npz, images/*.png, config.yaml.

    `config` is the resolved config; it goes into every picture, with the checkpoint's hash. All that can be wrong with
    it is found before the first step, the folder included. The processes of a `team` share the batches and write what
    one of them would. What was stopped goes on: finished batches lie in out_dir/parts until all are there.
    """
    team = Team() if team is None else team
    num_samples, out_dir = config["num_samples"], Path(config["out_dir"])
    with warnings.catch_warnings():
        if not team.first:
            warnings.simplefilter("ignore")  # the first process says it for all
        settings = checked(model, sampler, guidance, config, team)
    channels, height, width = model.facts["shape"]
    parts = Parts(out_dir, num_samples, settings["batch_size"], (height, width, channels))
    made_by = team.share(lambda: {**provenance(model, config), "device": settings["device"].type})
    begun = team.share(lambda: _begin(parts, made_by, config))
    parts.hold()
    steps = len(sampler.timesteps(model.diffusion.schedule)) - 1
    try:
        with _counting(team, steps, num_samples, begun) as on_step:
            numbers = parts.missing(team.turns(len(parts.starts)))
            for batch in batches(model.net, model.diffusion, sampler, **settings, numbers=numbers, on_step=on_step):
                first, images = batch.seeds[0] - config["seed"], to_uint8(batch.images)
                if config["save_images"]:
                    save_pictures(batch, images, out_dir / "images", made_by, first=first)
                parts.save(first, images)
        team.share(lambda: _finish(parts, settings, model.facts["class_names"], made_by))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{settings['device']} has too little memory for batches of {parts.batch_size}; choose a smaller "
            "batch_size, in steps of pad_to"
        ) from error
    except Stopped as stop:
        stop.message = f"stopped after {parts.count()} of {num_samples} samples; to go on: {_same_command(out_dir)}"
        raise
    return out_dir


def checked(
    model: LoadedModel, sampler: Sampler, guidance: Any, config: Mapping[str, Any], team: Team
) -> dict[str, Any]:
    """Put the model on its device, and return what `batches` is to be told. Raises ValueError for what cannot be."""
    for name in ("num_samples", "batch_size", "pad_to", "tile"):
        check_count(name, 1 if config[name] is None and name == "tile" else config[name])
    device, dtype = device_of(config["device"], team), choose_dtype(config["dtype"])
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
    sampler.timesteps(model.diffusion.schedule)
    if team.first:
        say_guidance(guidance, sampler, model.diffusion)
    batch = whole(config["batch_size"], config["pad_to"])
    if (count := -(-config["num_samples"] // batch)) < team.size:
        warnings.warn(
            f"batches of {batch} make {count} for {team.size} processes, some of which get none; choose a batch_size "
            f"of at most {-(-config['num_samples'] // team.size)}",
            stacklevel=1,
        )
    return {
        **asked._asdict(),
        "guidance": guidance_for(guidance, **known),
        "shape": model.facts["shape"],
        "conditioner": model.conditioner,
        "autoencoder": model.autoencoder,
        "device": device,
        "dtype": dtype,
        "batch_size": batch,
        **{name: config[name] for name in ("num_samples", "seed", "pad_to", "tile")},
    }


def device_of(name: str, team: Team) -> torch.device:
    """Return the device of this process: of several GPUs each process of a team on this machine gets its own."""
    device = choose_device(name)
    if team.size == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ValueError(
            f"device={device} is one device for {team.size} processes; device=cuda gives each its own, device=cpu works"
        )
    count = torch.cuda.device_count()
    if team.local_rank >= count > 1:
        raise ValueError(f"this machine has {count} CUDA devices for more processes; start {count} on each machine")
    return torch.device("cuda", team.local_rank % count)


def _begin(parts: Parts, made_by: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Prepare the folder, and return how many images are there from an earlier attempt."""
    settings = {name: config[name] for name in ("num_samples", "seed", "labels", "prompt", "save_images")}
    settings |= {"batch_size": parts.batch_size} | {key: made_by[key] for key in made_by if key not in VERSIONS}
    begun = parts.begin(settings, {name: made_by[name] for name in VERSIONS}, overwrite=config["overwrite"])
    files = {name: value for name, value in made_by.items() if name.endswith("_sha256")}
    with atomic_write(parts.out_dir / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump({**config, **files}, sort_keys=False), encoding="utf-8")
    parts.hold()
    return begun


@contextlib.contextmanager
def _counting(team: Team, steps: int, num_samples: int, begun: int) -> Iterator[Callable[[int], None]]:
    """Show the images that all processes have made, parts of them for steps done; yield what counts a batch's step."""
    with contextlib.ExitStack() as stack:
        bar = None
        if team.first:
            bar = stack.enter_context(WorkBar(num_samples, begun, doing="sampling", done="sampled"))
        yield stack.enter_context(team.working(lambda done: bar.show(begun + done / steps)))


def _finish(
    parts: Parts, settings: Mapping[str, Any], class_names: Sequence[str] | None, made_by: Mapping[str, Any]
) -> None:
    """Make the files of the whole run, and take its parts away."""
    shown = min(GRID, parts.num_samples)
    labels = settings["labels"]
    columns, captions = label_layout(labels and labels[:shown], class_names)
    shown -= shown % columns if columns else 0
    captions = ((settings["inputs"] or {}).get("caption") or captions or [])[:shown] or None
    save_png(grid(parts.first(shown), columns, captions=captions), parts.out_dir / "grid.png", made_by)
    save_npz(parts.out_dir / "samples.npz", parts.images(), labels, count=parts.num_samples)
    parts.remove()


def _same_command(out_dir: Path) -> str:
    """Return what to type to go on. A default out_dir has the time in it, so the folder must be named."""
    sweeping = {"-m", "--multirun"} & set(sys.argv)
    words = [word for word in sys.argv if not word.startswith("out_dir=")]
    return shlex.join([*words, f"out_dir={out_dir.parent if sweeping else out_dir}"])


def save_pictures(batch: Batch, images: np.ndarray, folder: Path, made_by: Mapping[str, Any], *, first: int) -> None:
    """Write a batch as 000000.png, ... from `first` on, each with its own seed, label and prompt in its text."""
    prompts = (batch.inputs or {}).get("caption")
    for i, image in enumerate(images):
        own = {"seed": batch.seeds[i], "label": None if batch.labels is None else batch.labels[i]}
        own |= {} if prompts is None else {"prompt": prompts[i]}
        save_png(image, folder / f"{first + i:06d}.png", {**own, **made_by})


def provenance(model: LoadedModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that makes a sample what it is, but its own seed, label and prompt."""
    settings = ("negative_prompt", "condition_image", "condition_noise")
    asked = {name: config[name] for name in settings if config.get(name) is not None}
    parts = {f"{name}_sha256": part["sha256"] for name, part in model.parts.items()}
    if classifier := config["guidance"].get("classifier_checkpoint"):
        parts["classifier_sha256"] = file_hash(classifier)
    if (images := config.get("condition_image")) is not None:
        parts["condition_image_sha256"] = files_hash([images] if isinstance(images, str) else images)
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


def files_hash(paths: Sequence[str]) -> str:
    """Return one SHA-256 of several files, and of all that lies in folders among them."""
    found = hashlib.sha256()
    for path in (Path(path).expanduser() for path in paths):
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        found.update("".join(file_hash(file) for file in below if file.is_file()).encode())
    return found.hexdigest()
