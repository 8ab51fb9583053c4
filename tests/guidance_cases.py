"""Data whose classes, denoiser and classifier are known exactly: what the tests of classifier guidance share."""

from dataclasses import dataclass

import torch
from oracles import Gaussian, normal
from torch import Tensor, nn

from diffusion.generate import generate
from diffusion.guidance import ClassifierGuidance
from diffusion.process import GaussianDiffusion
from diffusion.sampling import Sampler
from diffusion.schedule import linear

SHAPE = (4, 2, 4, 4)
LABELS = [0, 1, 2, 1]
T = 200


@dataclass(frozen=True)
class Classes:
    """x0 of class k is N(means[k], stds[k]^2), each class as likely: denoiser and classifier in closed form."""

    means: Tensor  # (K, C, H, W)
    stds: Tensor  # (K,)

    @classmethod
    def make(cls, shape=SHAPE, num_classes=3) -> "Classes":
        means = 0.5 * normal((num_classes, *shape[1:]), 11)
        return cls(means, torch.linspace(0.3, 0.5, num_classes, dtype=torch.float64))

    def logits(self, x: Tensor, at) -> Tensor:
        """log p(x_t, class), (B, K)."""
        variance = (at.alpha * self.stds) ** 2 + at.sigma**2
        away = (x[:, None] - at.alpha * self.means).square().flatten(2).sum(2)
        return -0.5 * (away / variance + x[0].numel() * variance.log())

    def of(self, labels) -> Gaussian:
        return Gaussian(self.means[labels], self.stds[labels].view(-1, 1, 1, 1))

    def net(self, diffusion: GaussianDiffusion):
        """What an unconditional network with parameterization=x0 answers at best: E[x0 | x_t]."""

        def answer(x: Tensor, t: Tensor) -> Tensor:
            at = diffusion.schedule.level(round(t[0].item() / diffusion.time_scale))
            p = self.logits(x, at).softmax(1)
            each = [self.of([k]).posterior_mean(x, at) for k in range(len(self.means))]
            return sum(p[:, k].view(-1, 1, 1, 1) * each[k] for k in range(len(each)))

        return answer

    def classifier(self, diffusion: GaussianDiffusion) -> "Exact":
        return Exact(self, diffusion)


class Exact(nn.Module):
    """The classifier that is right, which remembers the timesteps it was asked at."""

    def __init__(self, data: Classes, diffusion: GaussianDiffusion) -> None:
        super().__init__()
        self.data, self.diffusion, self.asked = data, diffusion, []
        self.num_classes, (self.in_channels, self.image_size) = len(data.means), data.means.shape[1:3]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked.append(t[0].item())
        return self.data.logits(x, self.diffusion.schedule.level(round(t[0].item() / self.diffusion.time_scale)))


class Small(nn.Module):
    """A classifier with weights, of any behaviour; its activations may be scaled down towards float16's underflow."""

    num_classes, in_channels, image_size = 3, 2, 4

    def __init__(self, dtype=torch.float32, *, spread: float = 1.0) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(8, 3)
        with torch.no_grad():
            for k, weight in enumerate(self.parameters()):
                weight.copy_(0.4 * normal(tuple(weight.shape), 20 + k))
            self.last.weight.mul_(spread)
        self.to(dtype)
        self.seen = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x.dtype, t.dtype, torch.is_autocast_enabled(x.device.type)))
        h = torch.tanh(self.first(x) + (t.to(self.first.weight) / 1000).view(-1, 1, 1, 1))
        return self.last(h.mean((2, 3)))


def exact(**settings) -> tuple[GaussianDiffusion, Classes, ClassifierGuidance]:
    diffusion, data = GaussianDiffusion(linear(T), "x0"), Classes.make()
    return diffusion, data, ClassifierGuidance(classifier=data.classifier(diffusion), **settings)


def gradient_by_hand(data: Classes, x: Tensor, labels, at) -> Tensor:
    """d log p(label | x_t) / d x_t of Gaussian classes: that of its own class less the mean over all."""
    variance = ((at.alpha * data.stds) ** 2 + at.sigma**2).view(1, -1, 1, 1, 1)
    each = -(x[:, None] - at.alpha * data.means) / variance  # (B, K, C, H, W)
    p = data.logits(x, at).softmax(1).view(len(x), -1, 1, 1, 1)
    return each[torch.arange(len(x)), labels] - (p * each).sum(1)


def drawn(guidance, *, eta=0.0, labels=LABELS, net=None, dtype=torch.float64, **settings) -> Tensor:
    diffusion, data = GaussianDiffusion(linear(T), "x0"), Classes.make()
    sampler = Sampler(10, eta=eta, clip=None)
    asked = {"shape": SHAPE[1:], "seeds": range(4), "labels": labels, "dtype": dtype}
    return generate(net or Unconditional(data.net(diffusion)), diffusion, sampler, guidance, **{**asked, **settings})


class Unconditional(nn.Module):
    """A network that knows no classes."""

    num_classes = None

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.answer(x, t)


class Labelled(nn.Module):
    """A network that knows three classes, or none where the label is -1."""

    num_classes = 3

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
        return 0.2 * x + (label.view(-1, 1, 1, 1) + 1) * 0.1 * torch.cos(x)
