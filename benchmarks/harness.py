"""How are two implementations timed fairly on one machine? In turn, in one process, by the median; kept in RESULTS.md.

Interleaving makes a slow minute of the machine hit both; the ratio is taken from medians of the same rounds.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from diffusion.cli import CONFIGS
from diffusion.cli.composing import register_latents
from diffusion.training import run

RESULTS = Path(__file__).parent / "RESULTS.md"


def machine() -> str:
    """CPU, threads, memory and versions in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    return f"{model}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {packages}"


def interleaved(contenders: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each contender over `rounds`, called in turn after `warmup` untimed calls each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def composed(*overrides: str) -> dict[str, Any]:
    """Return what train.py composes from these words."""
    register_latents()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(compose("train", list(overrides)), resolve=True)


def trained(config: dict[str, Any], callback: Callback) -> None:
    """Train as train.py does, with this callback and the config's, and leave no model."""
    task, data = run.build_task(config), run.build(config["data"])
    data = run.with_cache(data, task, config)
    callbacks = [*run.build_callbacks(config, {}, data), callback]
    run.fit(run.build_trainer(config, run.Path(config["run_dir"]), callbacks, None), task, data, None)


def report(title: str, rows: Mapping[str, str]) -> None:
    """Print the rows and append them, under the title and the machine, to RESULTS.md."""
    width = max(map(len, rows))
    text = "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())
    print(f"\n{title}\n{text}", flush=True)
    with RESULTS.open("a") as file:
        file.write(f"\n## {title}\n{time.strftime('%Y-%m-%d')}, {machine()}\n```\n{text}\n```\n")
