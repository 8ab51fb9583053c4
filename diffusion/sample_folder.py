"""From samples to a folder: which files hold them, and what does each say about how it was made?

Behind sample.py; the samples themselves come from diffusion/generate.py.
"""

import contextlib
import functools
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
from diffusion.files import file_hash, files_hash, numbered, path_hash
from diffusion.generate import Batch, batches, choose_device, whole
from diffusion.images import grid, label_layout, read_text, save_npz, save_png, to_uint8
from diffusion.pictures.parameters import written
from diffusion.pictures.picture_text import (
    FILES,
    FROM,
    GROUPS,
    PICTURES,
    SETTINGS,
    TEXT_KEY,
    parameters_of,
    picture_texts,
)
from diffusion.pictures.verify import check_comparable, unlike
from diffusion.prepare import is_published, prepared
from diffusion.processes import Stopped, Team
from diffusion.progress import WorkBar
from diffusion.run_folder import record_start
from diffusion.sample_parts import Parts
from diffusion.sampling import Sampler

GRID = 100  # pictures in grid.png, at most
# What may differ between the batches of one run: the same command with another version of the code, or a moved file.
VERSIONS = ("package_version", "git_commit", "torch_version", "checkpoint")


def sample_to_folder(
    model: LoadedModel, sampler: Sampler, guidance: Any, config: Mapping[str, Any], team: Team | None = None
) -> Path:
    """Do what configs/sample.yaml says; return the folder: grid.png, samples.npz, images/, config.yaml, record.yaml.

    `config` is the resolved config; it goes into every picture, with the checkpoint's hash. All that can be wrong with
    it is found before the first step, the folder included. The processes of a `team` share the batches and write what
    one of them would. What was stopped goes on: finished batches lie in out_dir/parts until all are there.
    """
    team = Team() if team is None else team
    num_samples, out_dir = config["num_samples"], Path(config["out_dir"])
    with warnings.catch_warnings():
        if not team.first:
            warnings.simplefilter("ignore")  # the first process says it for all
        device = device_of(config["device"], team)
        model, settings = prepared(model, sampler, guidance, config, device=device, silent=not team.first)
        say_idle(config, team)
    channels, height, width = settings["shape"]
    check_comparable(config, settings["shape"])
    parts = Parts(out_dir, num_samples, settings["batch_size"], (height, width, channels))
    made_by = team.share(lambda: made_of(model, config, settings))
    begun = team.share(lambda: _begin(parts, made_by, config, device=str(device), world_size=team.size))
    parts.hold()
    own = owned(settings, config, batches_tell=is_published(model) or settings["pad_to"] == 1)
    steps = len(sampler.timesteps(model.diffusion.schedule)) - 1
    try:
        with _counting(team, steps, num_samples, begun) as on_step:
            numbers = parts.missing(team.turns(len(parts.starts)))
            for batch in batches(model.net, model.diffusion, sampler, **settings, numbers=numbers, on_step=on_step):
                first, images = batch.seeds[0] - config["seed"], to_uint8(batch.images)
                if config["save_images"]:
                    save_pictures(batch, images, out_dir / "images", made_by, own, first=first)
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


