"""Autoencoder runs of seconds: the digits, networks of a few thousand weights, everything switched on."""

import copy
from typing import Any

from lightning.pytorch import Callback, Trainer
from training_cases import tiny

KL = {
    "_target_": "diffusion.models.autoencoder.AutoencoderKL",
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 2,
    "channels": 4,
    "norm_groups": 2,
    "stages": [{"depth": 1}, {"depth": 1}],
    "middle": {"depth": 1},
    "dropout": 0.1,
}
VQ = {**KL, "_target_": "diffusion.models.vq.VQAutoencoder", "num_codes": 16}
VECTOR = {
    "_target_": "diffusion.models.conv_vae.ConvVAE",
    "in_channels": 1,
    "image_size": 8,
    "latent_channels": 3,
    "channels": 4,
    "num_levels": 1,
}
LOSS = {"_target_": "diffusion.autoencoder_losses.AutoencoderLoss", "kl_weight": 1e-3, "kl_warmup_steps": 5}
ADVERSARIAL = {"_target_": "diffusion.autoencoder_losses.AdversarialLoss", "start": 4}
DISCRIMINATOR = {
    "_target_": "diffusion.models.discriminator.PatchDiscriminator",
    "in_channels": 1,
    "channels": 4,
    "num_layers": 1,
}
CALLBACKS = {
    "guard": {"_target_": "diffusion.training.guard.NonFiniteGuard"},
    "log": {"_target_": "diffusion.training.metrics.TrainingLog"},
    "reconstructions": {
        "_target_": "diffusion.training.reconstructions.Reconstructions",
        "_partial_": True,
        "every_n_steps": 4,
        "num_images": 4,
        "columns": 2,
    },
    "checkpoints": {
        "_target_": "diffusion.training.checkpoints.Checkpoints",
        "_partial_": True,
        "every_n_steps": 1,
    },
    "scale": {
        "_target_": "diffusion.training.latent_scale.MeasureScale",
        "_partial_": True,
        "num_images": 100,
    },
}
# Without a discriminator; with one, of which the run has four steps without and ten with it.
PLAIN = {"loss": LOSS}
GAN = {
    "loss": {**LOSS, "adversarial": ADVERSARIAL},
    "discriminator": DISCRIMINATOR,
    "discriminator_optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 1e-3, "betas": [0.5, 0.9]},
}


def tiny_autoencoder(run_dir: Any, **changes: Any) -> dict[str, Any]:
    """The config of a tiny run; `changes` are dotted keys with `__` for the dot, as for `tiny`."""
    parts = {
        "task": {"_target_": "diffusion.training.autoencoder.AutoencoderTask"},
        "autoencoder": KL,
        "net": {},
        "diffusion": None,
        "callbacks": CALLBACKS,
    }
    whole = {key: value for key, value in {**parts, **PLAIN, **changes}.items() if "__" not in key}
    inside = {key: value for key, value in changes.items() if "__" in key}
    return tiny(run_dir, **copy.deepcopy(whole), **inside)


class Watch(Callback):
    """Keep what each batch gave: (global step, loss), and the class's list outlives the run."""

    seen: list[tuple[int, float]]

    def __init__(self) -> None:
        type(self).seen = []

    def on_train_batch_end(self, trainer: Trainer, task: Any, outputs: dict[str, Any], *args: Any) -> None:
        self.seen.append((trainer.global_step, float(outputs["loss"])))


class Diverge(Callback):
    """Make the decoder's last weight NaN once `step` steps are done, so that the next loss is."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, task: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            task.autoencoder.last_layer.data.fill_(float("nan"))
