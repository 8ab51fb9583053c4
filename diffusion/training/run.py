"""How does a composed config become a run? Build every object, find out where to go on, fit, and leave a model.

The same command again is the resume command: a run folder that has `checkpoints/last.ckpt` continues from it.
"""

import functools
import inspect
import logging
import pickle
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import OmegaConf
from rich.console import Console
from rich.tree import Tree

from diffusion.checkpoint import atomic_write, locate, read_header
from diffusion.cli import flat
from diffusion.data.latent_cache import cached
from diffusion.randomness import fold
from diffusion.training.checkpoints import AtomicCheckpointIO, Interrupted, last_checkpoint
from diffusion.training.export import export_model
from diffusion.training.metrics import MetricsCSV

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
    run_dir = Path(config["run_dir"])
    checkpoint = resume_path(config.get("resume", "auto"), run_dir)
    print_tree(config)
    quieten_lightning()
    if config.get("threads"):
        torch.set_num_threads(config["threads"])
    resumed_step = None if checkpoint is None else read_step(checkpoint)
    report_start(run_dir, checkpoint, resumed_step, config)
    fast_dev_run = bool(config["trainer"].get("fast_dev_run"))
    task, data = build_task(config), build(config["data"])
    task.check_shape(data.shape)
    data = with_cache(data, task, config)
    facts = {
        "shape": list(data.shape),
        "num_classes": data.num_classes,
        "class_names": None if data.class_names is None else list(data.class_names),
        "condition_drop": getattr(task, "condition_drop", 0.0),
    }
    callbacks = build_callbacks(config, facts, data)
    if not fast_dev_run:
        save_config(config, run_dir)
    trainer = build_trainer(config, run_dir, callbacks, None if fast_dev_run else resumed_step)
    fit(trainer, task, data, checkpoint)
    model = run_dir / "model.safetensors"
    if not fast_dev_run and trainer.is_global_zero:
        if not model.exists() or read_header(model).step != trainer.global_step:
            export_model(model, trainer, task, config, facts)
        print(f"{model} holds the model of step {trainer.global_step}", file=sys.stderr)
    return run_dir


def fit(trainer: Trainer, task: LightningModule, data: LightningDataModule, checkpoint: Path | None) -> None:
    """Run the training loop; a signal ends the program with its own status after saying how to go on."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
            warnings.filterwarnings("ignore", message=".*have overridden `on_before_batch_transfer`.*")  # of a task
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # Lightning with torch 2.15
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except Interrupted as stop:
        # A default run_dir has the time in it, so the folder must be named.
        words = [word for word in sys.argv if not word.startswith("run_dir=")]
        print(
            f"stopped after step {stop.step} of {trainer.max_steps}; to go on: "
            f"{' '.join(words)} run_dir={trainer.default_root_dir}",
            file=sys.stderr,
        )
        raise SystemExit(128 + stop.number) from None


# ---------------------------------------------------------------------------------------------------------------------
# where to go on


def resume_path(resume: str | bool | None, run_dir: Path) -> Path | None:
    """Return the checkpoint to start from. auto: the run's own, if any; a path: that file or run; false: none.

    Raises ValueError for a path that does not exist, and for resume=false in a folder that holds a run.
    """
    own = last_checkpoint(run_dir)
    if resume == "auto":
        return own if own.exists() else None
    if not resume:
        if own.exists():
            raise ValueError(f"{run_dir} already holds a run; give another run_dir, or resume=auto to continue it")
        return None
    path = Path(str(resume))
    path = last_checkpoint(path) if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"resume={resume}: there is no {path}; give a .ckpt file, a run folder, auto or false")
    return path


def read_step(checkpoint: Path) -> int:
    """Return the optimizer steps done in a checkpoint. Raises ValueError for a file that is no checkpoint of ours."""
    try:
        return int(torch.load(checkpoint, map_location="meta", weights_only=True, mmap=True)["global_step"])
    except (RuntimeError, KeyError, TypeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"cannot resume from {checkpoint}: it is damaged or no checkpoint of train.py ({reason}); "
            "take another checkpoint of the run, or start anew with another run_dir"
        ) from error


def report_start(run_dir: Path, checkpoint: Path | None, step: int | None, config: Mapping[str, Any]) -> None:
    """Say what is about to happen, and what has changed in the config since the run began."""
    if checkpoint is None:
        print(f"training in {run_dir}", file=sys.stderr)
        return
    max_steps = config["trainer"]["max_steps"]
    if 0 < max_steps <= step:
        print(f"{run_dir} has finished its {step} steps; raise trainer.max_steps to go on", file=sys.stderr)
    else:
        print(f"going on after step {step} of {checkpoint}", file=sys.stderr)
    before = run_dir / "config.yaml"
    if before.exists():
        old, new = flat(yaml.safe_load(before.read_text(encoding="utf-8"))), flat(config)
        for key in sorted((old.keys() | new.keys()) - {"resume"}):
            if old.get(key) != new.get(key):
                print(f"  changed: {key}: {old.get(key)} -> {new.get(key)}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# building


def build(node: Mapping[str, Any] | None) -> Any:
    """Build the object that a config node describes; a node that names no class (`ema=none`) is None.

    Such a node need not be empty: a recipe that sets ema.decays can still be run with ema=none.
    """
    return instantiate(dict(node), _convert_="all") if node and "_target_" in node else None


def build_task(config: Mapping[str, Any]) -> LightningModule:
    """Build the task: each parameter of its constructor that is a node of the config gets the object of that node.

    The initial weights of each network are a function of `seed` and the node's name alone.
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
            parts[name] = config[name] if name in PLAIN else build_seeded(config[name], config["seed"], name)
    return instantiate({**settings, "_partial_": True}, _convert_="all")(**parts)


