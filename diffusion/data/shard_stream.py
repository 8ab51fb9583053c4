"""How are shards read that can only be read from beginning to end, such as those behind a URL?

Each worker of each rank reads shards of its own through a buffer that shuffles. All of it is a function of (seed,
epoch, rank, worker), so that a run with the same ranks and workers goes on exactly where it was: the state counts what
each worker took from its buffer, and a resumed worker reads that much again without decoding it. With other ranks or
workers a resumed run goes on after the same number of samples, of which some may be met twice or not in that epoch.
"""

import math
import random
import tarfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from diffusion.data.image_folder import EncodedImages, fitted
from diffusion.data.images import BROKEN, as_floats, digest
from diffusion.data.listing import UNREADABLE, some
from diffusion.data.shard_index import damaged, decode_bytes, image_extension, read_fields
from diffusion.data.shard_labels import number_of
from diffusion.randomness import fold, generator

PROGRESS = "progress"  # the entry of a batch that the loader takes out: samples taken by its worker, passes over shards
ERROR = "error"  # what ends a worker's batches
NoteBroken = Callable[[Sequence[tuple[str, str]]], Any]


class RawSample(NamedTuple):
    """One sample as it lies in a tar: its shard, its number there, its key, and its files by extension."""

    url: str
    number: int
    key: str
    fields: Mapping[str, bytes]

    @property
    def name(self) -> str:
        return f"{self.url}: {self.key}"


def raw_samples(urls: Sequence[str]) -> Iterator[RawSample]:
    """Read shards one after the other. Raises ValueError that names a shard that cannot be read to its end."""
    from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

    url, key, number = None, None, 0

    def sources() -> Iterator[dict[str, str]]:
        nonlocal url, key, number
        for url in urls:
            key, number = None, 0
            yield {"url": url}

    files = tar_file_expander(url_opener(sources()))
    try:
        for sample in group_by_keys(files, handler=lambda error: True):  # of files of one name the first counts
            key = sample.pop("__key__")
            yield RawSample(sample.pop("__url__"), number, key, sample)
            number += 1
    except (OSError, tarfile.TarError, EOFError) as error:
        reason = str(error.args[0] if error.args else error).partition(" @ ")[0]
        raise ValueError(damaged(url, reason, key)) from error


class SampleReader(NamedTuple):
    """What becomes of raw samples: the settings of a datamodule that concern one sample."""

    channels: int
    image_size: int
    class_names: tuple[str, ...] | None
    captions: bool | None
    captioned: bool = False

    def described(self, sample: RawSample) -> tuple[bytes, int | None, str | None]:
        """Return image file, label and caption. Raises ValueError for what is not there or not as it should be."""
        image = sample.fields[image_extension(list(sample.fields))]
        label, caption = read_fields(sample.fields)
        if self.captions and caption is None:
            raise ValueError("it has no caption")
        return image, None if self.class_names is None else number_of(label, self.class_names), caption

    def read(self, sample: RawSample, crop: int | None = None) -> dict[str, Any]:
        """Return "image" (C, H, W) uint8, "label" and "caption". Raises one of `UNREADABLE` for a broken sample."""
        data, label, caption = self.described(sample)
        image = fitted(decode_bytes(data), channels=self.channels, image_size=self.image_size, crop=crop)
        found: dict[str, Any] = {"image": image}
        if label is not None:
            found["label"] = label
        if self.captioned:
            found["caption"] = caption or ""
        return found


class HeldImages(EncodedImages):
    """A few samples of a stream, kept in memory as they came: what validation sees."""

    def __init__(
        self, samples: Sequence[tuple[str, bytes, int | None, str | None]], *, captioned: bool, **how: Any
    ) -> None:
        super().__init__(**how)
        self.held, self.captioned = list(samples), captioned
        if samples[0][2] is not None:
            self.labels = [label for _, _, label, _ in samples]

    def __len__(self) -> int:
        return len(self.held)

    def name(self, index: int) -> str:
        return self.held[index][0]

    def picture(self, index: int) -> Image.Image:
        return decode_bytes(self.held[index][1])

    def caption(self, index: int) -> str:
        return self.held[index][3] or ""

    def content(self) -> str:
        """Hash all that is held."""
        return digest(part for sample in self.held for part in sample)


