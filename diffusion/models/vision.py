"""How does an image become tokens that a denoiser can attend to?

A small vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) without class token, to be trained along.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.models.layers import add
from diffusion.models.text import EncoderBlock


class PatchEncoder(nn.Module):
    """Images (B, C, H, W) of any size, resized to `image_size` -> tokens (B, (image_size / patch_size)^2, channels)."""

    def __init__(
        self,
        channels: int,
        image_size: int,
        *,
        in_channels: int = 3,
        patch_size: int = 8,
        num_layers: int = 2,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size={patch_size} does not divide image_size={image_size}; choose a divisor")
        self.channels, self.in_channels, self.image_size = channels, in_channels, image_size
        self.patches = nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(torch.empty((image_size // patch_size) ** 2, channels))
        self.blocks = nn.ModuleList(EncoderBlock(channels, num_heads=num_heads) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(channels)
        nn.init.normal_(self.position_embedding, std=0.02)
        for block in self.blocks:
            block.initialise(num_layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.patches.weight.dtype)
        if x.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        tokens = add(self.patches(x).flatten(2).transpose(1, 2).contiguous(), self.position_embedding)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm_out(tokens)
