"""What does the model draw by now? Pictures of the same seeds every n steps, with and without averaged weights.

Everything drawn has its own generator and the network is only read, so the training's numbers do not change.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from diffusion.data.base import ImageData
from diffusion.generate import (
    Batch,
    NonFiniteSamples,
    batches,
    classes_asked,
    classes_of,
    guidance_for,
    sampler_for,
    say_guidance,
    with_classifier,
)
from diffusion.guidance import ClassifierGuidance, NonFiniteGradient
from diffusion.images import grid, to_uint8
from diffusion.sampling import Sampler
from diffusion.training.ema import EMA
from diffusion.training.pictures import Pictures, show

HALF = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16, "16-true": torch.float16}


class Drawing(Pictures):
    """Draw samples of the model in training, in evaluation mode and on seeds `seed`, `seed` + 1, ...

    `data` gives the shape (C, H, W), and its validation set the conditions of models that listen to texts or images.
    A subclass says in `draw_at_rest` what is drawn and what becomes of it.
    """

    def __init__(
        self,
        name: str,
        sampler: Sampler,
        guidance: Any,
        *,
        data: ImageData,
        every_n_steps: int,
        batch_size: int,
        seed: int,
        **numbers: int,
    ) -> None:
        super().__init__(name, every_n_steps=every_n_steps, batch_size=batch_size, **numbers)
        self.sampler, self.guidance, self.data = sampler, guidance, data
        self.batch_size, self.seed = batch_size, seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the guidance to the task, and raise ValueError for a sampler that this schedule or space cannot have."""
        super().on_train_start(trainer, pl_module)
        self.sampler.timesteps(pl_module.diffusion.schedule)  # a grid that does not fit fails now, not in an hour
        sampler_for(self.sampler, latents=pl_module.autoencoder is not None)
        conditional = pl_module.net.num_classes is not None or pl_module.conditioner is not None
        settings = {"conditional": conditional, "condition_drop": pl_module.condition_drop}
        self.guidance = with_classifier(
            guidance_for(self.guidance, **settings),
            pl_module.diffusion,
            shape=self.data.shape,
            num_classes=classes_of(pl_module.net, pl_module.conditioner),
            autoencoder=pl_module.autoencoder,
            device=pl_module.device,
        )
        if trainer.is_global_zero:
            say_guidance(self.guidance, self.sampler, pl_module.diffusion)

    def draw(self, trainer: Trainer, task: LightningModule) -> None:
        """Call `draw_at_rest`; samples that are not finite are a warning, because training may still get there."""
        training = task.model.training
        task.model.eval()
        try:
            self.draw_at_rest(trainer, task)
        except (NonFiniteSamples, NonFiniteGradient) as error:
            rank_zero_warn(f"no samples at step {trainer.global_step}: {error}")
        finally:
            task.model.train(training)

    @abstractmethod
    def draw_at_rest(self, trainer: Trainer, task: LightningModule) -> None:
        """Draw and keep samples while the model is in evaluation mode."""

    def weights(self, trainer: Trainer, task: LightningModule) -> Iterator[tuple[str, AbstractContextManager]]:
        """Yield a name and a context for the raw weights and, where there is one, for the first average."""
        yield "raw", nullcontext()
        ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)
        if ema is not None:
            yield "ema", ema.swapped(task.model)

    def drawn(
        self, trainer: Trainer, task: LightningModule, count: int, asked: Mapping[str, Sequence[Any]]
    ) -> Iterator[Batch]:
        """Draw `count` samples, a batch at a time, of what is `asked`: by batch entry, a value a sample."""
        inputs = {name: asked[name] for name in (task.conditioner.entries if task.conditioner else ())}
        return batches(
            task.net,
            task.diffusion,
            self.sampler,
            self.guidance,
            num_samples=count,
            batch_size=self.batch_size,
            seed=self.seed,
            labels=asked.get("label") if task.net.num_classes is not None or self._guides_by_label else None,
            inputs=inputs or None,
            shape=self.data.shape,
            conditioner=task.conditioner,
            autoencoder=task.autoencoder,
            device=task.device,
            dtype=HALF.get(trainer.precision, torch.float32),
        )

    def entries(self, task: LightningModule) -> set[str]:
        """Return what a sample is asked for, as a batch names it: "label", "caption", "image"."""
        entries = set(task.conditioner.entries if task.conditioner else ())
        return entries | ({"label"} if task.net.num_classes is not None or self._guides_by_label else set())

    def shown(self, entries: set[str], count: int, **instead: Sequence[Any]) -> dict[str, list[Any]]:
        """Return these entries of the first `count` validation samples; ValueError where the data lack one."""
        found: dict[str, list[Any]] = {entry: list(instead.get(entry, ())) for entry in entries}
        for start in range(0, count, self.batch_size):
            keys = [(0, index) for index in range(start, min(start + self.batch_size, count))]
            samples = self.data.val_set.__getitems__(keys)
            if lacking := sorted(entries - samples.keys() - instead.keys()):
                raise ValueError(f"the data's samples have no {' and no '.join(lacking)}, which this model is told")
            for entry in entries - instead.keys():
                found[entry] += samples[entry].tolist() if entry == "label" else list(samples[entry])
        return found

    def num_classes(self, task: LightningModule) -> int | None:
        """Return how many classes samples can be asked for, by the model or by a classifier that guides it."""
        return classes_asked(task.net, task.conditioner, self.guidance)

    @property
    def _guides_by_label(self) -> bool:
        return isinstance(self.guidance, ClassifierGuidance)


