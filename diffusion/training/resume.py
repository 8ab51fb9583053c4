"""Where does a run go on, and may it? The newest checkpoint that can be read, and what has changed since.

The same command again is the resume command. Settings that change the numbers of a run stop it with their list.
"""

import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from diffusion.checkpoint import read_header
from diffusion.cli import flat
from diffusion.run_folder import first_process, read_status
from diffusion.training.checkpoint_files import LAST, Damaged, candidates, last_checkpoint, read_checkpoint

# Settings that leave the numbers of a run as they are, but for the last bits where a device or a kernel changes.
HARMLESS = (
    *("resume", "run_dir", "name", "threads", "callbacks", "callbacks.*", "logger", "logger.*", "forecast*", "sweep*"),
    *("objective", "direction"),  # of a search
    *("sampler", "sampler.*", "guidance", "guidance.*"),  # of the pictures
    *("data.root", "data.num_workers", "data.pin_memory", "data.prefetch*", "data.max_broken"),
    *("latent_cache", "task.compile", "task.bundle"),
    *("trainer.max_*", "trainer.min_*", "trainer.log_every_n_steps", "trainer.val_check_interval"),
    *("trainer.check_val_every_n_epoch", "trainer.limit_val_batches", "trainer.num_sanity_val_steps"),
    *("trainer.enable_*", "trainer.profiler*", "trainer.benchmark", "trainer.deterministic", "trainer.accelerator"),
    *("trainer.detect_anomaly", "trainer.strategy*", "trainer.default_root_dir", "trainer.plugins*"),
)
# Together they say how large a step's batch is; how it is divided changes nothing.
BATCH = ("data.batch_size", "trainer.devices", "trainer.num_nodes", "trainer.accumulate_grad_batches")
LENGTH = ("max_steps", "max_epochs", "max_time")  # of the trainer's settings


class Refused(ValueError):
    """A run may not begin like this; what its folder holds is as good as before."""


class Start(NamedTuple):
    """Where a run begins. `own`: from what this run has saved itself. `checkpoint` None: from nothing."""

    checkpoint: Path | None = None
    step: int | None = None
    own: bool = True
    forced: bool = False
    finished: bool = False
    held: Mapping[str, Any] = MappingProxyType({})  # what the checkpoint holds, tensors without their numbers
    changed: Mapping[str, tuple[Any, Any]] = MappingProxyType({})  # settings that are not those of the checkpoint

    @property
    def anew(self) -> bool:
        """Say whether a checkpoint's state goes on under the settings of this start, whatever its own were."""
        return self.checkpoint is not None and (self.forced or not self.own)


def starting_point(config: Mapping[str, Any], run_dir: Path) -> Start:
    """Find out where to begin, say so, and list what has changed in the settings.

    resume auto: at the run's newest checkpoint that can be read, if it has one; force: also with other settings; a
    path: at that file, or at the newest of that run; false: never. Raises ValueError for a path that is not there, a
    folder that holds a run already, checkpoints of which none can be read, and those of another task.
    """
    resume = config.get("resume", "auto")
    start = _own(run_dir, resume) if resume in ("auto", "force") else _named(run_dir, resume)
    if start.checkpoint is None:
        _say(f"training in {run_dir}")
        return start
    before = _settings(start, run_dir)
    check_task(start, before, config)
    start = start._replace(changed=differences(before, config) if before else {})
    start = start._replace(finished=start.own and _is_finished(start, run_dir, config))
    max_steps = config["trainer"].get("max_steps", -1)
    if start.finished:
        _say(f"{run_dir} has finished its {start.step} steps; raise trainer.max_steps to go on")
    elif not start.own and 0 < max_steps <= start.step:
        raise Refused(
            f"resume={resume} begins after step {start.step}, and trainer.max_steps={max_steps} leaves nothing to "
            "train; raise trainer.max_steps"
        )
    else:
        _say(f"going on after step {start.step} of {start.checkpoint}")
    for key, (old, new) in start.changed.items():
        _say(f"  changed: {key}: {old} -> {new}")
    return start


