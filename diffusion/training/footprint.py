"""How much work and memory is a training step, before any memory is spent? Asked of a twin of the task without data.

The twin's tensors know shape, type and device alone (PyTorch's fake tensors), so a step of a network that no machine
here could hold costs seconds, and the task it was made from is not touched: not its weights, counters or random state.
"""

import copy
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from diffusion.training.ema import EMA, full_precision, trainable
from diffusion.training.metrics import peak_memory

TRUE_HALF = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


class StepNeeds(NamedTuple):
    """What one optimizer step of `batch_size` samples a device needs, in bytes on one device unless said.

    Not all of it is alive at once: `peak` is the most that is, `parameters`, `optimizer` and `ema` included.
    """

    batch_size: int
    flops: int  # forward and backward, of all accumulated batches; a multiply-add counts as two
    parameters: int  # of everything on the device: trained, frozen, buffers
    gradients: int
    optimizer: int
    ema: int
    activations: int  # what a batch needs beyond these
    peak: int


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that come and go: `now`, and the `peak` of it. Those in `before` are not counted."""

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class Twin:
    """A copy of a task whose parameters and buffers are fake, on `device`; its steps cost time only.

    The copy may be made of a task on any device, "meta" included. Trainer, schedule and timestep sampler are shared
    and only read.
    """

    def __init__(self, task: LightningModule, trainer: Trainer, device: torch.device) -> None:
        self.trainer, self.device = trainer, device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        memo: dict[int, Any] = {}
        for module in modules_of(task):
            dtype = TRUE_HALF.get(trainer.precision) if module is task else None  # Lightning does not see the frozen
            for parameter in module.parameters():
                memo[id(parameter)] = nn.Parameter(self._fake(parameter, dtype), requires_grad=parameter.requires_grad)
            for buffer in module.buffers():
                memo[id(buffer)] = self._fake(buffer, dtype)
        for shared in ("timestep_sampler", "diffusion"):
            if hasattr(task, shared):
                memo[id(getattr(task, shared))] = getattr(task, shared)
        own, task._trainer = task._trainer, None
        try:
            self.task = copy.deepcopy(task, memo)
        finally:
            task._trainer = own
        self.task.note = lambda *values: None  # logs, and tells the shared timestep sampler of its losses
        optimizer, shards = optimizer_of(self.task), shards_of(trainer)
        self._groups = optimizer.param_groups
        copies = 2 if isinstance(trainer.strategy, DDPStrategy) and trainer.world_size > 1 else 1  # one is sent around
        self.held = {
            "parameters": size_of(tensors_of(self.task)) // shards,
            "gradients": size_of(self._trained) // shards * copies,
            "optimizer": state_bytes(optimizer) // shards,
            "ema": averages_bytes(trainer, self.task.model) // shards,
        }

    def _fake(self, like: Tensor, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype if dtype is not None and like.is_floating_point() else like.dtype
        with self._mode:
            return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=self.device)

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.task.parameters() if p.requires_grad]

    def needs(self, batch: Mapping[str, Any], *, step: int = 0) -> StepNeeds:
        """Return what a step on this batch needs when `step` steps are done (a discriminator may begin late)."""
        self.task._trainer = AtStep(self.trainer, step)
        accumulated = self.trainer.accumulate_grad_batches
        live = LiveBytes([*tensors_of(self.task), *(value for value in batch.values() if isinstance(value, Tensor))])
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), FlopCounterMode(display=False) as flops, live:
            with self.trainer.precision_plugin.forward_context():
                loss = self.task.training_step(dict(batch), 0)["loss"]
            loss.backward()
        del loss
        whole = size_of(p.grad for p in self._trained if p.grad is not None)
        for parameter in self._trained:
            parameter.grad = None
        own = whole // shards_of(self.trainer)
        held = own if accumulated > 1 else 0  # from the batches before
        work = max(live.peak - whole + own + held, own + self._update_bytes())
        fixed = sum(self.held.values()) - size_of(self._trained) // shards_of(self.trainer)
        return StepNeeds(
            batch_size=len(next(iter(batch.values()))),
            flops=flops.get_total_flops() * accumulated,
            activations=max(work - own, 0),
            peak=fixed + work,
            **self.held,
        )

    def _update_bytes(self) -> int:
        """Return what an optimizer's update takes for itself: on CUDA, where it updates all at once, a copy of them."""
        groups = self._groups
        at_once = self.device.type == "cuda" and not any(g.get("fused") or g.get("foreach") is False for g in groups)
        return self.held["gradients"] if at_once else 0


class AtStep:
    """A trainer after `global_step` steps, of one process."""

    world_size, global_rank = 1, 0  # a twin has nobody to talk to

    def __init__(self, trainer: Trainer, global_step: int) -> None:
        self._trainer, self.global_step = trainer, global_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


# ---------------------------------------------------------------------------------------------------------------------
# bytes


def modules_of(task: LightningModule) -> Iterator[nn.Module]:
    """Yield the task and the frozen modules that it keeps out of its tree."""
    yield task
    yield from getattr(task, "_frozen", {}).values()


def tensors_of(task: LightningModule) -> Iterator[Tensor]:
    """Yield all parameters and buffers of a task, those of frozen modules included."""
    for module in modules_of(task):
        yield from of(module)


def of(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers of a module."""
    yield from module.parameters()
    yield from module.buffers()


def shards_of(trainer: Trainer) -> int:
    """Return among how many devices weights, gradients, optimizer state and averages are divided."""
    return trainer.world_size if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy) else 1


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors; one that occurs twice counts once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def parameter_counts(task: LightningModule) -> tuple[int, int]:
    """Return how many parameters are trained, and how many are frozen."""
    unique = {id(p): p for module in modules_of(task) for p in module.parameters()}.values()
    trained = sum(p.numel() for p in unique if p.requires_grad)
    return trained, sum(p.numel() for p in unique) - trained


def optimizer_of(task: LightningModule) -> torch.optim.Optimizer:
    """Return the optimizer that a task trains with."""
    answer = task.configure_optimizers()
    return answer["optimizer"] if isinstance(answer, dict) else answer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes that an optimizer keeps between steps, by a step on parameters that have shapes only.

    The optimizer has those afterwards, instead of its own.
    """
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    states = [state for part in getattr(optimizer, "parts", [optimizer]) for state in part.state.values()]
    return size_of(value for state in states for value in state.values() if isinstance(value, Tensor))


def averages_bytes(trainer: Trainer, model: nn.Module) -> int:
    """Return the bytes of all moving averages of a model: one copy a decay, in float32 at least."""
    copies = sum(len(callback.decays) for callback in trainer.callbacks if isinstance(callback, EMA))
    kept = trainable(model).values()
    return copies * sum(p.numel() * full_precision(p.new_empty(0)).element_size() for p in kept)


def resized(batch: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return a batch of `size` samples: this one's, again and again."""
    count = len(next(iter(batch.values())))
    chosen = [number % count for number in range(size)]
    return {
        name: value[chosen] if isinstance(value, Tensor) else [value[number] for number in chosen]
        for name, value in batch.items()
        if isinstance(value, Tensor | list | tuple) and len(value) == count
    }


def available_memory(device: torch.device) -> int:
    """Return the bytes that this process could use in all: what it has, and what nobody else has."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return free_memory() + resident_memory()


def free_memory() -> int:
    """Return the bytes of main memory that nobody uses, within the limit of a container where there is one."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux: all there is, half of it taken by others
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free


def resident_memory() -> int:
    """Return the bytes of main memory that this process has now; its peak where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory(torch.device("cpu"))
