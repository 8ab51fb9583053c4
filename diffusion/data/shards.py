"""Images in webdataset's tar shards, on this disk or behind URLs: which of them, in which order, and what is broken?

Shards on this disk are read at random through an index, in the order that every datamodule has: a run goes on bit for
bit with any number of workers. Others are read as streams, see `shard_stream.py`.
"""

import glob
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from diffusion.data.base import ImageData
from diffusion.data.batches import EpochLoader
from diffusion.data.image_folder import MODES, EncodedImages
from diffusion.data.images import digest
from diffusion.data.listing import some
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.data.shard_index import ShardIndex, decode_bytes, indexes
from diffusion.data.shard_labels import number_of, numbered_classes
from diffusion.data.shard_stream import SampleReader, StreamLoader, StreamSet, first_samples
from diffusion.randomness import fold

READINGS = ("auto", "indexed", "stream")


class ShardImages(EncodedImages):
    """Images read directly from their places in tar files. `rows` picks samples of `found`, in their order."""

    def __init__(
        self,
        found: Sequence[ShardIndex],
        rows: np.ndarray,
        labels: np.ndarray | None,
        *,
        captioned: bool,
        **how: Any,
    ) -> None:
        super().__init__(**how)
        self.paths = [index.path for index in found]
        self.shard = np.repeat(np.arange(len(found)), [len(index.keys) for index in found])[rows]
        self.places = np.concatenate([index.images for index in found])[rows]
        self.texts = np.concatenate([index.captions for index in found])[rows]
        self.in_json = np.concatenate([index.in_json for index in found])[rows]
        names = [key.encode() for index in found for key in index.keys]
        self.keys = np.array(names, dtype=np.bytes_)[rows]  # one block of memory, whatever the number of workers
        self.labels = None if labels is None else labels[rows]
        self.captioned = captioned

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        return f"{self.paths[self.shard[index]]}: {self.keys[index].decode()}"

    def picture(self, index: int) -> Image.Image:
        return decode_bytes(self._bytes(index, self.places))

    def caption(self, index: int) -> str:
        if self.texts[index, 1] < 0:
            return ""
        text = self._bytes(index, self.texts)
        if self.in_json[index]:
            fields = json.loads(text)
            return fields.get("caption", fields.get("text"))
        return text.decode("utf-8").strip()

    def _bytes(self, index: int, places: np.ndarray) -> bytes:
        with open(self.paths[self.shard[index]], "rb", buffering=0) as file:
            file.seek(int(places[index, 0]))
            return file.read(int(places[index, 1]))

    def content(self) -> str:
        """Hash the shards' names and sizes, and every sample's name, places and label, wherever the shards lie."""
        shards = [(path.name, path.stat().st_size) for path in self.paths]
        arrays = (self.shard, self.keys, self.places, self.texts, *(() if self.labels is None else (self.labels,)))
        return digest([shards, *(array.tobytes() for array in arrays)])


