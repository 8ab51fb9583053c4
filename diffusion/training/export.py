"""How does a run leave a model? Its network with its first average, and what rebuilds it, in one model.safetensors."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from diffusion.checkpoint import save_model
from diffusion.training.ema import EMA
from diffusion.training.sharded import is_sharded, whole


class Gathered:
    """A network in shards as it is put together for a file: as much of a module as that asks for."""

    def __init__(self, module: nn.Module, *, keep: bool) -> None:
        """Gather the weights one by one; all ranks take part, and those that `keep` have them all, on the CPU."""
        self.state: dict[str, Tensor] = {}
        for name, tensor in module.state_dict().items():
            together = whole(tensor.detach())
            if keep:
                self.state[name] = together.cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by name."""
        return self.state


def export_model(
    path: Path, trainer: Trainer, task: LightningModule, config: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write the network with its first average, or its raw weights where none is kept, and what rebuilds it.

    `task.for_export(config)` gives the config to store and the parts that the network needs beside it. Call it on all
    ranks; the first writes, and for a network in shards the others lend theirs.
    """
    first, sharded = trainer.is_global_zero, is_sharded(task.model)
    if not (first or sharded):
        return
    ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA) and callback.averages), None)
    with ema.swapped(task.model) if ema else nullcontext():
        config, parts = task.for_export(config)
        net = task.net
        if sharded:
            net = Gathered(net, keep=first)
            parts = {name: with_whole_module(part, keep=first) for name, part in parts.items()}
        if first:
            save_model(
                path,
                net,
                config,
                weights="ema" if ema else "raw",
                step=trainer.global_step,
                facts=facts,
                ema_decay=ema.decays[0] if ema else None,
                parts=parts,
            )


def with_whole_module(part: Any, *, keep: bool) -> Any:
    """Return a part whose weights are put together, where they were in shards."""
    return replace(part, module=Gathered(part.module, keep=keep)) if is_sharded(part.module) else part
