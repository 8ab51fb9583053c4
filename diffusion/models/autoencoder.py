"""Which autoencoder turns images into latents and back? Latent diffusion's, and what all kinds of them share.

AutoencoderKL of Rombach et al. 2022 (arXiv 2112.10752, section 3.1 and appendix G) as Stable Diffusion uses it; its
relatives are in vq.py and conv_vae.py.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion.models.attention import SelfAttention
from diffusion.models.layers import Downsample, ResidualBlock, Upsample, group_norm, silu
from diffusion.models.tiling import in_tiles
from diffusion.models.unet import Block, Level, Stage

NORM_EPS = 1e-6  # of all of the original's norms, unlike the UNet's 1e-5


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
                    f"{name} has {len(value)} entries, but there are {latent_channels} latent channels; give one number "
                    "for all, or one a channel"
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
            f"{int(failed.sum())} of {len(x)} overflowed {str(dtype)[6:]} in the autoencoder; computed again in float32. "
            "Choose bfloat16 or float32 to save the second attempt",
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


class FoldedUpsample(Upsample):
    """`Upsample` by a convolution that is folded with the repetition of pixels where no gradient is tracked.

    Each of the four pixels that one becomes sees 2x2 different neighbours under the 3x3 kernel, so four kernels of 2x2
    summed weights give the same numbers for 4/9 of the multiplications, and the repeated image is never stored.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.conv is None:
            return super().forward(x)
        batch, _, height, width = x.shape
        weight, bias = self.conv.weight, self.conv.bias
        out = None
        for down in range(2):
            for right in range(2):
                kernel = _fold(_fold(weight, down, 2), right, 3).contiguous(memory_format=torch.channels_last)
                y = F.conv2d(x, kernel, bias, padding=1)[..., down : down + height, right : right + width]
                if out is None:
                    shape = (batch, y.shape[1], 2 * height, 2 * width)
                    out = y.new_empty(shape).contiguous(memory_format=torch.channels_last)
                out[..., down::2, right::2] = y
        return out


def _fold(weight: Tensor, late: int, dim: int) -> Tensor:
    """The three taps along `dim` as the two that the early or late pixel of a repeated pair sees."""
    first, middle, last = weight.split(1, dim)
    return torch.cat([first + middle, last] if late else [first, middle + last], dim)


def _run(module: nn.Module, h: Tensor, *, checkpointing: bool) -> Tensor:
    """A block or a resampling module on h; with `checkpointing` recomputed in the backward pass."""
    args = (None, None, None) if isinstance(module, Block) else ()
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(module, h, *args, use_reentrant=False)
    return module(h, *args)


class _Way(nn.Module):
    """What encoder and decoder share. Both run in two parts: the upper levels, fit for tiles, and the rest.

    split: how many levels the upper part has: two, which take most of the memory, but none with attention, and never
    the lowest level. The rest looks at the whole image, so that tiles agree on what attention and most norms say.
    """

    tiled_levels = 2

    def __init__(self, stages: Sequence[Stage], *, dropout: float, norm_groups: int, checkpointing: bool) -> None:
        super().__init__()
        attends = [number for number, stage in enumerate(stages) if stage.attention != "none"]
        self.split = min([*attends, len(stages) - 1, self.tiled_levels])
        self.size_factor = 2 ** (len(stages) - 1)
        self.checkpointing = checkpointing
        self._norm = {"norm_groups": norm_groups, "norm_eps": NORM_EPS}
        self._dropout = dropout

    def _block(self, stage: Stage, number: int, in_channels: int, out_channels: int) -> Block:
        attention = None
        if stage.attention_at(number) == "self":
            heads = {"num_heads": stage.num_heads, "head_channels": stage.head_channels}
            attention = SelfAttention(out_channels, **heads, **self._norm)
        return Block(ResidualBlock(in_channels, out_channels, dropout=self._dropout, **self._norm), attention)

    def _middle(self, stage: Stage, width: int) -> nn.ModuleList:
        last = stage.depth - 1
        blocks = [
            self._block(replace(stage, attention="none") if i == last else stage, i, width, width)
            for i in range(stage.depth)
        ]
        return nn.ModuleList(blocks)

    def _through(self, modules: Sequence[nn.Module], h: Tensor) -> Tensor:
        for module in modules:
            h = _run(module, h, checkpointing=self.checkpointing)
        return h


