"""What is one training step of a denoiser? Keyed draws, one loss, sums for the log; every formula is elsewhere.

All randomness is a function of (seed, purpose, number of the sample in the run): see `Task`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffusion.checkpoint import Part
from diffusion.denoiser import NULL_LABEL
from diffusion.draws import SampleDraws
from diffusion.losses import DenoisingLoss
from diffusion.process import GaussianDiffusion
from diffusion.stored_condition import condition_on
from diffusion.timestep_samplers import UniformTimesteps
from diffusion.training.noised import NoisedTask, part_of
from diffusion.training.task import Means, OptimizerPartial, SchedulerPartial, batch_size


class DenoiserTask(NoisedTask):
    """Train `net` to denoise. `optimizer(parameters)` and `lr_scheduler(optimizer)` are partials, counted in steps.

    With an `autoencoder` (frozen) the data are its latents: of "image", encoded in each step, or of cached "moments".
    A `conditioner` makes context, vector or further channels from another entry of the batch; it is trained along
    where it has trainable parameters. `condition_drop` is the probability that a sample loses its condition, which
    classifier-free guidance needs (about 0.1). `compile` compiles the network in place: parameter names stay as they
    are. `bundle` puts autoencoder and conditioner into model.safetensors. Batches are {"image": (B, C, H, W) in
    [-1, 1], "label": (B,) where there are classes, "caption": B texts, ...}.
    """

    def __init__(
        self,
        net: nn.Module,
        diffusion: GaussianDiffusion,
        *,
        loss: DenoisingLoss,
        optimizer: OptimizerPartial,
        timestep_sampler: UniformTimesteps | None = None,
        lr_scheduler: SchedulerPartial | None = None,
        autoencoder: nn.Module | None = None,
        conditioner: nn.Module | None = None,
        condition_drop: float = 0.0,
        compile: bool = False,
        bundle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            diffusion, timestep_sampler=timestep_sampler, autoencoder=autoencoder, bundle=bundle, seed=seed
        )
        if not 0 <= condition_drop <= 1:
            raise ValueError(f"task.condition_drop is a probability in [0, 1], got {condition_drop}")
        loss.check(diffusion)
        check_fit(net, diffusion, autoencoder, conditioner)
        self.net = net
        self.loss = loss
        self.optimizer_partial = optimizer
        self.lr_scheduler_partial = lr_scheduler
        self.condition_drop = condition_drop
        self.trained_conditioner = conditioner if is_trainable(conditioner) else None
        if conditioner is not None and self.trained_conditioner is None:
            self._frozen["conditioner"] = conditioner
        if compile:
            net.compile()

    @property
    def conditioner(self) -> nn.Module | None:
        """What turns conditions into the network's inputs, frozen or trained; None for none."""
        return self._frozen.get("conditioner", self.trained_conditioner)

    @property
    def model(self) -> nn.Module:
        """What is trained and averaged: the network, together with the conditioner where that learns, too."""
        if self.trained_conditioner is None:
            return self.net
        return nn.ModuleDict({"net": self.net, "conditioner": self.trained_conditioner})

    def sharded_networks(self) -> list[nn.Module]:
        """Return the network, and the conditioner where it is trained."""
        return [self.net] if self.trained_conditioner is None else [self.net, self.trained_conditioner]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Take the loss of one batch at random timesteps; its numbers depend on seed and samples alone."""
        size = batch_size(batch)
        draws = self.draws(size, batch_idx)
        x0 = self.clean(batch, draws)
        t, weight = self.timestep_sampler(draws)
        eps = self.loss.noise(x0, draws)
        drop = draws.uniform("drop") < self.condition_drop if self.condition_drop else None
        condition = self.condition(batch, draws, drop=drop)
        terms = self.loss(self.diffusion, self.net, x0, t, eps, condition)
        objective = (terms.loss * weight).mean()
        self.note(t, terms.loss[None], objective[None])
        return {"loss": self.counted(objective, size, batch_idx), "t": t}

    def condition(
        self, batch: Mapping[str, Any], draws: SampleDraws, *, drop: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return what the network is told of a batch; samples where `drop` (B,) is True are told nothing."""
        condition = condition_of(batch, self.net)
        if drop is not None and "label" in condition:
            condition["label"] = condition["label"].masked_fill(drop, NULL_LABEL)
        if self.conditioner is not None:
            condition |= condition_on(self.conditioner, batch, draws.within("condition"), drop)
        return condition

    # -- validation ----------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin the means anew, for the raw weights and for each average."""
        self._validation = {name: Means(["loss"]).to(self.device) for name, _ in self.weights()}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Take the loss at the same timesteps and noise each time, of the raw weights and of each average."""
        batch, draws, count = self.validated(batch, batch_idx)
        x0 = self.clean(batch, draws)
        t = self.timestep_sampler.timesteps(draws.spread())
        eps = self.loss.noise(x0, draws)
        for name, weights in self.weights():
            with weights:
                condition = self.condition(batch, draws)
                loss = self.loss(self.diffusion, self.net, x0, t, eps, condition).loss.mean()
            self._validation[name].add({"loss": loss}, weight=count)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the samples of all ranks."""
        for name, means in self._validation.items():
            for metric, mean in means.pop(self.summed).items():
                self.log(f"val/{metric}{name}", mean, logger=False, sync_dist=True)

    # -- before and after ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Build the optimizer of the network and of what trains with it, and their schedule."""
        optimizer = self.optimizer_partial([p for p in self.model.parameters() if p.requires_grad])
        return self.with_schedule(optimizer, self.lr_scheduler_partial)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError where images of `shape` (C, H, W), or their latents, cannot pass the network."""
        shape = self.learnt_shape(shape)
        factor = getattr(self.net, "size_factor", 1)
        if any(size % factor for size in shape[1:]):
            what = "images" if self.autoencoder is None else "latents"
            raise ValueError(
                f"the {what} are {shape[1]}x{shape[2]}, but the network halves its input to 1/{factor} and needs "
                f"multiples of {factor}; change data.image_size or leave out stages of the network"
            )

    def for_export(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Part]]:
        """Return the config to store with the network, and the parts that it needs beside it."""
        config, parts = super().for_export(config)
        if self.trained_conditioner is not None:
            parts["conditioner"] = part_of(self.trained_conditioner, config["conditioner"], bundled=True)
        return config, parts


def condition_of(batch: dict[str, Any], net: nn.Module) -> dict[str, Tensor]:
    """Return what of a batch conditions this network: its labels, if it has classes."""
    if net.num_classes is None:
        return {}
    if "label" not in batch:
        raise ValueError(
            f"the network has num_classes={net.num_classes}, but the data give no labels; "
            "set net.num_classes=null or choose data with classes"
        )
    return {"label": batch["label"]}


def is_trainable(module: nn.Module | None) -> bool:
    """Say whether an optimizer would change anything in a module."""
    return module is not None and any(p.requires_grad for p in module.parameters())


def check_fit(
    net: nn.Module, diffusion: GaussianDiffusion, autoencoder: nn.Module | None, conditioner: nn.Module | None
) -> None:
    """Raise ValueError where the widths of network, autoencoder and conditioner differ, naming both numbers."""
    provided = {} if conditioner is None else conditioner.provides
    for name, attribute in (("context", "context_channels"), ("vector", "vector_channels")):
        wanted = getattr(net, attribute, None)
        if name in provided and wanted != provided[name]:
            raise ValueError(
                f"the conditioner gives a {name} of {provided[name]} channels, but the network has {attribute}="
                f"{wanted}; set net.{attribute}={provided[name]}"
            )
        if name not in provided and wanted is not None and name == "vector":
            raise ValueError(f"the network needs a vector of {wanted} channels, which no conditioner gives; add one")
    if autoencoder is None:
        return
    channels = autoencoder.latent_channels
    has = (getattr(net, "in_channels", None), getattr(net, "out_channels", None))
    needs = (channels + provided.get("concat", 0), diffusion.out_channels(channels))
    if None not in has and has != needs:
        raise ValueError(
            f"the autoencoder's latents have {channels} channels, so the network needs in_channels={needs[0]} and "
            f"out_channels={needs[1]}, but it has {has[0]} and {has[1]}; set net.in_channels={needs[0]} "
            f"out_channels={needs[1]}, or take another autoencoder"
        )
