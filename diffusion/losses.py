"""What are networks trained on? Denoising losses, their weights by SNR, the variational bound, a classifier's loss.

DDPM (2006.11239), iDDPM's hybrid (2102.09672), min-SNR (2303.09556), P2 (2204.00227), truncated SNR (2202.00512).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .denoiser import Network
from .likelihood import chain_of, vlb_term
from .process import GaussianDiffusion, q_sample
from .randomness import Draws

KINDS = ("mse", "l1", "huber", "vlb")
MIN_SNR = 1e-20  # zero terminal SNR: the weights' limits are taken here, in float64

# ---------------------------------------------------------------------------------------------------------------
# Weightings. Each gives the weight of |x0 - x0_hat|^2 as a function of SNR = alpha^2 / sigma^2; `weight` carries it to
# the space in which the network answers, so a weighting means the same for eps, x0 and v.

Weighting = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma): the loss of x0 where the image is noisy, of eps where it is clean."""

    gamma: float = 5.0

    def __call__(self, snr: Tensor) -> Tensor:
        return snr.clamp(max=self.gamma)


@dataclass(frozen=True)
class P2:
    """SNR / (k + SNR)^gamma: the unweighted eps loss with clean timesteps played down."""

    gamma: float = 1.0
    k: float = 1.0

    def __call__(self, snr: Tensor) -> Tensor:
        return snr / (self.k + snr) ** self.gamma


@dataclass(frozen=True)
class TruncatedSNR:
    """max(SNR, minimum): progressive distillation's eq. 10, which never lets the noisiest timesteps vanish."""

    minimum: float = 1.0

    def __call__(self, snr: Tensor) -> Tensor:
        return snr.clamp(min=self.minimum)


