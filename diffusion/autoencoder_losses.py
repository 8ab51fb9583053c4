"""What is an autoencoder trained on? Reconstruction, KL or codebook, perceptual distance, a discriminator's opinion.

VAE (1312.6114), VQGAN (2012.09841), LDM (2112.10752, appendix G) with its code's reductions and its adaptive weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .likelihood import normal_kl

KINDS = ("l1", "l2", "gaussian")
REDUCTIONS = ("sum", "mean")
GAN_KINDS = ("hinge", "vanilla")
MAX_ADAPTIVE_WEIGHT = 1e4

Perceptual = Callable[[Tensor, Tensor], Tensor]  # (B, C, H, W) twice -> (B,), 0 for equal images


# ---------------------------------------------------------------------------------------------------------------------
# the pieces


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp logvar) || N(0, 1)) in nats per image and channel: (B, C, ...) -> (B, C)."""
    kl = normal_kl(mean, logvar, 0.0, 0.0)
    return kl if kl.ndim == 2 else kl.flatten(2).sum(2)


def annealed(weight: float, step: int, warmup_steps: int) -> float:
    """Return the weight at an optimizer step: up linearly from weight / warmup_steps at step 0, then constant."""
    return weight * min(1.0, (step + 1) / warmup_steps) if warmup_steps else weight


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Return what the discriminator minimises, given its logits of any shape: half the hinge or the log loss."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """Return what the autoencoder minimises of the discriminator's logits: with either kind, as taming and LDM do."""
    return -fake.mean()


def adaptive_weight(
    nll: Tensor, gan: Tensor, last_layer: Tensor, *, average: Callable[[Tensor], Tensor] = lambda gradient: gradient
) -> Tensor:
    """Return |d nll / d last_layer| / (|d gan / d last_layer| + 1e-4) in [0, 1e4], detached: VQGAN eq. 7, LDM's code.

    It makes both terms pull equally hard on the decoder's last weights. The graphs of both terms are kept. `average`
    makes the gradient of a batch out of that of a device's share.
    """
    gradients = (torch.autograd.grad(term, last_layer, retain_graph=True)[0] for term in (nll, gan))
    norms = [average(gradient.float()).norm() for gradient in gradients]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, MAX_ADAPTIVE_WEIGHT).detach()


