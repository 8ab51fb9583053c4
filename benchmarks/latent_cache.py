"""How much faster is training on cached latents than encoding in each step, and is it the same training?

    python benchmarks/latent_cache.py [steps] [batch_size]      # target: at least 3 times the steps a second

Stable Diffusion's autoencoder (configs/autoencoder/kl_f8.yaml, random weights) on 256x256 shapes, a latent UNet of
1.7 M parameters. Both are the runs that train.py makes, with the same seed, one after the other: first the one that
encodes in each step. Losses are compared step by step.
"""

import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import composed, report, trained
from lightning.pytorch import Callback, LightningModule, Trainer

from diffusion.checkpoint import save_model
from diffusion.latents import encode_moments
from diffusion.training import run

IMAGE_SIZE = 256
WARMUP = 2  # steps not timed


def save_autoencoder(path: Path, images: torch.Tensor) -> None:
    """Write an autoencoder of random weights whose latents are of unit variance and hardly noisy: those of images."""
    node = composed("autoencoder=kl_f8")["autoencoder"]
    autoencoder = run.build_seeded(node, 0, "autoencoder").eval()
    with torch.no_grad():
        autoencoder.to_latent.bias[autoencoder.latent_channels :] -= 20.0
    mean = encode_moments(autoencoder, images).chunk(2, dim=1)[0]
    node["scale_factor"] = 1 / mean.std().item()
    facts = {"shape": [3, IMAGE_SIZE, IMAGE_SIZE], "num_classes": None, "class_names": None, "condition_drop": 0.0}
    save_model(path, autoencoder, {"autoencoder": node}, weights="raw", step=0, facts=facts)


class Clock(Callback):
    """Note each step's loss and seconds, and the seconds before the first."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._since = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = time.perf_counter()
        self.before = now - self._since
        self._since = now

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())  # waits for the device
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now


def timed(*overrides: str) -> Clock:
    """Train as these words say, under a clock."""
    clock = Clock()
    trained(composed(*overrides), clock)
    return clock


def main(steps: int = 12, batch_size: int = 4) -> None:
    run.quieten_lightning()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [
            "experiment=shapes",
            "autoencoder=trained",
            f"autoencoder.checkpoint={folder / 'autoencoder.safetensors'}",
            f"data.image_size={IMAGE_SIZE}",
            f"data.num_train={4 * batch_size}",  # four batches an epoch: each is met several times
            f"data.num_val={batch_size}",
            f"data.batch_size={batch_size}",
            "net.in_channels=4",
            "net.out_channels=4",
            "lr_scheduler.warmup_steps=1",
            f"trainer.max_steps={steps}",
            "trainer.limit_val_batches=0",
            "+trainer.enable_progress_bar=false",
            *(f"callbacks.{callback}=null" for callback in ("samples", "checkpoints", "progress")),
        ]
        data = run.build(composed("data=shapes", f"data.image_size={IMAGE_SIZE}")["data"])
        data.setup("fit")
        save_autoencoder(folder / "autoencoder.safetensors", data.train_set.samples(range(4))["image"])
        fly = timed(*common, f"run_dir={folder / 'fly'}")
        cache = timed(*common, f"run_dir={folder}", f"latent_cache={folder / 'cache'}")
    slow, fast = (statistics.median(clock.seconds[WARMUP:]) for clock in (fly, cache))
    difference = max(abs(a - b) / abs(a) for a, b in zip(fly.losses, cache.losses, strict=True))
    assert all(map(math.isfinite, fly.losses))
    rows = {
        "encoding in each step": f"{slow:.3f} s a step",
        "cached latents": f"{fast:.3f} s a step",
        "steps/s, cached / encoding": f"{slow / fast:.1f} (target 3)",
        "filling the cache": f"{cache.before - fly.before:.1f} s for {5 * batch_size} images",
        "losses": f"{fly.losses[0]:.4f} to {fly.losses[-1]:.4f} in {steps} steps",
        "largest relative difference": f"{difference:.1e}",
    }
    report(f"Training with cached latents, {IMAGE_SIZE}x{IMAGE_SIZE}, kl_f8, batch {batch_size}", rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