def first_samples(urls: Sequence[str], most: int, reader: SampleReader, note_broken: NoteBroken) -> HeldImages:
    """Keep the first samples of these shards that can be read. Raises ValueError where none can."""
    kept, broken = [], []
    for sample in raw_samples(urls):
        try:
            reader.read(sample)
        except UNREADABLE as error:
            broken.append((sample.name, str(error)))
        else:
            kept.append((sample.name, *reader.described(sample)))
        if len(kept) == most:
            break
    note_broken(broken)
    if not kept:
        reasons = some([f"{name} ({reason})" for name, reason in broken]) or "they are empty"
        raise ValueError(f"no sample of {some(list(urls))} can be used to validate: {reasons}")
    captioned = reader.captions is not False and any(caption is not None for *_, caption in kept)
    return HeldImages(kept, captioned=captioned, channels=reader.channels, image_size=reader.image_size)


class StreamBatches:
    """How many batches an epoch of a stream has for each of `readers` = ranks x workers, and which comes next."""

    def __init__(
        self, stream: "StreamSet", batch_size: int, rank: int, world_size: int, num_workers: int, *, reshuffle: bool
    ) -> None:
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, stream.seed
        self.reshuffle = reshuffle
        self.epoch = self.start_batch = 0
        workers = max(num_workers, 1)
        readers = world_size * workers
        if len(stream.urls) < readers:
            fewer = f"set data.num_workers={len(stream.urls) // world_size}" if world_size <= len(stream.urls) else ""
            raise ValueError(
                f"{len(stream.urls)} training shards cannot be shared by {world_size} ranks x {workers} workers: each "
                f"needs a shard of its own; {fewer or 'use fewer ranks'}, or pack smaller shards"
            )
        self.num_batches = stream.num_batches(self.global_batch_size, readers, workers, batch_size)

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size

    @property
    def num_samples(self) -> int:
        return self.num_batches * self.global_batch_size

    def __len__(self) -> int:
        return self.num_batches


