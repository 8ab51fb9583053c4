"""What is the smallest variational autoencoder? One vector of latents for an image, with convolutions around it.

Kingma & Welling 2013 (arXiv 1312.6114, section 3 and appendix C), their perceptrons replaced by convolutions.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.models.autoencoder import Autoencoder, AutoencoderOutput, Moments
from diffusion.models.layers import Downsample, Upsample


class ConvVAE(Autoencoder):
    """Images (B, C, image_size, image_size) to Gaussian latents (B, latent_channels) and back.

    channels: width at full resolution; it doubles each time the size halves.
    num_levels: how often the size halves; image_size must be a multiple of 2 ** num_levels.
    scale_factor, shift: see `Autoencoder`.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        image_size: int,
        latent_channels: int,
        channels: int = 32,
        num_levels: int = 2,
        scale_factor: float | Sequence[float] | None = None,
        shift: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            latent_channels=latent_channels,
            size_factor=2**num_levels,
            scale_factor=scale_factor,
            shift=shift,
        )
        self.image_size = image_size
        self._check_image((in_channels, image_size, image_size))
        widths = [channels * 2**level for level in range(num_levels + 1)]
        self._low = (widths[-1], image_size // self.size_factor, image_size // self.size_factor)
        size = widths[-1] * self._low[1] ** 2
        pairs = list(pairwise(widths))
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Sequential(Downsample(a), nn.SiLU(), nn.Conv2d(a, b, 3, padding=1)) for a, b in pairs
        )
        self.to_moments = nn.Linear(size, 2 * latent_channels)
        self.from_latent = nn.Linear(latent_channels, size)
        self.up = nn.ModuleList(
            nn.Sequential(Upsample(b), nn.SiLU(), nn.Conv2d(b, a, 3, padding=1)) for a, b in reversed(pairs)
        )
        self.conv_out = nn.Conv2d(widths[0], in_channels, 3, padding=1)
        self.out_channels = in_channels
        self.to(memory_format=torch.channels_last)

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where the adaptive weight of an adversarial loss compares gradients."""
        return self.conv_out.weight

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(latent_channels,) for images (C, H, W)."""
        self._check_image(shape)
        return (self.latent_channels,)

    def moments(self, x: Tensor) -> Moments:
        """q(z | x) of images x (B, C, H, W) in [-1, 1]: vectors (B, latent_channels), not normalised."""
        self._check_image(x.shape)
        h = self.conv_in(x)
        for level in self.down:
            h = level(F.silu(h))
        mean, logvar = self.to_moments(F.silu(h).flatten(1)).chunk(2, dim=1)
        return Moments(mean, logvar.clamp(-30.0, 20.0))

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents (B, latent_channels): the mode, or with noise (B, latent_channels) a sample."""
        moments = self.moments(x)
        return self.normalise(moments.mean if noise is None else moments.sample(noise))

    def decode(self, z: Tensor) -> Tensor:
        """Images from normalised latents (B, latent_channels)."""
        self._check_latents(z)
        return self._decoded(self.denormalise(z))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> AutoencoderOutput:
        """Reconstruct images from the mode, or with noise from a sample, as training does."""
        moments = self.moments(x)
        return AutoencoderOutput(self._decoded(moments.mean if noise is None else moments.sample(noise)), moments)

    def _decoded(self, z: Tensor) -> Tensor:
        h = self.from_latent(z).unflatten(1, self._low)
        for level in self.up:
            h = level(F.silu(h))
        return self.conv_out(F.silu(h)).contiguous()

    def _check_image(self, shape: Sequence[int]) -> None:
        super()._check_image(shape)
        if tuple(shape[-2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"this autoencoder was built for images of {self.image_size}x{self.image_size}, because its latents "
                f"are one vector an image, but got {tuple(shape)}; resize them or build it with another image_size"
            )
