"""How long do a step, a validation, a picture and a checkpoint take here? Asked of a few steps of the very same run.

The rehearsal goes on in a folder that is thrown away. It ends with one step that is due for everything, so that each
callback does once what it will do every so often; long drawings are cut short and counted to their end.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from diffusion.training.footprint import StepNeeds, Twin, available_memory, resized
from diffusion.training.forecast import HEADROOM, largest_batch
from diffusion.training.interruptions import (
    Event,
    age_of_process,
    discriminator_start,
    name_of,
    times_due,
    validation_batches,
    validations,
)
from diffusion.training.metrics import peak_memory

WARM_UP = 3  # steps before the clock counts
SECONDS = 8.0  # of steps that are counted, at least two of them
MOST = 200  # steps that are enough in any case
VALIDATION_BATCHES = 2
REAL_CALLS = 2  # of the network for each size of its input; the other answers of a drawing repeat the last one
END = ("on_train_end", "on_fit_end")
TRIAL_SECONDS = 20.0  # that trying a larger batch may take
LESS = 0.9  # of a batch that did not fit is tried next
NEVER = 2**62


class TooBig(Exception):
    """The step does not fit into memory, says its twin; none was run."""

    def __init__(self, needs: StepNeeds, doubled: StepNeeds) -> None:
        super().__init__(f"a step needs {needs.peak} bytes")
        self.needs, self.doubled = needs, doubled


class Phase(NamedTuple):
    """A stretch of the run whose steps are alike: how many, and the mean seconds of one, `data` of them waiting."""

    steps: int
    needs: StepNeeds
    seconds: float
    data: float


class Rehearsal(Callback):
    """Time some steps in each phase of the run, then everything that is done now and then, and stop.

    `max_steps` and `limit_val_batches` are the real run's. Put it last among the callbacks, in a trainer that validates
    on few batches, and call `finish` when the fit has ended.
    """

    def __init__(self, *, max_steps: int, limit_val_batches: float) -> None:
        self.max_steps, self.limit_val_batches = max_steps, limit_val_batches
        self.phases: list[Phase] = []
        self.events: list[Event] = []
        self.largest_batch: int | None = None
        self.doubled: StepNeeds | None = None  # twice the batch, for the line through both
        self.peak = 0  # bytes in use at most, when all was done
        self.start_seconds = math.nan  # from the start of the program to the first step, without what only we do
        self._plan: list[tuple[int, int]] = []  # first step and number of steps of the phases to come
        self._needs: StepNeeds | None = None
        self._last_step = 0
        self._hooks: dict[tuple[str, str], float] = {}

    # -- before the steps ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the twin while the task is as it was built: strategies change it afterwards."""
        self._twin = Twin(pl_module, trainer, trainer.strategy.root_device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over when steps are due: no validation and no last step before we say so."""
        self._validations = validations(trainer, self.max_steps)
        trainer.check_val_every_n_epoch, trainer.val_check_batch = None, NEVER
        trainer.fit_loop.epoch_loop.max_steps = NEVER
        begun = min(discriminator_start(pl_module), self.max_steps)
        self._plan = [(first, steps) for first, steps in ((0, begun), (begun, self.max_steps - begun)) if steps]
        for callback in trainer.callbacks:
            if callback is not self:
                for hook in ("on_train_batch_end", "on_validation_end", *END):
                    self._time(callback, hook, pl_module)

    # -- the steps -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, task: LightningModule, batch: dict[str, Any], *args: Any) -> None:
        """Note how long the batch was waited for; at the beginning of a phase, ask the twin."""
        now = time.perf_counter()
        if self._needs is None:
            self._begin(trainer, task, batch)
        else:
            self._waited += now - self._ended

    def _begin(self, trainer: Trainer, task: LightningModule, batch: dict[str, Any]) -> None:
        age = age_of_process()
        first, self._count = self._plan.pop(0)
        self._needs = self._twin.needs(batch, step=first)
        if not self._plan:
            self.doubled = self._twin.needs(resized(batch, 2 * self._needs.batch_size), step=first)
            self.batch = batch
        if agreed(trainer, self._needs.peak > available_memory(self._twin.device)):
            raise TooBig(self._needs, self.doubled or self._needs)
        if first:
            task.loss.adversarial = dataclasses.replace(task.loss.adversarial, start=0)
        if math.isnan(self.start_seconds):
            self.start_seconds = age
        self._steps, self._waited = -WARM_UP, 0.0
        self._since = self._ended = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, task: LightningModule, *args: Any) -> None:
        """Count the steps; when there are enough, go on to the next phase or let the next step be the last."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            if self._needs is not None and trainer.global_step != trainer.max_steps:
                self._count_step(trainer)
        self._ended = time.perf_counter()

    def _count_step(self, trainer: Trainer) -> None:
        self._steps += 1
        seconds = time.perf_counter() - self._since
        enough = self._steps >= MOST or (self._steps >= 2 and seconds > SECONDS)
        if self._steps != 0 and not agreed(trainer, enough):
            return
        if self._twin.device.type == "cuda":
            torch.cuda.synchronize(self._twin.device)
        now = time.perf_counter()
        if self._steps == 0:
            self._since, self._waited = now, 0.0
            return
        mean = (now - self._since) / self._steps
        self.phases.append(Phase(self._count, self._needs, mean, self._waited / self._steps))
        if self._plan:
            self._needs = None
        else:
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step + 1

    # -- the last step: everything is due ------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        """Let the validation follow the last step."""
        if trainer.global_step + 1 == trainer.max_steps and self._validations:
            trainer.val_check_batch = 1

    def on_validation_batch_start(self, *args: Any) -> None:
        """Time each batch: the first one has to warm up."""
        self._batch_began = time.perf_counter()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Keep the time of the last batch."""
        if self._twin.device.type == "cuda":
            torch.cuda.synchronize(self._twin.device)
        self._a_batch = time.perf_counter() - self._batch_began

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batches of a whole validation."""
        batches = validation_batches(trainer, self.limit_val_batches) or VALIDATION_BATCHES
        self.events.append(Event("validation", self._validations, self._a_batch * batches))

    def _time(self, callback: Callback, hook: str, task: LightningModule) -> None:
        """Let a hook of a callback note its seconds in the last step, with drawings cut short."""
        original = getattr(callback, hook)

        @functools.wraps(original)
        def timed(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
            if trainer.global_step != trainer.max_steps:
                return original(trainer, *args, **kwargs)
            began = time.perf_counter()
            with shortened(task) as left_out:
                answer = original(trainer, *args, **kwargs)
            self._hooks[name_of(callback), hook] = time.perf_counter() - began + left_out[0]
            return answer

        setattr(callback, hook, timed)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the memory that all of it took, then look how large a batch could be."""
        self.peak = peak_memory(self._twin.device)
        if trainer.global_step == trainer.max_steps:  # and not because a signal asked
            self.largest_batch = self._largest_batch(trainer, pl_module)

    def _largest_batch(self, trainer: Trainer, task: LightningModule) -> int:
        """Extend the line through two batches to all memory, and try it where that is cheap: in full on a GPU, which
        says no politely, with twice the batch in main memory, where too much would end other programs."""
        one, two = self.phases[-1].needs, self.doubled
        room = HEADROOM * available_memory(self._twin.device) - max(0, self.peak - one.peak)
        a_sample = self.phases[-1].seconds / trainer.accumulate_grad_batches / one.batch_size
        largest = largest_batch(one, two, room)
        if self._twin.device.type == "cuda":
            while (
                largest and largest * a_sample < TRIAL_SECONDS and not fits(task, trainer, resized(self.batch, largest))
            ):
                largest = int(LESS * largest)
        elif two.batch_size * a_sample < TRIAL_SECONDS and two.peak < room:
            fits(task, trainer, resized(self.batch, two.batch_size))
            grown = peak_memory(self._twin.device) - self.peak
            largest = largest_batch(one, two._replace(peak=max(two.peak, one.peak + grown)), room)
        try:
            return min(largest, len(trainer.train_dataloader.dataset) // trainer.world_size)
        except TypeError:  # a stream
            return largest

    def finish(self, trainer: Trainer) -> None:
        """Make events of what the callbacks took."""
        every = {name_of(callback): getattr(callback, "every_n_steps", None) for callback in trainer.callbacks}
        ending = sum(seconds for (_, hook), seconds in self._hooks.items() if hook in END)
        for name, interval in every.items():
            taken = sum(seconds for (of, hook), seconds in self._hooks.items() if of == name and hook not in END)
            if interval is not None and taken:
                self.events.append(Event(name, times_due(interval, self.max_steps), taken))
        self.events.append(Event("end", 1, ending))

    @property
    def total_seconds(self) -> float:
        """From the start of the program to its end."""
        steps = sum(phase.steps * phase.seconds for phase in self.phases)
        return self.start_seconds + steps + sum(event.times * event.seconds for event in self.events)

    @property
    def seconds(self) -> float:
        """Mean of a step over the whole run."""
        return self._mean([phase.seconds for phase in self.phases])

    @property
    def data_seconds(self) -> float:
        """Mean that a step waits for data."""
        return self._mean([phase.data for phase in self.phases])

    def _mean(self, values: Sequence[float]) -> float:
        weighted = zip(values, (phase.steps for phase in self.phases), strict=True)
        return sum(value * steps for value, steps in weighted) / self.max_steps


def agreed(trainer: Trainer, answer: bool) -> bool:
    """Return the first process' answer on all of them."""
    return bool(trainer.strategy.broadcast(answer)) if trainer.world_size > 1 else answer


@contextlib.contextmanager
def shortened(task: LightningModule) -> Iterator[list[float]]:
    """Within the block, answer most calls of the network by the last answer; yield a list with the seconds spared."""
    net: nn.Module = task.net
    spared = [0.0]
    answers: dict[tuple[int, ...], tuple[int, Any, float]] = {}
    forward = net.forward

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        count, answer, seconds = answers.get(tuple(x.shape), (0, None, 0.0))
        if count >= REAL_CALLS and not torch.is_grad_enabled():
            spared[0] += seconds
            return answer
        began = time.perf_counter()
        answer = forward(x, *args, **kwargs)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        answers[tuple(x.shape)] = count + 1, answer, time.perf_counter() - began
        return answer

    if net._compiled_call_impl is not None:  # a compiled network is called past its `forward`
        yield spared
        return
    net.forward = call
    try:
        yield spared
    finally:
        del net.forward


def fits(task: LightningModule, trainer: Trainer, batch: Mapping[str, Any]) -> bool:
    """Go forward and back on a batch, and tell whether a GPU had the memory."""
    try:
        with trainer.precision_plugin.forward_context():
            loss = task.training_step(dict(batch), 0)["loss"]
        loss.backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        task.zero_grad()
    return True
