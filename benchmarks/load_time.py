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
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import sd_files
import torch
from harness import interleaved, report
from load_once import SIDES, loader, touched

DTYPES = ("float16", "float32")


def times(path: Path, configs: Path, dtype: str, rounds: int) -> dict[str, str]:
    """Seconds of both sides, to have the model and to have read all of it, and the ratios."""
    loads = {side: loader(side, path, configs, getattr(torch, dtype)) for side in SIDES}
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


def memory(path: Path, configs: Path, dtype: str, *words: str) -> dict[str, str]:
    """Peak memory of both sides, each in a process of its own that imports nothing else."""
    size = path.stat().st_size / 2**20
    rows = {"the file": f"{size:7.0f} MiB"}
    script = str(Path(__file__).with_name("load_once.py"))
    for side in SIDES:
        command = [sys.executable, script, side, str(path), str(configs), dtype, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=sd_files.ROOT)
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
    given = parser.parse_args()
    size = "small" if given.small else "full"
    path, configs = (make(given.folder, given.model, size) for make in (sd_files.single_file, sd_files.configs))
    accelerate = "with" if find_spec("accelerate") else "without"
    what = f"{given.model} ({size}), float16, {path.stat().st_size / 1e9:.2f} GB"
    report(f"Naming a file, {what}", inspection(path, given.rounds))
    for dtype in DTYPES:
        title = f"Loading a single file, {what}, as {dtype}, diffusers {accelerate} accelerate"
        report(title, times(path, configs, dtype, given.rounds))
    title = f"Peak memory of loading a single file, {what}, diffusers {accelerate} accelerate"
    report(title, memory(path, configs, "float16"))
    if given.model == "sd1":
        title = f"Peak memory of a picture of two guided steps at 512x512, from {what}, as float32 on the CPU"
        report(title, memory(path, configs, "float32", "--image", *["--small"] * given.small))


if __name__ == "__main__":
    main()
