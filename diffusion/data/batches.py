"""In which order are samples seen, and where does an interrupted epoch go on?

The order is a function of (seed, epoch), never of workers, ranks or of what ran before; a position in it is two
integers, so that any batch of any epoch can be asked for directly.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from diffusion.data.images import BROKEN, KeyedSet
from diffusion.randomness import fold, generator


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys: what a dataset needs to fetch, and to augment, a sample.

    `batch_size` is that of one rank. A *global* batch is the next `batch_size * world_size` entries of the epoch's
    permutation and each rank takes its contiguous share, so 1 x 16 and 2 x 8 see the same global batches. Without
    `drop_last` the last global batch is filled up from the epoch's beginning to a multiple of `world_size`: all ranks
    make equally many steps. `shuffle=False` keeps the dataset's order; `reshuffle=False` repeats epoch 0's order.

    Iteration begins at batch `start_batch` of `epoch` and ends with that epoch; `len` is always that of a full epoch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        *,
        shuffle: bool = True,
        reshuffle: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.shuffle, self.reshuffle = shuffle, reshuffle
        self.epoch = 0
        self.start_batch = 0
        self._order: tuple[int, Tensor] | None = None  # the last epoch asked for

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        full, rest = divmod(self.num_samples, self.global_batch_size)
        return full + bool(rest and not self.drop_last)

    def order(self, epoch: int) -> Tensor:
        """All sample indices in the order of this epoch, before they are dealt to ranks; (num_samples,) int64."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        epoch = epoch if self.reshuffle else 0
        if self._order is None or self._order[0] != epoch:
            source = generator(self.seed, "order", epoch)
            self._order = epoch, torch.randperm(self.num_samples, generator=source)
        return self._order[1]

    def batch(self, epoch: int, number: int) -> list[int]:
        """This rank's sample indices of one batch of one epoch."""
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of an epoch of {len(self)}")
        begin = number * self.global_batch_size
        share = self.order(epoch)[begin : begin + self.global_batch_size]
        missing = -len(share) % self.world_size
        if missing:  # only the last batch; wrap around, repeatedly where the set is smaller than the number of ranks
            share = torch.cat([share, self.order(epoch)[torch.arange(missing) % self.num_samples]])
        return share.chunk(self.world_size)[self.rank].tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for number in range(self.start_batch, len(self)):
            yield [(epoch, index) for index in self.batch(epoch, number)]


class EpochLoader(DataLoader):
    """A DataLoader that knows how far it got: each `iter` is the next epoch of its `EpochBatches`.

    Asking for an iterator again before a batch was taken starts at the same place: Lightning does that around a resume.
    Only batches that were handed over count, not those that workers have fetched ahead. `note_broken` is told of
    samples that turn out to be broken: pairs of name and reason.
    """

    def __init__(
        self,
        dataset: KeyedSet,
        batches: EpochBatches,
        *,
        note_broken: Callable[[Sequence[tuple[str, str]]], None] | None = None,
        **kwargs: Any,
    ) -> None:
        # DataLoader draws a worker seed at each iter; from the global generator that would disturb the training's.
        source = torch.Generator().manual_seed(fold(batches.seed, "workers"))
        super().__init__(dataset, batch_sampler=batches, collate_fn=collated, generator=source, **kwargs)
        self.batches, self.note_broken = batches, note_broken
        self.delivered = 0  # batches handed over since the last iter

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.delivered:
            self.start(self.batches.epoch + 1)
        return self._deliver(super().__iter__())

    def _deliver(self, fetched: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in fetched:
            if (broken := batch.pop(BROKEN, None)) and self.note_broken is not None:
                self.note_broken(broken)
            self.delivered += 1
            yield batch

    def start(self, epoch: int, batch: int = 0) -> None:
        """Let the next `iter` begin at this batch of this epoch; past the last batch means the next epoch's first."""
        if batch >= len(self.batches):
            epoch, batch = epoch + 1, 0
        self.batches.epoch, self.batches.start_batch, self.delivered = epoch, batch, 0

    def position(self, epoch: int, batch: int) -> dict[str, Any]:
        """Return what the datamodule's state needs beside the number of a batch to go on there: here nothing."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Take from the datamodule's state what `position` gave; `start` has been called."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: the datamodule carries the position. Lightning takes a loader with these two methods as resumable."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept what `state_dict` gave."""


def collated(batch: dict[str, Any]) -> dict[str, Any]:
    """A `KeyedSet` answers a list of keys with a finished batch: nothing is left to collate."""
    return batch
