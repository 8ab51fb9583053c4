"""Where in the chain is the loss, and has the curve the shape of a classic bug?

Looked at every n steps on fixed images with fixed noise: run_dir/microscope.csv has the curves, run_dir/hints.yaml what
they may mean. Looking changes nothing: the run's weights are the same bits without it.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from diffusion.checkpoint import atomic_write
from diffusion.denoiser import NULL_LABEL
from diffusion.report.hints import Hint, hints_of
from diffusion.training.classifier import ClassifierTask
from diffusion.training.ema import EMA, trainable
from diffusion.training.looks import (
    InputNoise,
    Lens,
    Subject,
    data_facts,
    exported_facts,
    known_clean,
    marks,
    rank_facts,
    schedule_facts,
    undisturbed,
)
from diffusion.training.metrics import as_csv, read_rows
from diffusion.training.noised import NoisedTask
from diffusion.training.sharded import is_sharded

CURVES, HINTS = "microscope.csv", "hints.yaml"
HALF_SCALE = 2.0**12  # of the loss in float16, as a gradient scaler has it; norms are divided by it again
COMPARED = 16  # samples of a batch whose noise the ranks compare
HEARD_STEPS = 200  # optimizer steps whose inputs are measured; a bug in them is there from the start
ENCODED_EVERY = 5  # of these, where images must be encoded once more for it


class Microscope(Callback):
    """Look before the first optimizer step, every `every_n_steps` and at the last one, on the first process.

    The first `num_images` of the validation set, at most half a training batch at once, at `num_timesteps` evenly
    spaced timesteps: loss, gradient norm, error of x0, answers without the condition and of the averaged weights. The
    noise depends on `seed` and the timestep alone, so that runs can be compared. Beside it, what training shows the
    network is measured in the first steps: how noisy it is, and how often nothing is told; and with several processes
    whether their draws differ. Hints are said on stderr when they first appear, and at the end.

    Of a network in shards (FSDP) all processes look at the same, because each of its calls needs all of them; such
    curves have no gradient norm.
    """

    def __init__(
        self,
        *,
        data: Any,
        config: Mapping[str, Any],
        every_n_steps: int = 500,
        num_images: int = 16,
        num_timesteps: int = 12,
        seed: int = 0,
    ) -> None:
        own = {"every_n_steps": (every_n_steps, 1), "num_images": (num_images, 2), "num_timesteps": (num_timesteps, 2)}
        for name, (value, least) in own.items():
            if value < least:
                raise ValueError(f"callbacks.microscope.{name} must be at least {least}, got {value}")
        self.data, self.config, self.seed = data, config, seed
        self.every_n_steps, self.num_images, self.num_timesteps = every_n_steps, num_images, num_timesteps
        self.rows: list[dict[str, Any]] = []
        self.hints: dict[str, dict[str, Any]] = {}
        self._subject: Subject | None = None
        self._initial: Tensor | None = None  # marks of the weights that training began with
        self._first_step = self._last_step = 0
        self._looking = False
        self._shown: tuple[Tensor, Tensor] | None = None  # x_t and the times told, of this training step
        self._noise: InputNoise | None = None
        self._told = torch.zeros(2, dtype=torch.long)  # samples, and those without their condition
        self._undo: list[Callable[[], None]] = []

    # -- when ----------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the files where a resumed run goes on; otherwise have a first look, at the data above all."""
        if not isinstance(pl_module, NoisedTask):
            raise ValueError(
                f"{type(pl_module).__name__} has no timesteps to look at; switch the callback off: "
                "callbacks.microscope=null"
            )
        self._first_step = self._last_step = trainer.global_step
        self._told, self._noise = self._told.to(pl_module.device), InputNoise(pl_module.device)
        self._listen(trainer, pl_module)
        if self._initial is None and trainer.global_step == 0:
            self._initial = marks(trainable(pl_module.model))
        if trainer.fast_dev_run or not self._looks(trainer, pl_module):
            return
        if trainer.global_step:
            self._take_up(Path(trainer.default_root_dir), trainer.global_step)
        else:
            self._look(trainer, pl_module, None, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Look when this batch completed a step that is due; processes first compare what they drew for it."""
        shown, self._shown = self._shown, None
        if shown is not None and self._measures(trainer, pl_module, batch):
            x0, variance = known_clean(pl_module.autoencoder, batch)
            self._noise.add(pl_module.diffusion, x0, *shown, variance)
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if trainer.fast_dev_run or (step % self.every_n_steps and step != trainer.max_steps):
            return
        ranks = None
        if trainer.world_size > 1 and getattr(pl_module, "noised", True):
            ranks = compare_ranks(pl_module, batch, outputs["t"], shown and shown[0])
        if self._looks(trainer, pl_module):
            self._look(trainer, pl_module, batch, ranks)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once more what still holds."""
        self._stop_listening()
        for hint in self.hints.values():
            stands = hint["since"] < hint["until"] == trainer.global_step
            if stands and trainer.is_global_zero and not trainer.fast_dev_run:
                print(f"hint, still at the last step: {hint['name']}: {hint['seen']}", file=sys.stderr)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the network as it was."""
        self._stop_listening()

    def state_dict(self) -> dict[str, Any]:
        """Keep the marks of the initial weights, which a resumed run cannot know otherwise."""
        return {"initial": self._initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self._initial = state_dict["initial"]

    # -- listening while training --------------------------------------------------------------------------------------

    def _listen(self, trainer: Trainer, task: LightningModule) -> None:
        """Hear what the network is shown and told in training; a compiled one is heard from outside its graph."""
        net = task.net

        def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled() and not self._looking:
                if trainer.world_size > 1 or trainer.global_step - self._first_step < HEARD_STEPS:
                    self._shown = args[0].detach(), args[1].detach()
                if (label := kwargs.get("label")) is not None:
                    self._count(label == NULL_LABEL)

        def hear_drop(_: nn.Module, args: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled() and not self._looking:
                drop = args[1] if len(args) > 1 else None
                self._count(torch.zeros(len(args[0]), device=task.device) if drop is None else drop)

        compiled = getattr(net, "_compiled_call_impl", None)
        if compiled is None:
            self._undo = [net.register_forward_pre_hook(hear, with_kwargs=True).remove]
        else:

            def heard(*args: Any, **kwargs: Any) -> Any:
                hear(net, args, kwargs)
                return compiled(*args, **kwargs)

            net._compiled_call_impl = heard
            self._undo = [lambda: setattr(net, "_compiled_call_impl", compiled)]
        if task.conditioner is not None:
            self._undo.append(task.conditioner.register_forward_pre_hook(hear_drop).remove)

    def _stop_listening(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def _measures(self, trainer: Trainer, task: LightningModule, batch: Mapping[str, Any]) -> bool:
        """Say whether the noise of this batch is measured."""
        steps = trainer.global_step - self._first_step
        free = task.autoencoder is None or "moments" in batch or steps % ENCODED_EVERY == 0
        return steps < HEARD_STEPS and free and getattr(task, "noised", True)

    def _count(self, dropped: Tensor) -> None:
        """Count without waiting for the device."""
        self._told[0] += len(dropped)
        self._told[1] += dropped.sum().to(self._told)

    @staticmethod
    def _looks(trainer: Trainer, task: LightningModule) -> bool:
        return trainer.is_global_zero or is_sharded(task.model)

    # -- one look ------------------------------------------------------------------------------------------------------

    def _look(
        self,
        trainer: Trainer,
        task: LightningModule,
        batch: Mapping[str, Any] | None,
        ranks: dict[str, Any] | None,
    ) -> None:
        """Measure, write the files, and say the hints that are new."""
        self._looking = True
        try:
            with undisturbed(task.model, task.conditioner, device=task.device), torch.no_grad():
                self._subject = self._subject or subject_of(trainer, task, self.data, self.num_images)
                look = self._facts(trainer, task, batch) | {"ranks": ranks, "curve": self._curve(trainer, task)}
        finally:
            self._looking = False
        self.rows += [{"step": trainer.global_step, **row} for row in look["curve"]]
        if trainer.is_global_zero:
            self._write(Path(trainer.default_root_dir), trainer.global_step, hints_of(look))

    def _facts(self, trainer: Trainer, task: LightningModule, batch: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return all that is not a curve; see `diffusion.report.hints` for what becomes of it."""
        data = {"validation": data_facts(self._subject.x0)}
        if batch is not None:
            seen = {name: value[: self.num_images] for name, value in batch.items()}
            data["training"] = data_facts(task.clean(seen, task.aside("microscope", seen)))
        return {
            "step": trainer.global_step,
            "latents": task.autoencoder is not None,
            "data": data,
            "schedule": schedule_facts(task.diffusion),
            "inputs": self._noise.facts(),
            "ema": self._ema_facts(trainer, task),
            "condition": self._condition_facts(task),
            **self._exported(task),
        }

    def _curve(self, trainer: Trainer, task: LightningModule) -> list[dict[str, float]]:
        """Return a row a timestep."""
        subject, lens = self._subject, self._lens(trainer, task)
        last = task.diffusion.num_train_timesteps - 1
        times = sorted({round(i * last / (self.num_timesteps - 1)) for i in range(self.num_timesteps)})
        if isinstance(task, ClassifierTask):
            times = times if task.noised else [0]
            return [lens.classifier_row(subject, t, noised=task.noised) for t in times]
        curve = [lens.row(subject, t) for t in times]
        if not trainer.global_step:  # nothing has been learnt, with or without a condition, and nothing averaged
            return curve
        if subject.null is not None:
            without = Subject(subject.x0, subject.condition | subject.null)
            for row in curve:
                row["mse_null"] = lens.error(without, row["t"])
        if (ema := average_of(trainer)) is not None:
            with ema.swapped(task.model):
                for row in curve:
                    row["mse_ema"] = lens.error(subject, row["t"])
        return curve

    def _lens(self, trainer: Trainer, task: LightningModule) -> Lens:
        half = str(trainer.precision).startswith("16")
        return Lens(
            task.net,
            task.diffusion,
            getattr(task, "loss", None),
            size=max(1, min(self.num_images, getattr(self.data, "batch_size", 2 * self.num_images) // 2)),
            seed=self.seed,
            scale=HALF_SCALE if half else 1.0,
            gradients=not is_sharded(task.net),
            context=trainer.precision_plugin.forward_context,
        )

    def _exported(self, task: LightningModule) -> dict[str, Any]:
        """Return what samplers will be told of the process, beside what training has."""
        said = {"parameterization": task.diffusion.parameterization}
        node = self.config.get("diffusion")
        if isinstance(task, ClassifierTask) or not isinstance(node, Mapping) or "_target_" not in node:
            return said | {"exported": None}
        exported = instantiate(dict(node), _convert_="all")
        facts = exported_facts(task.diffusion, exported)
        return said | {"exported": facts | {"parameterization": exported.parameterization}}

    def _condition_facts(self, task: LightningModule) -> dict[str, Any] | None:
        if not self._subject.condition:
            return None
        samples, dropped = self._told.tolist()
        scale = (self.config.get("guidance") or {}).get("guidance_scale", 1.0)
        told = {"samples": samples, "dropped": dropped, "null": self._subject.null is not None}
        return {"drop": task.condition_drop, "guidance_scale": scale, **told}

    def _ema_facts(self, trainer: Trainer, task: LightningModule) -> dict[str, Any] | None:
        """Return how far the first average and the weights are from where they began, in `marks`."""
        ema = average_of(trainer)
        if ema is None or self._initial is None:
            return None
        now, average = marks(trainable(task.model)), marks(ema.average())
        return {
            "decay": ema.decays[0],
            "updates": ema.num_updates,
            "weights_moved": float((now - self._initial).norm()),
            "average_moved": float((average - self._initial).norm()),
            "initial_share": initial_share(ema, max(ema.num_updates, trainer.max_steps)),
        }

    # -- files ---------------------------------------------------------------------------------------------------------

    def _take_up(self, folder: Path, step: int) -> None:
        """Go on with the files of a run that was resumed after this step."""
        self.rows = [row for row in read_rows(folder / CURVES) if int(row["step"]) <= step]
        path = folder / HINTS
        known = (yaml.safe_load(path.read_text(encoding="utf-8")) or []) if path.exists() else []
        self.hints = {hint["name"]: {**hint, "until": min(hint["until"], step)} for hint in known}
        self.hints = {name: hint for name, hint in self.hints.items() if hint["since"] <= step}

    def _write(self, folder: Path, step: int, found: list[Hint]) -> None:
        """Write curves and hints, and say those that are new."""
        for hint in found:
            known = self.hints.get(hint.name)
            if known is None:
                print(f"hint at step {step}: {hint.name}: {hint.seen}. {hint.means}. {hint.check}.", file=sys.stderr)
            since = step if known is None else known["since"]
            self.hints[hint.name] = {**hint._asdict(), "since": since, "until": step}
        columns = list(dict.fromkeys(["step", *(name for row in self.rows for name in row)]))
        header = dict(zip(columns, columns, strict=True))
        with atomic_write(folder / CURVES, durable=False) as partial:
            partial.write_text(as_csv(columns, [header, *self.rows]), encoding="utf-8", newline="")
        with atomic_write(folder / HINTS, durable=False) as partial:
            text = yaml.safe_dump(list(self.hints.values()), sort_keys=False, allow_unicode=True, width=1000)
            partial.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------


def average_of(trainer: Trainer) -> EMA | None:
    """Return the callback that keeps averages, if there is one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, EMA) and callback.averages), None)


def initial_share(ema: EMA, updates: int) -> float:
    """Return what share of the first average the initial weights will have after so many updates."""
    share = 1.0
    for n in range(1, updates + 1):
        share *= ema.rule(ema.decays[0], n)
        if share < 1e-6:
            return 0.0
    return share


def subject_of(trainer: Trainer, task: LightningModule, data: Any, count: int) -> Subject:
    """Return the first validation samples, as training would see them, and what a model that is told nothing hears."""
    batch = trainer.strategy.batch_to_device(first_samples(data, count), task.device)
    x0 = trainer.precision_plugin.convert_input(task.clean(batch, task.aside("microscope", batch)))
    if isinstance(task, ClassifierTask):
        return Subject(x0, {}, label=batch["label"])
    everyone = torch.ones(len(x0), dtype=torch.bool, device=task.device)
    condition = task.condition(batch, task.aside("microscope", batch))
    nothing = task.condition(batch, task.aside("microscope", batch), drop=everyone)
    null = {name: value for name, value in nothing.items() if not torch.equal(value, condition[name])}
    return Subject(x0, condition, null or None)


def first_samples(data: Any, count: int) -> dict[str, Any]:
    """Return the first samples of a datamodule's validation set, without its workers where they can be asked for."""
    loader = data.val_dataloader()
    if hasattr(loader.dataset, "__getitems__"):
        return loader.dataset.__getitems__([(0, index) for index in range(min(count, len(loader.dataset)))])
    batch = next(iter(loader))
    return {name: value[:count] for name, value in batch.items()}


def compare_ranks(task: LightningModule, batch: Mapping[str, Any], t: Tensor, x: Tensor | None) -> dict[str, Any]:
    """Gather timesteps and noise of this batch from all ranks, which all must call this, and compare them.

    The noise is what remains of the network's input without the signal, of latents nearly.
    """
    times, noise = task.all_gather(t), None
    if x is not None:
        x0, _ = known_clean(task.autoencoder, {name: value[:COMPARED] for name, value in batch.items()})
        at = task.diffusion.schedule.level(t[:COMPARED]).to(x0)
        rest = (x[:COMPARED, : x0.shape[1]].to(x0) - at.alpha * x0) / at.sigma
        noise = task.all_gather(rest.flatten(1).float())
    return rank_facts(times, noise)
