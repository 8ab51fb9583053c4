"""How does a composed config become a run? Build every object, find out where to go on, fit, and leave a model.

The same command again is the resume command: a run folder that has checkpoints continues from the newest (`resume.py`).
"""

import atexit
import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from hydra.utils import instantiate
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import OmegaConf
from rich.console import Console
from rich.tree import Tree

from diffusion.checkpoint import atomic_write, locate, read_header
from diffusion.randomness import fold
from diffusion.run_folder import first_process
from diffusion.training.cached_latents import CACHE_LATENTS, cache_latents, with_cache
from diffusion.training.checkpoint_files import AtomicCheckpointIO
from diffusion.training.export import export_model
from diffusion.training.metrics import MetricsCSV
from diffusion.training.recording import RunRecord, attempt
from diffusion.training.resume import NewSettings, check_changes, check_fits, starting_point

# What `task` says on behalf of other nodes: `diffusion` refers to these.
NOT_ARGUMENTS = ("parameterization", "variance")
# Nodes that tasks name in their constructors and that are plain values, not objects to build.
PLAIN = ("seed",)


def train(cfg: Any) -> Path:
    """Train as the composed config says and return the run folder. Ctrl-C and SIGTERM exit with 130 and 143.

    Raises ValueError for what the user can mend: a resume path that is not there, a folder that holds another run,
    a loss that is not finite.
    """
    config = OmegaConf.to_container(OmegaConf.create(cfg), resolve=True)
    if config["task"]["_target_"] == CACHE_LATENTS:
        return cache_latents(config, lambda name: build_seeded(config[name], config["seed"], name))
    run_dir = Path(config["run_dir"])
    if config.get("forecast"):
        from diffusion.training.forecast_run import forecast  # it rehearses what is built here

        said = forecast(config)
        if first_process():
            print(said)
        return run_dir
    fast_dev_run = bool(config["trainer"].get("fast_dev_run"))  # writes nothing
    with attempt(run_dir, writes=not fast_dev_run) as this:
        start = starting_point(config, run_dir)
        if start.finished:
            return run_dir
        threads, max_steps = config.get("threads"), config["trainer"].get("max_steps")
        this.begin(resumed_step=start.step, max_steps=max_steps, threads=threads)
        print_tree(config)
        quieten_lightning()
        if threads:
            torch.set_num_threads(threads)
        task, data = build_task(config), build(config["data"])
        task.check_shape(data.shape)
        check_fits(start, task)
        data = with_cache(data, task, config)
        facts = facts_of(task, data)
        callbacks = [*build_callbacks(config, facts, data), RunRecord(), *([NewSettings()] if start.anew else [])]
        trainer = this.trainer = build_trainer(config, run_dir, callbacks, None if fast_dev_run else start.step)
        check_changes(start, trainer, getattr(data, "batch_size", None))
        if not fast_dev_run and trainer.is_global_zero:
            save_config(config, run_dir)
        fit(trainer, task, data, start.checkpoint)
        if dist.is_initialized() and dist.get_backend() == "gloo":  # Lightning leaves NCCL's by itself
            atexit.unregister(leave_group)
            atexit.register(leave_group)
        if not fast_dev_run:
            leave_model(run_dir / "model.safetensors", trainer, task, config, facts)
    return run_dir


