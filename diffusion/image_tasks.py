"""How does a picture take part in sampling: as the start, as what a mask keeps, or as input of the network?

Image-to-image is SDEdit (arXiv 2108.01073): the picture, noised, and the tail of the grid. Inpainting blends what is
known, noised, into every state (RePaint's forward half, arXiv 2201.09865), or asks a network made for it, which reads
[x, mask, masked picture] (Stable Diffusion inpainting). InstructPix2Pix (arXiv 2211.09800) reads [x, picture].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.denoiser import Network
from diffusion.devices import HALF, half_weights
from diffusion.process import GaussianDiffusion, q_sample

INPAINTING, EDITING = "inpainting", "editing"
STRENGTH = 0.75  # of image-to-image, as in latent-diffusion's img2img.py


@dataclass(frozen=True)
class Source:
    """The pictures that samples start from, one a sample: bytes (C, H, W), and masks (1, H, W) of 1 = paint anew.

    `strength` in [0, 1] is the part of the grid that is walked, from the noised picture on; None: all of it, from
    noise. `paste` puts what a mask keeps back from the picture itself.
    """

    images: Sequence[Tensor]
    masks: Sequence[Tensor] | None = None
    strength: float | None = None
    paste: bool = True

    def __post_init__(self):
        check_strength(self.strength)
        for image, mask in zip(self.images, self.masks or (), strict=self.masks is not None):
            if mask.shape[-2:] != image.shape[-2:]:
                (height, width), (tall, wide) = mask.shape[-2:], image.shape[-2:]
                raise ValueError(f"the mask is {width}x{height}, but its image {wide}x{tall}; make them equally large")

    def chosen(self, choose: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> "Source":
        """Return what `choose` makes of the pictures and of the masks: some of the samples, or more of them."""
        return replace(self, images=choose(self.images), masks=None if self.masks is None else choose(self.masks))

    def stacked(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return the pictures (B, C, H, W) in [-1, 1], and the masks (B, 1, H, W)."""
        images = torch.stack(list(self.images)).to(device, dtype) / 127.5 - 1
        masks = None if self.masks is None else torch.stack(list(self.masks)).to(device, dtype)
        return images, masks


def check_strength(strength: float | None) -> None:
    """Raise ValueError for a strength that is no part of the way from the picture to noise."""
    if strength is None:
        return
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], from the picture as it is to nothing of it, got {strength!r}")


def picture_task(net: Network, channels: int, conditioner: nn.Module | None = None) -> str | None:
    """Tell by its input channels what a network reads beside x of `channels`: "inpainting", "editing", or None.

    What a conditioner gives as `concat` is not counted.
    """
    own = getattr(conditioner, "provides", {}).get("concat", 0)
    extra = getattr(net, "in_channels", channels) - channels - own
    return {channels + 1: INPAINTING, channels: EDITING}.get(extra)


def choose_strength(strength: float | None, task: str | None, *, masked: bool) -> float | None:
    """Return the strength to use, None for a start from pure noise; not given, it is the task's usual one."""
    check_strength(strength)
    if strength is None:
        return None if masked or task is not None else STRENGTH
    return None if strength == 1 and (masked or task is not None) else float(strength)


def check_source(source: Source | None, task: str | None) -> None:
    """Raise ValueError where a network that reads pictures gets none, or a mask that it has no use for."""
    if task is not None and source is None:
        needs = "image=FILE mask=FILE" if task == INPAINTING else "image=FILE"
        raise ValueError(f"this model is made for {task} pictures and needs one; add {needs}")
    if task == INPAINTING and source.masks is None:
        raise ValueError("this model is made for inpainting and needs to know where; add mask=FILE")
    if task == EDITING and source.masks is not None:
        raise ValueError("this model edits whole pictures and reads no mask; leave out mask=")


class Begin(NamedTuple):
    """What a picture changes in sampling: start, timesteps, the condition and its null, and a move after every step.

    Without timesteps x is the result.
    """

    x: Tensor
    timesteps: Sequence[Any]
    concat: Tensor | None = None
    null_concat: Tensor | None = None
    project: Callable[[Tensor, float], Tensor] | None = None


