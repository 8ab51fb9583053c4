"""How fast does Stable Diffusion 1.5 draw, ours against diffusers with the same weights, settings and start?

DDIM with classifier-free guidance at 512x512, from text to pixels; random weights from one float16 file, made on first
use in --folder: `python benchmarks/text_to_image.py [--device cuda] [--dtype bfloat16] [--batch 1 8] [--compile]`.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import sd_files
import torch
from harness import interleaved, report
from torch import Tensor

from diffusion.conversion.foreign import load_foreign
from diffusion.generate import generate
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.sampling import SampleNoise, Sampler

SCALE, PROMPT, NEGATIVE = 7.5, sd_files.sd_cases.PROMPT, sd_files.sd_cases.NEGATIVE


class Clock:
    """Seconds a step, of every image drawn: between its first and its last step, so that nothing else is in it."""

    def __init__(self, device: torch.device, num_steps: int):
        self.device, self.num_steps, self.seconds = device, num_steps, []
        self._steps, self._first = 0, 0.0

    def __call__(self, *told: Any) -> dict:
        """To be called after each step, with whatever; returns what diffusers expects of a callback."""
        self._steps += 1
        if self._steps == 1:
            self._first = self._now()
        elif self._steps == self.num_steps:
            self.seconds.append((self._now() - self._first) / (self.num_steps - 1))
            self._steps = 0
        return {}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def ours(path: Path, given: argparse.Namespace, dtype: torch.dtype) -> Callable[..., Tensor]:
    """draw(batch, clock) -> images (B, 3, H, W) in [0, 1], by our model."""
    device, side = torch.device(given.device), given.pixels
    model = load_foreign(path, device=device, dtype=dtype, say=lambda line: None)
    net = torch.compile(model.net, mode=given.mode) if given.compile else model.net
    # What diffusers' DDIM does with Stable Diffusion's config.
    sampler = Sampler(num_steps=given.steps, spacing="leading", offset=1, final=0)

    def draw(batch: int, clock: Clock) -> Tensor:
        images = generate(
            net,
            model.diffusion,
            sampler,
            ClassifierFreeGuidance(SCALE),
            shape=(3, side, side),
            seeds=range(batch),
            inputs={"caption": [PROMPT] * batch},
            negative={"caption": [NEGATIVE] * batch},
            conditioner=model.conditioner,
            autoencoder=model.autoencoder,
            device=device,
            dtype=dtype,
            on_step=clock,
        )
        return (images / 2 + 0.5).clamp(0, 1)

    return draw


def theirs(path: Path, configs: Path, given: argparse.Namespace, dtype: torch.dtype, *, last: bool) -> Callable:
    """The same by diffusers' pipeline; `last` has its networks in channels_last, and fused where compiled."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    sd_files.sd_cases.silence()
    pipe = StableDiffusionPipeline.from_single_file(
        str(path), torch_dtype=dtype, config=str(configs), local_files_only=True
    ).to(given.device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(sd_files.sd_cases.PNDM)
    if last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if given.compile:
        if last:
            pipe.fuse_qkv_projections()
        pipe.unet = torch.compile(pipe.unet, mode=given.mode)

    def draw(batch: int, clock: Clock) -> Tensor:
        latents = SampleNoise(range(batch)).initial((4, given.pixels // 8, given.pixels // 8))
        return pipe(
            [PROMPT] * batch,
            negative_prompt=[NEGATIVE] * batch,
            num_inference_steps=given.steps,
            guidance_scale=SCALE,
            height=given.pixels,
            width=given.pixels,
            latents=latents.to(given.device, dtype),
            output_type="pt",
            callback_on_step_end=clock,
        ).images.cpu()

    return draw


def compare(draws: dict[str, Callable], batch: int, given: argparse.Namespace) -> dict[str, str]:
    """Seconds a step and an image on all sides, the ratios to the fastest peer, and how far the images are apart."""
    clocks = {name: Clock(torch.device(given.device), given.steps) for name in draws}
    calls = {name: partial(draw, batch, clocks[name]) for name, draw in draws.items()}
    images = {name: call() for name, call in calls.items()}  # the first call compiles
    whole = interleaved(calls, rounds=given.rounds, warmup=0)
    step = {name: median(clock.seconds[-given.rounds :]) for name, clock in clocks.items()}
    rows = {name: f"{step[name]:9.4f} s a step, {whole[name]:9.3f} s in all" for name in draws}
    peers = [name for name in draws if name != "ours"]
    for what, seconds in (("a step", step), ("in all", whole)):
        best = min(peers, key=seconds.__getitem__)
        rows[f"ours / best peer, {what}"] = f"{seconds['ours'] / seconds[best]:9.3f} ({best})"
    rows["steps a second, ours"] = f"{batch / step['ours']:9.3f} images through the network"
    change = (images["ours"].float() - images[peers[0]].float()).abs()
    rows["images apart by"] = f"{change.max() * 255:.2f} of 255 at most, {change.mean() * 255:.3f} on average"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=None, help="default: 4 on the CPU, 20 elsewhere")
    parser.add_argument("--pixels", type=int, default=None, help="side of the image; default: 512")
    parser.add_argument("--compile", action="store_true", help="all networks through torch.compile")
    parser.add_argument("--mode", default="default", help="torch.compile's mode, such as max-autotune")
    parser.add_argument("--small", action="store_true", help="a tiny model at 64 pixels: a trial of the script")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sd_benchmark_files")
    given = parser.parse_args()
    given.steps = given.steps or (4 if given.device == "cpu" else 20)
    given.pixels = given.pixels or (64 if given.small else 512)
    size = "small" if given.small else "full"
    path, configs = (make(given.folder, "sd1", size) for make in (sd_files.single_file, sd_files.configs))
    how = f"compiled ({given.mode})" if given.compile else "eager"
    for name in given.dtype:
        dtype = getattr(torch, name)
        draws = {"ours": ours(path, given, dtype)}
        for last in (False, True):
            label = "diffusers, channels_last" if last else "diffusers"
            draws[label] = theirs(path, configs, given, dtype, last=last)
        for batch in given.batch:
            title = f"Text to image, Stable Diffusion 1.5 ({size}), {given.pixels}x{given.pixels}, {given.steps} steps"
            rows = compare(draws, batch, given)
            report(f"{title} of guided DDIM, batch {batch}, {name}, {how}, {given.device}", rows)
        del draws
        gc.collect()


if __name__ == "__main__":
    main()