class Shards(ImageData):
    """Images in tar files in webdataset's layout, with captions (`.txt`), labels (`.cls`) or both as `.json` fields.

    shards: a folder of .tar files, or names and URLs with {000..123} and * in them, or a list of those. Plain tar files
    on this disk are "indexed": any sample can be read at any time, so that order, ranks and resuming are those of every
    datamodule here. URLs, `pipe:` commands and packed tars are read as a "stream": each rank's each worker reads shards
    of its own from the beginning, through a buffer of `shuffle_buffer` samples; `samples_per_epoch` is how many there
    are in an epoch over all ranks, or None where a manifest of `diffusion.data.pack` beside the shards says it.

    num_classes: None trains without labels; labels are numbers below it, or names, which `indexed` shards and manifests
    can number. captions: None gives them where there are any, True also calls a sample without one broken, False drops
    them. Validation takes `val_shards`, or sets `val_fraction` of the samples aside by a hash of their names; of
    streams whole shards, of which at most `num_val` samples are kept in memory.

    A broken sample, whose image, json, caption or label cannot be used, is left out, named and counted; more than
    `max_broken` end the run. `check_images` decodes every image once, for the index; without it, indexed images that
    turn out to be broken give way to the next one.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        image_size: int,
        channels: int = 3,
        num_classes: int | None = None,
        captions: bool | None = None,
        val_shards: str | Sequence[str] | None = None,
        val_fraction: float = 0.02,
        num_val: int = 1024,
        reading: str = "auto",
        check_images: bool = True,
        samples_per_epoch: int | None = None,
        shuffle_buffer: int = 2000,
        max_broken: int | None = 100,
        horizontal_flip: bool = False,
        random_crop: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            channels=channels,
            image_size=image_size,
            num_classes=num_classes,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            seed=seed,
            max_broken=max_broken,
        )
        if channels not in MODES:
            raise ValueError(f"data.channels is {channels}; image files are read as 1 (grey) or 3 (RGB)")
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction is {val_fraction}; it must be above 0 and below 1")
        if reading not in READINGS:
            raise ValueError(f"data.reading is {reading!r}; choose {', '.join(READINGS)}")
        if shuffle_buffer < 1 or num_val < 1:
            raise ValueError(f"data.shuffle_buffer={shuffle_buffer} and data.num_val={num_val} must be at least 1")
        self.val_urls = [] if val_shards is None else expanded(val_shards, "val_shards")
        self.urls = [url for url in expanded(shards, "shards") if url not in self.val_urls]
        self.captions, self.val_fraction, self.num_val = captions, val_fraction, num_val
        self.check_images, self.shuffle_buffer, self.samples_per_epoch = check_images, shuffle_buffer, samples_per_epoch
        self.horizontal_flip, self.random_crop = horizontal_flip, random_crop
        local = [url for url in (*self.urls, *self.val_urls) if is_plain_file(url)]
        self.indexed = reading == "indexed" or (reading == "auto" and len(local) == len(self.urls) + len(self.val_urls))
        if reading == "indexed" and (others := [url for url in (*self.urls, *self.val_urls) if url not in local]):
            raise ValueError(
                f"data.reading=indexed needs plain .tar files on this disk, and {some(others)} are none; set "
                "data.reading=stream, or copy them here"
            )
        if num_classes is not None:
            self.class_names = self._classes()

    @cached_property
    def manifest(self) -> Manifest | None:
        """What `diffusion.data.pack` says of the shards, where they lie beside its manifest."""
        return read_manifest(self.urls)

    @cached_property
    def _found(self) -> list[ShardIndex]:
        return indexes([Path(url) for url in (*self.urls, *self.val_urls)], check=self.check_images)

    def _classes(self) -> tuple[str, ...]:
        """Name the classes: by the manifest, or by the labels that occur, or by numbers."""
        if self.manifest is not None and self.manifest.classes:
            names = self.manifest.classes
        elif self.indexed:
            names = numbered_classes((label for index in self._found for label in index.labels), self.num_classes)
        else:
            names = tuple(map(str, range(self.num_classes)))
        if len(names) != self.num_classes:
            has = f"{len(names)} classes ({some(list(names))})" if names else "no labels"
            fix = f"data.num_classes={len(names)}" if names else "data.num_classes=null"
            raise ValueError(f"data.num_classes is {self.num_classes}, but {self._name()} has {has}; set {fix}")
        return names

    def _name(self) -> str:
        return self.urls[0] if len(self.urls) == 1 else f"{self.urls[0]} and {len(self.urls) - 1} more shards"

    def prepare_data(self) -> None:
        """Build the indexes that are missing, on one process of a node, so that the others find them."""
        if self.indexed:
            _ = self._found

    def setup(self, stage: str | None = None) -> None:
        """Split the samples, or the shards of a stream. Raises ValueError where a side is left without samples."""
        if self.train_set is not None:
            return
        if self.indexed:
            self._setup_indexed()
        else:
            self._setup_stream()
        if len(self.broken):
            rank_zero_warn(
                f"{len(self.broken)} samples cannot be used and are left out: {some(self.broken.told())}; "
                f"data.max_broken={self.broken.limit} may be"
            )

    # -- on this disk --------------------------------------------------------------------------------------------------

    def _setup_indexed(self) -> None:
        found = self._found
        labels, usable = self._usable(found)
        captioned = self.captions is not False and any(bool((index.captions[:, 1] >= 0).any()) for index in found)
        names = [f"{index.path.name}: {key}" for index in found for key in index.keys]
        if self.val_urls:
            last = sum(len(index.keys) for index in found[: len(self.urls)])
            val = np.arange(len(names)) >= last
        else:
            val = self._set_aside([name if use else None for name, use in zip(names, usable, strict=True)])
        for side, rows in (("training", usable & ~val), ("validation", usable & val)):
            if not rows.any():
                raise ValueError(
                    f"{self._name()}: {int(usable.sum())} usable samples leave none for {side} with "
                    f"data.val_fraction={self.val_fraction}; add samples, change it, or set data.val_shards"
                )

        def images(rows: np.ndarray, **augmented: bool) -> ShardImages:
            return ShardImages(
                found, np.flatnonzero(rows), labels, captioned=captioned, **self._how, seed=self.seed, **augmented
            )

        self.train_set = images(usable & ~val, horizontal_flip=self.horizontal_flip, random_crop=self.random_crop)
        self.val_set = images(usable & val)

    @property
    def _how(self) -> dict[str, int]:
        return {"channels": self.channels, "image_size": self.image_size}

    def _usable(self, found: Sequence[ShardIndex]) -> tuple[np.ndarray | None, np.ndarray]:
        """Return labels as numbers, and which samples have all that is needed; the others are noted as broken."""
        labels, usable, broken, known = [], [], {}, {}
        for index in found:
            broken |= {f"{index.path}: {key}": reason for key, reason in index.faults.items()}
            for key, label, (_, size) in zip(index.keys, index.labels, index.captions, strict=True):
                number, reason = known[label] if label in known else known.setdefault(label, self._numbered(label))
                if self.captions and size < 0:
                    reason = "it has no caption"
                if reason is not None:
                    broken[f"{index.path}: {key}"] = reason
                labels.append(number)
                usable.append(reason is None)
        self.broken.note(broken)
        return None if self.class_names is None else np.array(labels, np.int64), np.array(usable, bool)

    def _numbered(self, label: str | None) -> tuple[int, str | None]:
        """Return a label's number, or why it has none."""
        try:
            return 0 if self.class_names is None else number_of(label, self.class_names), None
        except ValueError as error:
            return 0, str(error)

    def _set_aside(self, names: Sequence[str | None]) -> np.ndarray:
        """Choose what to validate with: the names whose hash is small, at least one; None is no sample."""
        places = np.array([2.0 if name is None else fold(0, "validation", name) / 2**63 for name in names])
        return places <= max(self.val_fraction, places.min(initial=2.0))

    # -- as a stream ---------------------------------------------------------------------------------------------------

    def _setup_stream(self) -> None:
        train, val = self.urls, self.val_urls
        if not val:
            if len(train) < 2:
                raise ValueError(
                    f"{self._name()} is the only shard, and a stream sets whole shards aside to validate; give "
                    "data.val_shards, or more shards"
                )
            order = sorted(train, key=lambda url: fold(0, "validation", url.rpartition("/")[2]))
            val = order[: max(1, round(self.val_fraction * len(train)))]
            train = [url for url in train if url not in val]
        reader = SampleReader(class_names=self.class_names, captions=self.captions, **self._how)
        self.val_set = first_samples(val, self.num_val, reader, self.broken.note)
        reader = reader._replace(captioned=self.val_set.captioned)
        self.train_set = StreamSet(
            train,
            reader,
            sizes=None if self.manifest is None else self.manifest.sizes,
            samples_per_epoch=self.samples_per_epoch,
            shuffle_buffer=self.shuffle_buffer,
            seed=self.seed,
            horizontal_flip=self.horizontal_flip,
            random_crop=self.random_crop,
            max_broken=self.broken.limit,
        )

    def _loader(self, dataset: Any, **order: bool) -> EpochLoader | StreamLoader:
        if not isinstance(dataset, StreamSet):
            return super()._loader(dataset, **order)
        return StreamLoader(dataset, **self._loading, reshuffle=order["reshuffle"])