def begun(
    source: Source | None,
    diffusion: GaussianDiffusion,
    noise: Tensor,
    timesteps: Sequence[Any],
    *,
    task: str | None = None,
    autoencoder: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    tile: int | None = None,
) -> Begin:
    """Prepare sampling from pictures, or from none. `noise` (B, C, h, w) is x_T then; x has its type and device.

    The grid `timesteps` is of numbers or of (t, s) intervals. Raises ValueError as `check_source`.
    """
    check_source(source, task)
    if source is None:
        return Begin(noise, timesteps)
    images, masks = source.stacked(noise.device, noise.dtype)
    encode = partial(encoded, autoencoder, dtype=dtype, tile=tile)
    level = diffusion.schedule.level
    if task == EDITING:
        known = encode(images)
        told = known if autoencoder is None else autoencoder.denormalise(known)
        rest = {"concat": told, "null_concat": torch.zeros_like(told)}
    elif task == INPAINTING:
        small = reduced(masks, noise.shape[-2:])
        concat = torch.cat([small, encode(images * (masks < 0.5))], dim=1)
        known = None if source.strength is None else encode(images)
        rest = {"concat": concat}
    else:
        known, rest = encode(images), {}
    kept = tail(timesteps, source.strength)
    if task is None and masks is not None and kept:
        rest["project"] = blending(known, reduced(masks, noise.shape[-2:]), noise, level, kept)
    if source.strength is None:
        return Begin(noise, kept, **rest)
    return Begin(q_sample(known, noise, level(ends(kept)[0])) if kept else known, kept, **rest)


def tail(timesteps: Sequence[Any], strength: float | None) -> Sequence[Any]:
    """Return the last moves of a grid, of numbers or of (t, s) intervals: `strength` of them, rounded down; None: all.

    No moves at all are ().
    """
    moves = count_moves(timesteps)
    kept = moves if strength is None else min(int(moves * strength), moves)
    return timesteps[moves - kept :] if kept else ()


def count_moves(timesteps: Sequence[Any]) -> int:
    """Return how many moves a grid has, of numbers or of (t, s) intervals."""
    return len(timesteps) - (not isinstance(timesteps[0], tuple)) if timesteps else 0


def ends(timesteps: Sequence[Any]) -> tuple[float, float]:
    """Return the first and the last timestep of a grid, of numbers or of (t, s) intervals."""
    first, last = timesteps[0], timesteps[-1]
    return (first[0] if isinstance(first, tuple) else first, last[1] if isinstance(last, tuple) else last)


def blending(
    known: Tensor, mask: Tensor, noise: Tensor, level: Callable[[float], Any], timesteps: Sequence[Any]
) -> Callable[[Tensor, float], Tensor]:
    """Return a move x, t -> x that puts what the mask keeps back, noised to t by the same noise every time.

    The start of the grid stays as it is, pure noise or the whole picture noised. At its last timestep what is kept is
    put back without noise, wherever the grid ends.
    """
    first, last = ends(timesteps)

    def project(x: Tensor, t: float) -> Tensor:
        if t == first:
            return x
        return torch.where(mask > 0.5, x, known if t == last else q_sample(known, noise, level(t)))

    return project


def reduced(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (B, 1, h, w) of 0 and 1 at the latents' size: the upper left pixel of each cell, as the models learned it.

    Raises ValueError for a mask of which nothing is left.
    """
    masks = (masks >= 0.5).to(masks.dtype)
    small = F.interpolate(masks, tuple(size), mode="nearest")
    lost = masks.flatten(1).any(1) & ~small.flatten(1).any(1)
    if bool(lost.any()):
        cell = masks.shape[-1] // size[-1]
        raise ValueError(f"the white of the mask is finer than a latent pixel, {cell}x{cell}; draw it broader")
    return small


@torch.no_grad()
def encoded(
    autoencoder: nn.Module | None,
    images: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    tile: int | None = None,
) -> Tensor:
    """Return the latents of pictures, the mode, one after the other; of a model without an autoencoder themselves.

    What overflows in half precision is encoded again in float32, with a warning.
    """
    if autoencoder is None:
        return images
    dtype = half_weights(autoencoder) or dtype
    how = {} if tile is None else {"tile": tile, "overlap": min(8, tile // 4)}
    safely = partial(autoencoder.encode_safely, dtype=dtype, **how)
    encode = safely if dtype in HALF else partial(autoencoder.encode, **how)
    return torch.cat([encode(image).to(images.dtype) for image in images.split(1)])


def pasted(images: Tensor, source: Source | None) -> Tensor:
    """Put what the masks keep back into samples (B, C, H, W) from the pictures themselves, where `paste` says so."""
    if source is None or source.masks is None or not source.paste:
        return images
    originals, masks = source.stacked(images.device, images.dtype)
    return torch.where(masks >= 0.5, images, originals)
