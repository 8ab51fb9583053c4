"""How long does a published Stable Diffusion file take to be named and to be loaded, and how much memory?

A CompVis-layout safetensors file in float16 with random weights, made on first use in --folder (2 GB, SDXL 7 GB):
`python benchmarks/load_time.py [--model sd1|sdxl-base] [--small]`. Times interleaved in one process, in which the file
is in the page cache for both; peak memory in one fresh process each; accelerate is used by diffusers where installed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import sd_files
import torch
from harness import interleaved, report, resident
from torch import nn

DTYPES = {"float16": torch.float16, "float32": torch.float32}
SIDES = ("ours", "diffusers")


def loader(side: str, path: Path, configs: Path, dtype: torch.dtype) -> Callable[[], Any]:
    """A function that loads the file once with everything that sampling needs."""
    if side == "ours":
        from diffusion.foreign import load_foreign

        return lambda: load_foreign(path, dtype=dtype, say=lambda line: None)
    import diffusers

    sd_files.sd_cases.silence()
    index = (configs / "model_index.json").read_text()
    pipeline = "StableDiffusionXLPipeline" if "StableDiffusionXLPipeline" in index else "StableDiffusionPipeline"
    load = partial(getattr(diffusers, pipeline).from_single_file, str(path), torch_dtype=dtype)
    return partial(load, config=str(configs), local_files_only=True)


def modules(loaded: Any) -> list[nn.Module]:
    """The networks of what either side's loader returns."""
    parts = loaded.components.values() if hasattr(loaded, "components") else vars(loaded).values()
    return [part for part in parts if isinstance(part, nn.Module)]


def touched(load: Callable[[], Any]) -> float:
    """Load and read a number of every page, since weights that are only mapped are not in memory yet."""
    weights = [p.detach().flatten() for module in modules(load()) for p in module.parameters()]
    return sum(w[:: 4096 // w.element_size()].sum().item() for w in weights)


def times(path: Path, configs: Path, dtype: str, rounds: int) -> dict[str, str]:
    """Seconds of both sides, to have the model and to have read all of it, and the ratios."""
    loads = {side: loader(side, path, configs, DTYPES[dtype]) for side in SIDES}
    calls = loads | {f"{side}, all read": partial(touched, loads[side]) for side in SIDES}
    seconds = interleaved(calls, rounds=rounds)
    rows = {name: f"{value:8.3f} s" for name, value in seconds.items()}
    for end in ("", ", all read"):
        rows[f"ours / diffusers{end}"] = f"{seconds[f'ours{end}'] / seconds[f'diffusers{end}']:8.3f}"
    return rows


def inspection(path: Path, rounds: int) -> dict[str, str]:
    """Seconds of the command that names a file, the start of Python included."""
    command, seconds = [sys.executable, "-m", "diffusion.pretrained", "inspect", str(path)], []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(command, cwd=sd_files.ROOT, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return {"inspect, the whole command": f"{median(seconds):8.3f} s"}


def measure(side: str, path: Path, configs: Path, dtype: str) -> None:
    """Load once, read every page, and print the process's peak of resident memory and what it was before, in MiB."""
    load = loader(side, path, configs, DTYPES[dtype])
    before = resident("VmRSS")
    touched(load)
    print(before, resident("VmHWM"))


def memory(arguments: argparse.Namespace, path: Path) -> dict[str, str]:
    """Peak memory of both sides, each in a process of its own."""
    size, rows = path.stat().st_size / 2**20, {"the file": f"{path.stat().st_size / 2**20:7.0f} MiB"}
    for side in SIDES:
        command = [sys.executable, __file__, "--measure", side, "--model", arguments.model]
        command += ["--folder", str(arguments.folder)] + ["--small"] * arguments.small
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        before, peak = map(float, done.stdout.split()[-2:])
        rows[side] = (
            f"{peak:7.0f} MiB at most, {before:.0f} of them before; (peak - 300) / file {(peak - 300) / size:.3f}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sd_files.LISTS, default="sd1")
    parser.add_argument("--small", action="store_true", help="a tiny model: a trial of the script")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sd_benchmark_files")
    parser.add_argument("--measure", choices=SIDES, help="measure the memory of one side and stop")
    given = parser.parse_args()
    size = "small" if given.small else "full"
    path, configs = (make(given.folder, given.model, size) for make in (sd_files.single_file, sd_files.configs))
    if given.measure:
        return measure(given.measure, path, configs, "float16")
    accelerate = "with" if find_spec("accelerate") else "without"
    what = f"{given.model} ({size}), float16, {path.stat().st_size / 1e9:.2f} GB"
    report(f"Naming a file, {what}", inspection(path, given.rounds))
    for dtype in DTYPES:
        title = f"Loading a single file, {what}, as {dtype}, diffusers {accelerate} accelerate"
        report(title, times(path, configs, dtype, given.rounds))
    report(f"Peak memory of loading a single file, {what}, diffusers {accelerate} accelerate", memory(given, path))
    return None


if __name__ == "__main__":
    main()