def _say(text: str) -> None:
    if first_process():
        print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# which checkpoint


def _own(run_dir: Path, resume: str) -> Start:
    """The newest checkpoint of the run itself; one that is damaged is skipped with a warning."""
    skipped: list[tuple[Path, Exception]] = []
    for path in candidates(run_dir):
        try:
            held = read_checkpoint(path)
        except Damaged as error:
            skipped.append((path, error))
            continue
        for bad, error in skipped:
            rank_zero_warn(f"{bad} is damaged ({error}); going on from the one before, {path}")
        return Start(path, int(held["global_step"]), forced=resume == "force", held=held)
    if skipped:
        listing = "; ".join(f"{path.name}: {error}" for path, error in skipped)
        raise ValueError(
            f"none of the checkpoints in {skipped[0][0].parent} can be read ({listing}); bring one back from a copy, "
            "begin with another run's by resume=FILE, or start anew with another run_dir"
        )
    status = read_status(run_dir)
    if status is not None and status.state == "finished":
        raise Refused(
            f"{run_dir} has finished its {status.step} steps, and its checkpoints are gone: it can neither go on nor "
            "begin anew; choose another run_dir"
        )
    return Start(forced=resume == "force")


def _named(run_dir: Path, resume: str | bool | None) -> Start:
    """The checkpoint that resume= names: a file, or a run's newest; none for false."""
    if not resume:
        if candidates(run_dir):
            raise Refused(f"{run_dir} already holds a run; give another run_dir, or resume=auto to continue it")
        return Start()
    path = Path(str(resume)).expanduser()
    if path.is_dir() and not (path / "meta.pt").exists():
        start = _own(path, "auto") if candidates(path) else Start()
        path = start.checkpoint or last_checkpoint(path)
    if not path.exists():
        raise Refused(f"resume={resume}: there is no {path}; give a .ckpt file, a run folder, auto, force or false")
    try:
        held = read_checkpoint(path)
    except Damaged as error:
        raise Refused(
            f"cannot resume from {path}: it is damaged or no checkpoint of train.py ({error}); "
            "take another checkpoint of the run, or start anew with another run_dir"
        ) from error
    own = path.resolve().parent == last_checkpoint(run_dir).resolve().parent
    return Start(path, int(held["global_step"]), own=own, held=held)


