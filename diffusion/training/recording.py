"""What becomes of a run, told to its folder by the process that runs it: STATUS, record.yaml, one run at a time."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from diffusion.checkpoint import atomic_write
from diffusion.cli import explain
from diffusion.processes import Stopped, stoppable
from diffusion.ranks import end_with_first_rank
from diffusion.run_folder import (
    STATES,
    STATUS,
    first_process,
    locked,
    read_record,
    record_facts,
    record_start,
    write_status,
)
from diffusion.training.checkpoint_files import candidates
from diffusion.training.checkpoints import Interrupted
from diffusion.training.resume import Refused


class Attempt:
    """One start of a run. What it does not write, because another process does or nothing is, it only remembers."""

    def __init__(self, run_dir: Path, *, writes: bool) -> None:
        self.run_dir, self.writes = run_dir, writes
        self.before = _bytes(run_dir / STATUS) if writes else None
        self.begun = False
        self.trainer: Trainer | None = None
        self.step: int | None = None
        self.max_steps: int | None = None

    def begin(self, *, resumed_step: int | None, max_steps: int | None, threads: int | None = None) -> None:
        """Say that the run is running, and record how it was started."""
        self.begun, self.step = True, resumed_step
        self.max_steps = max_steps if max_steps is not None and max_steps > 0 else None
        if self.writes:
            self.say("running")
            record_start(self.run_dir, resumed_step=resumed_step, threads=threads or torch.get_num_threads())

    def say(self, state: str, error: str | None = None) -> None:
        """Write STATUS."""
        if self.trainer is not None:
            self.step = self.trainer.global_step
        if self.writes:
            write_status(self.run_dir, state, step=self.step, max_steps=self.max_steps, error=error)

    def ended(self, error: BaseException) -> None:
        """Say that the run has ended with an error or a signal; a refusal leaves what the folder says of its run."""
        if not self.writes:
            return
        try:
            if isinstance(error, Refused) and (self.before is not None or candidates(self.run_dir)):
                self._restore()
            else:
                own, other = getattr(error, "state", None), "preempted" if is_stop(error) else "failed"
                self.say(own if own in STATES else other, in_words(error))
        except OSError as problem:  # a full disk, perhaps; what the run died of is more important
            print(f"cannot write {self.run_dir / STATUS}: {problem.strerror}", file=sys.stderr)

    def _restore(self) -> None:
        if self.begun and self.before is not None:
            with atomic_write(self.run_dir / STATUS, durable=False) as partial:
                partial.write_bytes(self.before)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


@contextmanager
def attempt(run_dir: Path, *, writes: bool) -> Iterator[Attempt]:
    """Hold the run folder while the block runs, and say in its STATUS how it ended.

    A signal ends the program with 128 and its number after saying how to go on. Raises ValueError where another process
    is at work in the folder. An exception may name the state that it leaves in an attribute `state`.
    """
    end_with_first_rank()
    with ExitStack() as stack:
        writes = writes and first_process()
        if writes:
            stack.enter_context(locked(run_dir))
        this = Attempt(run_dir, writes=writes)
        try:
            with stoppable():
                yield this
        except (Interrupted, Stopped) as stop:
            this.ended(stop)
            if first_process():
                print(how_to_go_on(stop, this), file=sys.stderr, flush=True)
            # What starts processes ends them all where one fails, and the first one may still be writing.
            saved_by_first = isinstance(stop, Interrupted) and not first_process()
            raise SystemExit(0 if saved_by_first else 128 + stop.number) from None
        except BaseException as error:
            this.ended(error)
            raise
        if this.begun:
            this.say("finished")


def how_to_go_on(stop: Interrupted | Stopped, this: Attempt) -> str:
    """Return what to type to continue. A default run_dir has the time in it, so the folder must be named."""
    words = [word for word in sys.argv if not word.startswith("run_dir=")]
    saved = f"stopped after step {stop.step}" if isinstance(stop, Interrupted) else "stopped before the next checkpoint"
    of = f" of {this.max_steps}" if this.max_steps and isinstance(stop, Interrupted) else ""
    return f"{saved}{of}; to go on: {shlex.join([*words, f'run_dir={this.run_dir}'])}"


def is_stop(error: BaseException) -> bool:
    """Say whether somebody asked the run to stop, rather than that something went wrong in it."""
    if isinstance(error, SystemExit):
        return isinstance(error.code, int) and error.code > 128
    return isinstance(error, (Interrupted, Stopped, KeyboardInterrupt))


def in_words(error: BaseException) -> str:
    """Return an error as the command line words it; what is no mistake of the user's with its kind before that."""
    text = explain(error).strip()
    if getattr(error, "state", None) in STATES or (isinstance(error, (ValueError, OSError, HydraException)) and text):
        return text
    kind = "signal" if is_stop(error) else type(error).__name__
    return f"{kind}: {text}" if text else kind


# ---------------------------------------------------------------------------------------------------------------------
# what is known once the run has begun


class RunRecord(Callback):
    """Add to record.yaml what is known when training begins: data, parameters, device, number of processes."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record; warn where the data are not those that the run began with."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        run_dir, data = Path(trainer.default_root_dir), describe(trainer.datamodule)
        before = read_record(run_dir)["data"]
        if before and data and before.get("hash") != data["hash"]:
            rank_zero_warn(
                f"the data are not those that this run began with: {before.get('num_samples')} samples of hash "
                f"{str(before.get('hash'))[:12]} then, {data['num_samples']} of {data['hash'][:12]} now; it goes on "
                "with these"
            )
        start = {"device": device_name(pl_module.device), "world_size": trainer.world_size}
        count = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        record_facts(run_dir, start=start, data=data, parameters=count)


def describe(data: Any) -> dict[str, Any] | None:
    """Return name, number of samples and hash of the data, where they can say."""
    return data.fingerprint() if hasattr(data, "fingerprint") else None


def device_name(device: torch.device) -> str:
    """Return what computes, such as "cuda: NVIDIA H100" or "cpu"."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return device.type
