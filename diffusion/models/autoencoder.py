"""Which autoencoder turns images into latents and back? Latent diffusion's, and what all kinds of them share.

AutoencoderKL of Rombach et al. 2022 (arXiv 2112.10752, section 3.1 and appendix G) as Stable Diffusion uses it; its
relatives are in vq.py and conv_vae.py.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.models.coders import Decoder, Encoder
from diffusion.models.tiling import Tiles, in_tiles
from diffusion.models.unet import Stage


class Moments(NamedTuple):
    """Mean and log variance of q(z | x), not normalised: (B, C, h, w), or (B, D) for vectors. The mode is the mean."""

    mean: Tensor
    logvar: Tensor  # clamped to [-30, 20]

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise."""
        return self.mean + self.std * noise


class AutoencoderOutput(NamedTuple):
    """What training needs: the reconstruction, and the moments or the codebook's loss () and indices (B, h, w)."""

    reconstruction: Tensor
    moments: Moments | None = None
    codebook_loss: Tensor | None = None
    indices: Tensor | None = None


class Autoencoder(nn.Module):
    """What every autoencoder has: the sizes it takes, and the normalisation of its latents.

    Latents leave `encode` and enter `decode` normalised, (z - shift) * scale_factor, so that a diffusion model meets
    unit variance and knows no number. `scale_factor` and `shift` are one number or one a channel; scale_factor None
    means not measured yet and counts as 1. Both may be set later. They are settings, stored with the config and not
    among the weights, and never rounded to half precision.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        latent_channels: int,
        size_factor: int,
        scale_factor: float | Sequence[float] | None = None,
        shift: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.latent_channels, self.size_factor = in_channels, latent_channels, size_factor
        for name, value in (("scale_factor", scale_factor), ("shift", shift)):
            if isinstance(value, Sequence) and len(value) != latent_channels:
                raise ValueError(
                    f"{name} has {len(value)} entries, but there are {latent_channels} latent channels; give one "
                    "number for all, or one a channel"
                )
        self.scale_factor, self.shift = scale_factor, shift

    @property
    def measured(self) -> bool:
        """Whether a scale factor was set, by the config or by measuring the latents of data."""
        return self.scale_factor is not None

    def normalise(self, z: Tensor) -> Tensor:
        """(z - shift) * scale_factor."""
        return (z - _per_channel(self.shift, z)) * _per_channel(self.scale_factor, z)

    def denormalise(self, z: Tensor) -> Tensor:
        """z / scale_factor + shift, the inverse of `normalise`."""
        return z / _per_channel(self.scale_factor, z) + _per_channel(self.shift, z)

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the latents of images (C, H, W)."""
        self._check_image(shape)
        return (self.latent_channels, *(size // self.size_factor for size in shape[-2:]))

    def encode_safely(self, x: Tensor, noise: Tensor | None = None, *, dtype=torch.float16, **how: Any) -> Tensor:
        """`encode` computed in half precision, in float32 where that overflows; see `decode_safely`."""
        return _in_half(self, x, dtype, lambda model, x, kept: model.encode(x, _rows(noise, kept), **how))

    def decode_safely(self, z: Tensor, *, dtype: torch.dtype = torch.float16, **how: Any) -> Tensor:
        """`decode` computed in half precision, as float32: images that overflow are decoded again in float32.

        One warning says how many. Stable Diffusion XL's autoencoder overflows float16 and would give black images.
        Raises FloatingPointError where float32 is not finite either. `how` goes to `decode`.
        """
        return _in_half(self, z, dtype, lambda model, z, kept: model.decode(z, **how))

    def _check_image(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless images of (..., C, H, W) can be coded."""
        if len(shape) < 3 or shape[-3] != self.in_channels:
            raise ValueError(
                f"this autoencoder takes images of {self.in_channels} channels, (B, {self.in_channels}, H, W), but got "
                f"{tuple(shape)}; convert the images (grey or RGB) or build it with matching in_channels"
            )
        for name, size in zip("HW", shape[-2:], strict=True):
            if size % self.size_factor or size == 0:
                below = size // self.size_factor * self.size_factor
                nearest = " or ".join(str(s) for s in (below, below + self.size_factor) if s)
                raise ValueError(
                    f"{name}={size} is not a multiple of {self.size_factor}, by which the autoencoder divides it; "
                    f"the nearest sizes that work: {nearest}"
                )

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim < 2 or z.shape[1] != self.latent_channels:
            raise ValueError(
                f"this autoencoder's latents have {self.latent_channels} channels, but got {tuple(z.shape)}; "
                "decode what a model trained on its latents made"
            )


def _per_channel(value: float | Sequence[float] | None, like: Tensor) -> Tensor | float:
    if isinstance(value, Sequence):
        return torch.tensor(value, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 2))
    return 1.0 if value is None else value


def _rows(tensor: Tensor | None, kept: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or kept is None else tensor[kept]


Coding = Callable[[Autoencoder, Tensor, Tensor | None], Tensor]  # (model, inputs, which of the batch or None for all)


def _in_half(model: Autoencoder, x: Tensor, dtype: torch.dtype, code: Coding) -> Tensor:
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        result = code(model, x, None).float()
    failed = ~result.isfinite().flatten(1).all(dim=1)
    if not failed.any():
        return result
    if dtype != torch.float32:
        warnings.warn(
            f"{int(failed.sum())} of {len(x)} overflowed {str(dtype)[6:]} in the autoencoder; computed again in "
            "float32. Choose bfloat16 or float32 to save the second attempt",
            stacklevel=3,
        )
        wide = next(model.parameters()).dtype in (torch.float32, torch.float64)
        wider = model if wide else copy.deepcopy(model).float()
        with torch.autocast(x.device.type, enabled=False):
            result[failed] = code(wider, x[failed].float(), failed).float()
    if not result.isfinite().all():
        raise FloatingPointError(
            "the autoencoder's result is not finite in float32 either: its input or its weights hold NaN or infinity"
        )
    return result


class SpatialAutoencoder(Autoencoder):
    """An encoder and a decoder of latent diffusion's kind around latents (B, latent_channels, H / f, W / f).

    channels: width of the first convolution; widths of the stages are multiples of it.
    stages: `Stage`s or plain dicts from the highest resolution down, f = 2 ** (number of stages - 1). Of a stage count
        depth, channel_mult, attention ("none" or "self", one head unless told otherwise) and resample ("conv" or
        "pool"). The decoder has one block a stage more.
    up_stages: the decoder's, in the same order, where they are not the encoder's.
    middle: the lowest point; by default two residual blocks with self-attention between them.
    inner_channels: width between the coders and the 1x1 convolutions beside the latents; default latent_channels.
    encoder_projection, decoder_projection: whether those convolutions are there.
    tanh: end the decoder in tanh, which bounds the image to [-1, 1]; no published autoencoder does.
    checkpointing: recompute blocks in the backward pass instead of storing their activations; settable later.

    `encode` and `decode` take `tile` and `overlap` in latent pixels (64 and 8 suit Stable Diffusion's) for images
    larger than memory, see tiling.py, and `slices` to code one image at a time. Tiles are for inference.

    Unlike the original, the last convolution of every residual branch starts at zero (`ResidualBlock`), so training
    from scratch starts from a plain chain of convolutions; loaded weights are not affected.
    """

    doubled = False  # whether the encoder gives two numbers a latent, as a distribution needs

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        *,
        latent_channels: int = 4,
        channels: int = 128,
        stages: Sequence[Stage | Mapping[str, Any]],
        up_stages: Sequence[Stage | Mapping[str, Any]] | None = None,
        middle: Stage | Mapping[str, Any] | None = None,
        inner_channels: int | None = None,
        encoder_projection: bool = True,
        decoder_projection: bool = True,
        dropout: float = 0.0,
        norm_groups: int = 32,
        tanh: bool = False,
        checkpointing: bool = False,
        scale_factor: float | Sequence[float] | None = None,
        shift: float | Sequence[float] = 0.0,
    ) -> None:
        down = tuple(map(Stage.parse, stages))
        up = down if up_stages is None else tuple(map(Stage.parse, up_stages))
        middle = Stage(depth=2, attention="self") if middle is None else Stage.parse(middle)
        _check_stages(down, up, middle)
        super().__init__(
            in_channels=in_channels,
            latent_channels=latent_channels,
            size_factor=2 ** (len(down) - 1),
            scale_factor=scale_factor,
            shift=shift,
        )
        inner = latent_channels if inner_channels is None else inner_channels
        if inner != latent_channels and not (encoder_projection and decoder_projection):
            raise ValueError(
                f"inner_channels={inner} and latent_channels={latent_channels} differ, so both projections are needed"
            )
        self.out_channels = out_channels
        shared = {"channels": channels, "middle": middle, "dropout": dropout}
        shared |= {"norm_groups": norm_groups, "checkpointing": checkpointing}
        times = 2 if self.doubled else 1
        self.encoder = Encoder(in_channels, times * inner, stages=down, **shared)
        self.to_latent = nn.Conv2d(times * inner, times * latent_channels, 1) if encoder_projection else None
        self.from_latent = nn.Conv2d(latent_channels, inner, 1) if decoder_projection else None
        self.decoder = Decoder(inner, out_channels, stages=up, tanh=tanh, **shared)
        self.to(memory_format=torch.channels_last)

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where the adaptive weight of an adversarial loss compares gradients."""
        return self.decoder.conv_out.weight

    def _encoded(self, x: Tensor, *, tile: int | None = None, overlap: int = 8, slices: bool = False) -> Tensor:
        """What leaves the projection: moments, or latents before quantisation."""
        self._check_image(x.shape)
        if slices:
            return torch.cat([self._encoded(image, tile=tile, overlap=overlap) for image in x.split(1)])
        h = self.encoder(x) if tile is None else self.encoder.lower(self._in_tiles(self.encoder, x, tile, overlap))
        return (h if self.to_latent is None else self.to_latent(h)).contiguous()

    def _decoded(self, z: Tensor, *, tile: int | None = None, overlap: int = 8, slices: bool = False) -> Tensor:
        """Images from latents that are not normalised."""
        if slices:
            return torch.cat([self._decoded(latent, tile=tile, overlap=overlap) for latent in z.split(1)])
        z = z if self.from_latent is None else self.from_latent(z)
        if tile is None:
            return self.decoder(z)
        return self._in_tiles(self.decoder, self.decoder.lower(z), tile, overlap)

    def _in_tiles(self, way: Encoder | Decoder, x: Tensor, tile: int, overlap: int) -> Tensor:
        """The upper levels in tiles; tile and overlap in latent pixels."""
        fine = 2**way.split  # pixels of the image to one of the lower levels'
        steps = self.size_factor // fine  # of those to one of the latents
        units = {"unit": fine, "out_unit": 1} if way is self.encoder else {"unit": 1, "out_unit": fine}
        tiles = Tiles(tile * steps, overlap * steps, way.reach, **units)
        return in_tiles(way.upper, x, tiles, way.upper_norms)


def _check_stages(down: Sequence[Stage], up: Sequence[Stage], middle: Stage) -> None:
    if not down or len(down) != len(up):
        raise ValueError(f"{len(down)} stages and {len(up)} up_stages; give at least one, and as many of both")
    for stage in (*down, *up, middle):
        kinds = {stage.attention_at(number) for number in range(stage.depth + 1)}
        if "cross" in kinds or stage.resample == "residual" or stage.residual_scale is not None:
            raise ValueError(
                "an autoencoder's stages take attention 'none' or 'self', resample 'conv' or 'pool', and no "
                f"residual_scale; got {stage}"
            )


class AutoencoderKL(SpatialAutoencoder):
    """Images to Gaussian latents and back: the variational autoencoder of latent and Stable Diffusion.

    Settings: see `SpatialAutoencoder`, and `Autoencoder` for scale_factor and shift.
    """

    doubled = True

    def moments(self, x: Tensor, **how: Any) -> Moments:
        """q(z | x) of images x (B, C, H, W) in [-1, 1], not normalised; `how`: tile, overlap, slices."""
        mean, logvar = self._encoded(x, **how).chunk(2, dim=1)
        return Moments(mean, logvar.clamp(-30.0, 20.0))

    def encode(self, x: Tensor, noise: Tensor | None = None, **how: Any) -> Tensor:
        """Normalised latents of images (B, C, H, W): the mode, or with noise of the latents' shape a sample."""
        moments = self.moments(x, **how)
        return self.normalise(moments.mean if noise is None else moments.sample(noise))

    def decode(self, z: Tensor, **how: Any) -> Tensor:
        """Images (B, C, H, W) from normalised latents; `how`: tile, overlap, slices."""
        self._check_latents(z)
        return self._decoded(self.denormalise(z), **how)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> AutoencoderOutput:
        """Reconstruct images from the mode, or with noise from a sample, as training does."""
        moments = self.moments(x)
        z = moments.mean if noise is None else moments.sample(noise)
        return AutoencoderOutput(self._decoded(z), moments)