def fit(trainer: Trainer, task: LightningModule, data: LightningDataModule, checkpoint: Path | None) -> None:
    """Run the training loop, without what Lightning says of things that are meant to be so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*have overridden `on_before_batch_transfer`.*")  # of a task
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # Lightning with torch 2.15
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")  # DDP's speed
        if not trainer.is_global_zero:
            warnings.simplefilter("ignore")  # the first process says it
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)


def leave_group() -> None:
    """Leave the processes that trained together: threads of gloo that still run would abort a program that ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_model(
    path: Path, trainer: Trainer, task: LightningModule, config: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write the model of the last step, unless a callback has."""
    if not trainer.strategy.broadcast(path.exists() and read_header(path).step == trainer.global_step):
        export_model(path, trainer, task, config, facts)
    if trainer.is_global_zero:
        print(f"{path} holds the model of step {trainer.global_step}", file=sys.stderr)


def facts_of(task: LightningModule, data: LightningDataModule) -> dict[str, Any]:
    """Return what a model file says of the data that its model knows."""
    return {
        "shape": list(data.shape),
        "num_classes": data.num_classes,
        "class_names": None if data.class_names is None else list(data.class_names),
        "condition_drop": getattr(task, "condition_drop", 0.0),
    }


# ---------------------------------------------------------------------------------------------------------------------
# building


def build(node: Mapping[str, Any] | None) -> Any:
    """Build the object that a config node describes; a node that names no class (`ema=none`) is None.

    Such a node need not be empty: a recipe that sets ema.decays can still be run with ema=none.
    """
    return instantiate(dict(node), _convert_="all") if node and "_target_" in node else None


def build_task(config: Mapping[str, Any], *, on_meta: Sequence[str] = ()) -> LightningModule:
    """Build the task: each parameter of its constructor that is a node of the config gets the object of that node.

    The initial weights of each network are a function of `seed` and the node's name alone. The nodes in `on_meta` get
    networks without weights, which take no memory.
    """
    settings = {key: value for key, value in config["task"].items() if key not in NOT_ARGUMENTS}
    wanted = inspect.signature(locate(settings["_target_"])).parameters
    if foreign := sorted(key for key in settings if key not in wanted and not key.startswith("_")):
        kind = settings["_target_"].rpartition(".")[2]
        raise ValueError(
            f"{kind} takes no task.{', task.'.join(foreign)}: the recipe is one for another task; choose another one "
            "with experiment=NAME (experiment=autoencoder and experiment=classifier are plain ones for your own images)"
        )
    parts = {}
    for name in wanted:
        if name in config and name not in settings:
            with torch.device("meta") if name in on_meta else nullcontext():
                parts[name] = config[name] if name in PLAIN else build_seeded(config[name], config["seed"], name)
    return instantiate({**settings, "_partial_": True}, _convert_="all")(**parts)


def build_seeded(node: Mapping[str, Any] | None, seed: int, name: str) -> Any:
    """Build a node with a global random state of its own, and leave the one outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(fold(seed, "init") if name == "net" else fold(seed, "init", name))
        return build(node)


def build_callbacks(config: Mapping[str, Any], facts: Mapping[str, Any], data: LightningDataModule) -> list[Callback]:
    """Build the callbacks in their order: averages first, so that all others see the step's final weights."""
    callbacks = []
    known = {"config": config, "facts": facts, "shape": data.shape, "data": data}
    for node in (config.get("ema"), *(config.get("callbacks") or {}).values()):
        callback = build(node)
        if isinstance(callback, functools.partial):  # `_partial_: true` asks for what only a run knows
            callback = with_known(callback, known)
        if callback is not None:
            callbacks.append(callback)
    return callbacks


def with_known(partial: Callable[..., Any], known: Mapping[str, Any]) -> Any:
    """Call what a config has half described with those of the `known` things that it asks for."""
    asked = inspect.signature(partial).parameters
    return partial(**{key: value for key, value in known.items() if key in asked})


def build_trainer(
    config: Mapping[str, Any], run_dir: Path, callbacks: list[Callback], resumed_step: int | None
) -> Trainer:
    """Build Lightning's trainer with our loggers, writing checkpoints atomically into `run_dir`."""
    settings = dict(config["trainer"])
    loggers: list[Any] | bool = False
    if not settings.get("fast_dev_run"):
        extra = [build(node) for node in (config.get("logger") or {}).values()]
        loggers = [MetricsCSV(run_dir / "metrics.csv", resume_step=resumed_step)]
        known = {"run_dir": run_dir, "config": config, "resume_step": resumed_step}
        loggers += [with_known(logger, known) for logger in extra]
    make = instantiate({**settings, "_partial_": True}, _convert_="all")
    plugins = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():  # what queues a job again is outside of it, and waits until it has saved
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return make(default_root_dir=str(run_dir), callbacks=callbacks, logger=loggers, plugins=plugins)


# ---------------------------------------------------------------------------------------------------------------------
# for people


def save_config(config: Mapping[str, Any], run_dir: Path) -> None:
    """Write the resolved config to run_dir/config.yaml."""
    with atomic_write(run_dir / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")


def print_tree(config: Mapping[str, Any]) -> None:
    """Print the resolved config as a tree, a branch a group; one process of several does."""
    if not first_process():
        return
    tree = Tree("config")
    for key, node in config.items():
        if isinstance(node, Mapping) and node:
            tree.add(f"[bold]{key}[/bold]").add(yaml.safe_dump(dict(node), sort_keys=False).rstrip(), highlight=True)
        else:
            tree.add(f"[bold]{key}[/bold]: {node}")
    Console(stderr=True).print(tree)


def quieten_lightning() -> None:
    """Keep Lightning's advertisements and its table of devices out of the log; its warnings stay."""
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.distributed"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # also of a cluster's login node
