"""Measure an autoencoder's latents on training images, and write their scale into its file.

    uv run python -m diffusion.training.latent_scale checkpoint=outputs/RUN/model.safetensors data=digits
    uv run python -m diffusion.training.latent_scale checkpoint=FILE data=image_folder data.root=DIR per_channel=true

A denoiser then meets latents of unit variance. Training does the same at its end; this command is for files whose
scale was never measured, or for other data.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion.checkpoint import atomic_write, load_autoencoder, read_header
from diffusion.cli import command
from diffusion.data.base import ImageData
from diffusion.data.batches import EpochBatches, EpochLoader
from diffusion.generate import choose_device
from diffusion.latents import encode_moments

CONSTANT = 1e-6  # standard deviation of latents that do not change; rounding, and `latents.NO_NOISE`, stay below
Scale = tuple[float | list[float], float | list[float]]  # scale_factor and shift, one number or one a channel


class LatentStatistics:
    """Mean and standard deviation of latents drawn from q(z | x), exact: no noise is drawn."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._squares = torch.zeros(0)

    def add(self, moments: Tensor) -> None:
        """Take in means and log-variances (B, 2C, ...), unscaled, as `encode_moments` gives them."""
        mean, logvar = moments.detach().cpu().double().transpose(0, 1).flatten(1).chunk(2)
        if not self.count:
            self._sum = self._squares = mean.new_zeros(len(mean))
        self.count += mean.shape[1]
        self._sum = self._sum + mean.sum(1)
        self._squares = self._squares + (mean.square() + logvar.exp()).sum(1)

    def together(self, summed: Callable[[Tensor], Tensor], device: torch.device) -> "LatentStatistics":
        """Return the statistics of all ranks, whose tensors on `device` are added up by `summed`."""
        all_ranks, channels = LatentStatistics(), len(self._sum)
        own = torch.cat([torch.tensor([float(self.count)], dtype=torch.float64), self._sum, self._squares])
        total = summed(own.to(device if device.type == "cuda" else "cpu")).cpu()
        all_ranks.count = int(total[0])
        all_ranks._sum, all_ranks._squares = total[1:].split(channels)
        return all_ranks

    @property
    def mean(self) -> Tensor:
        """Of each channel (C,), float64."""
        return self._sum / self.count

    @property
    def std(self) -> Tensor:
        """Of each channel (C,), float64, around its own mean."""
        return (self._squares / self.count - self.mean.square()).sqrt()

    def scale(self, *, per_channel: bool) -> Scale:
        """Return what gives latents (z - shift) * scale_factor unit variance: over all channels, or in each."""
        if per_channel:
            std, shift = self.std, self.mean.tolist()
        else:  # LDM's: one over the standard deviation of everything, and no shift
            std, shift = (self._squares.mean() / self.count - self.mean.mean().square()).sqrt(), 0.0
        if not (std > CONSTANT).all() or not std.isfinite().all():
            raise ValueError(
                f"the latents' standard deviation is {std.tolist()}, which no scale makes 1; a channel that is "
                "constant on these images needs other images, or a model that uses it"
            )
        return (1 / std).tolist(), shift


def measure_scale(
    autoencoder: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    num_images: int,
    per_channel: bool = False,
    device: torch.device | str = "cpu",
) -> Scale:
    """Return (scale_factor, shift) by the latents of the first `num_images` images of a loader, or of all there are.

    In float32 on any device. Raises ValueError where there are no images, or latents that never change.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    statistics, left = LatentStatistics(), num_images
    for batch in loader:
        images = batch["image"][:left].to(device)
        statistics.add(encode_moments(autoencoder, images, torch.float32))
        left -= len(images)
        if left <= 0:
            break
    if not statistics.count:
        raise ValueError("there are no images to measure the latents' scale on")
    return statistics.scale(per_channel=per_channel)


def training_images(data: ImageData, batch_size: int = 64) -> EpochLoader:
    """Return all training images of a datamodule in the order of the first epoch: its beginning is a fair share."""
    if data.train_set is None:
        data.prepare_data()
        data.setup("fit")
    order = EpochBatches(len(data.train_set), batch_size, data.seed, drop_last=False)
    return EpochLoader(data.train_set, order, num_workers=data.num_workers)


def write_scale(path: str | Path, scale_factor: float | list[float], shift: float | list[float]) -> None:
    """Set the scale in an autoencoder file's config; everything else in it stays. Raises ValueError for other files."""
    header = read_header(path)
    if header.kind != "autoencoder":
        raise ValueError(
            f"{path} holds a {header.kind}, whose autoencoder has its scale; measure an autoencoder's file"
        )
    node = {**header.config["autoencoder"], "scale_factor": scale_factor, "shift": shift}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["config"] = json.dumps({**header.config, "autoencoder": node})
    with atomic_write(path) as partial:
        save_file(load_file(path), partial, metadata=metadata)


def measure_file(
    path: str | Path, data: ImageData, *, num_images: int, per_channel: bool, device: torch.device | str
) -> Scale:
    """Measure the autoencoder in a file on training images, write the scale into the file, and return it."""
    autoencoder = load_autoencoder(path, device=device)
    autoencoder.latent_shape(data.shape)
    loader = training_images(data)
    scale_factor, shift = measure_scale(
        autoencoder, loader, num_images=num_images, per_channel=per_channel, device=device
    )
    write_scale(path, scale_factor, shift)
    measured = min(num_images, len(data.train_set))
    print(f"{path}: scale_factor={rounded(scale_factor)} shift={rounded(shift)}, by {measured} images", file=sys.stderr)
    return scale_factor, shift


def rounded(value: float | list[float]) -> float | list[float]:
    """Round to five digits, as far as a measurement over images means anything."""
    return [rounded(one) for one in value] if isinstance(value, list) else float(f"{value:.5g}")


class MeasureScale(Callback):
    """When training has ended, measure the latents of run_dir/model.safetensors and write their scale into it.

    A scale that the config gives, or that was measured before, stays.
    """

    def __init__(self, *, data: ImageData, num_images: int = 1000, per_channel: bool = False) -> None:
        if num_images < 1:
            raise ValueError(f"callbacks.scale.num_images must be at least 1, got {num_images}")
        self.data, self.num_images, self.per_channel = data, num_images, per_channel

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # after the last checkpoint
        """Measure, when the last checkpoint and its model are written."""
        path = Path(trainer.default_root_dir) / "model.safetensors"
        if trainer.fast_dev_run or not trainer.is_global_zero or not path.exists():
            return
        if read_header(path).config["autoencoder"].get("scale_factor") is None:
            settings = {"num_images": self.num_images, "per_channel": self.per_channel}
            measure_file(path, self.data, **settings, device=pl_module.device)


@command("latent_scale", __doc__, folder="checkpoint")
def main(cfg: DictConfig) -> None:
    """Measure one file."""
    data = instantiate(OmegaConf.to_container(cfg.data, resolve=True), _convert_="all")
    settings = {"num_images": cfg.num_images, "per_channel": cfg.per_channel}
    measure_file(cfg.checkpoint, data, **settings, device=choose_device(cfg.device))


if __name__ == "__main__":
    main()