def _is_finished(start: Start, run_dir: Path, config: Mapping[str, Any]) -> bool:
    """Say whether nothing is left to do: all steps are done, and the model of the last one is there."""
    if start.checkpoint.name != LAST:
        return False
    status = read_status(run_dir)
    if status is not None and (status.state != "finished" or status.step != start.step):
        return False
    max_steps = config["trainer"].get("max_steps", -1)
    if not 0 < max_steps <= start.step:
        longer = any(f"trainer.{name}" in start.changed for name in LENGTH)
        if status is None or longer or max_steps > 0:
            return False
    try:
        return read_header(run_dir / "model.safetensors").step == start.step
    except (OSError, ValueError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# what has changed


def _settings(start: Start, run_dir: Path) -> dict[str, Any]:
    """Return the settings that a checkpoint was made with; of an old one, which has none, those of the run's folder."""
    if "config" in start.held:
        return start.held["config"]
    path = start.checkpoint.parent.parent / "config.yaml"
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (old, new)} of what differs between two configs; null is what is not there."""
    old, new = flat(before), flat(now)
    keys = [*new, *(key for key in old if key not in new)]
    unlike = (key for key in keys if _plain(old.get(key)) != _plain(new.get(key)))
    return {key: (old.get(key), new.get(key)) for key in unlike if key not in ("resume", "run_dir")}


def _plain(value: Any) -> Any:
    """An empty group is what is not there, a tuple what a list is."""
    return None if value == {} else list(value) if isinstance(value, tuple) else value


def check_changes(start: Start, trainer: Trainer, batch_size: int | None) -> None:
    """Raise ValueError where a run would go on with other numbers than it began with, unless that is wanted.

    Wanted it is with resume=force, and where the state of another run is taken up.
    """
    if start.checkpoint is None or start.anew:
        return
    step = samples_a_step(trainer, batch_size)
    same_batch = step is not None and start.held.get("samples_a_step") == step
    harmful = {
        key: values for key, values in start.changed.items() if not (is_harmless(key) or (same_batch and key in BATCH))
    }
    if not harmful:
        return
    listing = "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in harmful.items())
    raise Refused(
        f"{start.checkpoint} was trained with other settings, and going on with these would give another run:\n"
        f"{listing}\n"
        "take them back to go on, say resume=force to go on with the new ones, or choose another run_dir to start anew"
    )


def is_harmless(key: str) -> bool:
    """Say whether a setting leaves the numbers of a run as they are."""
    return any(fnmatchcase(key, pattern) for pattern in HARMLESS)


def samples_a_step(trainer: Trainer, batch_size: int | None) -> int | None:
    """Return how many samples an optimizer step takes, on all devices; None where the data do not say."""
    return batch_size and batch_size * trainer.world_size * trainer.accumulate_grad_batches


# ---------------------------------------------------------------------------------------------------------------------
# whether it fits


def check_task(start: Start, before: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise ValueError for the checkpoint of another task."""
    old, new = (node.get("task", {}).get("_target_", "") for node in (before, config))
    if old and old != new:
        raise Refused(
            f"{start.checkpoint} is of a {old.rpartition('.')[2]}, and this run trains a {new.rpartition('.')[2]}; "
            "choose the task that it was trained with, or another checkpoint"
        )


def check_fits(start: Start, task: LightningModule) -> None:
    """Raise one ValueError that lists every tensor of a checkpoint that is none of the task's, and the reverse."""
    found = start.held.get("state_dict")
    if not found:  # none to begin with, or a folder of shards, whose reader compares them
        return
    wanted = {key: tuple(value.shape) for key, value in task.state_dict().items() if isinstance(value, Tensor)}
    found = {key: tuple(value.shape) for key, value in found.items() if isinstance(value, Tensor)}
    problems = [f"missing {key} {shape}" for key, shape in wanted.items() if key not in found]
    problems += [f"unexpected {key} {shape}" for key, shape in found.items() if key not in wanted]
    problems += [
        f"mis-shaped {key}: checkpoint {found[key]}, network {shape}"
        for key, shape in wanted.items()
        if key in found and found[key] != shape
    ]
    if problems:
        shown = "\n  ".join([*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])])
        raise Refused(
            f"{start.checkpoint} does not fit the network of this run, {len(problems)} keys:\n  {shown}\n"
            "choose the network and the timestep sampler that it was trained with, or another checkpoint"
        )


class NewSettings(Callback):
    """Let the optimizers' state go on with the settings of this run: their own would come back with a checkpoint.

    For resume=force and for the state of another run. Learning rates go on at their step of this run's schedule.
    """

    def __init__(self) -> None:
        self._groups: list[list[dict[str, Any]]] = []
        self._base_rates: list[list[float] | None] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the settings, before a checkpoint brings back the old ones."""
        self._groups = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]
        schedulers = (config.scheduler for config in trainer.lr_scheduler_configs)
        self._base_rates = [list(getattr(scheduler, "base_lrs", [])) for scheduler in schedulers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put them back."""
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
        for config, base_rates in zip(trainer.lr_scheduler_configs, self._base_rates, strict=True):
            scheduler = config.scheduler
            if not base_rates or not hasattr(scheduler, "lr_lambdas"):
                continue  # one that is computed from its last rate has nowhere else to go on
            scheduler.base_lrs = base_rates
            factors = (factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas)
            scheduler._last_lr = [rate * factor for rate, factor in zip(base_rates, factors, strict=True)]
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate
