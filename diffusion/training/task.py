"""What does every trained thing share? Counted draws, gradients clipped and measured, averages to validate with."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from diffusion.draws import SampleDraws
from diffusion.randomness import fold
from diffusion.training.ema import EMA, average_name
from diffusion.training.sharded import clip, is_sharded, norm_of, shard

OptimizerPartial = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerPartial = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class Task(LightningModule):
    """A Lightning module that wires and logs; formulas are elsewhere. A subclass gives `net` and `training_step`.

    What is random about a sample is a function of (`seed`, a purpose, the sample's number in the whole run), so that a
    resumed run continues bit for bit, and that a global batch may be split over devices and accumulated batches at
    will. Dropout inside a network is the exception: it is keyed by the number of the first sample of a rank's share,
    so runs with dropout depend on how a batch is split.
    """

    rank_buffers: tuple[str, ...] = ()  # names of buffers whose values are each rank's own

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.batches_seen = 0  # micro-batches over the whole run
        self.samples_seen = 0  # their samples, on all ranks together
        self.gradient_norm: Tensor | None = None  # of the last optimizer step, before clipping
        self._unstepped = (0, 0)  # batches and samples whose gradients wait for their step
        self._by_rank: dict[str, Tensor] = {}  # restored values of `rank_buffers`, a row a rank

    @property
    def model(self) -> nn.Module:
        """What is trained and averaged; its part `net` is what model.safetensors holds."""
        return self.net

    def weights(self) -> Iterator[tuple[str, contextlib.AbstractContextManager]]:
        """Yield a suffix for names, and a context in which `model` has these weights: raw ones, then each average."""
        yield "", contextlib.nullcontext()
        for ema in self.trainer.callbacks:
            if isinstance(ema, EMA):
                for decay in ema.averages:
                    suffix = "_ema" if decay == ema.decays[0] else f"_ema_{average_name(decay)}"
                    yield suffix, ema.swapped(self.model, decay)

    def with_schedule(self, optimizer: torch.optim.Optimizer, scheduler: SchedulerPartial | None) -> Any:
        """Return what `configure_optimizers` answers: a schedule is counted in optimizer steps."""
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler(optimizer), "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer's flags say, and keep the norm from before."""
        by_norm = bool(gradient_clip_val) and gradient_clip_algorithm in (None, "norm")
        next_step = self.trainer.global_step + 1
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not by_norm and next_step % self.trainer.log_every_n_steps == 0:  # costs a pass over the gradients
            self.gradient_norm = norm_of(p.grad for p in parameters if p.grad is not None)
        if by_norm:
            self.gradient_norm = clip(parameters, gradient_clip_val)
        elif gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # -- which samples these are ---------------------------------------------------------------------------------------

    def draws(self, size: int, batch_idx: int) -> SampleDraws:
        """Return what is random about this rank's `size` samples of a training batch, and seed dropout for them."""
        everywhere = size * self.trainer.world_size
        place, among = self.accumulated(batch_idx)
        begin = self.samples_seen - place * everywhere
        first = self.samples_seen + self.global_rank * size
        # The one place where training sets a global seed: dropout, inside the network, knows no other generator.
        seed_dropout(fold(self.seed, "dropout", first), self.device)
        step = range(begin, begin + among * everywhere)
        return SampleDraws(self.seed, range(first, first + size), step, self.device)

    def aside(self, purpose: str, batch: Mapping[str, Any]) -> SampleDraws:
        """Return what is random about a batch that is looked at beside the training, the same each time."""
        return SampleDraws(fold(self.seed, purpose), range(batch_size(batch)), device=self.device)

    def accumulated(self, batch_idx: int) -> tuple[int, int]:
        """Return this batch's place among those of its optimizer step, from 0, and how many these are.

        The last step of an epoch takes what is left. (Where the data do not say how many there are, that is known at
        the last batch only.)
        """
        place = batch_idx % self.trainer.accumulate_grad_batches
        batches = self.trainer.num_training_batches
        if math.isfinite(batches):
            return place, min(self.trainer.accumulate_grad_batches, int(batches) - (batch_idx - place))
        last = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        return place, place + 1 if last else self.trainer.accumulate_grad_batches

    def counted(self, objective: Tensor, size: int, batch_idx: int) -> Tensor:
        """Count a training batch, and return its loss as Lightning must see it for steps that are means.

        Lightning divides by the number of batches that a step accumulates, also where an epoch ends with fewer.
        """
        place, among = self.accumulated(batch_idx)
        everywhere = size * self.trainer.world_size
        self.batches_seen, self.samples_seen = self.batches_seen + 1, self.samples_seen + everywhere
        batches, samples = self._unstepped
        self._unstepped = (0, 0) if place + 1 == among else (batches + 1, samples + everywhere)
        full = self.trainer.accumulate_grad_batches
        return objective if among == full else objective * (full / among)

    def validated(self, batch: Mapping[str, Any], batch_idx: int) -> tuple[dict[str, Any], SampleDraws, int]:
        """Return a validation batch, what is random about its samples, and how many of them count.

        The last ones of an epoch may repeat others, for all ranks to have equally many; they are left out, but for
        one where a rank has nothing else, because networks in shards need all ranks at each call.
        """
        size = batch_size(batch)
        dealt = getattr(self.trainer.val_dataloaders, "batches", None)
        if dealt is None:  # a loader that is none of ours
            first = (batch_idx * self.trainer.world_size + self.global_rank) * size
            count = size
        else:
            first = batch_idx * dealt.global_batch_size + self.global_rank * size
            count = min(max(dealt.num_samples - first, 0), size)
        kept = max(count, 1)
        draws = SampleDraws(fold(self.seed, "validation"), range(first, first + kept), device=self.device)
        return {name: values[:kept] for name, values in batch.items()}, draws, count

    def summed(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks; each rank's own stays as it is."""
        return self.trainer.strategy.reduce(value.clone(), reduce_op="sum")

    def rows(self, value: Tensor) -> Tensor:
        """Return the tensors of all ranks, a row a rank."""
        world_size, value = self.trainer.world_size, value.detach().contiguous()
        if world_size == 1:
            return value[None].clone()
        found = [torch.empty_like(value) for _ in range(world_size)]
        dist.all_gather(found, value)
        return torch.stack(found)

    def averaged(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over all ranks."""
        return value if self.trainer.world_size == 1 else self.summed(value) / self.trainer.world_size

    # -- before and after ----------------------------------------------------------------------------------------------

    def sharded_networks(self) -> list[nn.Module]:
        """Return what is spread over the ranks under `trainer=fsdp`: modules that are only ever called."""
        return [self.net]

    def configure_model(self) -> None:
        """Spread networks over the ranks, where Lightning's strategy asks for it.

        DistributedDataParallel is told which buffers are each rank's own: it would copy those of the first rank.
        """
        self._ddp_params_and_buffers_to_ignore = list(self.rank_buffers)
        if self.device_mesh is not None and not is_sharded(self):
            for network in self.sharded_networks():
                shard(network, self.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        """Take up this rank's own sums; those of another number of ranks go on together."""
        for name, rows in self._by_rank.items():
            own = rows.sum(0) if self.global_rank == 0 else torch.zeros_like(rows[0])
            if len(rows) == self.trainer.world_size:
                own = rows[self.global_rank]
            self.get_buffer(name).copy_(own)
        self._by_rank = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how many samples steps have used, by which all that is random is keyed, and every rank's own sums."""
        batches, samples = self._unstepped
        checkpoint["batches_seen"] = self.batches_seen - batches
        checkpoint["samples_seen"] = self.samples_seen - samples
        checkpoint["by_rank"] = {name: self.rows(self.get_buffer(name)).cpu() for name in self.rank_buffers}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the sample after the last one that a step has used."""
        if "samples_seen" not in checkpoint:
            raise ValueError(
                "the checkpoint is of an older version, which counted batches where this one counts samples: its run "
                "cannot go on; start anew with another run_dir"
            )
        self.batches_seen, self.samples_seen = checkpoint["batches_seen"], checkpoint["samples_seen"]
        self._unstepped = (0, 0)
        self._by_rank = dict(checkpoint["by_rank"])

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError where images of `shape` (C, H, W) cannot be trained on."""

    def for_export(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the config to store with `net`, and what it needs beside it (`diffusion.checkpoint.Part`)."""
        return dict(config), {}


class Means(nn.Module):
    """Means of named scalars since they were last asked for, summed on the device without waiting for it.

    The sums are a buffer, so that a checkpoint between two logs carries them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("sums", torch.zeros(len(names) + 1))

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], *, weight: float = 1.0) -> None:
        """Add one batch: a scalar for each of `names`. A weight of 0 adds nothing, not even what is not finite."""
        if weight:
            scalars = torch.stack([*(values[name].detach().float() for name in self.names), self.sums.new_ones(())])
            self.sums += scalars * weight

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means over all ranks, whose sums `reduce` adds up, and begin anew; {} where nothing was added."""
        *totals, count = reduce(self.sums).tolist()
        self.sums.zero_()
        return {name: total / count for name, total in zip(self.names, totals, strict=True)} if count else {}


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return how many samples a batch holds."""
    return len(next(iter(batch.values())))


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the global generator of this device; `torch.manual_seed` would ask every backend, at 0.1 ms a call."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.manual_seed(seed)
