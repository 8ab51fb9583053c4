"""What does an autoencoder make of images by now? Pictures of the same validation images every n steps.

Beside the reconstructions: what the channels of the latents look like, or what each number of a latent vector does.
"""

from collections.abc import Iterator

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor, nn

from diffusion.autoencoder_losses import kl_to_standard_normal
from diffusion.data.base import ImageData
from diffusion.images import grid, to_uint8
from diffusion.latents import encode_moments
from diffusion.training.pictures import Pictures, show

SPREAD = 3.0  # standard deviations of the prior that a traversal goes to each side


class Reconstructions(Pictures):
    """Draw pictures every `every_n_steps` optimizer steps and at the last one, of raw weights and the first average.

    run_dir/samples/step=0001000_ema.png: `num_images` pairs of a validation image and its reconstruction from the mode,
    `columns` pairs a row. step=0001000_latents_ema.png: a row an image, first itself, then its latent channels, black
    at their least and white at their greatest value in the picture. Latents that are vectors get
    step=0001000_traversal_ema.png instead: a row one latent (at most `rows`, those with the largest KL first), going
    from -3 to 3 while the others stay at the first image's mode.
    """

    def __init__(
        self,
        *,
        data: ImageData,
        every_n_steps: int = 1000,
        num_images: int = 32,
        columns: int = 8,
        rows: int = 10,
        latents: bool = True,
    ) -> None:
        super().__init__(
            "reconstructions", every_n_steps=every_n_steps, num_images=num_images, columns=columns, rows=rows
        )
        self.data, self.num_images = data, num_images
        self.columns, self.rows, self.latents = columns, rows, latents

    def draw(self, trainer: Trainer, task: LightningModule) -> None:
        """Draw, write and log the pictures of the raw weights and of the first average."""
        autoencoder, training = task.autoencoder, task.autoencoder.training
        images = self.images().to(task.device)
        autoencoder.eval()
        try:
            for suffix, weights in task.weights():
                if suffix in ("", "_ema"):
                    with weights, torch.no_grad(), trainer.precision_plugin.forward_context():
                        for name, picture in self.pictures(autoencoder, images):
                            show(trainer, f"{name}{suffix or '_raw'}".removeprefix("_"), picture)
        finally:
            autoencoder.train(training)

    def images(self) -> Tensor:
        """Return the first validation images (N, C, H, W), the same each time."""
        count = min(self.num_images, len(self.data.val_set))
        return self.data.val_set.__getitems__([(0, index) for index in range(count)])["image"]

    def pictures(self, autoencoder: nn.Module, images: Tensor) -> Iterator[tuple[str, Image.Image]]:
        """Yield names and pictures of these images; none where the network's answers are not finite."""
        reconstruction = autoencoder(images).reconstruction
        if not reconstruction.isfinite().all():
            rank_zero_warn("no pictures: the reconstructions are not finite")
            return
        pairs = torch.stack([images, reconstruction.to(images)], dim=1).flatten(0, 1)
        yield "", grid(to_uint8(pairs), 2 * self.columns)
        if not self.latents:
            return
        if len(autoencoder.latent_shape(images.shape[1:])) == 1:
            yield "_traversal", self._traversal(autoencoder, images)
        else:
            yield "_latents", self._channels(autoencoder, images[: self.rows])

    def _traversal(self, autoencoder: nn.Module, images: Tensor) -> Image.Image:
        mean, logvar = autoencoder.moments(images)
        order = kl_to_standard_normal(mean.float(), logvar.float()).mean(0).argsort(descending=True)[: self.rows]
        values = torch.linspace(-SPREAD, SPREAD, 2 * self.columns - 1, device=mean.device, dtype=mean.dtype)
        z = mean[0].repeat(len(order), len(values), 1)
        for row, latent in enumerate(order.tolist()):
            z[row, :, latent] = values
        decoded = autoencoder.decode(autoencoder.normalise(z.flatten(0, 1)))
        captions = [f"z{latent}" if i == 0 else "" for latent in order.tolist() for i in range(len(values))]
        return grid(to_uint8(decoded), len(values), captions=captions)

    def _channels(self, autoencoder: nn.Module, images: Tensor) -> Image.Image:
        latents = encode_moments(autoencoder, images, images.dtype).chunk(2, dim=1)[0]
        low, high = latents.amin((0, 2, 3), keepdim=True), latents.amax((0, 2, 3), keepdim=True)
        grey = 2 * (latents - low) / (high - low).clamp(min=1e-6) - 1
        grey = nn.functional.interpolate(grey, size=images.shape[2:], mode="nearest")
        cells = [to_uint8(images.expand(-1, 3, -1, -1))]
        cells += [np.repeat(to_uint8(grey[:, [channel]]), 3, axis=3) for channel in range(grey.shape[1])]
        return grid(np.stack(cells, 1).reshape(-1, *cells[0].shape[1:]), len(cells))
