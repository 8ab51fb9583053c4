"""Which class does a noisy image show? The half of a UNet that goes down its stages, and one of four heads.

Dhariwal & Nichol 2021 (arXiv 2105.05233, appendix A and section 4): the noisy classifiers that guide ADM.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.models.attention import attend, head_layout, to_tokens
from diffusion.models.layers import group_norm, silu, zero_init
from diffusion.models.stages import Stage, StageNetwork, choose

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


class AveragePool(nn.Module):
    """Norm, SiLU, mean over the pixels, linear layer, zero at the start (guided-diffusion's "adaptive")."""

    def __init__(self, channels: int, num_classes: int, *, norm_groups: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = group_norm(norm_groups, channels, norm_eps)
        self.out = zero_init(nn.Linear(channels, num_classes))

    def forward(self, h: Tensor) -> Tensor:
        """(B, num_classes) from the activations h (B, C, H, W)."""
        return self.out(silu(self.norm(h)).mean((2, 3)))


class AttentionPool(nn.Module):
    """Norm, SiLU, and attention of the mean of all pixels to itself and to them, as CLIP pools (arXiv 2103.00020).

    size: side of the square of pixels, each of which has a learned position; so has the mean, the first of them.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        size: int,
        num_heads: int | None,
        head_channels: int | None,
        norm_groups: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.num_heads, _ = head_layout(channels, num_heads, head_channels)
        self.norm = group_norm(norm_groups, channels, norm_eps)
        self.position = nn.Parameter(torch.randn(size**2 + 1, channels) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, num_classes)

    def forward(self, h: Tensor) -> Tensor:
        """(B, num_classes) from the activations h (B, C, size, size)."""
        tokens = to_tokens(silu(self.norm(h)))
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.position
        width = tokens.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        query = F.linear(tokens[:, :1], weight[:width], bias[:width])  # of the mean alone: no other answer is used
        key, value = F.linear(tokens, weight[width:], bias[width:]).chunk(2, dim=-1)
        return self.out(attend(query, key, value, self.num_heads).squeeze(1))


class LevelPool(nn.Module):
    """A perceptron over the means of the activations after every part of the way down and after the middle.

    "spatial" has a ReLU between its layers, "spatial_v2" a norm and a SiLU.
    """

    def __init__(
        self, features: int, num_classes: int, *, channels: int, normed: bool, norm_groups: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, channels)
        self.norm = group_norm(norm_groups, channels, norm_eps) if normed else None
        self.out = nn.Linear(channels, num_classes)

    def forward(self, means: Tensor) -> Tensor:
        """(B, num_classes) from the means (B, features)."""
        h = self.hidden(means)
        return self.out(F.relu(h) if self.norm is None else silu(self.norm(h)))


class Classifier(StageNetwork):
    """Logits (B, num_classes) of x_t (B, C, H, W) at timesteps t (B,); `net(x, t)`.

    in_channels, image_size: of the images, or of the latents that it judges.
    pool: the head, "adaptive" (mean of the pixels), "attention" (for images of exactly image_size; its heads are the
        last stage's), "spatial" or "spatial_v2" (means of all levels, through `pool_channels` hidden units).
    All else as in `UNet`; the middle is two residual blocks with self-attention unless it is given.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        *,
        image_size: int,
        channels: int = 128,
        stages: Sequence[Stage | Mapping[str, Any]],
        middle: Stage | Mapping[str, Any] | None = None,
        pool: str = "attention",
        pool_channels: int = 2048,
        modulation: str = "scale_shift",
        resample: str = "conv",
        num_heads: int | None = None,
        head_channels: int | None = None,
        dropout: float = 0.0,
        residual_scale: float = 1.0,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
        embedding_channels: int | None = None,
        freq_shift: float = 0.0,
        downsample_padding: int = 1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            channels=channels,
            modulation=modulation,
            resample=resample,
            num_heads=num_heads,
            head_channels=head_channels,
            dropout=dropout,
            residual_scale=residual_scale,
            norm_groups=norm_groups,
            norm_eps=norm_eps,
            embedding_channels=embedding_channels,
            freq_shift=freq_shift,
            downsample_padding=downsample_padding,
            checkpointing=checkpointing,
        )
        choose("pool", pool, POOLS)
        if num_classes is None or num_classes < 1:
            raise ValueError(
                f"a classifier needs classes, got num_classes={num_classes}; choose data with labels, or say how many "
                "classes they have: data.num_classes=N"
            )
        self.num_classes, self.image_size, self.pool = num_classes, image_size, pool
        parsed = tuple(map(Stage.parse, stages))
        features = self._add_way_down(parsed, middle)
        self._check_size(image_size, image_size)
        self.head = self._head(parsed[-1], features, pool_channels)
        self.to(memory_format=torch.channels_last)

    def _head(self, last: Stage, features: Sequence[int], pool_channels: int) -> nn.Module:
        width = features[-1]
        if self.pool == "adaptive":
            return AveragePool(width, self.num_classes, **self._norm)
        if self.pool == "attention":
            size = self.image_size // self.size_factor
            return AttentionPool(width, self.num_classes, size=size, **self._heads(last), **self._norm)
        normed = self.pool == "spatial_v2"
        total = sum(features) + width
        return LevelPool(total, self.num_classes, channels=pool_channels, normed=normed, **self._norm)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, num_classes) from x (B, C, H, W) and timesteps t (B,), integer or fractional."""
        self._check_input(x)
        emb = F.silu(self._embed_time(x, t))
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        means = [h.mean((2, 3))] if self._reads_levels else []
        for part in self._way_down():
            h = self._step(part, h, emb)
            if self._reads_levels:
                means.append(h.mean((2, 3)))
        for block in self.middle:
            h = self._step(block, h, emb)
        return self.head(torch.cat([*means, h.mean((2, 3))], dim=1) if self._reads_levels else h)

    @property
    def _reads_levels(self) -> bool:
        return isinstance(self.head, LevelPool)

    def _check_input(self, x: Tensor) -> None:
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"the classifier takes images of {self.in_channels} channels, but got {x.shape[1]}; take one that was "
                "trained on such images"
            )
        self._check_size(*x.shape[-2:])
        if self.pool == "attention" and tuple(x.shape[-2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"the classifier's attention pool takes {self.image_size}x{self.image_size}, but got "
                f"{x.shape[-2]}x{x.shape[-1]}; take one for that size, or one with another pool"
            )
