"""Order and resume: which batches are seen, with any number of workers, ranks and interruptions."""

import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from diffusion.data.base import ImageData
from diffusion.data.batches import EpochBatches
from diffusion.data.images import TensorImages

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def indices_of(batches: EpochBatches) -> list[list[int]]:
    return [[index for _, index in batch] for batch in batches]


class CountingData(ImageData):
    """22 images of 1x1 whose label is their index: with batches of 4, an epoch of five batches."""

    def __init__(self, num_train: int = 22, **kwargs):
        super().__init__(channels=1, image_size=1, **kwargs)
        self.num_train = num_train

    def setup(self, stage=None):
        labels = torch.arange(self.num_train)
        images = labels.to(torch.uint8)[:, None, None, None]
        self.train_set = TensorImages(images, labels, seed=self.seed, horizontal_flip=True)
        self.val_set = TensorImages(images[:3], labels[:3], seed=self.seed)


def test_the_order_is_a_function_of_seed_and_epoch():
    batches = EpochBatches(22, 4, seed=3)
    epochs = [indices_of(batches)]
    batches.epoch = 1
    epochs.append(indices_of(batches))
    assert epochs[0] != epochs[1]
    again = EpochBatches(22, 4, seed=3)
    again.epoch = 1
    assert indices_of(again) == epochs[1]
    assert indices_of(EpochBatches(22, 4, seed=4)) != epochs[0]
    assert len(batches) == len(epochs[0]) == 5
    assert sorted(again.order(1).tolist()) == list(range(22))


def test_any_batch_of_any_epoch_is_addressable_and_an_epoch_can_start_in_its_middle():
    batches = EpochBatches(22, 4)
    whole = indices_of(batches)
    batches.start_batch = 3
    assert indices_of(batches) == whole[3:]
    assert len(batches) == 5
    assert batches.batch(0, 2) == whole[2]
    with pytest.raises(IndexError, match="batch 5"):
        batches.batch(0, 5)


def test_ranks_share_the_global_batches_of_one_process():
    whole = indices_of(EpochBatches(100, 16, seed=1))
    ranks = [indices_of(EpochBatches(100, 8, seed=1, rank=rank, world_size=2)) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("num_samples", [3, 21, 22, 24, 25])
def test_without_drop_last_every_sample_is_seen_and_all_ranks_step_equally_often(num_samples):
    ranks = [
        indices_of(EpochBatches(num_samples, 4, rank=rank, world_size=4, drop_last=False, shuffle=False))
        for rank in range(4)
    ]
    assert len({tuple(len(batch) for batch in batches) for batches in ranks}) == 1
    seen = [index for batches in ranks for batch in batches for index in batch]
    assert set(seen) == set(range(num_samples))
    assert len(seen) - num_samples < 4


def test_fixed_orders():
    assert indices_of(EpochBatches(5, 2, shuffle=False, drop_last=False)) == [[0, 1], [2, 3], [4]]
    repeated = EpochBatches(22, 4, reshuffle=False)
    assert repeated.batch(7, 1) == repeated.batch(0, 1)


def test_an_epoch_or_batch_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"batch_size is 0"):
        EpochBatches(4, 0)
    with pytest.raises(ValueError, match="rank 2"):
        EpochBatches(4, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"22 training images do not fill one batch of 23; lower data\.batch_size"):
        CountingData(batch_size=23).train_dataloader()
    with pytest.raises(ValueError, match=r"data\.num_workers is -1"):
        CountingData(num_workers=-1)


def test_a_loader_goes_to_the_next_epoch_only_after_it_gave_a_batch():
    data = CountingData(batch_size=4)
    loader = data.train_dataloader()
    first = iter(loader)
    assert torch.equal(next(iter(loader))["index"], next(first)["index"])
    second = next(iter(loader))
    assert second["index"].tolist() == loader.batches.batch(1, 0)


def test_loading_draws_nothing_from_the_global_generator():
    data = CountingData(batch_size=4)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("epoch", [0, 1])
def test_mirrors_are_a_function_of_seed_epoch_and_index(epoch):
    images = torch.arange(64 * 2).view(64, 1, 1, 2).to(torch.uint8)

    def mirrored(order, seed=5, epoch=epoch):
        dataset = TensorImages(images, torch.arange(64), seed=seed, horizontal_flip=True)
        batch = dataset.__getitems__([(epoch, index) for index in order])
        flipped = batch["image"][:, 0, 0, 0] > batch["image"][:, 0, 0, 1]
        return {index: bool(flip) for index, flip in zip(order, flipped, strict=True)}

    together = mirrored(range(64))
    assert together == {**mirrored(range(40, 64)), **mirrored(range(39, -1, -1))}
    assert 16 < sum(together.values()) < 48
    assert together != mirrored(range(64), seed=6)
    assert together != mirrored(range(64), epoch=epoch + 1)


def test_workers_change_nothing():
    epochs = []
    for num_workers in (0, 2):
        loader = CountingData(batch_size=4, num_workers=num_workers).train_dataloader()
        epochs.append([(batch["index"].tolist(), batch["image"]) for _ in range(2) for batch in loader])
    for (index, image), (other_index, other_image) in zip(*epochs, strict=True):
        assert index == other_index
        assert torch.equal(image, other_image)


def test_validation_sees_all_in_order_every_time():
    loader = CountingData(batch_size=2).val_dataloader()
    assert [batch["index"].tolist() for _ in range(2) for batch in loader] == [[0, 1], [2]] * 2


