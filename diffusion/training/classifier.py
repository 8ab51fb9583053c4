"""What is one training step of a noisy classifier? Keyed draws, a noised batch, the cross-entropy of its labels.

Dhariwal & Nichol 2021 (arXiv 2105.05233, section 4): log p(y | x_t) of every t, whose gradient guides a denoiser.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.checkpoint import Part, load_weights
from diffusion.draws import SampleDraws
from diffusion.losses import ClassifierTerms, classifier_loss
from diffusion.process import GaussianDiffusion, q_sample
from diffusion.timestep_samplers import UniformTimesteps
from diffusion.training.noised import NoisedTask, add_quarters, quarter_means, quarter_sums
from diffusion.training.task import OptimizerPartial, SchedulerPartial, batch_size


class ClassifierTask(NoisedTask):
    """Train `classifier` to name the class of x_t. `optimizer(parameters)` and `lr_scheduler(optimizer)` are partials.

    With an `autoencoder` (frozen), which model.safetensors names by its hash, it learns latents. `noised=False` trains
    on clean images, at timestep 0. `weights` is the model.safetensors of a classifier to go on from. `compile` compiles
    the network in place. Batches are {"image": (B, C, H, W) in [-1, 1], "label": (B,)}.
    """

    measured = ("loss", "accuracy@1", "accuracy@5")
    conditioner = None  # nothing but the noisy image is told

    def __init__(
        self,
        classifier: nn.Module,
        diffusion: GaussianDiffusion,
        *,
        optimizer: OptimizerPartial,
        timestep_sampler: UniformTimesteps | None = None,
        lr_scheduler: SchedulerPartial | None = None,
        autoencoder: nn.Module | None = None,
        noised: bool = True,
        weights: str | Path | None = None,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(diffusion, timestep_sampler=timestep_sampler, autoencoder=autoencoder, bundle=False, seed=seed)
        self.classifier = classifier
        self.noised = noised
        self.optimizer_partial = optimizer
        self.lr_scheduler_partial = lr_scheduler
        if weights is not None:
            load_weights(classifier, weights, "classifier")
        if compile:
            classifier.compile()

    @property
    def net(self) -> nn.Module:
        """What is exported and averaged: the classifier."""
        return self.classifier

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Raise ValueError for labels that are missing or that name no class, while looking at them costs nothing."""
        check_labels(batch, self.classifier.num_classes)
        return batch

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Take the loss of one batch at random timesteps; its numbers depend on seed and samples alone."""
        size = batch_size(batch)
        draws = self.draws(size, batch_idx)
        x0 = self.clean(batch, draws)
        t, weight = self.timestep_sampler(draws) if self.noised else (None, 1.0)
        x, t = self._shown(x0, t, draws)
        terms = self._judge(x, t, batch["label"])
        objective = (terms.loss * weight).mean()
        overall = torch.stack([objective, terms.top1.mean(), terms.top5.mean()])
        self.note(t if self.noised else None, torch.stack(terms), overall)
        return {"loss": self.counted(objective, size, batch_idx), "t": t}

    def _shown(self, x0: Tensor, t: Tensor | None, draws: SampleDraws) -> tuple[Tensor, Tensor]:
        """Return what the classifier is shown of x0 (B, C, H, W) at t (B,), and t; None shows it clean, at 0."""
        if t is None:
            return x0, torch.zeros(len(x0), dtype=torch.long, device=x0.device)
        eps = draws.normal("eps", x0.shape[1:]).to(x0)
        return q_sample(x0, eps, self.diffusion.schedule.level(t)), t

    def _judge(self, x: Tensor, t: Tensor, label: Tensor) -> ClassifierTerms:
        return classifier_loss(self.classifier(x, self.diffusion.time(x, t)), label)

    # -- validation ----------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin the sums anew, for the raw weights and for each average."""
        self._validation = {name: quarter_sums(self.measured).to(self.device) for name, _ in self.weights()}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Judge the same timesteps and noise each time, with the raw weights and with each average."""
        batch, draws, count = self.validated(batch, batch_idx)
        x0 = self.clean(batch, draws)
        t = self.timestep_sampler.timesteps(draws.spread()) if self.noised else None
        x, t = self._shown(x0, t, draws)
        quarter = self._quarter(t if self.noised else None)
        for name, weights in self.weights():
            with weights:
                values = torch.stack(self._judge(x, t, batch["label"]))
            if count:
                add_quarters(self._validation[name], quarter, values, values.mean(1), weight=count)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all ranks."""
        for weights, sums in self._validation.items():
            for name, mean in quarter_means(self.summed(sums), self.measured).items():
                self.log(f"val/{name}{weights}", mean, logger=False, sync_dist=True)

    # -- before and after ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule."""
        optimizer = self.optimizer_partial([p for p in self.classifier.parameters() if p.requires_grad])
        return self.with_schedule(optimizer, self.lr_scheduler_partial)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError where images of `shape` (C, H, W), or their latents, are not what the classifier takes."""
        learnt = tuple(self.learnt_shape(shape))
        size = self.classifier.image_size
        if learnt != (self.classifier.in_channels, size, size):
            what = "images" if self.autoencoder is None else "latents"
            raise ValueError(
                f"the {what} are {'x'.join(map(str, learnt))}, but the classifier was built for "
                f"{self.classifier.in_channels}x{size}x{size}; set classifier.in_channels={learnt[0]} "
                f"classifier.image_size={learnt[1]}"
            )

    def for_export(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Part]]:
        """Return the config to store with the classifier, without a denoiser's network, and its autoencoder's hash."""
        config, parts = super().for_export(config)
        return {**config, "net": None}, parts


def check_labels(batch: Mapping[str, Any], num_classes: int) -> None:
    """Raise ValueError for a batch without labels, or with labels outside 0 to `num_classes` - 1."""
    if "label" not in batch:
        raise ValueError(
            "the data give no labels, which are all that a classifier learns; choose data with classes, or say how "
            "many there are: data.num_classes=N"
        )
    low, high = (int(bound) for bound in batch["label"].aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"the data have labels from {low} to {high}, but the classifier knows the classes 0 to {num_classes - 1}; "
            "set classifier.num_classes to the data's number of classes, and give every image one"
        )
