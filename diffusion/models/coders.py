"""What are the two halves of latent diffusion's autoencoders? Residual encoder and decoder, in parts that fit in tiles.

Rombach et al. 2022 (arXiv 2112.10752, appendix G), after Esser et al. 2021 (arXiv 2012.09841).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion.models.attention import SelfAttention
from diffusion.models.layers import Downsample, ResidualBlock, Upsample, group_norm, silu
from diffusion.models.tiling import Place, norm_places
from diffusion.models.unet import Block, Level, Stage

NORM_EPS = 1e-6  # of all of the original's norms, unlike the UNet's 1e-5


class FoldedUpsample(Upsample):
    """`Upsample` by a convolution that is folded with the repetition of pixels where no gradient is tracked.

    Each of the four pixels that one becomes sees 2x2 different neighbours under the 3x3 kernel, so four kernels of 2x2
    summed weights give the same numbers for 4/9 of the multiplications, and the repeated image is never stored.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.conv is None:
            return super().forward(x)
        weight, bias = self.conv.weight, self.conv.bias
        height, width = x.shape[-2:]
        out = None
        for down in range(2):
            for right in range(2):
                kernel = _fold(_fold(weight, down, 2), right, 3).contiguous(memory_format=torch.channels_last)
                y = F.conv2d(x, kernel, bias, padding=1)[..., down : down + height, right : right + width]
                if out is None:
                    shape = (*y.shape[:2], 2 * height, 2 * width)
                    out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
                out[..., down::2, right::2] = y
        return out


def _fold(weight: Tensor, late: int, dim: int) -> Tensor:
    """The three taps along `dim` as the two that the early or late pixel of a repeated pair sees."""
    first, middle, last = weight.split(1, dim)
    return torch.cat([first + middle, last] if late else [first, middle + last], dim)


class Coder(nn.Module):
    """What encoder and decoder share. Both run in two parts: the upper levels, fit for tiles, and the rest.

    split: how many levels the upper part has: `tiled_levels`, which take most of the memory, but none with attention,
    and never the lowest level. The rest looks at the whole image, so that tiles agree on what attention and most norms
    say.
    """

    tiled_levels = 2

    def __init__(self, stages: Sequence[Stage], *, dropout: float, norm_groups: int, checkpointing: bool) -> None:
        super().__init__()
        attends = [number for number, stage in enumerate(stages) if stage.attention != "none"]
        self.split = min([*attends, len(stages) - 1, self.tiled_levels])
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
        """The stage's blocks with its attention between them, none after the last."""
        plain = replace(stage, attention="none")
        last = stage.depth - 1
        return nn.ModuleList(self._block(plain if i == last else stage, i, width, width) for i in range(stage.depth))

    def _step(self, module: nn.Module, h: Tensor) -> Tensor:
        """h after a block or a resampling module. The caller's loop must not keep the h before."""
        args = (None, None, None) if isinstance(module, Block) else ()
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, h, *args, use_reentrant=False)
        return module(h, *args)

    def _end(self, h: Tensor) -> Tensor:
        return self.conv_out(silu(self.norm_out(h)))


class Encoder(Coder):
    """Images (B, C, H, W) -> (B, out_channels, H / f, W / f)."""

    tiled_levels = 3  # with two, the third takes more memory than a tile of the others

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
            width = out if blocks else width
            last = number + 1 == len(stages)
            levels.append(Level(blocks, None if last else Downsample(width, stage.resample or "conv", padding=0)))
        self.down = nn.ModuleList(levels)
        self.middle = self._middle(middle, width)
        self.norm_out = group_norm(self._norm["norm_groups"], width, NORM_EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lower(self.upper(x))

    def upper(self, x: Tensor) -> Tensor:
        """The levels above the split."""
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for module in (module for level in self.down[: self.split] for module in (*level.blocks, level.resample)):
            h = self._step(module, h)
        return h

    def lower(self, h: Tensor) -> Tensor:
        """The levels below the split, the middle and the end."""
        levels = [module for level in self.down[self.split :] for module in (*level.blocks, level.resample)]
        for module in (*levels[:-1], *self.middle):
            h = self._step(module, h)
        return self._end(h)

    @property
    def upper_norms(self) -> list[Place]:
        """The group norms of the upper levels."""
        return norm_places(self.down[: self.split])

    @property
    def reach(self) -> float:
        """How far the convolutions of `upper` look, in pixels of its result: one pixel a convolution at its scale."""
        pixels = 1.0 / 2**self.split  # the first convolution
        for number in range(self.split):
            pixels += (2 * len(self.down[number].blocks) + 1) / 2 ** (self.split - number)
        return pixels


class Decoder(Coder):
    """Latents (B, C, h, w) -> images (B, out_channels, h * f, w * f), with one residual block more a level."""

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
        h = self._start(z)
        for module in self._way:
            h = self._step(module, h)
        return self._finish(h)

    def lower(self, z: Tensor) -> Tensor:
        """The start, the middle and the levels below the split."""
        h = self._start(z)
        for module in self._way[: len(self._way) - self._upper_count]:
            h = self._step(module, h)
        return h

    def upper(self, h: Tensor) -> Tensor:
        """The levels above the split, from the enlargement to their resolution on, and the end."""
        for module in self._way[len(self._way) - self._upper_count :]:
            h = self._step(module, h)
        return self._finish(h)

    @property
    def upper_norms(self) -> list[Place]:
        """The group norms of the upper levels and the end."""
        return [*norm_places(self.up[: self.split]), (self, "norm_out")]

    @property
    def reach(self) -> float:
        """How far the convolutions of `upper` look, in pixels of its input: one pixel a convolution at its scale."""
        pixels = 1.0 / 2**self.split  # the last convolution
        for number in range(self.split):
            pixels += (1 + 2 * len(self.up[number].blocks)) / 2 ** (self.split - number)
        return pixels

    @property
    def _way(self) -> list[nn.Module]:
        """Blocks and resampling modules from the middle to the end."""
        levels = [module for level in reversed(self.up) for module in (*level.blocks, level.resample)]
        return [*self.middle, *levels[:-1]]

    @property
    def _upper_count(self) -> int:
        return sum(len(level.blocks) + 1 for level in self.up[: self.split])

    def _start(self, z: Tensor) -> Tensor:
        return self.conv_in(z.contiguous(memory_format=torch.channels_last))

    def _finish(self, h: Tensor) -> Tensor:
        h = self._end(h).contiguous()
        return h.tanh() if self.tanh else h
