"""What does our training loop cost over a bare one? The digits recipe against the same mathematics in 30 plain lines.

    python benchmarks/training_loop.py [chunks]      # target: at most 1.05 of the bare loop

Both run in one process, twenty steps in turn: a callback of the Lightning run hands over to the bare loop and back.
"""

import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
from harness import composed, report, trained
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from diffusion.training import run
from diffusion.training.denoiser import DenoiserTask

CHUNK = 20


def bare_loop(task: DenoiserTask, data: run.LightningDataModule, clip: float, decay: float) -> Iterator[None]:
    """Train a copy of the task's network; one `next` is one step."""
    net, diffusion, loss, drop = copy.deepcopy(task.net), task.diffusion, task.loss, task.condition_drop
    parameters = list(net.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = task.optimizer_partial(parameters)
    scheduler = task.lr_scheduler_partial(optimizer)
    images = data.train_set.images.float() / (data.train_set.levels / 2) - 1
    labels = data.train_set.labels
    for step in itertools.count():
        index = torch.randint(len(images), (data.batch_size,))
        x0, label = images[index], labels[index]
        t = torch.randint(diffusion.num_train_timesteps, (len(x0),))
        label = label.masked_fill(torch.rand(len(x0)) < drop, -1)
        value = loss(diffusion, net, x0, t, torch.randn_like(x0), {"label": label}).loss.mean()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
        if step % 50 == 0:
            value.item()
        yield


class TakeTurns(Callback):
    """After every chunk of our steps, run and time as many of the bare loop."""

    def __init__(self, clip: float, decay: float) -> None:
        self.clip, self.decay = clip, decay
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bare = bare_loop(pl_module, trainer.datamodule, self.clip, self.decay)
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step % CHUNK:
            return
        middle = time.perf_counter()
        for _ in range(CHUNK):
            next(self._bare)
        end = time.perf_counter()
        self.ours.append((middle - self._since) / CHUNK)
        self.theirs.append((end - middle) / CHUNK)
        self._since = end


def main(chunks: int = 40) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rest = "callbacks.samples=null callbacks.checkpoints=null trainer.limit_val_batches=0 trainer.accelerator=cpu"
        config = composed(f"run_dir={folder}", f"trainer.max_steps={chunks * CHUNK}", *rest.split())
        run.quieten_lightning()
        torch.set_num_threads(config["threads"] or torch.get_num_threads())
        turns = TakeTurns(config["trainer"]["gradient_clip_val"], config["ema"]["decays"][0])
        trained(config, turns)
    ours, theirs = (statistics.median(times[2:]) for times in (turns.ours, turns.theirs))  # the first ones warm up
    ratio = statistics.median(a / b for a, b in zip(turns.ours[2:], turns.theirs[2:], strict=True))
    rows = {
        "ours": f"{ours * 1e3:.2f} ms a step",
        "bare loop": f"{theirs * 1e3:.2f} ms a step",
        "ours / bare": f"{ratio:.3f} (target 1.05)",
    }
    report(f"Training loop, digits, batch {config['data']['batch_size']}, {chunks} x {CHUNK} steps in turn", rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
