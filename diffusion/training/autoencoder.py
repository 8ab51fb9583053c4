"""What is one training step of an autoencoder? One reconstruction, judged by the loss and, later, by a discriminator.

Both learn from the same backward pass and step together (`JointOptimizer`), so a step is a step of the run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from diffusion.autoencoder_losses import (
    AutoencoderLoss,
    LossTerms,
    adaptive_weight,
    codebook_usage,
    discriminator_loss,
    generator_loss,
)
from diffusion.draws import SampleDraws
from diffusion.latents import encode_moments, is_deterministic
from diffusion.training.latent_scale import LatentStatistics
from diffusion.training.optimizers import JointOptimizer
from diffusion.training.similarity import SIMILARITY, similarity
from diffusion.training.task import Means, OptimizerPartial, SchedulerPartial, Task

GAN_NAMES = ("gan", "adaptive_weight", "discriminator", "logits_real", "logits_fake")


class AutoencoderTask(Task):
    """Train `autoencoder`; with a `discriminator`, which `loss.adversarial` then describes, against one.

    `optimizer`, `discriminator_optimizer` (None: `optimizer` again) and `lr_scheduler`, which multiplies the rates of
    both, are partials. `compile` compiles the autoencoder in place. Batches are {"image": (B, C, H, W) in [-1, 1]}.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        *,
        loss: AutoencoderLoss,
        optimizer: OptimizerPartial,
        lr_scheduler: SchedulerPartial | None = None,
        discriminator: nn.Module | None = None,
        discriminator_optimizer: OptimizerPartial | None = None,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        check_pair(loss, discriminator)
        self.autoencoder = autoencoder
        self.loss = loss
        self.discriminator = discriminator
        self.optimizer_partial = optimizer
        self.discriminator_optimizer_partial = discriminator_optimizer or optimizer
        self.lr_scheduler_partial = lr_scheduler
        self.discriminator_gradient_norm: Tensor | None = None
        self.means = Means(term_names(autoencoder, loss))
        self.gan_means = Means(GAN_NAMES) if discriminator is not None else None
        if is_deterministic(autoencoder):  # how often each code was chosen since the last log
            self.register_buffer("code_counts", torch.zeros(autoencoder.num_codes, dtype=torch.long))
        if compile:
            # The adaptive weight goes back through the graph once more, which compiled graphs forbid by default.
            torch._functorch.config.donated_buffer = False
            autoencoder.compile()

    @property
    def rank_buffers(self) -> tuple[str, ...]:
        """The sums since the last log."""
        names = ("means.sums", "gan_means.sums", "code_counts")
        own = dict(self.named_buffers())
        return tuple(name for name in names if name in own)

    @property
    def net(self) -> nn.Module:
        """What is exported and averaged: the autoencoder."""
        return self.autoencoder

    def sharded_networks(self) -> list[nn.Module]:
        """Return the autoencoder's parts, because it encodes and decodes without being called."""
        if self.discriminator is not None or self.loss.log_variance.requires_grad:
            raise ValueError(
                "trainer=fsdp spreads networks over devices, and a discriminator, like loss.learn_log_variance=true, "
                "needs whole ones; use trainer=ddp"
            )
        return [part for part in self.autoencoder.children() if trainable(part)]

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Take the loss of one batch, and the discriminator's beside it; see `JointOptimizer` for who learns what."""
        x = batch["image"]
        output = self.autoencoder(x, self._noise(x, self.draws(len(x), batch_idx)))
        terms = self._terms(x, output)
        values, objective = term_values(terms, self.loss), terms.loss
        discriminator = x.new_zeros(())
        if self._adversary_begun:
            gan = self._adversary(x, output.reconstruction, terms)
            self.gan_means.add(gan)
            objective = objective + gan["adaptive_weight"] * self.loss.adversarial.weight * gan["gan"]
            discriminator = gan["discriminator"]
        elif self.discriminator is not None and self.trainer.world_size > 1:
            # DistributedDataParallel waits for a gradient of every parameter; `on_before_optimizer_step` drops these.
            discriminator = 0 * sum(p.sum() for p in self.discriminator.parameters())
        self.means.add({**values, "loss": objective})
        if output.indices is not None:
            self.code_counts.index_add_(0, output.indices.flatten(), torch.ones_like(output.indices.flatten()))
        return {"loss": self.counted(objective + discriminator, len(x), batch_idx)}

    @property
    def _adversary_begun(self) -> bool:
        return self.discriminator is not None and self.loss.adversarial.begun(self.trainer.global_step)

    def _noise(self, x: Tensor, draws: SampleDraws) -> Tensor | None:
        """Return the noise of a draw from q(z | x), for autoencoders that have such a distribution."""
        if is_deterministic(self.autoencoder):
            return None
        return draws.normal("autoencoder", self.autoencoder.latent_shape(x.shape[1:]))

    def _terms(self, x: Tensor, output: Any) -> LossTerms:
        mean, logvar = output.moments or (None, None)
        step, codebook = self.trainer.global_step, output.codebook_loss
        return self.loss(x, output.reconstruction, mean=mean, logvar=logvar, codebook=codebook, step=step)

    def _adversary(self, x: Tensor, reconstruction: Tensor, terms: LossTerms) -> dict[str, Tensor]:
        """Return what the autoencoder and the discriminator each want of the other's work.

        In the first pass the discriminator's weights are constants, in the others the reconstruction is, so that one
        backward pass gives each side the gradient of its own loss.
        """
        gan = self.loss.adversarial
        constants = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        wanted = generator_loss(torch.func.functional_call(self.discriminator, constants, (reconstruction,)).float())
        weight = wanted.new_ones(())
        if gan.adaptive:
            weight = adaptive_weight(terms.nll, wanted, self.autoencoder.last_layer, average=self.averaged)
        real, fake = (self.discriminator(image.detach()).float() for image in (x, reconstruction))
        return {
            "gan": wanted,
            "adaptive_weight": weight,
            "discriminator": discriminator_loss(gan.kind, real, fake),
            "logits_real": real.mean(),
            "logits_fake": fake.mean(),
        }

    def on_train_start(self) -> None:
        """Warn of a discriminator that would never start."""
        super().on_train_start()
        if self.discriminator is None:
            return
        start, steps = self.loss.adversarial.start, self.trainer.estimated_stepping_batches
        if start >= steps:
            rank_zero_warn(
                f"the discriminator starts after the last step: loss.adversarial.start={start}, and the run ends after "
                f"{steps:.0f} steps, so it trains without one; lower loss.adversarial.start or raise trainer.max_steps"
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the discriminator as it is until it starts: without gradients an optimizer passes its weights by."""
        if self.discriminator is not None and not self._adversary_begun:
            for parameter in self.discriminator.parameters():
                parameter.grad = None

    def configure_optimizers(self) -> Any:
        """Build the autoencoder's optimizer, joined with the discriminator's where there is one, and their schedule."""
        optimizer = self.optimizer_partial(trainable(self.autoencoder, self.loss))
        if self.discriminator is not None:
            optimizer = JointOptimizer([optimizer, self.discriminator_optimizer_partial(trainable(self.discriminator))])
        return self.with_schedule(optimizer, self.lr_scheduler_partial)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *settings: Any, **named: Any) -> None:
        """Clip autoencoder and discriminator apart, each by its own norm."""
        if self.discriminator is None:
            super().configure_gradient_clipping(optimizer, *settings, **named)
            return
        autoencoder, discriminator = optimizer.parts
        if self._adversary_begun:
            super().configure_gradient_clipping(discriminator, *settings, **named)
            self.discriminator_gradient_norm = self.gradient_norm
        super().configure_gradient_clipping(autoencoder, *settings, **named)

    def pop_losses(self) -> dict[str, float]:
        """Return the means since the last call of all terms, and of the codebook how much of it was in use."""
        means = self.means.pop(self.summed)
        if self.gan_means is not None:
            means |= self.gan_means.pop(self.summed)
            if self.discriminator_gradient_norm is not None:
                means["discriminator_grad_norm"] = float(self.discriminator_gradient_norm)
        if is_deterministic(self.autoencoder):
            used, perplexity = codebook_usage(self.summed(self.code_counts))
            self.code_counts.zero_()
            means |= {"codebook_usage": float(used), "codebook_perplexity": float(perplexity)}
        return {f"train/{name}": value for name, value in means.items()}

    # -- validation ----------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin the means and the statistics of the latents anew."""
        perceptual = self.loss.perceptual is not None and self.loss.perceptual_weight
        names = ["loss", *SIMILARITY, *(["perceptual"] if perceptual else [])]
        self._validation = {name: Means(names).to(self.device) for name, _ in self.weights()}
        self._latents = LatentStatistics()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measure losses with the same noise each time, and how like images their reconstructions from the mode are."""
        batch, draws, count = self.validated(batch, batch_idx)
        x = batch["image"]
        noise = self._noise(x, draws)
        for name, weights in self.weights():
            with weights:
                output = self.autoencoder(x, noise)
                mode = output if noise is None else self.autoencoder(x)
                terms = self._terms(x, output)
            if not name:
                moments = encode_moments(self.autoencoder, x, torch.float32)
                self._latents.add(moments[:count])
            measured = {"loss": terms.loss, **similarity(mode.reconstruction, x)}
            if terms.perceptual is not None:
                measured["perceptual"] = terms.perceptual
            self._validation[name].add(measured, weight=count)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all ranks, and mean and standard deviation of each latent channel."""
        for name, means in self._validation.items():
            for metric, value in means.pop(self.summed).items():
                self.log(f"val/{metric}{name}", value, logger=False, sync_dist=True)
        latents = self._latents.together(self.summed, self.device)
        for what, values in (("mean", latents.mean), ("std", latents.std)):
            for channel, value in enumerate(values.tolist()):
                self.log(f"val/latent_{what}_{channel:02d}", value, logger=False, sync_dist=True)

    # -- before and after ----------------------------------------------------------------------------------------------

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError where autoencoder or discriminator cannot take images of `shape` (C, H, W)."""
        self.autoencoder.latent_shape(shape)
        least = getattr(self.discriminator, "min_size", 1)
        if min(shape[1:]) < least:
            raise ValueError(
                f"the discriminator needs images of at least {least} pixels a side, these have {shape[1]}x{shape[2]}; "
                "lower discriminator.num_layers"
            )

    def for_export(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the config to store with the autoencoder, without the networks of other tasks."""
        return {**config, "net": None, "classifier": None}, {}


def check_pair(loss: AutoencoderLoss, discriminator: nn.Module | None) -> None:
    """Raise ValueError where a discriminator has no part in the loss, or the loss asks for one that is not there."""
    if discriminator is not None and loss.adversarial is None:
        raise ValueError(
            "there is a discriminator, but loss.adversarial does not say how it takes part; use loss=autoencoder_gan"
        )
    if discriminator is None and loss.adversarial is not None:
        raise ValueError(
            "loss.adversarial needs a discriminator; add discriminator=patch, or set loss.adversarial=null"
        )


def trainable(*modules: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that an optimizer may change."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def term_names(autoencoder: nn.Module, loss: AutoencoderLoss) -> list[str]:
    """Return the names of the terms that this autoencoder and this loss log."""
    names = ["loss", "nll", "reconstruction", "log_variance"]
    if loss.perceptual is not None:
        names.append("perceptual")
    if is_deterministic(autoencoder):
        return [*names, "codebook"]
    return [*names, "kl", *(f"kl_{channel:02d}" for channel in range(autoencoder.latent_channels))]


def term_values(terms: LossTerms, loss: AutoencoderLoss) -> dict[str, Tensor]:
    """Return the terms by the names of `term_names`; "kl" and its channels are nats per image."""
    values: Mapping[str, Tensor | None] = terms._asdict() | {"log_variance": loss.log_variance.detach()}
    found = {name: value for name, value in values.items() if value is not None and name != "kl"}
    if terms.perceptual is None:
        found["perceptual"] = torch.zeros_like(terms.nll)
    if terms.kl is not None:
        found |= {"kl": terms.kl.sum(), **{f"kl_{i:02d}": value for i, value in enumerate(terms.kl)}}
    return found
