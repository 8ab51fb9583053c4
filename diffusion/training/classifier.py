"""What is one training step of a noisy classifier? Keyed draws, a noised batch, the cross-entropy of its labels.

Dhariwal & Nichol 2021 (arXiv 2105.05233, section 4): log p(y | x_t) of every t, whose gradient guides a denoiser.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.checkpoint import Part, load_weights
from diffusion.losses import ClassifierTerms, classifier_loss
from diffusion.process import GaussianDiffusion, q_sample
from diffusion.randomness import fold, generator
from diffusion.timestep_samplers import StratifiedTimesteps, UniformTimesteps
from diffusion.training.noised import NoisedTask, add_quarters, quarter_means, quarter_sums
from diffusion.training.task import OptimizerPartial, SchedulerPartial, seed_dropout


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
        """Take the loss of one batch at random timesteps; its numbers depend on seed, batch number and rank alone."""
        key = (self.batches_seen, self.global_rank)
        seed_dropout(fold(self.seed, "dropout", *key), self.device)
        draws = generator(self.seed, "train", *key, device=self.device)
        x0 = self.clean(batch, "train", *key)
        x, t, weight = self._shown(x0, self.timestep_sampler, draws)
        terms = self._judge(x, t, batch["label"])
        objective = (terms.loss * weight).mean()
        overall = torch.stack([objective, terms.top1.mean(), terms.top5.mean()])
        self.note(t if self.noised else None, torch.stack(terms), overall)
        self.batches_seen += 1
        return {"loss": objective, "t": t}

    def _shown(
        self, x0: Tensor, sampler: UniformTimesteps, draws: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return what the classifier is shown of x0 (B, C, H, W), at which timesteps (B,), and what each weighs."""
        if not self.noised:
            return x0, torch.zeros(len(x0), dtype=torch.long, device=x0.device), 1.0
        t, weight = sampler(len(x0), draws)
        eps = torch.randn(x0.shape, generator=draws, device=x0.device, dtype=x0.dtype)
        return q_sample(x0, eps, self.diffusion.schedule.level(t)), t, weight

    def _judge(self, x: Tensor, t: Tensor, label: Tensor) -> ClassifierTerms:
        return classifier_loss(self.classifier(x, self.diffusion.time(x, t)), label)

    # -- validation ----------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin the sums anew, for the raw weights and for each average."""
        self._validation = {name: quarter_sums(self.measured).to(self.device) for name, _ in self.weights()}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Judge the same timesteps and noise each time, with the raw weights and with each average."""
        key = (batch_idx, self.global_rank)
        fixed = generator(self.seed, "validation", *key, device=self.device)
        x0 = self.clean(batch, "validation", *key)
        x, t, _ = self._shown(x0, StratifiedTimesteps(self.diffusion.schedule.num_train_timesteps), fixed)
        quarter = self._quarter(t if self.noised else None)
        for name, weights in self.weights():
            with weights:
                values = torch.stack(self._judge(x, t, batch["label"]))
            add_quarters(self._validation[name], quarter, values, values.mean(1), weight=len(x0))

    def on_validation_epoch_end(self) -> None:
        """Log the means over all ranks."""
        for weights, sums in self._validation.items():
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
            for name, mean in quarter_means(sums, self.measured).items():
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