def in_output_space(parameterization: str, weight: Tensor, snr: Tensor) -> Tensor:
    """Carry a weight of the x0 loss to the loss of what the network answers.

    |eps - eps_hat|^2 = SNR |x0 - x0_hat|^2 and |v - v_hat|^2 = (SNR + 1) |x0 - x0_hat|^2 at the same x_t.
    """
    if parameterization == "mean":
        raise ValueError("weightings are defined for eps, x0 and v; use weighting=null with parameterization=mean")
    return weight / {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[parameterization]


def snr_weight(weighting: Weighting, diffusion: GaussianDiffusion, t: Tensor) -> Tensor:
    """The weight (B,) in float64 of each sample's loss, finite at zero terminal SNR."""
    at = diffusion.schedule.level(t)
    snr = (at.alpha**2 / at.sigma**2).flatten().clamp(min=MIN_SNR)
    return in_output_space(diffusion.parameterization, weighting(snr), snr)


# ---------------------------------------------------------------------------------------------------------------


class ClassifierTerms(NamedTuple):
    """Per sample (B,): the cross-entropy in nats, and 1 where the label is the likeliest class, or among the five."""

    loss: Tensor
    top1: Tensor
    top5: Tensor


def classifier_loss(logits: Tensor, label: Tensor) -> ClassifierTerms:
    """Judge logits (B, K), of whatever precision, by labels (B,).

    Ties go against the label, and so does NaN: a network that says the same of all classes names none.
    """
    logits = logits.float()
    others = (~(logits < logits.gather(1, label[:, None]))).sum(1) - 1  # that are at least as likely
    loss = F.cross_entropy(logits, label, reduction="none")
    return ClassifierTerms(loss, (others < 1).float(), (others < min(5, logits.shape[1])).float())


class LossTerms(NamedTuple):
    """Per sample (B,): what is minimised, the plain MSE of the network's answer, and the bound's term in bits/dim."""

    loss: Tensor
    mse: Tensor
    vlb: Tensor | None = None


@dataclass(frozen=True)
class DenoisingLoss:
    """kind(target - answer) * weighting + vlb_weight * T * vlb_t, averaged over C, H, W.

    `kind`: mse, l1, huber (quadratic within `huber_delta`), or vlb, which drops the first term.
    `weighting` None is the constant weight 1 on what the network answers (L_simple).
    `vlb_weight` lambda scales T * vlb_t, the estimate of the whole bound in bits/dim: 0.001 with kind=mse is iDDPM's
    L_hybrid, in which the bound trains the variance only (the mean is detached). guided-diffusion's MSE, RESCALED_MSE,
    KL and RESCALED_KL are (mse, 1/T), (mse, 0.001), (vlb, 1/T) and (vlb, 1).
    `timesteps` restricts the bound's chain to a grid that ends in -1; t must then lie on it.
    `offset_noise` adds that much noise that is constant over H and W (SDXL's report, section 2.4, uses 0.05).
    """

    kind: str = "mse"
    weighting: Weighting | None = None
    vlb_weight: float = 0.0
    huber_delta: float = 0.1
    offset_noise: float = 0.0
    timesteps: Sequence[int] | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"loss kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.vlb_weight < 0 or (self.kind == "vlb" and self.vlb_weight == 0):
            raise ValueError(f"vlb_weight must be positive with kind=vlb and not negative otherwise: {self.vlb_weight}")

    def check(self, diffusion: GaussianDiffusion) -> None:
        """Raise ValueError where the loss would leave a part of the network untrained, or train a part it lacks."""
        if self.kind != "vlb" and diffusion.learned_variance != (self.vlb_weight > 0):
            raise ValueError(
                f"variance={diffusion.variance} with vlb_weight={self.vlb_weight}: the bound trains a learned variance "
                "and nothing else here; set both (loss=hybrid task.variance=learned) or neither"
            )

    def noise(self, x0: Tensor, draws: Draws) -> Tensor:
        """Draw eps shaped like x0 (B, C, H, W)."""
        eps = draws.normal("eps", x0.shape[1:]).to(x0)
        if self.offset_noise:
            eps = eps + self.offset_noise * draws.normal("offset", (x0.shape[1], 1, 1)).to(x0)
        return eps

    def __call__(
        self,
        diffusion: GaussianDiffusion,
        net: Network,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        condition: dict[str, Tensor],
    ) -> LossTerms:
        """Return the losses of a batch x0 (B, C, H, W) at timesteps t (B,) with the noise eps."""
        x = q_sample(x0, eps, diffusion.schedule.level(t))
        output = net(x, diffusion.time(x, t), **condition)
        output = output.to(x0.dtype)  # losses are float32 whatever autocast gave the network
        answer = output.chunk(2, dim=1)[0] if diffusion.learned_variance else output
        goal = diffusion.target(x0, eps, t)
        if answer.shape != goal.shape:
            diffusion.prediction(output, x, t)  # raises, saying which channels fit
        mse = F.mse_loss(answer, goal, reduction="none").flatten(1).mean(1)
        loss = torch.zeros_like(mse) if self.kind == "vlb" else self._simple(answer, goal, mse)
        if self.weighting is not None and self.kind != "vlb":
            loss = loss * snr_weight(self.weighting, diffusion, t).to(loss)
        if not self.vlb_weight:
            return LossTerms(loss, mse.detach())
        if self.kind != "vlb":  # the bound sees a stopped mean
            output = torch.cat([answer.detach(), output.chunk(2, dim=1)[1]], dim=1)
        chain = chain_of(diffusion.schedule, self.timesteps and tuple(self.timesteps))
        vlb = vlb_term(diffusion, diffusion.prediction(output, x, t), x0, x, t, chain)
        return LossTerms(loss + self.vlb_weight * len(chain) * vlb, mse.detach(), vlb.detach())

    def _simple(self, answer: Tensor, goal: Tensor, mse: Tensor) -> Tensor:
        match self.kind:
            case "mse":
                return mse
            case "l1":
                return F.l1_loss(answer, goal, reduction="none").flatten(1).mean(1)
        return F.huber_loss(answer, goal, reduction="none", delta=self.huber_delta).flatten(1).mean(1)
