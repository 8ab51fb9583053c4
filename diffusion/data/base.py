"""What does every datamodule share: shape and classes known at once, keyed order, exact resume in mid-epoch?

A subclass fills `train_set` and `val_set` in `setup`; all that concerns batches, workers and resuming is here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from diffusion.data.batches import EpochBatches, EpochLoader
from diffusion.data.broken import BrokenSamples
from diffusion.data.images import ImageSet, KeyedSet, digest


class ImageData(LightningDataModule):
    """Batches {"image": (B, C, H, W) float32 in [-1, 1], "index": (B,) int64, and "label" (B,) int64, "caption" list}.

    `batch_size` is that of one device. `pin_memory=None` pins where CUDA is there. Training order is a function of
    (seed, epoch), mirrors of (seed, epoch, index); validation has a fixed order and no mirrors. Train with
    `Trainer(use_distributed_sampler=False)`: the loaders deal their batches to the ranks themselves.

    The checkpoint's entry (`state_dict`) is the first batch that no optimizer step has used, so a resumed run takes up
    exactly there, with any number of workers, ranks (at the same global batch) and accumulated batches.

    `broken` counts and names the samples that had to be left out; more than `max_broken` of them end the run.
    """

    def __init__(
        self,
        *,
        channels: int,
        image_size: int,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int = 0,
        max_broken: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("channels", channels, 1),
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"data.{name} is {value!r}; it must be an integer of at least {least}")
        self.channels, self.image_size = channels, image_size
        self.num_classes = num_classes
        self.class_names = None if class_names is None else tuple(class_names)
        self.batch_size, self.num_workers, self.pin_memory, self.seed = batch_size, num_workers, pin_memory, seed
        self.broken = BrokenSamples(max_broken)
        self.train_set: ImageSet | None = None
        self.val_set: ImageSet | None = None
        self.served: dict[str, KeyedSet] = {}  # in place of the sets, see `serve`
        self._train_loader: EpochLoader | None = None
        self._resume: dict[str, int] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.channels, self.image_size, self.image_size

    def fingerprint(self) -> dict[str, Any]:
        """Say which data these are, wherever they lie: "name", "num_samples" and "hash", for the record of a run.

        The hash changes with the samples and what is done to them, not with batches, workers, seed or order.
        """
        self._ensure_setup()
        sets = {name: images.description() for name, images in (("train", self.train_set), ("val", self.val_set))}
        described = [self.shape, self.num_classes, *(sorted(about.items()) for about in sets.values())]
        count = sum(about["samples"] for about in sets.values())
        return {"name": type(self).__name__, "num_samples": count, "hash": digest(described)}

    def serve(self, *, train: KeyedSet, val: KeyedSet) -> None:
        """Give these samples in place of `train_set` and `val_set` from now on: what a cache has made of them.

        They must be as many. Order, mirrors, ranks and the place where a run goes on are those of the images.
        """
        self._ensure_setup()
        for name, served, images in (("train", train, self.train_set), ("val", val, self.val_set)):
            if len(served) != len(images):
                raise ValueError(f"{len(served)} samples cannot stand for the {len(images)} images of the {name} set")
        self.served = {"train": train, "val": val}

    def train_dataloader(self) -> EpochLoader:
        """The shuffled training set; each `iter` is the next epoch, and the first one after a resume its rest."""
        self._ensure_setup()
        dataset = self.served.get("train", self.train_set)
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # then every epoch is epoch 0
        loader = self._loader(dataset, drop_last=True, reshuffle=not overfit)
        if not len(loader):
            raise ValueError(
                f"{len(dataset)} training images do not fill one batch of {loader.batches.global_batch_size}; "
                f"lower data.batch_size (it is {self.batch_size}) or add images"
            )
        if self._resume is not None:
            self._restore(loader)
        self._train_loader = loader
        return loader

    def val_dataloader(self) -> EpochLoader:
        """The validation set in its own order, all of it."""
        self._ensure_setup()
        return self._loader(self.served.get("val", self.val_set), drop_last=False, shuffle=False)

    def _ensure_setup(self) -> None:
        """Do what Lightning's trainer would have done, for use without one."""
        if self.train_set is None:
            self.prepare_data()
            self.setup("fit")

    def _loader(self, dataset: KeyedSet, **order: bool) -> EpochLoader:
        how = self._loading
        share = [how.pop(name) for name in ("batch_size", "rank", "world_size")]
        batches = EpochBatches(len(dataset), share[0], self.seed, *share[1:], **order)
        return EpochLoader(dataset, batches, persistent_workers=self.num_workers > 0, **how)

    @property
    def _loading(self) -> dict[str, Any]:
        """What every loader is told: this rank's share, workers, memory, and whom to tell of broken samples."""
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return {
            "batch_size": self.batch_size,
            "rank": rank,
            "world_size": world_size,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            "note_broken": self.broken.note,
        }

    # -- resuming ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """Where training goes on: `samples` of `epoch` have been used by optimizer steps, over all ranks.

        `rewind` counts batches after the last step: their gradients are in no checkpoint, so they are seen again.
        """
        if self._train_loader is None:
            return {}
        batches = self._train_loader.batches
        epoch, batch, rewind = self._next_batch(self._train_loader)
        return {
            "epoch": epoch,
            "samples": batch * batches.global_batch_size,
            "rewind": rewind,
            "global_batch_size": batches.global_batch_size,
            "num_samples": batches.num_samples,
            "seed": batches.seed,
            **self._train_loader.position(epoch, batch),
        }

    def _next_batch(self, loader: EpochLoader) -> tuple[int, int, int]:
        """Return epoch and number of the first batch that no step has used, and how many were seen from there on.

        Our own count of epochs: Lightning's drifts when it resumes from a checkpoint of an epoch's end. Its count of
        batches within the epoch is right once the epoch has begun (`processed` grows with the optimizer step).
        """
        epoch, start = loader.batches.epoch, loader.batches.start_batch
        if not loader.delivered:
            return epoch, start, 0
        if self.trainer is None:
            return epoch, start + loader.delivered, 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        done = progress.current.processed
        over = progress.is_last_batch and done == progress.current.ready  # `is_last_batch` is set before its step
        if over or done >= self.trainer.num_training_batches:
            return epoch + 1, 0, 0  # the last batch of an epoch always steps, however many are accumulated
        rewind = done % self.trainer.accumulate_grad_batches
        return epoch, done - rewind, rewind

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Keep the position for the next `train_dataloader`, which Lightning asks for after it restored its loops."""
        self._resume = dict(state_dict)

    def _restore(self, loader: EpochLoader) -> None:
        """Put the loader, and Lightning's batch count where it differs, to the first batch that no step has used."""
        state, self._resume = self._resume, None
        batches = loader.batches
        changed = [
            f"data.{name} was {state[name]} and is {now}"
            for name, now in (
                ("seed", batches.seed),
                ("num_samples", batches.num_samples),
                ("global_batch_size", batches.global_batch_size),
            )
            if state[name] != now
        ]
        if changed:
            rank_zero_warn(
                f"the data differ from the checkpoint's: {'; '.join(changed)}. Training goes on after "
                f"{state['samples']} samples of epoch {state['epoch']}, but not with the batches that an unbroken "
                "run would have seen."
            )
        batch = state["samples"] // batches.global_batch_size
        loader.start(state["epoch"], batch)
        loader.resume(state)
        if self.trainer is not None:
            self._align_lightning(loader.batches.start_batch, mid_epoch=state["samples"] > 0 or state["rewind"] > 0)

    def _align_lightning(self, batch: int, *, mid_epoch: bool) -> None:
        """Correct Lightning's restored batch counters where they do not say that training goes on at `batch`.

        They include batches that no optimizer step has used; and in a checkpoint from `on_train_epoch_start` they are
        still those of the finished epoch, for which Lightning would skip the new one.
        """
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        epochs = self.trainer.fit_loop.epoch_progress.current
        excess = progress.current.processed - batch
        if mid_epoch and excess:
            for counts in (progress.current, progress.total):
                done = counts.processed - excess
                counts.ready = counts.started = counts.processed = counts.completed = done
        elif not mid_epoch and epochs.ready > epochs.started:
            progress.reset_on_run()