def say_idle(config: Mapping[str, Any], team: Team) -> None:
    """Warn where some processes of a team get nothing to do."""
    batch = whole(config["batch_size"], config["pad_to"])
    if (count := -(-config["num_samples"] // batch)) < team.size:
        warnings.warn(
            f"batches of {batch} make {count} for {team.size} processes, some of which get none; choose a batch_size "
            f"of at most {-(-config['num_samples'] // team.size)}",
            stacklevel=1,
        )


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


def _begin(parts: Parts, made_by: Mapping[str, Any], config: Mapping[str, Any], **known: Any) -> int:
    """Prepare the folder, record this start and what is `known` of it; return how many images are there already."""
    settings = {name: config[name] for name in ("num_samples", "seed", "labels", "prompt", "save_images")}
    settings |= {"batch_size": parts.batch_size} | {key: made_by[key] for key in made_by if key not in VERSIONS}
    begun = parts.begin(settings, {name: made_by[name] for name in VERSIONS}, overwrite=config["overwrite"])
    files = {name: value for name, value in made_by.items() if name.endswith("_sha256")}
    with atomic_write(parts.out_dir / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump({**config, **files}, sort_keys=False), encoding="utf-8")
    record_start(parts.out_dir, **known)
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
    end = next((i for i, word in enumerate(sys.argv) if word.startswith(f"++{FROM}=")), 0)  # of what was spelled out
    flags = [word for word in sys.argv[1:end] if word.startswith("-") or not ("=" in word or word.startswith("~"))]
    words = [sys.argv[0], *flags, *(word for word in sys.argv[end + 1 :] if not word.startswith("out_dir="))]
    return shlex.join([*words, f"out_dir={out_dir}"])


def save_pictures(
    batch: Batch, images: np.ndarray, folder: Path, made_by: Mapping[str, Any], own: Callable[[int], Mapping[str, Any]],
    *, first: int,
) -> None:  # fmt: skip
    """Write a batch as 000000.png, ... from `first` on; `own(i)` is what the text of sample i says of it alone."""
    for i, image in enumerate(images):
        label = None if batch.labels is None else batch.labels[i]
        made = {"seed": batch.seeds[i], "label": label, **made_by, **own(first + i)}
        also = written(parameters_of(made, image.shape[:2]))
        save_png(image, folder / f"{first + i:06d}.png", made, also=also)


def owned(
    settings: Mapping[str, Any], config: Mapping[str, Any], *, batches_tell: bool
) -> Callable[[int], dict[str, Any]]:
    """Return what sample i alone is made from, of settings that list one for each sample or are lists that repeat.

    `batches_tell`: how many samples share a batch changes how the kernels round, so that it belongs to them.
    """
    columns = {}
    for name, entries in (("prompt", settings["inputs"]), ("negative_prompt", settings["negative"])):
        if (entries or {}).get("caption") is not None:
            columns[name] = entries["caption"]
    for name in ("condition_image", "image", "mask"):
        given = config.get(name)
        if given is None or (isinstance(given, str) and is_picture(given)):
            continue
        if isinstance(given, list) and all(map(is_picture, given)):
            columns[name] = given
        else:
            columns["number"] = range(config["num_samples"])  # a file of many images: which one
    hashes = functools.cache(lambda path: files_hash([path]))

    def own(i: int) -> dict[str, Any]:
        found = {name: values[i % len(values)] for name, values in columns.items()}
        if batches_tell:
            others = settings["num_samples"] - i // settings["batch_size"] * settings["batch_size"]
            found["batch"] = whole(min(others, settings["batch_size"]), settings["pad_to"])
        return found | {f"{name}_sha256": hashes(found[name]) for name in PICTURES if name in found}

    return own


def made_of(model: LoadedModel, config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `provenance` with what was decided for the user, and say what differs from the picture of from=PICTURE."""
    made_by = provenance(model, config) | decided(model, config, settings)
    picture = config.get(FROM) and Path(config[FROM]).expanduser()
    if picture and TEXT_KEY in picture_texts(picture) and (different := unlike(read_text(picture), made_by)):
        print(f"from={picture}: {', '.join(different)}", file=sys.stderr)
    return made_by


def decided(model: LoadedModel, config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that say "auto", null or nothing, as they are in effect."""
    found = {"device": settings["device"].type, "dtype": str(settings["dtype"]).removeprefix("torch.")}
    found |= {name: settings[name] for name in ("pad_to", "tile")}
    if getattr(model, "recognised", None) is not None:
        found["parameterization"] = model.diffusion.parameterization
    if (source := settings["source"]) is not None:
        found |= {"strength": source.strength, "height": settings["shape"][1], "width": settings["shape"][2]}
    if hasattr(settings["guidance"], "image_guidance_scale"):
        found["image_guidance_scale"] = settings["guidance"].image_guidance_scale
    return {name: value for name, value in found.items() if value is not None or name == "tile"}


def listed(given: Any) -> list[Any]:
    """Return one value, or several, as a list."""
    return list(given) if isinstance(given, list | tuple) else [given]


def is_picture(path: str) -> bool:
    """Tell one picture, also one of many (FILE.npz#3), from a file or folder of many."""
    place, number = numbered(path)
    return number is not None or (place.suffix != ".npz" and not place.is_dir())


def provenance(model: LoadedModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that makes a sample what it is, but its own seed, label and prompt."""
    asked = {name: config[name] for name in SETTINGS if config.get(name) is not None}
    asked |= {} if config.get("weights", "auto") == "auto" else {"weights_asked": config["weights"]}
    parts = {f"{name}_sha256": part["sha256"] for name, part in model.parts.items() if part["sha256"]}
    if classifier := config["guidance"].get("classifier_checkpoint"):
        parts["classifier_sha256"] = file_hash(classifier)
    for name in FILES:
        if (given := config.get(name)) is not None and f"{name}_sha256" not in parts:
            alone = isinstance(given, str)
            parts[f"{name}_sha256"] = path_hash(given) if alone and name not in PICTURES else files_hash(listed(given))
    return {
        **asked,
        **parts,
        "checkpoint": str(model.path),
        "checkpoint_sha256": path_hash(model.path),
        "weights": model.weights,
        "step": model.step,
        **{name: config[name] for name in GROUPS},
        "package_version": package_version(),
        "git_commit": git_commit(),
        "torch_version": str(torch.__version__),
    }
