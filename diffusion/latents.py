"""What does an autoencoder say of images that a denoiser is to learn from, and in which precision may it be asked?

One function for encoding in the training step and for the cache on disk, so that both give the same latents.
"""

import torch
from torch import Tensor, nn

# log-variance of latents that have none (VQ): the least that `Moments` knows. Its noise, 3e-7, is below rounding.
NO_NOISE = -30.0


def is_deterministic(autoencoder: nn.Module) -> bool:
    """Say whether an image has one latent, not a distribution of them: that of a VQ autoencoder, before quantising."""
    return hasattr(autoencoder, "codebook")


def encode_moments(autoencoder: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return mean and log-variance of q(z|x), unscaled, (B, 2C, h, w) float32, for images (B, C, H, W) in [-1, 1].

    In eval mode, whatever the autoencoder's mode is, and without a gradient. `dtype` is what convolutions compute in;
    None means float16 on a GPU and float32 elsewhere. A batch that overflows in half precision is encoded again in
    float32. A VQ autoencoder gives its latents before quantising, with `NO_NOISE` as log-variance.
    """
    if dtype is None:
        dtype = torch.float16 if images.device.type == "cuda" else torch.float32
    training = autoencoder.training
    if training:
        autoencoder.eval()
    try:
        moments = _encode(autoencoder, images, dtype)
        if dtype is not torch.float32 and not moments.isfinite().all():
            moments = _encode(autoencoder, images, torch.float32)
    finally:
        if training:
            autoencoder.train()
    return moments


@torch.no_grad()
def _encode(autoencoder: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    # Switched off for float32 rather than left out: around a training step Lightning may have switched it on.
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not torch.float32):
        if is_deterministic(autoencoder):
            mean = autoencoder.denormalise(autoencoder.encode(images))
            logvar = torch.full_like(mean, NO_NOISE)
        else:
            mean, logvar = autoencoder.moments(images)
    return torch.cat([mean, logvar], dim=1).float().contiguous()  # strided as a cache gives them
