"""How long, how large and how seamless is Stable Diffusion's autoencoder, ours against diffusers with the same weights?

Decode to and encode from 512x512, and in tiles 1024x1024, on the CPU: `python benchmarks/autoencoder.py [--small]`.
Time interleaved in one process; peak memory in one fresh process each.
"""

import argparse
import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from harness import interleaved, report
from load_once import resident
from torch import Tensor

from diffusion.pretrained import diffusers_autoencoder

WIDTHS = {"full": (128, 256, 512, 512), "small": (32, 64, 128, 128)}
TILE = 64  # latent pixels; the default of diffusers for this autoencoder, with an overlap of 16
SIDES = ("ours", "ours, tiled", "diffusers", "diffusers, tiled")
TASKS = ("decode", "encode")


def config(size: str) -> dict:
    """Stable Diffusion's autoencoder, as both sides build it."""
    return {
        "block_out_channels": WIDTHS[size],
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "sample_size": 8 * TILE,
        "scaling_factor": 1.0,
    }


def build(side: str, size: str) -> torch.nn.Module:
    """One side's autoencoder, without a copy of the other in memory; the weights are the same."""
    torch.manual_seed(0)
    peer = AutoencoderKL(**config(size)).eval()
    if side.startswith("ours"):
        return diffusers_autoencoder.load_autoencoder(config(size), peer.state_dict()).eval()
    if side.endswith("channels_last"):
        peer = peer.to(memory_format=torch.channels_last)
    if side.endswith("tiled"):
        peer.enable_tiling()
    return peer


def inputs(task: str, pixels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images or latents that are calm on the left and restless on the right, so that the tiles' statistics differ."""
    size = pixels // 8 if task == "decode" else pixels
    x = torch.randn(1, 4 if task == "decode" else 3, size, size, generator=torch.Generator().manual_seed(0))
    slope = torch.linspace(0.1, 1.0, size)
    return (x * slope + torch.linspace(-1, 1, size)[:, None]).to(dtype)


def call(side: str, model: torch.nn.Module, task: str, x: Tensor) -> Callable[[], Tensor]:
    """A function that codes x once: latents are the modes."""
    if side.startswith("ours"):
        tiles = {"tile": TILE} if side.endswith("tiled") else {}
        return lambda: getattr(model, task)(x, **tiles)
    if side.endswith("channels_last"):
        x = x.contiguous(memory_format=torch.channels_last)
    if task == "decode":
        return lambda: model.decode(x).sample
    return lambda: model.encode(x).latent_dist.mean


@torch.inference_mode()
def times(size: str, task: str, pixels: int, dtype: torch.dtype, rounds: int) -> dict[str, str]:
    """Seconds of ours, of diffusers as it comes (NCHW) and of diffusers in channels_last, and the ratios."""
    sides = ("ours", "diffusers", "diffusers, channels_last")
    x = inputs(task, pixels, dtype)
    calls = {side: call(side, build(side, size).to(dtype), task, x) for side in sides}
    error = (calls["ours"]() - calls["diffusers"]()).abs().max().item()
    seconds = interleaved(calls, rounds=rounds)
    rows = {side: f"{value:8.3f} s" for side, value in seconds.items()}
    for side in sides[1:]:
        rows[f"ours / {side}"] = f"{seconds['ours'] / seconds[side]:8.3f}"
    return rows | {"largest difference of the results": f"{error:.1e}"}


def measure(side: str, size: str, task: str, pixels: int, out: str) -> None:
    """Code once, keep the result and print the peak of resident memory in MiB beyond what was held before building."""
    before = resident("VmRSS")
    model, x = build(side, size), inputs(task, pixels)
    # Building held both sides' weights: give back what is free, and forget that peak.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    with torch.inference_mode():
        torch.save(call(side, model, task, x)(), out)
    print(resident("VmHWM") - before)


def tiled(size: str, task: str, pixels: int, folder: Path) -> dict[str, str]:
    """Peak memory of whole and tiled on both sides, and what tiles changed: largest value, largest step beside it."""
    memory, results = {}, {}
    for side in SIDES:
        out = folder / f"{side}.pt"
        command = [sys.executable, __file__, "--measure", side, "--task", task, "--pixels", str(pixels)]
        command += ["--out", str(out)] + ["--small"] * (size == "small")
        memory[side] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        results[side] = torch.load(out)
    return memory_rows(memory) | seam_rows(results)


def memory_rows(memory: Mapping[str, float]) -> dict[str, str]:
    rows = {side: f"{value:7.0f} MiB" for side, value in memory.items()}
    for side in ("ours", "diffusers"):
        rows[f"{side}: tiled / whole"] = f"{memory[f'{side}, tiled'] / memory[side]:7.3f}"
    return rows | {"ours tiled / diffusers tiled": f"{memory['ours, tiled'] / memory['diffusers, tiled']:7.3f}"}


def seam_rows(results: Mapping[str, Tensor]) -> dict[str, str]:
    """Differences of tiled to whole in standard deviations of the whole result.

    A seam is seen as a step of the difference between neighbouring pixels, not as a difference that rises slowly.
    """
    rows = {}
    for side in ("ours", "diffusers"):
        whole = results[side]
        change = (results[f"{side}, tiled"] - whole) / whole.std()
        steps = torch.cat([change.diff(dim=dim).abs().flatten() for dim in (-1, -2)])
        rows[f"{side}: tiled - whole"] = (
            f"largest {change.abs().max():.4f}, rms {change.square().mean().sqrt():.4f}, largest step {steps.max():.4f}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a quarter of the width: a trial of the script")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pixels", type=int, default=512, help="side of the image; tiles are tried at twice that")
    parser.add_argument("--measure", choices=SIDES, help="measure one side at --pixels and stop")
    parser.add_argument("--task", choices=TASKS, default="decode")
    parser.add_argument("--out", help="where --measure leaves the result")
    given = parser.parse_args()
    size = "small" if given.small else "full"
    if given.measure:
        return measure(given.measure, size, given.task, given.pixels, given.out)
    for task in TASKS:
        for dtype in (torch.float32, torch.bfloat16):
            title = f"Autoencoder, {task} {given.pixels}x{given.pixels}, Stable Diffusion ({size}), {str(dtype)[6:]}"
            report(title, times(size, task, given.pixels, dtype, given.rounds))
    for task in TASKS:
        with tempfile.TemporaryDirectory() as folder:
            side = 2 * given.pixels
            title = f"Autoencoder, {task} {side}x{side} in tiles, Stable Diffusion ({size}), float32"
            report(title, tiled(size, task, 2 * given.pixels, Path(folder)))
    return None


if __name__ == "__main__":
    main()
