"""How like its original is a reconstruction? Errors in dB, structure, and whether its edges are as sharp."""

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

SIMILARITY = ("psnr", "ssim", "sharpness", "edge_distance")


def similarity(reconstruction: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Compare images (B, C, H, W) in [-1, 1], which are clamped to that; by the names of `SIMILARITY`.

    PSNR (dB) and SSIM are means over images. SSIM's Gaussian window has sigma 1.5, and 0.5 for images of less than 16
    pixels, which the usual one would cover.
    """
    reconstruction = reconstruction.float().clamp(-1, 1)
    sigma = 1.5 if min(x.shape[2:]) >= 16 else 0.5
    psnr = peak_signal_noise_ratio(reconstruction, x, data_range=2.0, dim=(1, 2, 3), reduction="elementwise_mean")
    ssim = structural_similarity_index_measure(reconstruction, x, data_range=2.0, sigma=sigma)
    edges, real = gradient_magnitude(reconstruction), gradient_magnitude(x)
    return {"psnr": psnr, "ssim": ssim, "sharpness": sharpness(edges, real), "edge_distance": distance(edges, real)}


def gradient_magnitude(images: Tensor) -> Tensor:
    """Length (B, C, H - 1, W - 1) of the gradient, by forward differences, of images (B, C, H, W)."""
    here = images[..., :-1, :-1]
    return torch.hypot(images[..., 1:, :-1] - here, images[..., :-1, 1:] - here)


def sharpness(edges: Tensor, real: Tensor) -> Tensor:
    """Mean square of the gradient over that of the originals: 1 is as sharp, blurred edges have less, noise has more.

    An edge of a given height has the same sum of gradients however wide it is, but fewer squares the wider it is.
    """
    return edges.square().mean() / real.square().mean()


def distance(edges: Tensor, real: Tensor) -> Tensor:
    """Wasserstein-1 distance between two distributions of equally many gradients, over the mean of the second."""
    return (edges.flatten().sort().values - real.flatten().sort().values).abs().mean() / real.mean()
