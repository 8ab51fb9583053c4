"""From a model to samples: which labels and seeds, in which batches, at which precision, and into which files.

Shared by sample.py and by the pictures made during training. Image i depends on `seed + i` alone.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from diffusion.checkpoint import LoadedModel, atomic_write, git_commit, package_version
from diffusion.denoiser import NULL_LABEL
from diffusion.guidance import NoGuidance
from diffusion.images import grid, label_layout, save_npz, save_png, to_uint8
from diffusion.process import GaussianDiffusion
from diffusion.sampling import SampleNoise, Sampler

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Batch(NamedTuple):
    """Finished samples: `images` (B, C, H, W) float32 on the CPU, made from `seeds`, of the classes `labels`."""

    seeds: list[int]
    labels: list[int] | None
    images: Tensor


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


def guidance_for(guidance: Any, *, num_classes: int | None, condition_drop: float) -> Any:
    """Return the guidance to use with such a model, with a warning where it cannot do what it is for."""
    if getattr(guidance, "guidance_scale", 1) == 1:
        return guidance
    if num_classes is None:
        warnings.warn("this model has no classes to guide towards: sampling without guidance", stacklevel=1)
        return NoGuidance()
    if not condition_drop:
        warnings.warn(
            f"guidance_scale={guidance.guidance_scale}, but this model was trained without condition drop: what it "
            "answers without a label means nothing, so guidance will hurt. Use guidance=none, or train with "
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
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    pad_to: int = 1,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Draw one batch (B, C, H, W), in [-1, 1] for pixels, as float32 on the CPU. Sample i depends on `seeds[i]` alone.

    The network is used as it is (call `.eval()` and `.to(device)` first); in bfloat16 and float16 it runs under
    autocast while the sampler's arithmetic stays float32; float64 needs a network in float64. Matrix kernels round
    differently for small and odd batches, by about 1e-6 an answer; `pad_to` fills the batch up to a multiple of itself
    with spare samples that are thrown away, and multiples of 16 were measured to agree bit for bit on CPUs. Raises
    ValueError for samples that are not finite.
    """
    wanted = len(seeds)
    seeds, labels = padded(seeds, pad_to), None if labels is None else padded(labels, pad_to)
    device = torch.device(device)
    condition = {} if labels is None else {"label": torch.tensor(labels, device=device)}
    null = {name: torch.full_like(value, NULL_LABEL) for name, value in condition.items()}
    denoise = guidance(diffusion, net, condition, null)
    noise = SampleNoise(seeds, device=device)
    x = noise.initial(shape).to(torch.float64 if dtype == torch.float64 else torch.float32)
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, dtype) if half else contextlib.nullcontext():
        for state in sampler.states(diffusion, denoise, x, noise=noise):
            x = state.x
            if on_step is not None:
                on_step()
    images = x[:wanted].float().cpu()
    if broken := int((~images.isfinite()).flatten(1).any(1).sum()):
        hint = "try dtype=float32" if half else "the checkpoint may be that of a run that diverged"
        raise ValueError(f"{broken} of {len(images)} samples are not finite; {hint}")
    return images


def padded(values: Sequence[int], multiple: int) -> list[int]:
    """Repeat the last value until the length is a multiple of `multiple`."""
    check_count("pad_to", multiple)
    return [*values, *[values[-1]] * (-len(values) % multiple)]


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
    **settings: Any,
) -> Iterator[Batch]:
    """Draw `num_samples` samples, seeded seed, seed + 1, ..., a batch at a time; `settings` are those of `generate`."""
    check_count("batch_size", batch_size)
    for start in range(0, num_samples, batch_size):
        some = slice(start, min(start + batch_size, num_samples))
        seeds = list(range(seed + some.start, seed + some.stop))
        some_labels = None if labels is None else list(labels[some])
        images = generate(net, diffusion, sampler, guidance, seeds=seeds, labels=some_labels, **settings)
        yield Batch(seeds, some_labels, images)


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# files


def sample_to_folder(model: LoadedModel, sampler: Sampler, guidance: Any, config: Mapping[str, Any]) -> Path:
    """Do what configs/sample.yaml says and return the folder: grid.png, samples.npz, images/*.png, config.yaml.

    `config` is the resolved config; it goes into every picture, with the checkpoint's hash. All that can be wrong with
    it is found before the first step, the folder included.
    """
    num_classes = getattr(model.net, "num_classes", model.facts["num_classes"])  # the net may ignore the data's classes
    for name in ("num_samples", "batch_size", "pad_to"):
        check_count(name, config[name])
    labels = choose_labels(config["labels"], config["num_samples"], num_classes)
    device, dtype = choose_device(config["device"]), choose_dtype(config["dtype"])
    net = model.net.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    known = {"num_classes": num_classes, "condition_drop": model.facts["condition_drop"]}
    num_steps = len(sampler.timesteps(model.diffusion.schedule)) - 1
    out_dir = Path(config["out_dir"])
    if (out_dir / "samples.npz").exists() and not config["overwrite"]:
        raise ValueError(f"{out_dir} already holds samples; choose another out_dir, or overwrite=true")
    with atomic_write(out_dir / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")

    made_by = {**provenance(model, config), "device": str(device)}
    pictures: list[np.ndarray] = []
    with _progress(num_steps * -(-config["num_samples"] // config["batch_size"])) as on_step:
        for batch in batches(
            net,
            model.diffusion,
            sampler,
            guidance_for(guidance, **known),
            num_samples=config["num_samples"],
            batch_size=config["batch_size"],
            seed=config["seed"],
            labels=labels,
            shape=model.facts["shape"],
            device=device,
            dtype=dtype,
            pad_to=config["pad_to"],
            on_step=on_step,
        ):
            save_pictures(batch, out_dir / "images", made_by, first=len(pictures))
            pictures.extend(to_uint8(batch.images))
    images = np.stack(pictures)
    save_npz(out_dir / "samples.npz", images, labels)
    columns, captions = label_layout(labels, model.facts["class_names"])
    save_png(grid(images, columns, captions=captions), out_dir / "grid.png", made_by)
    return out_dir


def save_pictures(batch: Batch, folder: Path, made_by: Mapping[str, Any], *, first: int) -> None:
    """Write a batch as 000000.png, 000001.png, ... from `first` on, each with its own seed and label in its text."""
    for i, image in enumerate(to_uint8(batch.images)):
        own = {"seed": batch.seeds[i], "label": None if batch.labels is None else batch.labels[i]}
        save_png(image, folder / f"{first + i:06d}.png", {**own, **made_by})


def provenance(model: LoadedModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that makes a sample what it is, but its own seed and label."""
    return {
        "checkpoint": str(model.path),
        "checkpoint_sha256": file_hash(model.path),
        "weights": model.weights,
        "step": model.step,
        "sampler": config["sampler"],
        "guidance": config["guidance"],
        "dtype": config["dtype"],
        "pad_to": config["pad_to"],
        "package_version": package_version(),
        "git_commit": git_commit(),
        "torch_version": str(torch.__version__),
    }


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Show a bar with the time left on stderr; yield what advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda: bar.advance(task)