class StreamSet(IterableDataset):
    """Batches of shards that are read from beginning to end; "index" numbers the samples, shard after shard."""

    def __init__(
        self,
        urls: Sequence[str],
        reader: SampleReader,
        *,
        sizes: Mapping[str, int] | None,
        samples_per_epoch: int | None,
        shuffle_buffer: int,
        seed: int,
        horizontal_flip: bool,
        random_crop: bool,
        max_broken: int | None,
    ) -> None:
        if sizes is None and samples_per_epoch is None:
            raise ValueError(
                "nothing beside the shards says how many samples they hold; set data.samples_per_epoch=N, or pack them "
                "with python -m diffusion.data.pack, which writes a manifest"
            )
        self.urls, self.reader = list(urls), reader
        self.sizes = None if sizes is None else [sizes[url] for url in urls]
        firsts = [0, *accumulate(self.sizes)] if self.sizes else [shard << 32 for shard in range(len(self.urls))]
        self._first = dict(zip(self.urls, firsts, strict=False))  # each shard's first index
        self.samples_per_epoch, self.shuffle_buffer, self.seed = samples_per_epoch, shuffle_buffer, seed
        self.horizontal_flip, self.random_crop = horizontal_flip, random_crop
        self.most_broken = math.inf if max_broken is None else max_broken
        self.batches: StreamBatches | None = None  # the loader's, as it was when the workers started
        self.place = torch.zeros(0, dtype=torch.long)  # where the next epoch begins, in memory that workers share

    def __len__(self) -> int:
        return self.samples_per_epoch if self.samples_per_epoch is not None else sum(self.sizes)

    def num_batches(self, global_batch_size: int, readers: int, workers: int, batch_size: int) -> int:
        """Return the batches of an epoch: as many as were asked for, or for which no reader meets a sample twice."""
        if self.samples_per_epoch is not None:
            return self.samples_per_epoch // global_batch_size
        fewest = sum(sorted(self.sizes)[: len(self.urls) // readers])  # what any reader gets in any epoch
        return fewest // batch_size * workers

    def description(self) -> dict[str, Any]:
        """Say in plain data what the samples are, as far as that is known without reading them all."""
        names = [url.rpartition("/")[2] for url in self.urls]
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "samples": len(self),
            "horizontal_flip": self.horizontal_flip,
            "content": digest([names, self.sizes]),
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this worker's batches of the rest of the epoch."""
        info = get_worker_info()
        process, workers = (0, 1) if info is None else (info.id, info.num_workers)
        plan, (epoch, start, *begun) = self.batches, self.place.tolist()
        worker = (start + process) % workers  # whose turn the first batch is does not change by a resume
        samples, taken = self._endless(plan, epoch, worker, workers), begun[worker]
        try:
            for _ in islice(samples, taken):
                pass
            for _ in range(start + process, len(plan), workers):
                batch, number = self._batch(samples, plan.batch_size, epoch)
                taken += number
                yield batch | {PROGRESS: (taken, self._passes)}
        except ValueError as error:
            yield {ERROR: str(error)}  # raised as it is by the loader; torch would wrap a worker's traceback around it

    def _endless(self, plan: StreamBatches, epoch: int, worker: int, workers: int) -> Iterator[RawSample]:
        """Yield this reader's share of the shards, shuffled, over and over; twice only if an epoch is too long."""
        from webdataset.filters import shuffle

        epoch = epoch if plan.reshuffle else 0
        self._passes = 0
        while True:
            order = torch.randperm(len(self.urls), generator=generator(self.seed, "shards", epoch, self._passes))
            mine = order.tolist()[plan.rank :: plan.world_size][worker::workers]
            draw = random.Random(fold(self.seed, "buffer", epoch, self._passes, plan.rank, worker))
            mixed = shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=draw)
            self._passes += 1
            empty = True
            for sample in mixed(raw_samples([self.urls[number] for number in mine])):
                empty = False
                yield sample
            if empty:
                raise ValueError(f"the shards {some([self.urls[number] for number in mine])} hold no samples")

    def _batch(self, samples: Iterator[RawSample], size: int, epoch: int) -> tuple[dict[str, Any], int]:
        """Read the next `size` samples that are not broken, and count what was taken for them."""
        found, indices, broken, taken = [], [], [], 0
        while len(found) < size:
            sample = next(samples)
            taken += 1
            index = self.index(sample)
            crop = fold(self.seed, "crop", epoch, index) if self.random_crop else None
            try:
                found.append(self.reader.read(sample, crop))
                indices.append(index)
            except UNREADABLE as error:
                broken.append((sample.name, str(error)))
                if len(broken) > self.most_broken:
                    return {BROKEN: broken}, taken
        return self._collated(found, indices, epoch) | ({BROKEN: broken} if broken else {}), taken

    def _collated(self, found: Sequence[Mapping[str, Any]], indices: Sequence[int], epoch: int) -> dict[str, Any]:
        image = as_floats(torch.stack([sample["image"] for sample in found]), self._mirrored(indices, epoch))
        batch: dict[str, Any] = {"image": image}
        if "label" in found[0]:
            batch["label"] = torch.tensor([sample["label"] for sample in found])
        if "caption" in found[0]:
            batch["caption"] = [sample["caption"] for sample in found]
        return batch | {"index": torch.tensor(indices)}

    def _mirrored(self, indices: Sequence[int], epoch: int) -> Tensor | None:
        if not self.horizontal_flip:
            return None
        return torch.tensor([bool(fold(self.seed, "flip", epoch, index) & 1) for index in indices])

    def index(self, sample: RawSample) -> int:
        """Number a sample over all shards; where their sizes are not known, a shard has room for 2^32."""
        return self._first[sample.url] + sample.number


class StreamLoader:
    """Batches of a `StreamSet` with an `EpochLoader`'s manners: each `iter` is the next epoch.

    No DataLoader itself: Lightning would warn of one that reads a stream and yet knows its length.
    """

    def __init__(
        self,
        stream: StreamSet,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
        note_broken: NoteBroken,
        reshuffle: bool,
    ) -> None:
        source = torch.Generator().manual_seed(fold(stream.seed, "workers"))
        how = {"num_workers": num_workers, "pin_memory": pin_memory, "persistent_workers": num_workers > 0}
        self._loader = DataLoader(stream, batch_size=None, generator=source, **how)
        self.stream, self.note_broken = stream, note_broken
        self.batches = StreamBatches(stream, batch_size, rank, world_size, num_workers, reshuffle=reshuffle)
        self.readers = max(num_workers, 1)
        stream.batches = self.batches
        stream.place = torch.zeros(2 + self.readers, dtype=torch.long).share_memory_()
        self.start(0)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.delivered:
            self.start(self.batches.epoch + 1)
        self.stream.place.copy_(torch.tensor([self.batches.epoch, self.batches.start_batch, *self._begun]))
        return self._deliver(iter(self._loader))

    def _deliver(self, fetched: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in fetched:
            if ERROR in batch:
                raise ValueError(batch[ERROR])
            if new := self.note_broken(batch.pop(BROKEN, ())):
                rank_zero_warn(f"broken and left out: {some(new)}")
            taken, passes = batch.pop(PROGRESS)
            if passes > 1 and not self._told:
                self._told = True
                rank_zero_warn(
                    f"data.samples_per_epoch={self.stream.samples_per_epoch} is more than the shards of one worker "
                    "hold: it reads them again in the same epoch"
                )
            self._taken.append(taken)
            self.delivered += 1
            yield batch

    def start(self, epoch: int, batch: int = 0) -> None:
        """Let the next `iter` begin at this batch of this epoch; past the last batch means the next epoch's first."""
        if batch >= len(self.batches):
            epoch, batch = epoch + 1, 0
        self.batches.epoch, self.batches.start_batch, self.delivered = epoch, batch, 0
        self._begun = [0] * self.readers  # what each worker has taken from its buffer before
        self._taken = array("q")  # and after each batch since
        self._told = False

    def position(self, epoch: int, batch: int) -> dict[str, Any]:
        """Return what each worker of each rank has taken when this batch is next: {"taken": [[...], ...]}."""
        taken = [0] * self.readers
        if epoch == self.batches.epoch:
            taken, start = list(self._begun), self.batches.start_batch
            for number in range(max(start, batch - self.readers), batch):
                taken[number % self.readers] = self._taken[number - start]
        everywhere = [taken]
        if self.batches.world_size > 1:
            everywhere = [None] * self.batches.world_size
            torch.distributed.all_gather_object(everywhere, taken)
        return {"taken": everywhere}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Let every worker pass over what it took before; with other ranks or workers, over its share of it all."""
        taken, batches = state.get("taken", [[0]]), self.batches
        if batches.start_batch == 0:
            return
        if len(taken) == batches.world_size and len(taken[0]) == self.readers:
            self._begun = list(taken[batches.rank])
            return
        readers = batches.world_size * self.readers
        self._begun = [sum(map(sum, taken)) // readers] * self.readers
        rank_zero_warn(
            f"the checkpoint is of {len(taken)} ranks x {len(taken[0])} workers that read shards, and here are "
            f"{batches.world_size} x {self.readers}: training goes on after as many samples, but in this epoch some "
            "may be met twice, or not at all"
        )

    def state_dict(self) -> dict[str, Any]:
        """Empty: the datamodule carries the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept what `state_dict` gave."""
