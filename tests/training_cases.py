"""A training run of seconds: the digits, a network of a few hundred weights, everything switched on."""

import copy
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion.training.metrics import read_rows


class TinyNet(nn.Module):
    """As little as can be called a conditional denoiser: two convolutions, dropout, time and label."""

    def __init__(
        self, num_classes: int | None = 10, width: int = 8, dropout: float = 0.1, out_channels: int = 1
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.label = None if num_classes is None else nn.Embedding(num_classes, width)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor | None = None) -> Tensor:
        bias = self.time(t[:, None] / 50)
        if label is not None:
            bias = bias + self.label(label.clamp(min=0)) * (label >= 0)[:, None]
        return self.last(self.dropout(torch.tanh(self.first(x) + bias[:, :, None, None])))


class Memory(nn.Module):
    """A perceptron that knows which pixel is which: it can learn a batch by heart."""

    def __init__(self, num_classes: int = 10, width: int = 256, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(nn.Linear(65, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, 64)

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
        return self.last(self.layers(torch.cat([x.flatten(1), t[:, None] / 50], 1))).view_as(x)


NET = {"_target_": "training_cases.TinyNet", "num_classes": 10}
BASE: dict[str, Any] = {
    "name": "tiny",
    "seed": 0,
    "resume": "auto",
    "run_dir": None,
    "data": {"_target_": "diffusion.data.digits.Digits", "batch_size": 200, "seed": 0},  # six batches an epoch
    "net": NET,
    "schedule": {"_target_": "diffusion.schedule.cosine", "num_train_timesteps": 50},
    "diffusion": {
        "_target_": "diffusion.process.GaussianDiffusion",
        "schedule": {"_target_": "diffusion.schedule.cosine", "num_train_timesteps": 50},
        "parameterization": "eps",
        "variance": "posterior",
    },
    "loss": {"_target_": "diffusion.losses.DenoisingLoss"},
    "timestep_sampler": {
        "_target_": "diffusion.timestep_samplers.ImportanceTimesteps",
        "num_train_timesteps": 50,
        "history_per_timestep": 2,
    },
    "task": {
        "_target_": "diffusion.training.denoiser.DenoiserTask",
        "parameterization": "eps",
        "variance": "posterior",
        "condition_drop": 0.2,
        "compile": False,
    },
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 2e-3},
    "lr_scheduler": {
        "_target_": "diffusion.training.lr_schedules.warmup_cosine",
        "_partial_": True,
        "warmup_steps": 3,
        "total_steps": 14,
    },
    "ema": {
        "_target_": "diffusion.training.ema.EMA",
        "decays": [0.9, 0.5],
        "rule": {"_target_": "diffusion.training.ema.LdmDecay"},
    },
    "sampler": {"_target_": "diffusion.sampling.Sampler", "num_steps": 2, "eta": 1.0},
    "guidance": {"_target_": "diffusion.guidance.ClassifierFreeGuidance", "guidance_scale": 2.0},
    "trainer": {
        "_target_": "lightning.pytorch.Trainer",
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 14,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 2,
        "val_check_interval": 5,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    },
    "callbacks": {
        "guard": {"_target_": "diffusion.training.guard.NonFiniteGuard"},
        "log": {"_target_": "diffusion.training.metrics.TrainingLog"},
        "samples": {
            "_target_": "diffusion.training.samples.SampleGrid",
            "_partial_": True,
            "sampler": {"_target_": "diffusion.sampling.Sampler", "num_steps": 2, "eta": 1.0},
            "guidance": {"_target_": "diffusion.guidance.ClassifierFreeGuidance", "guidance_scale": 2.0},
            "every_n_steps": 4,
            "rows": 2,
            "columns": 2,
        },
        "progress": {"_target_": "diffusion.training.progress.StepBar"},
        "checkpoints": {
            "_target_": "diffusion.training.checkpoints.Checkpoints",
            "_partial_": True,
            "every_n_steps": 1,
        },
    },
    "logger": {},
}


def tiny(run_dir: Any, **changes: Any) -> dict[str, Any]:
    """The config of a tiny run; `changes` are dotted keys with `__` for the dot: trainer__max_steps=3."""
    config = copy.deepcopy(BASE)
    config["run_dir"] = str(run_dir)
    for key, value in changes.items():
        *path, leaf = key.split("__")
        node = config
        for part in path:
            node = node[part]
        node[leaf] = value
    return config


def alone(task: Any) -> Any:
    """The task with as much of a trainer as one training step on one device asks for."""
    task._trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=0, accumulate_grad_batches=1, num_training_batches=100
    )
    return task


class Stopped(RuntimeError):
    """What ends a run here, as abruptly as an exception can."""


class StopAt(Callback):
    """Raise in the given hook, the first time that `step` optimizer steps are done there."""

    def __init__(self, step: int, hook: str = "on_train_batch_end") -> None:
        self.step, self.hook = step, hook
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step >= self.step:
            raise Stopped(f"{self.hook} at step {trainer.global_step}")


TIMINGS = ("train/images_per_second", "train/memory_gb")


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that two equal runs must share, as comparable values; tensors as their bytes."""
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_rows(run_dir / "metrics.csv")]
    model = {name: as_bytes(tensor) for name, tensor in load_file(run_dir / "model.safetensors").items()}
    kept = ("global_step", "batches_seen", "state_dict", "optimizer_states", "lr_schedulers")
    return {
        **{key: as_bytes(checkpoint[key]) for key in kept},
        "ema": as_bytes(next(state for name, state in checkpoint["callbacks"].items() if name.startswith("EMA"))),
        "metrics": rows,
        "model": model,
        "samples": {path.name: path.read_bytes() for path in sorted((run_dir / "samples").glob("*.png"))},
    }


def as_bytes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: as_bytes(child) for key, child in value.items()}
    return [as_bytes(child) for child in value] if isinstance(value, list | tuple) else value


def assert_same_outcome(one: Path, other: Path) -> None:
    expected, got = outcome(one), outcome(other)
    different = [key for key in expected if expected[key] != got[key]]
    assert not different, f"{different} differ: {one} {other}"


class Poison(Callback):
    """Make a weight NaN once `step` steps are done, so that the next loss is."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, task: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            task.net.last.bias.data.fill_(torch.nan)


class SignalAt(Callback):
    """Send this process SIGTERM in the middle of the batch after `step` steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Slow(Callback):
    """Take this many seconds for each batch."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.seconds)