def codebook_usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for how often each code was chosen (K,), the share of codes in use and their perplexity in [1, K]."""
    share = counts.double() / counts.sum().clamp(min=1)
    return (counts > 0).double().mean(), torch.special.entr(share).sum().exp()


# ---------------------------------------------------------------------------------------------------------------------
# the whole


@dataclass(frozen=True)
class AdversarialLoss:
    """How a discriminator takes part: `weight` times the adaptive weight (or alone) from optimizer step `start` on."""

    kind: str = "hinge"
    weight: float = 0.5
    start: int = 50_001
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.kind not in GAN_KINDS:
            raise ValueError(f"loss.adversarial.kind must be {' or '.join(GAN_KINDS)}, got {self.kind!r}")
        if not (0 <= self.weight < math.inf) or self.start < 0:
            raise ValueError(
                f"loss.adversarial needs weight >= 0 and start >= 0, got weight={self.weight}, start={self.start}"
            )

    def begun(self, step: int) -> bool:
        return step >= self.start


class LossTerms(NamedTuple):
    """What a batch cost, scalars unless said. `nll` is what the adaptive weight compares with the discriminator."""

    loss: Tensor  # all terms but the discriminator's
    nll: Tensor  # reconstruction and perceptual distance
    reconstruction: Tensor  # mean per value: absolute (l1) or squared error
    perceptual: Tensor | None
    kl: Tensor | None  # (C,) nats per image of each latent channel
    codebook: Tensor | None


class AutoencoderLoss(nn.Module):
    """distance / exp(log_variance) + log_variance, summed over an image, + kl_weight KL or codebook_weight codebook.

    `kind`: the distance is l1 or l2 per value, plus `perceptual_weight` times the image's perceptual distance, as LDM
    adds it to every value; "gaussian" is the exact negative log-likelihood of N(reconstruction, exp log_variance) in
    nats, so that with kl_weight=1 the loss is minus the evidence bound.
    `reduction`: "sum" counts nats per image, which LDM's kl_weight of 1e-6 presumes; "mean" divides by the number of
    values (VQGAN). `kl_warmup_steps` anneals the KL's weight from 0. `learn_log_variance` trains the scalar
    log-variance (one of the autoencoder's optimizer's parameters; LDM's code has it but never trains it).
    """

    def __init__(
        self,
        kind: str = "l1",
        *,
        kl_weight: float = 1e-6,
        kl_warmup_steps: int = 0,
        codebook_weight: float = 1.0,
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 1.0,
        log_variance: float = 0.0,
        learn_log_variance: bool = False,
        reduction: str = "sum",
        adversarial: AdversarialLoss | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("kind", kind, KINDS), ("reduction", reduction, REDUCTIONS)):
            if value not in allowed:
                raise ValueError(f"loss.{name} must be one of {', '.join(allowed)}, got {value!r}")
        weights = {"kl_weight": kl_weight, "codebook_weight": codebook_weight, "perceptual_weight": perceptual_weight}
        for name, weight in {**weights, "kl_warmup_steps": kl_warmup_steps}.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"loss.{name} must be a finite number >= 0, got {weight}")
        self.kind, self.reduction = kind, reduction
        self.kl_weight, self.kl_warmup_steps, self.codebook_weight = kl_weight, kl_warmup_steps, codebook_weight
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.adversarial = adversarial
        self.log_variance = nn.Parameter(torch.tensor(float(log_variance)), requires_grad=learn_log_variance)

    def forward(
        self,
        x: Tensor,
        reconstruction: Tensor,
        *,
        mean: Tensor | None = None,
        logvar: Tensor | None = None,
        codebook: Tensor | None = None,
        step: int = 0,
    ) -> LossTerms:
        """Compare images (B, C, H, W) in [-1, 1] with their reconstructions at an optimizer step.

        `mean` and `logvar` (B, C, ...) are those of q(z | x), None where there is none; `codebook` is a scalar.
        """
        reconstruction = reconstruction.float()  # losses are float32 whatever autocast gave the network
        error = (reconstruction - x).abs() if self.kind == "l1" else (reconstruction - x).square()
        perceptual = None
        if self.perceptual is not None and self.perceptual_weight:
            perceptual = self.perceptual(reconstruction, x).float()
        nll = self._negative_log_likelihood(error, perceptual)
        loss, channels = nll, None
        if mean is not None:
            channels = kl_to_standard_normal(mean.float(), logvar.float()).mean(0)
            loss = loss + self.kl_weight_at(step) * self._reduced(channels.sum(), x)
        if codebook is not None:
            loss = loss + self.codebook_weight * codebook
        return LossTerms(
            loss=loss,
            nll=nll,
            reconstruction=error.detach().mean(),
            perceptual=None if perceptual is None else perceptual.detach().mean(),
            kl=None if channels is None else channels.detach(),
            codebook=None if codebook is None else codebook.detach(),
        )

    def kl_weight_at(self, step: int) -> float:
        """Return the KL's weight at an optimizer step."""
        return annealed(self.kl_weight, step, self.kl_warmup_steps)

    def _negative_log_likelihood(self, error: Tensor, perceptual: Tensor | None) -> Tensor:
        distance = error.flatten(1).sum(1)
        values = error[0].numel()
        if perceptual is not None:
            distance = distance + values * self.perceptual_weight * perceptual
        nll = distance * torch.exp(-self.log_variance) + values * self.log_variance
        if self.kind == "gaussian":
            nll = 0.5 * (nll + values * math.log(2 * math.pi))
        return self._reduced(nll.mean(), error)

    def _reduced(self, per_image: Tensor, x: Tensor) -> Tensor:
        return per_image if self.reduction == "sum" else per_image / x[0].numel()
