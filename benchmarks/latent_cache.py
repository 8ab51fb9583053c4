"""How much faster is training on cached latents than encoding in each step, and is it the same training?

    python benchmarks/latent_cache.py sd [steps] [batch_size]      # target: at least 3 times the steps a second
    python benchmarks/latent_cache.py shapes [steps] [batch_size]
    python benchmarks/latent_cache.py digits [steps] [batch_size]

Stable Diffusion's autoencoder (configs/autoencoder/kl_f8.yaml, random weights) on 256x256 shapes, a latent UNet of
1.7 M parameters; or the recipes shapes_latent_text and digits_latent with autoencoders of their own sizes, where the
network's step is most of the work. The runs are those that train.py makes, with the same seed, one after the other:
encoding in each step, from the cache, and from `data=latents` alone. Losses are compared step by step.
"""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
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


def save_autoencoder(path: Path, option: str, images: torch.Tensor) -> None:
    """Write an autoencoder of random weights whose latents are of unit variance and hardly noisy: those of images."""
    channels, size = images.shape[1:3]
    node = composed(f"autoencoder={option}", "data=digits" if channels == 1 else "data=shapes")["autoencoder"]
    autoencoder = run.build_seeded(node, 0, "autoencoder").eval()
    with torch.no_grad():
        autoencoder.to_latent.bias[autoencoder.latent_channels :] -= 20.0
    mean = encode_moments(autoencoder, images).chunk(2, dim=1)[0]
    node["scale_factor"] = 1 / mean.std().item()
    facts = {"shape": [channels, size, size], "num_classes": None, "class_names": None, "condition_drop": 0.0}
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


def compare(title: str, autoencoder: str, words: Sequence[str], data_words: Sequence[str], steps: int) -> None:
    """Train three times as these words say, and report seconds a step, their ratio, and how far losses differ."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = run.build(composed(*data_words)["data"])
        data.setup("fit")
        save_autoencoder(folder / "autoencoder.safetensors", autoencoder, data.train_set.samples(range(4))["image"])
        common = [
            *words,
            "autoencoder=trained",
            f"autoencoder.checkpoint={folder / 'autoencoder.safetensors'}",
            "lr_scheduler.warmup_steps=1",
            f"trainer.max_steps={steps}",
            "trainer.limit_val_batches=0",
            "+trainer.enable_progress_bar=false",
            *(f"callbacks.{name}=null" for name in composed()["callbacks"] if name != "log"),
        ]
        fly = timed(*common, *data_words, f"run_dir={folder / 'fly'}")
        cache = timed(*common, *data_words, f"run_dir={folder / 'run'}", f"latent_cache={folder / 'cache'}")
        made = composed(*words, *data_words)["data"]  # what a recipe says of images must be as it was
        same = [f"data.{name}={made[name]}" for name in ("batch_size", "image_size")]
        latents = ["data=latents", f"data.root={folder / 'cache'}", *same]
        alone = timed(*common, *latents, f"run_dir={folder / 'alone'}")
    assert all(map(math.isfinite, fly.losses))
    slow, fast, bare = (statistics.median(clock.seconds[WARMUP:]) for clock in (fly, cache, alone))
    difference = max(
        abs(a - b) / abs(a) for other in (cache, alone) for a, b in zip(fly.losses, other.losses, strict=True)
    )
    rows = {
        "encoding in each step": f"{slow:.4f} s a step",
        "latent_cache=DIR": f"{fast:.4f} s a step",
        "data=latents": f"{bare:.4f} s a step",
        "steps/s, cached / encoding": f"{slow / fast:.1f} and {slow / bare:.1f} (target 3)",
        "filling the cache": f"{cache.before - fly.before:.1f} s",
        "losses": f"{fly.losses[0]:.4f} to {fly.losses[-1]:.4f} in {steps} steps",
        "largest relative difference": f"{difference:.1e}",
    }
    report(f"Training with cached latents, {title}", rows)


def main(which: str = "sd", steps: int = 12, batch_size: int = 4) -> None:
    run.quieten_lightning()
    if which == "digits":
        words = ["experiment=digits_latent"]
        compare(f"digits_latent, batch {batch_size}", "digits", words, [f"data.batch_size={batch_size}"], steps)
        return
    if which == "shapes":
        words = [f"data.batch_size={batch_size}", f"data.num_train={8 * batch_size}", "data.num_val=32"]
        title = f"shapes_latent_text, batch {batch_size}"
        compare(
            title, "shapes", ["experiment=shapes_latent_text"], ["data=shapes", "data.image_size=32", *words], steps
        )
        return
    shapes = [
        "data=shapes",
        f"data.image_size={IMAGE_SIZE}",
        f"data.num_train={4 * batch_size}",  # four batches an epoch: each is met several times
        f"data.num_val={batch_size}",
        f"data.batch_size={batch_size}",
    ]
    words = ["experiment=shapes", "net.in_channels=4", "net.out_channels=4"]
    compare(f"kl_f8 at {IMAGE_SIZE}x{IMAGE_SIZE}, batch {batch_size}", "kl_f8", words, shapes, steps)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