def build_seeded(node: Mapping[str, Any] | None, seed: int, name: str) -> Any:
    """Build a node with a global random state of its own, and leave the one outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(fold(seed, "init") if name == "net" else fold(seed, "init", name))
        return build(node)


def with_cache(data: LightningDataModule, task: LightningModule, config: Mapping[str, Any]) -> LightningDataModule:
    """Let the data come from the folder `latent_cache`, which is filled first where it is empty; None changes nothing.

    Raises ValueError for a run without latents, and for a cache that was made of something else.
    """
    if not config.get("latent_cache"):
        return data
    autoencoder = getattr(task, "autoencoder", None)
    if autoencoder is None or autoencoder is task.net:
        raise ValueError(
            f"latent_cache={config['latent_cache']}, but this run learns no latents; set latent_cache=null, or choose "
            "autoencoder=trained autoencoder.checkpoint=FILE"
        )
    if task.conditioner is not None and "image" in task.conditioner.entries:
        raise ValueError(
            f"the conditioner reads images, which latent_cache={config['latent_cache']} does not keep; "
            "set latent_cache=null"
        )
    return cached(data, autoencoder, config["latent_cache"], dtype=config.get("latent_dtype"))


def build_callbacks(config: Mapping[str, Any], facts: Mapping[str, Any], data: LightningDataModule) -> list[Callback]:
    """Build the callbacks in their order: averages first, so that all others see the step's final weights."""
    callbacks = []
    known = {"config": config, "facts": facts, "shape": data.shape, "data": data}
    for node in (config.get("ema"), *(config.get("callbacks") or {}).values()):
        callback = build(node)
        if isinstance(callback, functools.partial):  # `_partial_: true` asks for what only a run knows
            asked = inspect.signature(callback).parameters
            callback = callback(**{key: value for key, value in known.items() if key in asked})
        if callback is not None:
            callbacks.append(callback)
    return callbacks


def build_trainer(
    config: Mapping[str, Any], run_dir: Path, callbacks: list[Callback], resumed_step: int | None
) -> Trainer:
    """Build Lightning's trainer with our loggers, writing checkpoints atomically into `run_dir`."""
    settings = dict(config["trainer"])
    loggers: list[Any] | bool = False
    if not settings.get("fast_dev_run"):
        extra = [build(node) for node in (config.get("logger") or {}).values()]
        loggers = [MetricsCSV(run_dir / "metrics.csv", resume_step=resumed_step)]
        loggers += [logger(run_dir=run_dir, config=config) for logger in extra]
    make = instantiate({**settings, "_partial_": True}, _convert_="all")
    return make(default_root_dir=str(run_dir), callbacks=callbacks, logger=loggers, plugins=[AtomicCheckpointIO()])


# ---------------------------------------------------------------------------------------------------------------------
# for people


def save_config(config: Mapping[str, Any], run_dir: Path) -> None:
    """Write the resolved config to run_dir/config.yaml."""
    with atomic_write(run_dir / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")


def print_tree(config: Mapping[str, Any]) -> None:
    """Print the resolved config as a tree, a branch a group."""
    tree = Tree("config")
    for key, node in config.items():
        if isinstance(node, Mapping) and node:
            tree.add(f"[bold]{key}[/bold]").add(yaml.safe_dump(dict(node), sort_keys=False).rstrip(), highlight=True)
        else:
            tree.add(f"[bold]{key}[/bold]: {node}")
    Console(stderr=True).print(tree)


def quieten_lightning() -> None:
    """Keep Lightning's advertisements and its table of devices out of the log; its warnings stay."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
