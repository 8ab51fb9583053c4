"""Which timesteps a training batch sees: uniform, stratified over the batch, or by importance (iDDPM section 3.3).

Each returns timesteps t (B,) and weights (B,) that keep the loss an unbiased estimate of the uniform mean.
"""

import torch
from torch import Tensor, nn


class UniformTimesteps(nn.Module):
    """t uniform in 0..T-1, independently for each sample."""

    def __init__(self, num_train_timesteps: int):
        super().__init__()
        self.num_train_timesteps = num_train_timesteps

    def forward(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return timesteps (B,) int64 and the weights (B,) that keep the mean of their losses unbiased."""
        device = generator.device
        t = torch.randint(self.num_train_timesteps, (batch_size,), generator=generator, device=device)
        return t, torch.ones(batch_size, device=device)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take note of the losses (B,) at t; only the importance sampler does."""


class StratifiedTimesteps(UniformTimesteps):
    """One t from each of B equal parts of the chain, in random order: still uniform, with less variance (VDM, I.1)."""

    def forward(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `UniformTimesteps`."""
        device = generator.device
        part = torch.randperm(batch_size, generator=generator, device=device)
        within = torch.rand(batch_size, generator=generator, device=device, dtype=torch.float64)
        t = ((part + within) / batch_size * self.num_train_timesteps).long()
        return t.clamp(max=self.num_train_timesteps - 1), torch.ones(batch_size, device=device)


class ImportanceTimesteps(UniformTimesteps):
    """p(t) proportional to sqrt(E[loss^2]) over the last losses at t; uniform until each t has a full history.

    `uniform_fraction` of the probability stays uniform. The history is a buffer: it rides in checkpoints.
    """

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

    def forward(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `UniformTimesteps`."""
        p = self.probabilities().to(generator.device)
        t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        return t, (1 / (self.num_train_timesteps * p[t])).float()

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Append the unweighted losses (B,) at t (B,), dropping the oldest of each timestep."""
        size = self.history.shape[1]
        for at, loss in zip(t.tolist(), losses.double().tolist(), strict=True):
            self.history[at, self.counts[at] % size] = loss
            self.counts[at] += 1
