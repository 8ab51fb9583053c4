"""What do the tasks share that learn from noisy images? Latents, draws of timesteps, means by quarter of the chain.

All randomness is a function of (seed, purpose, number of the sample in the run): see `Task`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.checkpoint import Part
from diffusion.draws import SampleDraws
from diffusion.latents import encode_moments
from diffusion.models.autoencoder import Moments
from diffusion.process import GaussianDiffusion
from diffusion.timestep_samplers import UniformTimesteps
from diffusion.training.task import Task

QUARTERS = 4  # parts of the chain whose means are logged apart


class NoisedTask(Task):
    """A task on q(x_t | x0) at timesteps of `timestep_sampler` (None: uniform ones).

    With an `autoencoder` (frozen) x0 are its latents: of "image", encoded in each step, or of cached "moments".
    `bundle` puts the frozen parts into model.safetensors. `measured` names the values that are logged, in all and by
    quarter of the chain; the first is the loss.
    """

    measured: tuple[str, ...] = ("loss",)
    rank_buffers = ("sums",)

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        *,
        timestep_sampler: UniformTimesteps | None,
        autoencoder: nn.Module | None,
        bundle: bool,
        seed: int,
    ) -> None:
        super().__init__(seed=seed)
        num_train_timesteps = diffusion.schedule.num_train_timesteps
        self.diffusion = diffusion
        self.timestep_sampler = timestep_sampler or UniformTimesteps(num_train_timesteps)
        if self.timestep_sampler.num_train_timesteps != num_train_timesteps:
            raise ValueError(
                f"the timestep sampler draws from {self.timestep_sampler.num_train_timesteps} timesteps, the schedule "
                f"has {num_train_timesteps}; give both the same num_train_timesteps"
            )
        if autoencoder is not None:
            check_measured(autoencoder)
        # Frozen modules stay out of the module tree: no checkpoint repeats them, and `train()` leaves them alone.
        self._frozen: dict[str, nn.Module] = {} if autoencoder is None else {"autoencoder": autoencoder}
        self._frozen_parts: dict[str, Part] = {}  # made once, because hashing a large module takes a second
        self.bundle = bundle
        # Sums since the last log, see `add_quarters`. A buffer, so that a checkpoint between two logs carries it.
        self.register_buffer("sums", quarter_sums(self.measured))
        self._untold: list[tuple[Tensor, Tensor]] = []  # timesteps and losses of this optimizer step

    @property
    def autoencoder(self) -> nn.Module | None:
        """What makes latents of images, frozen; None for a model of pixels."""
        return self._frozen.get("autoencoder")

    def on_fit_start(self) -> None:
        """Move the frozen parts, which Lightning does not see, to the device."""
        for module in self._frozen.values():
            module.to(self.device).eval()

    def clean(self, batch: Mapping[str, Any], draws: SampleDraws) -> Tensor:
        """Return x0 (B, C, H, W): the images, or their latents, drawn from q(z|x)."""
        if self.autoencoder is None:
            return batch["image"]
        moments = batch["moments"] if "moments" in batch else encode_moments(self.autoencoder, batch["image"])
        mean, logvar = moments.chunk(2, dim=1)
        noise = draws.normal("latent", mean.shape[1:])
        return self.autoencoder.normalise(Moments(mean, logvar).sample(noise))

    @torch.no_grad()
    def note(self, t: Tensor | None, values: Tensor, overall: Tensor) -> None:
        """Add a batch to the sums without waiting for the device, and keep its losses for the timestep sampler.

        values: (measured, B); overall: (measured,), their means over the batch. t (B,) is None where no timestep
        distinguishes the samples.
        """
        add_quarters(self.sums, self._quarter(t), values, overall)
        if t is not None and self.timestep_sampler.learns:
            self._untold.append((t, values[0].detach()))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Tell the timestep sampler the losses of the whole step, on every rank those of all, in the samples' order.

        Not sooner: what is drawn must not depend on how many batches the step was accumulated from.
        """
        if not self._untold:
            return
        t, losses = (torch.stack(values) for values in zip(*self._untold, strict=True))  # (batches, B)
        self._untold.clear()
        t, losses = (self.rows(value).transpose(0, 1) for value in (t, losses))  # (batches, ranks, B)
        self.timestep_sampler.update(t.flatten(), losses.flatten())

    def _quarter(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else t * QUARTERS // self.diffusion.schedule.num_train_timesteps

    def pop_losses(self) -> dict[str, float]:
        """Return the means of what was measured, in all and of each quarter of the chain, since the last call."""
        sums = self.summed(self.sums)
        self.sums.zero_()
        return {f"train/{name}": mean for name, mean in quarter_means(sums, self.measured).items()}

    def learnt_shape(self, shape: Sequence[int]) -> Sequence[int]:
        """Return (C, H, W) of what the network learns from images of `shape`: theirs, or that of their latents."""
        if self.autoencoder is None:
            return shape
        shape = self.autoencoder.latent_shape(shape)
        if len(shape) != 3:
            raise ValueError(
                "the autoencoder's latents are vectors, and a network of the diffusion process needs (C, H, W); take "
                "one with spatial latents, such as autoencoder=digits"
            )
        return shape

    def for_export(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Part]]:
        """Return the config to store with the network, and the frozen parts that it needs beside it."""
        for name, module in self._frozen.items():
            if name not in self._frozen_parts:
                self._frozen_parts[name] = part_of(module, config[name], bundled=self.bundle)
        return dict(config), dict(self._frozen_parts)


