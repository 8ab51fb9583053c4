"""Which patches of an image look real? The PatchGAN discriminator of pix2pix (1611.07004) as VQGAN and LDM use it."""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

NORMS = ("batch", "act", "none")


class ActNorm(nn.Module):
    """One scale and shift a channel, set by the first training batch to zero mean and unit variance (1807.03039)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialised", torch.tensor(False))
        self._asked = False  # asking the buffer each time would wait for the device

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self._asked:
            self._initialise(x.detach())
        return self.scale * (x + self.shift)

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        """Fit this batch, unless a checkpoint brought what an earlier one gave."""
        mean, std = x.float().mean((0, 2, 3), keepdim=True), x.float().std((0, 2, 3), keepdim=True)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            mean, std = pooled(mean, std, count=x.numel() // x.shape[1])  # all devices must begin with the same weights
        self.shift.copy_(torch.where(self.initialised, self.shift, -mean))
        self.scale.copy_(torch.where(self.initialised, self.scale, 1 / (std + 1e-6)))
        self.initialised.fill_(True)
        self._asked = True


def pooled(mean: Tensor, std: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the values of all devices together, of which each has `count`."""
    devices = dist.get_world_size()
    moments = torch.stack([mean, std.square() * (count - 1) / count + mean.square()]).double()
    dist.all_reduce(moments)
    mean, square = moments / devices
    total = devices * count
    return mean.float(), ((square - mean.square()).clamp(min=0) * total / (total - 1)).sqrt().float()


class PatchDiscriminator(nn.Module):
    """(B, C, H, W) in [-1, 1] -> logits (B, 1, h, w), one a patch: positive says real.

    `num_layers` strided 4x4 convolutions double the width up to eight times `channels`, two more end in the logits: 3
    give patches of 70x70 pixels, one logit every 8. `norm` is batch, act or none. Weights begin as normal(0, 0.02),
    norm weights as normal(1, 0.02), biases as they are in pix2pix and taming. Too small an image raises ValueError.
    """

    def __init__(self, in_channels: int = 3, *, channels: int = 64, num_layers: int = 3, norm: str = "batch") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"discriminator.norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if num_layers < 1 or channels < 1:
            raise ValueError(f"discriminator needs num_layers, channels >= 1, got {num_layers} and {channels}")
        self.in_channels, self.num_layers = in_channels, num_layers
        widths = [min(2**i, 8) * channels for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, padding=1), nn.LeakyReLU(0.2, True)]
        for i, (narrow, wide) in enumerate(pairwise(widths)):
            stride = 1 if i == num_layers - 1 else 2
            bias = norm != "batch"  # BatchNorm would take it away
            layers += [nn.Conv2d(narrow, wide, 4, stride, padding=1, bias=bias), *_norm(norm, wide)]
            layers += [nn.LeakyReLU(0.2, True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers.apply(_initialise)

    @property
    def min_size(self) -> int:
        """The least height and width that leave a logit."""
        return 3 * 2**self.num_layers

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.min_size:
            raise ValueError(
                f"a discriminator of {self.num_layers} layers needs images of at least {self.min_size} pixels a side, "
                f"these have {x.shape[2]}x{x.shape[3]}; set discriminator.num_layers lower"
            )
        return self.layers(x)


def _norm(kind: str, channels: int) -> list[nn.Module]:
    match kind:
        case "batch":
            return [nn.BatchNorm2d(channels)]
        case "act":
            return [ActNorm(channels)]
    return []


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
