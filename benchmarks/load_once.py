"""How much memory does a process need that loads one Stable Diffusion file? Nothing is imported that it does not need.

`python benchmarks/load_once.py ours|diffusers FILE CONFIGS DTYPE [--image]`, which load_time.py starts, prints the
resident memory before and at its peak, in MiB. `--image` draws 512x512 in two steps, too.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

SIDES = ("ours", "diffusers")
PROMPT = "a photograph of an astronaut riding a horse"


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB; getrusage would inherit the parent's peak over exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def loader(side: str, path: Path, configs: Path, dtype: torch.dtype) -> Callable[[], Any]:
    """A function that loads the file once with everything that sampling needs."""
    if side == "ours":
        from diffusion.conversion.foreign import load_foreign

        return partial(load_foreign, path, dtype=dtype, settled=False, say=lambda line: None)
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    index = (configs / "model_index.json").read_text()
    pipeline = "StableDiffusionXLPipeline" if "StableDiffusionXLPipeline" in index else "StableDiffusionPipeline"
    load = partial(getattr(diffusers, pipeline).from_single_file, str(path), torch_dtype=dtype)
    return partial(load, config=str(configs), local_files_only=True)


def modules(loaded: Any) -> list[nn.Module]:
    """The networks of what either side's loader returns."""
    parts = loaded.components.values() if hasattr(loaded, "components") else vars(loaded).values()
    return [part for part in parts if isinstance(part, nn.Module)]


def touched(load: Callable[[], Any]) -> Any:
    """Load and read a number of every page, since weights that are only mapped are not in memory yet."""
    loaded = load()
    for weight in (weight for module in modules(loaded) for weight in module.parameters()):
        memory = weight.as_strided((weight.numel(),), (1,), weight.storage_offset())  # in its own order, uncopied
        memory[:: 4096 // weight.element_size()].sum().item()
    return loaded


def draw(side: str, loaded: Any, dtype: torch.dtype, size: int) -> None:
    """A picture of two steps with guidance."""
    if side == "diffusers":
        loaded.set_progress_bar_config(disable=True)
        loaded(PROMPT, num_inference_steps=2, height=size, width=size)
        return
    from diffusion.pipeline import LatentDiffusion

    parts = {name: getattr(loaded, name) for name in ("net", "diffusion", "autoencoder", "conditioner", "facts")}
    LatentDiffusion(**parts, dtype=dtype)(PROMPT, num_steps=2, height=size, width=size)


def main() -> None:
    side, path, configs, dtype, *rest = sys.argv[1:]
    precision = getattr(torch, dtype)
    load = loader(side, Path(path), Path(configs), precision)
    before = resident("VmRSS")
    loaded = touched(load)
    if "--image" in rest:
        draw(side, loaded, precision, 64 if "--small" in rest else 512)
    print(before, resident("VmHWM"))


if __name__ == "__main__":
    main()
