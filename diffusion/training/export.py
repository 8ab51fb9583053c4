"""How does a run leave a model? Its network with its first average, and what rebuilds it, in one model.safetensors."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from diffusion.checkpoint import save_model
from diffusion.training.ema import EMA


def export_model(
    path: Path, trainer: Trainer, task: LightningModule, config: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write the network with its first average, or its raw weights where none is kept, and what rebuilds it.

    `task.for_export(config)` gives the config to store and the parts that the network needs beside it.
    """
    ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA) and callback.averages), None)
    with ema.swapped(task.model) if ema else nullcontext():
        config, parts = task.for_export(config)
        save_model(
            path,
            task.net,
            config,
            weights="ema" if ema else "raw",
            step=trainer.global_step,
            facts=facts,
            ema_decay=ema.decays[0] if ema else None,
            parts=parts,
        )
