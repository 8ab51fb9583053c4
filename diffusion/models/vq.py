"""Which autoencoder has a codebook? Latent diffusion's VQ variant: latents that are quantised on the way back.

van den Oord et al. 2017 (arXiv 1711.00937, equation 3) in the form of Esser et al. 2021 (arXiv 2012.09841) and Rombach
et al. 2022 (arXiv 2112.10752, section 3.1).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.models.autoencoder import AutoencoderOutput, Moments, SpatialAutoencoder


class Quantised(NamedTuple):
    """Codes (B, C, h, w) in place of z but with its gradient, the codebook's loss (), the codes' numbers (B, h, w)."""

    z: Tensor
    loss: Tensor
    indices: Tensor


class Codebook(nn.Module):
    """A table of `num_codes` vectors; each position of the latents takes the nearest.

    The loss is mean((code - z.detach())^2) + beta * mean((code.detach() - z)^2): codes move to latents, and latents
    commit to their codes with weight beta. `legacy` True puts beta on the first term instead, by an error of the
    original code that all published latent diffusion models were trained with.
    """

    rows = 2**24  # distances held at once

    def __init__(self, num_codes: int, channels: int, *, beta: float = 0.25, legacy: bool = True) -> None:
        super().__init__()
        self.beta, self.legacy = beta, legacy
        self.weight = nn.Parameter(torch.empty(num_codes, channels).uniform_(-1 / num_codes, 1 / num_codes))

    def forward(self, z: Tensor) -> Quantised:
        """Quantise z (B, C, h, w); the gradient passes straight through to z."""
        indices = self.nearest(z)
        codes = self.lookup(indices)
        to_codes, to_latents = (codes - z.detach()).square().mean(), (codes.detach() - z).square().mean()
        loss = self.beta * to_codes + to_latents if self.legacy else to_codes + self.beta * to_latents
        return Quantised(z + (codes - z).detach(), loss, indices)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Number (B, h, w) of the code nearest to each vector of z (B, C, h, w)."""
        tokens, table = z.movedim(1, -1), self.weight
        squares = table.square().sum(1)
        parts = tokens.flatten(0, -2).split(max(1, self.rows // len(table)))
        # The square of z itself is the same for all codes.
        return torch.cat([torch.addmm(squares, part, table.T, alpha=-2).argmin(1) for part in parts]).view(
            tokens.shape[:-1]
        )

    def lookup(self, indices: Tensor) -> Tensor:
        """Vectors (B, C, h, w) of codes (B, h, w)."""
        return F.embedding(indices, self.weight).movedim(-1, 1)


class VQAutoencoder(SpatialAutoencoder):
    """Latent diffusion's VQ autoencoder: `encode` leaves latents continuous, `decode` quantises them first.

    num_codes, beta, legacy: see `Codebook`; the other settings: see `SpatialAutoencoder`, and `Autoencoder` for
    scale_factor and shift. It has no moments; `encode` takes noise like its relatives and ignores it.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        *,
        latent_channels: int = 3,
        num_codes: int = 8192,
        beta: float = 0.25,
        legacy: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, latent_channels=latent_channels, **settings)
        self.num_codes = num_codes
        self.codebook = Codebook(num_codes, latent_channels, beta=beta, legacy=legacy)

    def moments(self, x: Tensor, **how: Any) -> Moments:
        """Raise ValueError: the latents are not random."""
        raise ValueError("a VQ autoencoder has no moments: its latents are not random; call encode instead")

    def encode(self, x: Tensor, noise: Tensor | None = None, **how: Any) -> Tensor:
        """Normalised latents of images (B, C, H, W) before quantisation; `how`: tile, overlap, slices."""
        return self.normalise(self._encoded(x, **how))

    def decode(self, z: Tensor, *, quantise: bool = True, **how: Any) -> Tensor:
        """Images (B, C, H, W) from normalised latents, each vector first replaced by its nearest code."""
        self._check_latents(z)
        z = self.denormalise(z)
        return self._decoded(self.codebook(z).z if quantise else z, **how)

    def decode_indices(self, indices: Tensor, **how: Any) -> Tensor:
        """Images from codes (B, h, w)."""
        return self._decoded(self.codebook.lookup(indices), **how)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> AutoencoderOutput:
        """Reconstruct images through the codebook, as training does; noise is ignored."""
        z, loss, indices = self.codebook(self._encoded(x))
        return AutoencoderOutput(self._decoded(z), None, loss, indices)
