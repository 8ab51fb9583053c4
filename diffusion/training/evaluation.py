"""How good are samples by now? The field's metrics every n steps, of the averaged weights, on seeds that never change.

Off by default, because it costs (`callbacks=evaluation` switches it on). Everything drawn has its own generator and the
network is only read, so the training's numbers do not change.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer

from diffusion.data.base import ImageData
from diffusion.evaluation.command import check_shape, evaluation_for, write
from diffusion.evaluation.metrics import Evaluation
from diffusion.evaluation.reference import of_array, of_data
from diffusion.generate import choose_labels
from diffusion.images import to_uint8
from diffusion.sampling import Sampler
from diffusion.training.denoiser import DenoiserTask
from diffusion.training.samples import Drawing

BACKWARD = 3  # a training step on an image costs about three network calls: one forward, two's worth backward


class SampleMetrics(Drawing):
    """Measure `num_samples` samples every `every_n_steps` optimizer steps and at the last one.

    They are drawn with the first average of the weights, or the raw ones where there is none: all classes take turns,
    texts and images are those of the validation set, again and again. `reference` None compares with the training's own
    images (`reference_split` "train" or "val"); it and the other settings are those of sample.py. Scores go to the
    loggers as "eval/fid_500_pixels", results to run_dir/evaluation/step=0001000.json. The first process draws while
    others wait.
    """

    def __init__(
        self,
        sampler: Sampler,
        guidance: Any,
        *,
        data: ImageData,
        metrics: Sequence[str] = ("fid", "precision", "recall"),
        reference: str | None = None,
        reference_split: str = "train",
        reference_data: Mapping[str, Any] | None = None,
        features: str = "inception",
        inception_weights: str | None = None,
        resize: int | None = None,
        num_samples: int = 1000,
        every_n_steps: int = 10000,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        own = {"every_n_steps": every_n_steps, "batch_size": batch_size, "seed": seed, "num_samples": num_samples}
        super().__init__("evaluation", sampler, guidance, data=data, **own)
        self.num_samples = num_samples
        self.settings = {
            "metrics": metrics,
            "samples": None,
            "reference": reference,
            "reference_split": reference_split,
            "reference_data": reference_data,
            "features": features,
            "inception_weights": inception_weights,
            "resize": resize,
            "batch_size": batch_size,
        }
        self.evaluation: Evaluation | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open reference and features, find out whether samples fit them, and say what the evaluation will cost."""
        if not isinstance(pl_module, DenoiserTask):
            raise ValueError(
                f"{type(pl_module).__name__} draws no samples to measure; switch the callback off: "
                "callbacks.evaluation=null"
            )
        super().on_train_start(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        own = None
        if self.settings["reference"] is None:
            own = of_data(
                self.data,
                self.settings["reference_split"],
                name=type(self.data).__name__,
                resize=self.settings["resize"],
            )
        self.evaluation = evaluation_for(self.settings, device=str(pl_module.device), reference=own, silent=True)
        check_shape(self.evaluation, self.data.shape, self.num_samples)
        print(self.cost(trainer, pl_module), file=sys.stderr)

    def cost(self, trainer: Trainer, task: LightningModule) -> str:
        """Say in network calls, and in training steps that take about as long, what measuring will cost."""
        num_steps = len(self.sampler.timesteps(task.diffusion.schedule)) - 1
        twice = 1 if getattr(self.guidance, "guidance_scale", 1) == 1 else 2
        calls = self.num_samples * num_steps * twice
        steps = calls / (BACKWARD * self.data.batch_size * trainer.accumulate_grad_batches)
        share = ""
        if trainer.max_steps > 0:
            times = -(-trainer.max_steps // self.every_n_steps)
            share = f", {times} times in {trainer.max_steps} steps: {times * steps / trainer.max_steps:.1%} of the run"
        metrics = ", ".join(self.evaluation.metrics)
        return (
            f"evaluation: {metrics} of {self.num_samples} samples every {self.every_n_steps} steps, "
            f"{calls:,} network calls each, which take about as long as {steps:,.0f} training steps{share}"
        )

    def draw_at_rest(self, trainer: Trainer, task: LightningModule) -> None:
        """Draw, measure, log and keep."""
        started = time.monotonic()
        *_, (name, weights) = self.weights(trainer, task)
        with weights:
            batches = self.drawn(trainer, task, self.num_samples, self._asked(task))
            images = np.concatenate([to_uint8(batch.images) for batch in batches])
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        samples = of_array(images, f"step {step}, {name} weights", resize=self.settings["resize"])
        result = self.evaluation(samples)
        scores = {f"eval/{metric}": value for metric, value in result["scores"].items()}
        scores["eval/seconds"] = time.monotonic() - started
        for logger in trainer.loggers:
            logger.log_metrics(scores, step=step)
        print("  ".join([f"step {step}", *(f"{key} {value:.4g}" for key, value in scores.items())]), file=sys.stderr)
        if not trainer.fast_dev_run:
            write(
                {"step": step, "weights": name, **result},
                Path(trainer.default_root_dir) / "evaluation" / f"step={step:07d}.json",
            )

    def _asked(self, task: LightningModule) -> dict[str, list[Any]]:
        """Return what each sample is asked for, by batch entry."""
        entries = self.entries(task)
        if not entries:
            return {}
        if entries == {"label"}:
            return {"label": choose_labels(None, self.num_samples, self.num_classes(task))}
        shown = self.shown(entries, min(self.num_samples, len(self.data.val_set)))
        return {name: [values[i % len(values)] for i in range(self.num_samples)] for name, values in shown.items()}