class SampleGrid(Drawing):
    """Draw a picture every `every_n_steps` optimizer steps and at the last one: a row a condition, a column a seed.

    `data` gives the shape (C, H, W), and the first samples of its validation set give the conditions of models that
    listen to texts or images, unless `prompts` are given. `classes` None takes at most `rows` classes, evenly spaced; a
    model without conditions gets `rows` rows. Files: run_dir/samples/step=0001000_ema.png and ..._raw.png; TensorBoard
    and W&B get them, too.
    """

    def __init__(
        self,
        sampler: Sampler,
        guidance: Any,
        *,
        data: ImageData,
        every_n_steps: int = 1000,
        classes: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        rows: int = 10,
        columns: int = 8,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        own = {"every_n_steps": every_n_steps, "batch_size": batch_size, "seed": seed, "rows": rows, "columns": columns}
        super().__init__("samples", sampler, guidance, data=data, **own)
        self.classes, self.prompts, self.rows, self.columns = classes, prompts, rows, columns

    def draw_at_rest(self, trainer: Trainer, task: LightningModule) -> None:
        """Draw, write and log one picture of the raw weights and one of the first average."""
        for name, weights in self.weights(trainer, task):
            with weights:
                images, captions = self._images(trainer, task)
            show(trainer, name, grid(images, self.columns, captions=captions))

    def _images(self, trainer: Trainer, task: LightningModule) -> tuple[np.ndarray, list[str] | None]:
        """Return uint8 images (rows * columns, H, W, C), row after row, and the captions of rows that have some."""
        asked = {name: self._repeated(values) for name, values in self._conditions(task).items()}
        count = self.columns * self.rows if not asked else len(next(iter(asked.values())))
        images = np.concatenate([to_uint8(batch.images) for batch in self.drawn(trainer, task, count, asked)])
        if "caption" not in asked:
            return images, None
        return images, [text if i % self.columns == 0 else "" for i, text in enumerate(asked["caption"])]

    def _repeated(self, values: Sequence[Any]) -> list[Any]:
        """Repeat a row's value for each of its columns."""
        return [value for value in values for _ in range(self.columns)]

    def _conditions(self, task: LightningModule) -> dict[str, list[Any]]:
        """Return what the rows ask for, by batch entry: classes in turn, or what validation samples show."""
        entries = self.entries(task)
        if not entries:
            return {}
        if entries == {"label"}:
            return {"label": self._classes(self.num_classes(task))}
        rows = len(self.prompts) if self.prompts else min(self.rows, len(self.data.val_set))
        return self.shown(entries, rows, **({"caption": list(self.prompts)} if self.prompts else {}))

    def _classes(self, num_classes: int) -> list[int]:
        if self.classes is not None:
            return list(self.classes)
        count = min(self.rows, num_classes)
        return [i * num_classes // count for i in range(count)]