class Encoder(_Way):
    """Images (B, C, H, W) -> (B, out_channels, H / f, W / f)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: int,
        stages: Sequence[Stage],
        middle: Stage,
        **settings: Any,
    ) -> None:
        super().__init__(stages, **settings)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        levels, width = [], channels
        for number, stage in enumerate(stages):
            out = round(channels * stage.channel_mult)
            blocks = [self._block(stage, i, width if i == 0 else out, out) for i in range(stage.depth)]
            last = number + 1 == len(stages)
            levels.append(Level(blocks, None if last else Downsample(out, stage.resample or "conv", padding=0)))
            width = out if stage.depth else width
        self.down = nn.ModuleList(levels)
        self.middle = self._middle(middle, width)
        self.norm_out = group_norm(self._norm["norm_groups"], width, NORM_EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lower(self.upper(x))

    def upper(self, x: Tensor) -> Tensor:
        """The levels above the split."""
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for level in self.down[: self.split]:
            h = self._through([*level.blocks, level.resample], h)
        return h

    @property
    def reach(self) -> float:
        """How far the convolutions of `upper` look, in pixels of its result: one pixel a convolution at its scale."""
        pixels = 1.0 / 2**self.split  # the first convolution
        for number in range(self.split):
            pixels += (2 * len(self.down[number].blocks) + 1) / 2 ** (self.split - number)
        return pixels

    def lower(self, h: Tensor) -> Tensor:
        """The levels below the split, the middle and the end."""
        for level in self.down[self.split :]:
            h = self._through([*level.blocks, *([] if level.resample is None else [level.resample])], h)
        h = self._through(self.middle, h)
        return self.conv_out(silu(self.norm_out(h)))


class Decoder(_Way):
    """Latents (B, C, h, w) -> images (B, out_channels, h * f, w * f); one residual block a level more than the encoder."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: int,
        stages: Sequence[Stage],
        middle: Stage,
        tanh: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(stages, **settings)
        self.tanh = tanh
        width = round(channels * stages[-1].channel_mult)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.middle = self._middle(middle, width)
        levels: list[Level] = []
        for number, stage in reversed(list(enumerate(stages))):
            out = round(channels * stage.channel_mult)
            blocks = [self._block(stage, i, width if i == 0 else out, out) for i in range(stage.depth + 1)]
            levels.append(Level(blocks, FoldedUpsample(out, stage.resample or "conv") if number else None))
            width = out
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = group_norm(self._norm["norm_groups"], width, NORM_EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.upper(self.lower(z))

    def lower(self, z: Tensor) -> Tensor:
        """The start, the middle and the levels below the split."""
        h = self._through(self.middle, self.conv_in(z.contiguous(memory_format=torch.channels_last)))
        for number in range(len(self.up) - 1, self.split - 1, -1):
            h = self._through(self.up[number].blocks, h)
            if number > self.split:
                h = self._through([self.up[number].resample], h)
        return h

    def upper(self, h: Tensor) -> Tensor:
        """The levels above the split, from the enlargement to their resolution on, and the end."""
        for number in range(self.split - 1, -1, -1):
            h = self._through([self.up[number + 1].resample, *self.up[number].blocks], h)
        h = self.conv_out(silu(self.norm_out(h))).contiguous()
        return h.tanh() if self.tanh else h

    @property
    def reach(self) -> float:
        """How far the convolutions of `upper` look, in pixels of its input: one pixel a convolution at its scale."""
        pixels = 1.0 / 2**self.split  # the last convolution
        for number in range(self.split):
            pixels += (1 + 2 * len(self.up[number].blocks)) / 2 ** (self.split - number)
        return pixels


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

    Unlike the original, the last convolution of every residual branch starts at zero (`ResidualBlock`), so training from
    scratch starts from a plain chain of convolutions; loaded weights are not affected.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        latent_channels: int,
        channels: int,
        stages: Sequence[Stage | Mapping[str, Any]],
        up_stages: Sequence[Stage | Mapping[str, Any]] | None,
        middle: Stage | Mapping[str, Any] | None,
        inner_channels: int | None,
        encoder_projection: bool,
        decoder_projection: bool,
        doubled: bool,
        dropout: float,
        norm_groups: int,
        tanh: bool,
        checkpointing: bool,
        scale_factor: float | Sequence[float] | None,
        shift: float | Sequence[float],
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
        times = 2 if doubled else 1
        self.encoder = Encoder(in_channels, times * inner, stages=down, **shared)
        self.to_latent = nn.Conv2d(times * inner, times * latent_channels, 1) if encoder_projection else None
        self.from_latent = nn.Conv2d(latent_channels, inner, 1) if decoder_projection else None
        self.decoder = Decoder(inner, out_channels, stages=up, tanh=tanh, **shared)
        self.to(memory_format=torch.channels_last)

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where the adaptive weight of an adversarial loss compares gradients."""
        return self.decoder.conv_out.weight

    def _encoded(self, x: Tensor, *, tile: int | None = None, overlap: int = 16, slices: bool = False) -> Tensor:
        """What leaves the projection: moments, or latents before quantisation."""
        self._check_image(x.shape)
        if slices:
            return torch.cat([self._encoded(image, tile=tile, overlap=overlap) for image in x.split(1)])
        h = _in_parts(self.encoder.upper, self.encoder, x, tile, overlap, self.size_factor, encodes=True)
        h = self.encoder.lower(h)
        return (h if self.to_latent is None else self.to_latent(h)).contiguous()

    def _decoded(self, z: Tensor, *, tile: int | None = None, overlap: int = 16, slices: bool = False) -> Tensor:
        """Images from latents that are not normalised."""
        if slices:
            return torch.cat([self._decoded(latent, tile=tile, overlap=overlap) for latent in z.split(1)])
        h = self.decoder.lower(z if self.from_latent is None else self.from_latent(z))
        return _in_parts(self.decoder.upper, self.decoder, h, tile, overlap, self.size_factor, encodes=False)


def _in_parts(
    upper: Callable[[Tensor], Tensor],
    way: Encoder | Decoder,
    x: Tensor,
    tile: int | None,
    overlap: int,
    size_factor: int,
    *,
    encodes: bool,
) -> Tensor:
    """`upper(x)`, in tiles if `tile` says so; tile and overlap in latent pixels."""
    if tile is None or way.split == 0:
        return upper(x)
    fine = 2**way.split  # pixels of the image to one of the split
    steps = size_factor // fine  # pixels of the split to one of the latents
    units = {"unit": fine, "out_unit": 1} if encodes else {"unit": 1, "out_unit": fine}
    return in_tiles(upper, x, tile=tile * steps, overlap=overlap * steps, margin=way.reach, **units)


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

    Settings: see `SpatialAutoencoder`, and `Autoencoder` for scale_factor and shift. `encode`, `decode` and `moments`
    take `tile` and `overlap` in latent pixels for images larger than memory, and `slices` for one image at a time.
    """

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
        super().__init__(
            in_channels,
            out_channels,
            latent_channels=latent_channels,
            channels=channels,
            stages=stages,
            up_stages=up_stages,
            middle=middle,
            inner_channels=inner_channels,
            encoder_projection=encoder_projection,
            decoder_projection=decoder_projection,
            doubled=True,
            dropout=dropout,
            norm_groups=norm_groups,
            tanh=tanh,
            checkpointing=checkpointing,
            scale_factor=scale_factor,
            shift=shift,
        )

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
