"""Which timesteps a training batch sees: uniform, stratified over the batch, or by importance (iDDPM section 3.3).

Each returns timesteps t (B,) and weights (B,) that keep the loss an unbiased estimate of the uniform mean. A timestep
is a function of one number in [0, 1), so a sample's is the same however its batch is split.
"""

import torch
from torch import Tensor, nn

from .randomness import Draws


class UniformTimesteps(nn.Module):
    """t uniform in 0..T-1, independently for each sample. `learns` where `update` changes what is drawn."""

    learns = False

    def __init__(self, num_train_timesteps: int):
        super().__init__()
        self.num_train_timesteps = num_train_timesteps

    def forward(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return timesteps (B,) int64 and the weights (B,) that keep the mean of their losses unbiased."""
        t = self.timesteps(draws.uniform("timestep"))
        return t, torch.ones_like(t, dtype=torch.float32)

    def timesteps(self, u: Tensor) -> Tensor:
        """Return the timesteps of which u (B,) in [0, 1) says how far along the chain they are."""
        return (u * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take note of the losses (B,) at t; only the importance sampler does."""


class StratifiedTimesteps(UniformTimesteps):
    """One t from each of B equal parts of the chain, in random order: still uniform, with less variance (VDM, I.1).

    B are the samples of a whole optimizer step: of all its accumulated batches, on all devices.
    """

    def forward(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """See `UniformTimesteps`."""
        t = self.timesteps(draws.stratified("timestep"))
        return t, torch.ones_like(t, dtype=torch.float32)


class ImportanceTimesteps(UniformTimesteps):
    """p(t) proportional to sqrt(E[loss^2]) over the last losses at t; uniform until each t has a full history.

    `uniform_fraction` of the probability stays uniform. The history is a buffer: it rides in checkpoints.
    """

    learns = True

    def __init__(self, num_train_timesteps: int, history_per_timestep: int = 10, uniform_fraction: float = 0.001):
        super().__init__(num_train_timesteps)
        if history_per_timestep < 1 or not 0 <= uniform_fraction <= 1:
            raise ValueError(
                f"history_per_timestep must be >= 1 and uniform_fraction in [0, 1], got {history_per_timestep}, "
                f"{uniform_fraction}"
            )
        self.uniform_fraction = uniform_fraction
        self.register_buffer("history", torch.zeros(num_train_timesteps, history_per_timestep, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_train_timesteps, dtype=torch.long))

    def probabilities(self) -> Tensor:
        """p(t) (T,) in float64 from the history alone."""
        uniform = torch.full_like(self.history[:, 0], 1 / self.num_train_timesteps)
        if bool((self.counts < self.history.shape[1]).any()):
            return uniform
        p = self.history.square().mean(1).sqrt()
        if not p.any():  # nothing left to learn anywhere
            return uniform
        return torch.lerp(p / p.sum(), uniform, self.uniform_fraction)

    def forward(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """See `UniformTimesteps`."""
        p = self.probabilities()
        u = draws.uniform("timestep").to(p)
        t = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=self.num_train_timesteps - 1)
        return t, (1 / (self.num_train_timesteps * p[t])).float()

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Append the unweighted losses (B,) at t (B,) in their order, dropping the oldest of each timestep."""
        size = self.history.shape[1]
        order = t.argsort(stable=True)
        t, losses = t[order], losses[order].to(self.history)
        nth = torch.arange(len(t), device=t.device) - torch.searchsorted(t, t)  # of the losses at this timestep
        added = torch.bincount(t, minlength=len(self.counts))
        kept = nth >= added[t] - size  # the rest would be written over at once
        t, nth = t[kept], nth[kept]
        self.history[t, (self.counts[t] + nth) % size] = losses[kept]
        self.counts += added