def expanded(shards: str | Sequence[str], setting: str) -> list[str]:
    """Return the shards that a folder, names with {0..9} and *, or URLs mean. ValueError where one means none."""
    from webdataset.shardlists import expand_urls

    given = [shards] if isinstance(shards, str) else list(shards)
    urls, lacking = [], []
    for text in given:
        for url in expand_urls(str(Path(text).expanduser()) if ":" not in text else text):
            found = list(_named(url))
            urls += found
            lacking += [] if found else [url]
    if lacking or not urls:
        raise ValueError(
            f"data.{setting} matches nothing: {some(lacking) or given}; give a folder of .tar files, names such as "
            f"DIR/{{000..009}}.tar or DIR/*.tar (quoted), or URLs (names are seen from {Path.cwd()})"
        )
    return list(dict.fromkeys(urls))


def _named(url: str) -> Iterable[str]:
    if is_url(url):
        return [url]
    path = Path(url)
    if path.is_dir():
        return sorted(str(file) for file in path.glob("*.tar"))
    return [url] if path.is_file() else sorted(name for name in glob.glob(url) if Path(name).is_file())


def is_url(text: str) -> bool:
    """Say whether webdataset opens this by a scheme: http://, s3 through pipe:, ..."""
    scheme = text.partition(":")[0]
    return ":" in text and "/" not in scheme and len(scheme) > 1


def is_plain_file(url: str) -> bool:
    """Say whether this is a tar on this disk in which one can jump to any place."""
    return not is_url(url) and url.lower().endswith(".tar")
