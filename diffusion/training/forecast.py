"""What will a run cost? Parameters, FLOPs, memory, time, disk, and the largest batch that fits, before it is spent.

Each run prints at its start what a twin without data says of its steps, and how long it will take as soon as the first
steps are timed. `train.py forecast=true` (forecast_run.py) rehearses the run, and knows more.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from diffusion.data.images import KeyedSet
from diffusion.files import atomic_write
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.footprint import (
    StepNeeds,
    Twin,
    available_memory,
    modules_of,
    of,
    parameter_counts,
    resident_memory,
    resized,
    size_of,
    tensors_of,
)
from diffusion.training.interruptions import Event, age_of_process, discriminator_start, guessed, times_due
from diffusion.training.metrics import peak_memory

HEADROOM = 0.95  # of the memory that is there
MEMORY = ("parameters", "gradients", "optimizer", "ema", "activations")
WARM_UP, ENOUGH, SECONDS = 3, 10, 20.0  # steps that a run's start does not time, and times; or so many seconds of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will cost. Bytes and seconds are those of one device; None stands for what is not known (yet).

    `memory` has a part for each of `MEMORY`, "process" (interpreter and libraries, on a CPU), "rest" (measured, and
    none of the others) and "total", the peak: not all parts are alive at once. `seconds_per_step` counts optimizer
    steps and includes `data_seconds`, the time that a step waits for its data; `total_seconds` is from the start of
    the program to its end.
    """

    device: str
    batch_size: int
    max_steps: int
    parameters: int
    frozen: int
    flops_per_step: int
    memory: Mapping[str, int]
    disk_bytes: int
    largest_batch: int | None = None
    seconds_per_step: float | None = None
    data_seconds: float | None = None
    total_seconds: float | None = None
    start_seconds: float | None = None
    events: Sequence[Event] = ()
    notes: Sequence[str] = ()

    def to_yaml(self) -> str:
        """Return it as run_dir/forecast.yaml has it."""
        events = [event._asdict() for event in self.events]
        plain = dataclasses.asdict(self) | {"memory": dict(self.memory), "notes": list(self.notes), "events": events}
        return yaml.safe_dump(plain, sort_keys=False)

    def __str__(self) -> str:
        largest = "not known" if self.largest_batch is None else f"{self.largest_batch:,} samples a device"
        of = f"{self.batch_size:,} samples a device"
        rows = {
            "parameters": [in_parameters(self)],
            "FLOPs": [f"{count(self.flops_per_step)} a step of {of}, forward and backward"],
            "memory": [f"{size(self.memory['total'])} at the peak, {self.device}", in_memory(self.memory)],
            "time": in_time(self),
            "disk": [f"{size(self.disk_bytes)} of checkpoints and model"],
            "largest batch": [largest, *self.notes],
        }
        indented = (("\n" + 15 * " ").join(lines) for lines in rows.values())
        return "\n".join(f"{name:15}{text}" for name, text in zip(rows, indented, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# parts of it


def described(trainer: Trainer, twin: Twin, needs: StepNeeds, max_steps: int) -> dict[str, Any]:
    """Return what is known of a run of so many steps before any of them."""
    trained, frozen = parameter_counts(twin.task)
    return {
        "device": str(twin.device),
        "batch_size": needs.batch_size,
        "max_steps": max_steps,
        "parameters": trained,
        "frozen": frozen,
        "flops_per_step": needs.flops,
        "disk_bytes": disk_bytes(trainer, max_steps, *sizes_of_twin(twin)),
    }


def memory_of(needs: StepNeeds, process: int, *, measured: int = 0) -> dict[str, int]:
    """Return the memory by parts; what was measured beyond them is the rest."""
    parts = {name: getattr(needs, name) for name in MEMORY} | {"process": process}
    total = max(needs.peak + process, measured)
    return {**parts, "rest": max(0, total - sum(parts.values())), "total": total}


def largest_batch(one: StepNeeds, two: StepNeeds, room: float) -> int:
    """Return the largest batch whose step needs at most `room` bytes, on the line through two steps; 0 for none."""
    slope = (two.peak - one.peak) / (two.batch_size - one.batch_size)
    return max(0, int(one.batch_size + (room - one.peak) / max(slope, 1.0)))


def disk_bytes(trainer: Trainer, steps: int, checkpoint: int, model: int) -> int:
    """Return the bytes of what stays after so many steps, where a checkpoint and a model have these many."""
    saving = next((callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)
    if saving is None:
        return model
    kept = min(saving.keep_last, times_due(saving.every_n_steps, steps))
    kept += steps // saving.keep_every_n_steps if saving.keep_every_n_steps else 0
    best = getattr(saving, "best", None)
    kept += 0 if best is None else best.count
    return kept * checkpoint + (2 if best is not None else 1) * model * bool(saving.export)


def sizes_of_twin(twin: Twin) -> tuple[int, int]:
    """Return the bytes of a checkpoint and of a model, by the tensors that go into them."""
    frozen = size_of(tensor for module in modules_of(twin.task) if module is not twin.task for tensor in of(module))
    checkpoint = twin.held["parameters"] - frozen + twin.held["optimizer"] + twin.held["ema"]
    return checkpoint, size_of(of(twin.task.net)) + (frozen if getattr(twin.task, "bundle", False) else 0)


def process_memory(device: torch.device, resident: int) -> int:
    """Return what interpreter and libraries take of a device's memory: all that is resident, or nothing of a GPU."""
    return resident if device.type == "cpu" else 0


# ---------------------------------------------------------------------------------------------------------------------
# words


def in_parameters(found: Forecast) -> str:
    """Say how many parameters there are."""
    return f"{count(found.parameters)} trained" + (f", {count(found.frozen)} frozen" if found.frozen else "")


def in_memory(memory: Mapping[str, int]) -> str:
    """Name the parts of the memory that are not nothing, the largest ones first."""
    parts = sorted(((value, name) for name, value in memory.items() if name != "total" and value), reverse=True)
    return ", ".join(f"{name} {size(value)}" for value, name in parts)


def in_time(found: Forecast) -> list[str]:
    """Say what a step and the whole run take, a line each."""
    if found.seconds_per_step is None:
        return ["not measured"]
    events = [f"{event.times} x {event.name} of {seconds(event.seconds)}" for event in found.events if event.times]
    start = [f"start {seconds(found.start_seconds)}"] if found.start_seconds is not None else []
    return [
        f"{seconds(found.total_seconds)} in all",
        f"{seconds(found.seconds_per_step)} a step, {seconds(found.data_seconds)} of it waiting for data",
        ", ".join([*start, f"{found.max_steps:,} steps of that", *events]),
    ]


def count(number: float) -> str:
    """Write a number with three digits and K, M, G, T or P."""
    for letter in ("", "K", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g} {letter}".rstrip()
        number /= 1000
    return f"{number:.3g} P"


def size(number: float) -> str:
    """Write bytes with three digits in the unit that fits, KiB to TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


def seconds(number: float) -> str:
    """Write a duration: 0.4 ms, 12 s, 3 min 20 s, 5 h 2 min, 3 d 4 h."""
    if number < 1:
        return f"{number * 1e3:.3g} ms"
    if number < 60:
        return f"{number:.3g} s"
    for above, big, small in ((3600, "min", "s"), (86400, "h", "min"), (float("inf"), "d", "h")):
        if number < above:
            base = {"min": 60, "h": 3600, "d": 86400}[big]
            whole, rest = divmod(round(number), base)
            return f"{whole} {big} {rest // {'s': 1, 'min': 60, 'h': 3600}[small]} {small}"
    raise AssertionError(number)


# ---------------------------------------------------------------------------------------------------------------------
# at the start of a run


class StartForecast(Callback):
    """Say at the start of a run what it will cost, and write run_dir/forecast.yaml; nothing of the run changes.

    Before the first step there are parameters, FLOPs and memory by a twin of the task, which takes about a second; the
    time is added after the first steps. Put it first among the callbacks: their clocks then begin after it.
    """

    def __init__(self) -> None:
        self.found: Forecast | None = None
        self._twin: Twin | None = None
        self._needs: StepNeeds | None = None
        self._steps: list[tuple[float, float]] = []  # seconds of the step, and of them waiting for data

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the twin while the task is as it was built: strategies change it afterwards."""
        if not trainer.is_global_zero or trainer.fast_dev_run or stage != "fit":
            return
        device = trainer.strategy.root_device
        self._process = process_memory(device, resident_memory() - size_of(tensors_of(pl_module)))
        self._spare(lambda: setattr(self, "_twin", Twin(pl_module, trainer, device)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the twin, if a sample can be looked at without disturbing the order of the data."""
        self._first_step = self._last_step = trainer.global_step
        self._waited, self._steps = 0.0, []
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        if self._twin is not None and isinstance(dataset, KeyedSet):
            self._spare(lambda: self._ask(trainer, dataset.__getitems__([(0, 0)])))
        self._ended = self._began = time.perf_counter()

    def _spare(self, work: Callable[[], None]) -> None:
        """Do something that a run can do without; whatever goes wrong, it goes on, without a forecast."""
        try:
            work()
        except Exception as error:
            print(f"no forecast: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            self._twin = None

    def _ask(self, trainer: Trainer, sample: Mapping[str, Any]) -> None:
        batch = resized(sample, trainer.datamodule.batch_size)
        last = max(trainer.global_step, trainer.max_steps - 1)
        self._needs = needs = self._twin.needs(batch, step=last)
        self._begun = discriminator_start(self._twin.task)
        self._dearer = 1.0  # times the work of a step, once a discriminator has begun
        if trainer.global_step < self._begun <= last:
            self._dearer = needs.flops / self._twin.needs(batch, step=trainer.global_step).flops
        doubled = needs._replace(batch_size=2 * needs.batch_size, peak=needs.peak + needs.activations)
        room = HEADROOM * available_memory(self._twin.device) - self._process
        self.found = Forecast(
            **described(trainer, self._twin, needs, trainer.max_steps),
            memory=memory_of(needs, self._process),
            largest_batch=largest_batch(needs, doubled, room),
        )
        found = self.found
        print(
            f"forecast: {in_parameters(found)}; {count(found.flops_per_step)} FLOPs a step; memory "
            f"{size(found.memory['total'])} ({in_memory(found.memory)}); a batch of up to about "
            f"{found.largest_batch:,} a device would fit",
            file=sys.stderr,
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Note how long the batch was waited for."""
        if self._twin is None:
            return
        if self._needs is None:
            self._spare(lambda: self._ask(trainer, batch))
            self._ended = self._began = time.perf_counter()
        self._waited += time.perf_counter() - self._ended

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Time the steps until they are enough to tell, then say what the run will take and forget the twin."""
        if self._twin is None:
            return
        now = time.perf_counter()
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._steps.append((now - self._began, self._waited))
            self._began, self._waited = now, 0.0
            timed = self._steps[WARM_UP:]
            last = trainer.global_step == trainer.max_steps
            if last or len(timed) >= ENOUGH or (timed and sum(step for step, _ in timed) > SECONDS):
                self._say(trainer, pl_module)
        self._ended = now

    def _say(self, trainer: Trainer, task: LightningModule) -> None:
        timed = self._steps[WARM_UP:] or self._steps
        a_step, waiting = (statistics.median(values) for values in zip(*timed, strict=True))
        events = guessed(trainer, task, a_step)
        steps = trainer.max_steps - trainer.global_step
        steps += (self._dearer - 1) * max(0, trainer.max_steps - max(self._begun, trainer.global_step))
        between = sum(event.times * event.seconds for event in events)
        self.found = dataclasses.replace(
            self.found,
            memory=memory_of(self._needs, self._process, measured=peak_memory(task.device)),
            seconds_per_step=a_step,
            data_seconds=waiting,
            total_seconds=age_of_process() + steps * a_step + between,
            events=events,
        )
        print(
            f"forecast: {seconds(a_step)} a step ({seconds(waiting)} of it waiting for data), about "
            f"{seconds(self.found.total_seconds)} in all; {size(self.found.disk_bytes)} on disk",
            file=sys.stderr,
        )
        file = Path(trainer.default_root_dir) / "forecast.yaml"
        if not self._first_step or not file.exists():
            with atomic_write(file, durable=False) as partial:
                partial.write_text(self.found.to_yaml(), encoding="utf-8")
        self._twin = None
