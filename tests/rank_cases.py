"""Runs of two processes that talk over gloo, and what their networks were shown."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from diffusion.training.sharded import whole

TESTS = Path(__file__).parent


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_ranks(configs: Sequence[dict[str, Any]], file: Path, world_size: int = 2) -> list[subprocess.Popen]:
    """Start processes as torchrun does, which train each of the configs together."""
    file.write_text(json.dumps(list(configs)))
    shared = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(TESTS / "ranks.py"), str(file)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish(ranks: Sequence[subprocess.Popen]) -> list[str]:
    """Wait for all ranks and return what each of them said; an error of one ends the others."""
    said = []
    try:
        for rank in ranks:
            said.append(rank.communicate(timeout=300)[0])
            assert rank.returncode == 0, said[-1][-4000:]
    finally:
        for rank in ranks:
            rank.kill()
    return said


def run_ranks(configs: Sequence[dict[str, Any]], file: Path, world_size: int = 2) -> list[str]:
    """Train each of the configs on two processes; return what each of them said."""
    return finish(start_ranks(configs, file, world_size))


class Shown(Callback):
    """Keep what the network is shown in training, and the state that ranks must share, in run_dir/shown_RANK.pt."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self._listening = False

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        task.net.register_forward_pre_hook(self._hear, with_kwargs=True)

    def on_train_batch_start(self, trainer: Trainer, task: Any, batch: dict[str, Any], batch_idx: int) -> None:
        self.batches.append({"index": batch["index"].clone()})
        self._listening = True

    def _hear(self, net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._listening:
            self._listening = False
            named = {f"input {i}": value for i, value in enumerate(args)} | kwargs
            self.batches[-1] |= {name: value.detach().clone() for name, value in named.items() if value is not None}

    def on_train_end(self, trainer: Trainer, task: Any) -> None:
        averages = next((callback.averages for callback in trainer.callbacks if hasattr(callback, "averages")), {})
        shared = {
            **{f"average {decay} {name}": value for decay, of in averages.items() for name, value in of.items()},
            **{f"weight {name}": value for name, value in task.model.named_parameters()},
            **{f"buffer {name}": value for name, value in task.named_buffers() if name.startswith("timestep_sampler")},
            "gradient norm": task.gradient_norm,
        }
        shared = {name: whole(value.detach()).clone() for name, value in shared.items()}
        torch.save([self.batches, shared], Path(trainer.default_root_dir) / f"shown_{trainer.global_rank}.pt")


SHOWN = {"_target_": "rank_cases.Shown"}


def shown(run_dir: Path) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What the networks of a run were shown, in the order of the samples, and what each rank ended with."""
    ranks = [torch.load(path, weights_only=True) for path in sorted(run_dir.glob("shown_*.pt"))]
    batches = [part for together in zip(*(batches for batches, _ in ranks), strict=True) for part in together]
    return {name: torch.cat([part[name] for part in batches]) for name in batches[0]}, [state for _, state in ranks]


class KillAt(Callback):
    """Kill this process without notice, in the middle of the batch after `step` steps, where it is rank `rank`."""

    def __init__(self, step: int, rank: int = 1) -> None:
        self.step, self.rank = step, rank

    def on_before_backward(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


class PoisonOne(Callback):
    """Give the second rank images that are not numbers, once `step` steps are done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, task: Any, batch: dict[str, Any], batch_idx: int) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 1:
            batch["image"].fill_(torch.nan)
