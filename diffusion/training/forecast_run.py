"""What will this run cost? `train.py forecast=true`: a twin without data first, then a rehearsal where that fits.

Nothing stays on the disk, and no step of the run itself is taken.
"""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer

from diffusion.cli.composing import flat
from diffusion.training import run
from diffusion.training.checkpoints import Interrupted
from diffusion.training.footprint import StepNeeds, Twin, available_memory, resident_memory, resized
from diffusion.training.forecast import (
    HEADROOM,
    Forecast,
    StartForecast,
    described,
    largest_batch,
    memory_of,
    process_memory,
    size,
)
from diffusion.training.progress import StepBar
from diffusion.training.rehearsal import NEVER, VALIDATION_BATCHES, Rehearsal, TooBig

NETWORKS = ("net", "autoencoder", "discriminator", "classifier", "conditioner")


def forecast(config: Mapping[str, Any]) -> Forecast:
    """Forecast the run of a resolved config, and leave nothing behind. Raises ValueError for what `train` would."""
    resident, config = resident_memory(), {**config, "logger": {}}
    run.quieten_lightning()
    if config.get("threads"):
        torch.set_num_threads(config["threads"])
    with tempfile.TemporaryDirectory(prefix=".forecast-", dir=existing_parent(config["run_dir"])) as folder:
        task, data = run.build_task(config, on_meta=weightless(config)), run.build(config["data"])
        task.check_shape(data.shape)
        trainer = run.build_trainer(config, Path(folder), callbacks_of(config, {}, data), None)
        twin = Twin(task, trainer, trainer.strategy.root_device)
        process = process_memory(twin.device, resident)
        try:
            if sum(twin.held.values()) + process > available_memory(twin.device):
                raise TooBig(*needs_of_first_batch(twin, data))
            return rehearsed(config, Path(folder), twin, process)
        except TooBig as refusal:
            return without_time(refusal, trainer, twin, process)


def weightless(config: Mapping[str, Any]) -> list[str]:
    """Return the networks that can be built without memory: those that are not read from a file."""
    nodes = {name: flat(config.get(name) or {}) for name in NETWORKS}
    files = ("checkpoint", "weights")
    return [name for name, node in nodes.items() if not any(key.split(".")[-1] in files and node[key] for key in node)]


def callbacks_of(config: Mapping[str, Any], facts: Mapping[str, Any], data: LightningDataModule) -> list[Callback]:
    """Build the callbacks of a run without those that would speak of this one."""
    return [
        callback
        for callback in run.build_callbacks(config, facts, data)
        if not isinstance(callback, StartForecast | StepBar)
    ]


def existing_parent(run_dir: str) -> Path:
    """Return the folder nearest to a run's that exists already: on the disk that the run would write to."""
    return next(folder for folder in Path(run_dir).absolute().parents if folder.exists())


def needs_of_first_batch(twin: Twin, data: LightningDataModule) -> tuple[StepNeeds, StepNeeds]:
    """Return what the last step of the run needs on the first batch of the data, and on twice as many samples."""
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    one = twin.needs(batch, step=NEVER)
    return one, twin.needs(resized(batch, 2 * one.batch_size), step=NEVER)


def without_time(refusal: TooBig, trainer: Trainer, twin: Twin, process: int) -> Forecast:
    """Return the forecast of a run whose step does not fit into this machine's memory."""
    available = available_memory(twin.device)
    return Forecast(
        **described(trainer, twin, refusal.needs, trainer.max_steps),
        memory=memory_of(refusal.needs, process),
        largest_batch=largest_batch(refusal.needs, refusal.doubled, HEADROOM * available - process),
        notes=[
            f"a step does not fit into the {size(available)} that are free here: nothing was run and no time measured; "
            "memory and FLOPs are those of tensors without data"
        ],
    )


def rehearsed(config: Mapping[str, Any], folder: Path, twin: Twin, process: int) -> Forecast:
    """Return the forecast of a run that fits, by a rehearsal in `folder`. Raises `TooBig` where it does not."""
    settings = config["trainer"]
    limit = settings.get("limit_val_batches")
    rehearsal = Rehearsal(max_steps=settings["max_steps"], limit_val_batches=limit)
    few = min(limit, VALIDATION_BATCHES) if type(limit) is int or limit == 0 else VALIDATION_BATCHES
    task, data = run.build_task(config), run.build(config["data"])
    data = run.with_cache(data, task, config)
    callbacks = [*callbacks_of(config, run.facts_of(task, data), data), rehearsal]
    brief = {**settings, "limit_val_batches": few, "enable_progress_bar": False}
    trainer = run.build_trainer({**config, "trainer": brief}, folder, callbacks, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself will say it
        try:
            trainer.fit(task, datamodule=data)
        except Interrupted as stop:
            raise SystemExit(128 + stop.number) from None
    rehearsal.finish(trainer)
    needs = max((phase.needs for phase in rehearsal.phases), key=lambda needs: needs.peak)
    return Forecast(
        **described(trainer, twin, rehearsal.phases[-1].needs, rehearsal.max_steps),
        memory=memory_of(needs, process, measured=rehearsal.peak),
        seconds_per_step=rehearsal.seconds,
        data_seconds=rehearsal.data_seconds,
        total_seconds=rehearsal.total_seconds,
        start_seconds=rehearsal.start_seconds,
        largest_batch=rehearsal.largest_batch,
        events=rehearsal.events,
    )
