"""What is measured while training, and where does it go? One row every n steps, to metrics.csv and to each logger.

A resumed run continues the file: rows after its checkpoint are dropped, and written again.
"""

import csv
import io
import os
import resource
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from diffusion.checkpoint import atomic_write

GIB = 2**30


class TrainingLog(Callback):
    """Log losses, gradient norm before clipping, learning rate, images/s and peak memory every `log_every_n_steps`.

    Steps are optimizer steps done, for training and validation alike. `latest` is what the progress line shows.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self._last_step = 0
        self._images = 0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count images and seconds."""
        self._last_step, self._images, self._since = trainer.global_step, 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Record a row every `log_every_n_steps` optimizer steps and at the last one."""
        self._images += len(next(iter(batch.values())))
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if step % trainer.log_every_n_steps == 0 or step == trainer.max_steps:
            self._record(trainer, self._row(trainer, pl_module))

    def _row(self, trainer: Trainer, task: LightningModule) -> dict[str, float]:
        row = task.pop_losses()
        if task.gradient_norm is not None:
            row["train/grad_norm"] = float(task.gradient_norm)
        row["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        now = time.perf_counter()
        row["train/images_per_second"] = self._images * trainer.world_size / max(now - self._since, 1e-9)
        row["train/memory_gb"] = peak_memory(task.device) / GIB
        if broken := len(getattr(getattr(trainer, "datamodule", None), "broken", ())):
            row["data/broken_samples"] = broken  # left out since the start, by this rank
        self._images, self._since = 0, now
        return row

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the validation's metrics at the step where it ran."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self._record(trainer, metrics)

    def _record(self, trainer: Trainer, row: dict[str, float]) -> None:
        self.latest.update(row)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes used so far: of the GPU's memory by tensors, or of main memory by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MetricsCSV(Logger):
    """Write metrics to one CSV file, one row a step, with columns added as metrics appear.

    `resume_step` keeps the rows up to that step and drops later ones, which a resumed run writes again; None starts
    the file anew.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        rows = [] if resume_step is None else [row for row in read_rows(self.path) if int(row["step"]) <= resume_step]
        self._columns = list(rows[0]) if rows else ["step"]
        self._row: dict[str, Any] = {**rows[-1], "step": int(rows[-1]["step"])} if rows else {}
        self._in_file, self._changed = bool(rows), False  # what the file has of the current row
        if rank_zero_only.rank == 0 and self.path.exists():
            self._rewrite(rows)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def row(self, step: int) -> dict[str, float]:
        """Return what there is of this step so far; nothing on all ranks but the first."""
        row = self._row if self._row.get("step") == step else {}
        return {name: float(value) for name, value in row.items() if name != "step" and value != ""}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the row of this step; a row is written when the next one begins, and on `save`."""
        if self._row.get("step") != step:
            self.save()
            self._row, self._in_file = {"step": step}, False
        self._row.update(metrics)
        self._changed = True

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Write the row; a new column rewrites the file, all else is appended."""
        if not self._changed:
            return
        new = [column for column in self._row if column not in self._columns]
        if new or self._in_file or not self.path.exists():
            rows = read_rows(self.path)
            self._columns += new
            self._rewrite([*rows[: len(rows) - self._in_file], self._row])
        else:
            self._append(as_csv(self._columns, [self._row]))
        self._in_file, self._changed = True, False

    def finalize(self, status: str) -> None:
        """Write what is not written yet."""
        self.save()

    def _append(self, text: str) -> None:
        """Add lines; where there is no room the file stays as it was."""
        size = self.path.stat().st_size
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            os.truncate(self.path, size)
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}; free some space") from error

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        header = dict(zip(self._columns, self._columns, strict=True))
        with atomic_write(self.path, durable=False) as partial:
            partial.write_text(as_csv(self._columns, [header, *rows]), encoding="utf-8", newline="")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, without a last line that a kill cut short; [] where there is no file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def as_csv(columns: list[str], rows: list[dict[str, Any]]) -> str:
    """Format rows with eight digits a number; what a row lacks stays empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        values = (row.get(column, "") for column in columns)
        writer.writerow(f"{value:.8g}" if isinstance(value, float) else value for value in values)
    return text.getvalue()


def tensorboard_logger(
    *, run_dir: Path, config: Mapping[str, Any], resume_step: int | None = None
) -> TensorBoardLogger:
    """Write TensorBoard events, and the config as text, to run_dir/tensorboard.

    A run resumed after `resume_step` hides what its folder has of later steps: they come again.
    """
    purge_step = None if resume_step is None else resume_step + 1
    logger = TensorBoardLogger(save_dir=run_dir, name="tensorboard", version="", purge_step=purge_step)
    if rank_zero_only.rank == 0:
        text = f"```yaml\n{yaml.safe_dump(dict(config), sort_keys=False)}```"
        logger.experiment.add_text("config", text, global_step=purge_step or 0)
    return logger


class WandbRun(WandbLogger):
    """A W&B run that ends with its training, so that the next job of a sweep begins its own.

    Its steps are those of the optimizer: W&B takes none twice, so a resumed run adds where the one before it ended.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log at this step of W&B's own axis, too."""
        if step is None:
            super().log_metrics(metrics)
        else:
            self.experiment.log({**metrics, "trainer/global_step": step}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write and end the run, as failed unless training ended well."""
        super().finalize(status)
        self.experiment.finish(exit_code=0 if status == "success" else 1)


def wandb_logger(
    *, run_dir: Path, config: Mapping[str, Any], resume_step: int | None = None, **settings: Any
) -> WandbRun:
    """Log to Weights & Biases with the config as a dictionary; a resumed run continues the same W&B run.

    `settings` are those of `wandb.init` (project, name, tags, ...) and `offline=True`, which needs no network. Offline
    each start is a folder of its own with the same id, which `wandb sync` joins.
    """
    id_file = run_dir / "wandb_id"
    if rank_zero_only.rank == 0 and not id_file.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
    resume = None if settings.get("offline") else "allow"  # an offline run cannot look up what it continues
    if settings.get("offline") and resume_step is not None and rank_zero_only.rank == 0:
        print(
            f"W&B offline: this start is a folder of its own with the same id {run_id}; "
            f"`wandb sync {run_dir / 'wandb'}/offline-run-*` joins them",
            file=sys.stderr,
        )
    return WandbRun(save_dir=run_dir, id=run_id, resume=resume, config=dict(config), **settings)