# ---------------------------------------------------------------------------------------------------------------------
# means by quarter of the chain


def quarter_sums(names: Sequence[str]) -> Tensor:
    """Zeros: a row for each name and one for counts, a column for each quarter of the chain and one for all of it."""
    return torch.zeros(len(names) + 1, QUARTERS + 1)


@torch.no_grad()
def add_quarters(sums: Tensor, quarter: Tensor | None, values: Tensor, overall: Tensor, *, weight: float = 1.0) -> None:
    """Add a batch of values (names, B) to the sums of their quarters (B,), and `weight` of it to those of all."""
    if quarter is not None:
        sums.index_add_(1, quarter, torch.cat([values, torch.ones_like(values[:1])]))
    sums[:-1, QUARTERS] += overall * weight
    sums[-1, QUARTERS] += weight


def quarter_means(sums: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return the means as {"loss_q1": ..., "loss": ...}, without the quarters in which there was nothing."""
    *totals, counts = sums.tolist()
    columns = [f"_q{quarter + 1}" for quarter in range(QUARTERS)] + [""]
    return {
        f"{name}{column}": total / count
        for name, row in zip(names, totals, strict=True)
        for column, total, count in zip(columns, row, counts, strict=True)
        if count
    }


# ---------------------------------------------------------------------------------------------------------------------
# frozen parts


def check_measured(autoencoder: nn.Module) -> None:
    """Raise ValueError for an autoencoder whose latents have no known scale."""
    if not autoencoder.measured:
        file = autoencoder.origin.source if hasattr(autoencoder, "origin") else "FILE"
        raise ValueError(
            "the autoencoder's scale_factor has not been measured, and latents must have a standard deviation of about "
            f"1; measure it: uv run python -m diffusion.training.latent_scale checkpoint={file} data=..."
        )


def part_of(module: nn.Module, node: Mapping[str, Any], *, bundled: bool) -> Part:
    """Describe a module that stands at a node of the config, or that came from a file of its own."""
    source = None
    if origin := getattr(module, "origin", None):  # an autoencoder that came from a file
        node, source = origin.config, origin.source
    return Part(module=module, config=without_files(node) if bundled else node, bundled=bundled, source=source)


def without_files(node: Any) -> Any:
    """Return a conditioner's config without the files that its weights came from: they are stored beside it."""
    if isinstance(node, Mapping):
        return {key: None if key == "weights" else without_files(value) for key, value in node.items()}
    return [without_files(value) for value in node] if isinstance(node, list | tuple) else node
