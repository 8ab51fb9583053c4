"""Classic bugs, each planted in a subclass that does wrong what people do wrong; and the short runs that have them."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tiny import NET
from torch import Tensor
from training_cases import tiny

from diffusion.data.digits import Digits
from diffusion.process import GaussianDiffusion
from diffusion.schedule import linear
from diffusion.training.denoiser import DenoiserTask
from diffusion.training.ema import EMA

STEPS = 60
MICROSCOPE = {"_target_": "diffusion.training.microscope.Microscope", "_partial_": True, "num_timesteps": 6}
SMALL_NET = {**NET, "channels": 8, "norm_groups": 4, "stages": [{"depth": 1}]}


class TrainsOtherwise(DenoiserTask):
    """Trains with another process than the one that everything else is told of."""

    wrong: ClassVar[dict[str, Any]] = {}

    def other(self, diffusion: GaussianDiffusion) -> GaussianDiffusion:
        return replace(diffusion, **self.wrong)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        right = self.diffusion
        self.diffusion = self.other(right)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self.diffusion = right


class LearnsEps(TrainsOtherwise):
    wrong: ClassVar[dict[str, Any]] = {"parameterization": "eps"}


class LearnsV(TrainsOtherwise):
    wrong: ClassVar[dict[str, Any]] = {"parameterization": "v"}


class LearnsX0(TrainsOtherwise):
    wrong: ClassVar[dict[str, Any]] = {"parameterization": "x0"}


@dataclass(frozen=True)
class ToldLate(GaussianDiffusion):
    """Tells the network a time `late` steps after that of the noise."""

    late: int = 1

    def time(self, x: Tensor, t: int | float | Tensor) -> Tensor:
        return super().time(x, t) + self.late


class OffByOne(TrainsOtherwise):
    """Training passes t + 1 to the network."""

    def other(self, diffusion: GaussianDiffusion) -> GaussianDiffusion:
        return ToldLate(diffusion.schedule, diffusion.parameterization, late=1)


class WrongBetas(TrainsOtherwise):
    """Training's betas are those of a chain of 1000 steps on a short one: little noise, even at its end."""

    def other(self, diffusion: GaussianDiffusion) -> GaussianDiffusion:
        return replace(diffusion, schedule=linear(diffusion.num_train_timesteps, reference_steps=None))


class NeverDrops(DenoiserTask):
    """Says that it drops conditions, and does not."""

    def condition(self, batch: dict[str, Any], *key: int | str, drop: Tensor | None = None) -> dict[str, Tensor]:
        return super().condition(batch, *key, drop=None if self.training else drop)


class Digits01(Digits):
    """Images in 0..1, as a loader gives them that only divides by 255."""

    top = 1

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        for images in (self.train_set, self.val_set):
            images.samples = scaled(images.samples, self.top)


class Digits255(Digits01):
    """Images as bytes hold them."""

    top = 255


def scaled(samples: Any, top: float) -> Any:
    """Change what a data set answers: images to 0..`top`."""

    def wrong(*args: Any, **how: Any) -> dict[str, Any]:
        batch = samples(*args, **how)
        return {**batch, "image": (batch["image"] + 1) / 2 * top}

    return wrong


class OwnSchedule(DenoiserTask):
    """Has built its process anew by hand, by another schedule than the config's."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.diffusion = replace(self.diffusion, schedule=linear(self.diffusion.num_train_timesteps))


class FrozenEMA(EMA):
    """Counts its updates and forgets to make them."""

    def update(self) -> None:
        self.num_updates += 1


class ForgottenEMA(EMA):
    """Is never told that a step was made."""

    def on_train_batch_end(self, *args: object) -> None:
        pass


class SameDraws(DenoiserTask):
    """Draws on each rank what the first one draws."""

    global_rank = 0


def short(run_dir: Any, *, net: dict[str, Any] = SMALL_NET, timesteps: int = 100, **changes: Any) -> dict[str, Any]:
    """A run of `STEPS` steps on a short chain, with the microscope and little else."""
    schedule = {"_target_": "diffusion.schedule.cosine", "num_train_timesteps": timesteps}
    sampler = {"_target_": "diffusion.timestep_samplers.StratifiedTimesteps", "num_train_timesteps": timesteps}
    settings = {
        "net": net,
        "schedule": schedule,
        "diffusion__schedule": schedule,
        "timestep_sampler": sampler,
        "data__batch_size": 64,
        "optimizer__lr": 1e-2,
        "lr_scheduler": None,
        "callbacks__samples": None,
        "callbacks__progress": None,
        "callbacks__checkpoints__every_n_steps": 10_000,
        "callbacks__microscope": MICROSCOPE,
        "trainer__max_steps": STEPS,
        "trainer__limit_val_batches": 0,
        "trainer__log_every_n_steps": 50,
        "trainer__enable_progress_bar": False,
    }
    return tiny(run_dir, **{**settings, **changes})
