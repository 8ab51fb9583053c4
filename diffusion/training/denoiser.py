"""What is one training step of a denoiser? Keyed draws, one loss, sums for the log; every formula is elsewhere.

All randomness is a function of (seed, purpose, number of the micro-batch, rank), so that a resumed run continues bit
for bit and ranks never share noise.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from diffusion.denoiser import NULL_LABEL
from diffusion.losses import DenoisingLoss
from diffusion.process import GaussianDiffusion
from diffusion.randomness import fold, generator
from diffusion.timestep_samplers import StratifiedTimesteps, UniformTimesteps
from diffusion.training.ema import EMA, average_name

QUARTERS = 4  # parts of the chain whose losses are logged apart


class DenoiserTask(LightningModule):
    """Train `net` to denoise. `optimizer(parameters)` and `lr_scheduler(optimizer)` are partials, counted in steps.

    `condition_drop` is the probability that a sample loses its label, which classifier-free guidance needs (about 0.1).
    `compile` compiles the network in place: parameter names stay as they are. Batches are {"image": (B, C, H, W) in
    [-1, 1], "label": (B,) where there are classes, ...}.
    """

    def __init__(
        self,
        net: nn.Module,
        diffusion: GaussianDiffusion,
        *,
        loss: DenoisingLoss,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        timestep_sampler: UniformTimesteps | None = None,
        lr_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        condition_drop: float = 0.0,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= condition_drop <= 1:
            raise ValueError(f"task.condition_drop is a probability in [0, 1], got {condition_drop}")
        loss.check(diffusion)
        num_train_timesteps = diffusion.schedule.num_train_timesteps
        self.net = net
        self.diffusion = diffusion
        self.loss = loss
        self.timestep_sampler = timestep_sampler or UniformTimesteps(num_train_timesteps)
        if self.timestep_sampler.num_train_timesteps != num_train_timesteps:
            raise ValueError(
                f"the timestep sampler draws from {self.timestep_sampler.num_train_timesteps} timesteps, the schedule "
                f"has {num_train_timesteps}; give both the same num_train_timesteps"
            )
        self.optimizer_partial = optimizer
        self.lr_scheduler_partial = lr_scheduler
        self.condition_drop = condition_drop
        self.seed = seed
        self.batches_seen = 0  # micro-batches over the whole run: the key of every draw
        self.gradient_norm: Tensor | None = None  # of the last optimizer step, before clipping
        # Sums since the last log: [loss of each quarter of the chain..., objective], and how many samples gave them.
        # A buffer, so that a checkpoint between two logs carries it.
        self.register_buffer("sums", torch.zeros(2, QUARTERS + 1))
        if compile:
            net.compile()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        key = (self.batches_seen, self.global_rank)
        # The one place where training sets a global seed: dropout, inside the network, knows no other generator.
        seed_dropout(fold(self.seed, "dropout", *key), self.device)
        draws = generator(self.seed, "train", *key, device=self.device)
        x0, condition = batch["image"], condition_of(batch, self.net)
        t, weight = self.timestep_sampler(len(x0), draws)
        eps = self.loss.noise(x0, draws)
        if self.condition_drop:
            condition = dropped(condition, self.condition_drop, draws)
        terms = self.loss(self.diffusion, self.net, x0, t, eps, condition)
        objective = (terms.loss * weight).mean()
        self._note(t, terms.loss.detach(), objective.detach())
        self.batches_seen += 1
        return {"loss": objective, "t": t}

    @torch.no_grad()
    def _note(self, t: Tensor, losses: Tensor, objective: Tensor) -> None:
        """Add to the sums without waiting for the device, and tell the timestep sampler."""
        quarter = t * QUARTERS // self.diffusion.schedule.num_train_timesteps
        self.sums.index_add_(1, quarter, torch.stack([losses, torch.ones_like(losses)]))
        self.sums[0, QUARTERS] += objective
        self.sums[1, QUARTERS] += 1
        if self.trainer.world_size > 1:
            t, losses = (self.all_gather(value).flatten() for value in (t, losses))
        self.timestep_sampler.update(t, losses)

    def pop_losses(self) -> dict[str, float]:
        """Return the mean objective and the mean loss of each quarter of the chain since the last call."""
        sums = self.trainer.strategy.reduce(self.sums.clone(), reduce_op="sum")
        self.sums.zero_()
        totals, counts = sums.tolist()
        names = [f"train/loss_q{quarter + 1}" for quarter in range(QUARTERS)] + ["train/loss"]
        return {name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss at the same timesteps and noise each time, of the raw weights and of each average."""
        fixed = generator(self.seed, "validation", batch_idx, self.global_rank, device=self.device)
        x0, condition = batch["image"], condition_of(batch, self.net)
        t, _ = StratifiedTimesteps(self.diffusion.schedule.num_train_timesteps)(len(x0), fixed)
        eps = self.loss.noise(x0, fixed)
        for name, weights in self._weights():
            with weights:
                loss = self.loss(self.diffusion, self.net, x0, t, eps, condition).loss.mean()
            self.log(f"val/loss{name}", loss, batch_size=len(x0), logger=False, sync_dist=True)

    def _weights(self) -> Iterator[tuple[str, contextlib.AbstractContextManager]]:
        yield "", contextlib.nullcontext()
        for ema in self.trainer.callbacks:
            if isinstance(ema, EMA):
                for decay in ema.averages:
                    suffix = "_ema" if decay == ema.decays[0] else f"_ema_{average_name(decay)}"
                    yield suffix, ema.swapped(self.net, decay)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_partial([p for p in self.net.parameters() if p.requires_grad])
        if self.lr_scheduler_partial is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler_partial(optimizer), "interval": "step"},
        }

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
            self.gradient_norm = total_norm(parameters)
        if by_norm:
            self.gradient_norm = nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches_seen = checkpoint["batches_seen"]


def condition_of(batch: dict[str, Any], net: nn.Module) -> dict[str, Tensor]:
    """Return what of a batch conditions this network: its labels, if it has classes."""
    if net.num_classes is None:
        return {}
    if "label" not in batch:
        raise ValueError(
            f"the network has num_classes={net.num_classes}, but the data give no labels; "
            "set net.num_classes=null or choose data with classes"
        )
    return {"label": batch["label"]}


def dropped(condition: dict[str, Tensor], probability: float, draws: torch.Generator) -> dict[str, Tensor]:
    """Replace each sample's label by the null label with this probability."""
    if "label" not in condition:
        return condition
    label = condition["label"]
    drop = torch.rand(label.shape, generator=draws, device=draws.device) < probability
    return {**condition, "label": label.masked_fill(drop, NULL_LABEL)}


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the global generator of this device; `torch.manual_seed` would ask every backend, at 0.1 ms a call."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.manual_seed(seed)


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
