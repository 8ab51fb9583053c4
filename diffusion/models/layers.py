"""What are the networks' convolutional parts: embeddings of time and vectors, residual blocks, resampling?

ADM (Dhariwal & Nichol 2021, appendix A) and its descendants Stable Diffusion 1, 2 and XL, in one set of modules.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, *, max_period: float = 10_000.0, freq_shift: float = 0.0) -> Tensor:
    """Sinusoids (B, dim) of timesteps or other scalars t (B,), integer or fractional: cosines first, then sines.

    The frequencies fall geometrically from 1 to about 1 / max_period; an odd `dim` ends in a column of zeros.
    `freq_shift` 1 makes the last frequency exactly 1 / max_period (the original DDPM code). Always computed in float32,
    like all peers: the rounding of t * frequency is part of what trained weights expect.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * steps / (half - freq_shift))
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


Module = TypeVar("Module", bound=nn.Module)


def zero_init(module: Module) -> Module:
    """Zero the module's parameters, so that the branch it ends is the identity (or the net's output 0) at the start."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(groups: int, channels: int, eps: float) -> nn.GroupNorm:
    """GroupNorm that names the culprit when the channels cannot be split evenly."""
    if channels % groups:
        raise ValueError(
            f"{channels} channels cannot be split into {groups} normalisation groups; "
            f"choose norm_groups among the divisors of {channels} or change channels * channel_mult"
        )
    return nn.GroupNorm(groups, channels, eps=eps)


def silu(x: Tensor) -> Tensor:
    """SiLU that overwrites its argument where no gradient can need it: fresh memory costs more than the maths."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def add(h: Tensor, x: Tensor) -> Tensor:
    """h + x, in h's memory where no gradient is tracked (linear layers return views while it is, which resist)."""
    return h + x if torch.is_grad_enabled() else h.add_(x)


class TokenLinear(nn.Linear):
    """`nn.Linear` over tokens (B, L, C), computed as a 1x1 convolution where that is faster.

    PyTorch multiplies float32 matrices on CPUs by MKL, which runs at half the speed of oneDNN's convolutions on AMD
    machines (92 against 205 GFLOP/s a core, forward and backward). Sixteen rows, because with fewer images and one
    thread PyTorch does not ask oneDNN.
    """

    rows = 16
    worthwhile = 2**22  # multiplications; below, calling a convolution costs more than it saves

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.numel() // self.in_features
        if not self._as_convolution(x, tokens):
            return F.linear(x, self.weight, self.bias)
        image = x.reshape(self.rows, 1, -1, self.in_features).permute(0, 3, 1, 2)
        h = F.conv2d(image, self.weight[:, :, None, None], self.bias)
        return h.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)

    def _as_convolution(self, x: Tensor, tokens: int) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and tokens % self.rows == 0
            and tokens * self.weight.numel() >= self.worthwhile
            and torch.backends.mkldnn.is_available()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )


class EmbeddingMLP(nn.Module):
    """Two linear layers with SiLU between them: sinusoids or a vector (B, in) -> embedding (B, out)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(in_channels, out_channels)
        self.linear_out = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(F.silu(self.linear_in(x)))


class Downsample(nn.Module):
    """Halve H and W by a strided 3x3 convolution or, if `kind` is "pool", by averaging.

    `padding` 0 pads right and bottom only (the original DDPM code and the Stable Diffusion autoencoder), 1 all sides.
    """

    def __init__(self, channels: int, kind: str = "conv", *, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding) if kind == "conv" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W by repeating pixels, followed by a 3x3 convolution unless `kind` is "pool".

    What goes beyond `size` (H, W) is cut off in between.
    """

    def __init__(self, channels: int, kind: str = "conv") -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if kind == "conv" else None

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = x if size is None or x.shape[-2:] == tuple(size) else x[..., : size[0], : size[1]]
        return x if self.conv is None else self.conv(x)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, embedding, norm, SiLU, dropout, conv, plus the input: the UNet's unit of depth.

    The embedding enters as norm(h) * (1 + scale) + shift if `modulation` is "scale_shift" (AdaGN) or as h + shift
    before the second norm if it is "shift". `resample` "down" or "up" makes it a BigGAN block: h after the first SiLU
    and the input are both pooled or repeated. `residual_scale` multiplies the sum (1/sqrt(2) in NCSN++). Without
    `embedding_channels` it takes no embedding (autoencoders).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_channels: int | None = None,
        modulation: str = "scale_shift",
        resample: str | None = None,
        dropout: float = 0.0,
        skip_kernel: int = 1,
        residual_scale: float = 1.0,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.residual_scale = residual_scale
        self.scale_shift = modulation == "scale_shift" and embedding_channels is not None
        self.norm_in = group_norm(norm_groups, in_channels, norm_eps)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = None
        if embedding_channels is not None:
            self.embedding = nn.Linear(embedding_channels, out_channels * (2 if self.scale_shift else 1))
        self.norm_out = group_norm(norm_groups, out_channels, norm_eps)
        self.conv_out = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = None
        if in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, skip_kernel, padding=skip_kernel // 2)
        self.resample = {"down": Downsample, "up": Upsample}[resample](in_channels, "pool") if resample else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), embedding (B, E) already through its SiLU (every block would apply the same one)."""
        h = silu(self.norm_in(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_in(h)
        h = silu(self._modulate(h, embedding))
        if self.training and self.dropout:
            h = F.dropout(h, self.dropout)
        h = self.conv_out(h)
        # The convolution's output is needed by no backward pass, so the sum may overwrite it.
        h = h.add_(x if self.skip is None else self.skip(x))
        return h if self.residual_scale == 1.0 else h.mul_(self.residual_scale)

    def _modulate(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        if self.embedding is None:
            return self.norm_out(h)
        shift = self.embedding(embedding)[:, :, None, None]
        if not self.scale_shift:
            return self.norm_out(h.add_(shift))
        scale, shift = shift.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm_out(h), 1 + scale)