# -- resuming ----------------------------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Learns nothing of interest; remembers which indices each optimizer step used."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.window: list[list[int]] = []
        self.steps: list[list[list[int]]] = []

    def training_step(self, batch, batch_idx):
        self.window.append(batch["index"].tolist())
        return (self.weight - batch["image"].mean()) ** 2

    def on_before_optimizer_step(self, optimizer):
        self.steps.append(self.window)
        self.window = []

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Stop(Exception):
    pass


class SaveAndStop(Callback):
    """Saves at a chosen moment of the run, goes on for a few batches, then dies."""

    def __init__(self, path, *, hook: str, count: int, further: int = 0):
        self.path, self.hook, self.countdown, self.further = path, hook, count, further
        self.saved_steps = None

    def tick(self, trainer, module, hook):
        if self.saved_steps is not None:
            self.further -= hook == "on_train_batch_end"
        elif hook == self.hook:
            self.countdown -= 1
            if self.countdown == 0:
                trainer.save_checkpoint(self.path)
                self.saved_steps = trainer.global_step
        if self.saved_steps is not None and self.further <= 0:
            raise Stop

    def on_train_start(self, trainer, module):
        self.tick(trainer, module, "on_train_start")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.tick(trainer, module, "on_train_batch_start")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.tick(trainer, module, "on_train_batch_end")

    def on_train_epoch_end(self, trainer, module):
        self.tick(trainer, module, "on_train_epoch_end")

    def on_train_epoch_start(self, trainer, module):
        self.tick(trainer, module, "on_train_epoch_start")

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.tick(trainer, module, "on_validation_end")


def run(*, module=None, data=None, callbacks=(), ckpt_path=None, num_workers=0, batch_size=4, **trainer):
    module = module or Recorder()
    data = data or CountingData(batch_size=batch_size, num_workers=num_workers)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **({"max_epochs": 4} | trainer),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


MOMENTS = {
    "first batch": ("on_train_batch_end", 1),
    "mid-epoch": ("on_train_batch_end", 7),
    "before a step": ("on_train_batch_start", 8),
    "last batch of an epoch": ("on_train_batch_end", 10),
    "first batch of an epoch": ("on_train_batch_end", 11),
    "end of an epoch": ("on_train_epoch_end", 2),
    "start of an epoch": ("on_train_epoch_start", 3),
    "after validation": ("on_validation_end", 2),
}


@pytest.mark.parametrize("trainer", [{}, {"max_steps": 17, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_resumed_run_sees_what_an_unbroken_run_sees(tmp_path, moment, accumulate, trainer):
    check_resume(tmp_path, moment, accumulate_grad_batches=accumulate, **trainer)


@pytest.mark.parametrize("trainer", [{}, {"max_steps": 17, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_can_be_stopped_again_before_it_did_anything(tmp_path, moment, trainer):
    hook, count = MOMENTS[moment]
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    with pytest.raises(Stop):
        run(callbacks=[SaveAndStop(first, hook=hook, count=count)], accumulate_grad_batches=2, **trainer)
    with pytest.raises(Stop):
        again = SaveAndStop(second, hook="on_train_start", count=1)
        run(callbacks=[again], ckpt_path=first, accumulate_grad_batches=2, **trainer)
    resumed = [run(ckpt_path=path, accumulate_grad_batches=2, **trainer).steps for path in (first, second)]
    assert resumed[0] == resumed[1]


def test_a_changed_batch_size_is_reported_and_training_goes_on_at_the_same_sample(tmp_path):
    stop = SaveAndStop(tmp_path / "last.ckpt", hook="on_train_batch_end", count=7)
    with pytest.raises(Stop):
        run(callbacks=[stop])
    with pytest.warns(UserWarning, match=r"data\.global_batch_size was 4 and is 2.*after 8 samples of epoch 1"):
        resumed = run(ckpt_path=tmp_path / "last.ckpt", batch_size=2, max_epochs=2)
    assert [batch for (batch,) in resumed.steps] == [EpochBatches(22, 2).batch(1, number) for number in range(4, 11)]


def test_overfitting_repeats_the_same_batches():
    steps = run(overfit_batches=2, max_epochs=3).steps
    assert steps == steps[:2] * 3


def test_a_rank_takes_its_share():
    data = CountingData(batch_size=4)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, overfit_batches=0.0)
    assert next(iter(data.train_dataloader()))["index"].tolist() == EpochBatches(22, 8).batch(0, 0)[4:]


@pytest.mark.parametrize("moment", ["mid-epoch", "last batch of an epoch"])
def test_a_resumed_run_with_workers_sees_what_an_unbroken_run_sees(tmp_path, moment):
    check_resume(tmp_path, moment, num_workers=2, accumulate_grad_batches=2)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_resumed_run_of_shortened_epochs_sees_what_an_unbroken_run_sees(tmp_path, moment):
    check_resume(tmp_path, moment, limit_train_batches=4, max_epochs=5)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_resumed_run_that_validates_often_sees_what_an_unbroken_run_sees(tmp_path, moment):
    check_resume(tmp_path, moment, val_check_interval=2, accumulate_grad_batches=2)


def check_resume(tmp_path, moment, num_workers=0, **trainer):
    whole = run(**trainer)
    hook, count = MOMENTS[moment]
    for further in (0, 2):  # dying at once, or batches later: those are lost and seen again
        stop = SaveAndStop(tmp_path / "last.ckpt", hook=hook, count=count, further=further)
        broken = Recorder()
        with pytest.raises(Stop):
            run(module=broken, callbacks=[stop], num_workers=num_workers, **trainer)
        resumed = run(ckpt_path=tmp_path / "last.ckpt", num_workers=num_workers, **trainer)
        assert broken.steps[: stop.saved_steps] + resumed.steps == whole.steps
        assert torch.equal(resumed.weight, whole.weight)
