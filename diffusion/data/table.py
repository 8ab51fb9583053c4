"""How are millions of rows written so that a killed program loses little, and read without loading them?

One `.npy` file a column, which any program can map into memory; texts lie end to end in a `.txt` beside their ends.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

TEXT = "text"
ENCODING = ("utf-8", "surrogatepass")  # whatever a str can be


class Column(NamedTuple):
    """What a row of a column is: a NumPy dtype's name and a shape; or `TEXT`."""

    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        """The size of a row; of a text, that of its end."""
        return self.stored.itemsize * int(np.prod(self.shape))

    @property
    def stored(self) -> np.dtype:
        return np.dtype(np.int64 if self.dtype == TEXT else self.dtype)


def array_path(folder: Path, table: str, name: str, column: Column) -> Path:
    """Where a column lies: FOLDER/TABLE.NAME.npy, and the ends of texts in FOLDER/TABLE.NAME_ends.npy."""
    return folder / f"{table}.{name}{'_ends' if column.dtype == TEXT else ''}.npy"


def text_path(folder: Path, table: str, name: str) -> Path:
    return folder / f"{table}.{name}.txt"


class TableWriter:
    """Append rows to the columns of a table that will have `num_rows`, of which `done` are there.

    What lies behind row `done`, of an earlier writer that was killed, is cut off. Rows are written, not mapped: a full
    disk is an OSError, where a mapping would end the process. Until the last row is there no `.npy` can be opened as
    one: its header promises more than there is.
    """

    def __init__(
        self, folder: Path, table: str, num_rows: int, columns: Mapping[str, Column], *, done: int = 0
    ) -> None:
        self.columns = dict(columns)
        self.done = done
        self._arrays: dict[str, BinaryIO] = {}
        self._texts: dict[str, BinaryIO] = {}
        try:
            for name, column in columns.items():
                self._arrays[name] = file = _opened(array_path(folder, table, name, column))
                header = {
                    "descr": np.lib.format.dtype_to_descr(column.stored),
                    "fortran_order": False,
                    "shape": (num_rows, *column.shape),
                }
                np.lib.format.write_array_header_2_0(file, header)
                begin = file.tell()
                if column.dtype == TEXT:
                    self._texts[name] = text = _opened(text_path(folder, table, name))
                    _cut(text, _last_end(file, begin, done))
                _cut(file, begin + done * column.row_bytes)
        except BaseException:
            self.close()
            raise

    def append(self, rows: Mapping[str, np.ndarray | Sequence[str]]) -> None:
        """Write the next rows: of every column as many, in the column's dtype and shape."""
        if set(rows) != set(self.columns):
            raise ValueError(f"rows of {sorted(rows)} do not fit a table of {sorted(self.columns)}")
        number = len(next(iter(rows.values())))
        for name, values in rows.items():
            column = self.columns[name]
            if column.dtype == TEXT:
                text = self._texts[name]
                begin, encoded = text.tell(), [value.encode(*ENCODING) for value in values]
                _write(text, b"".join(encoded))
                values = begin + np.cumsum([len(characters) for characters in encoded])
            values = np.ascontiguousarray(values, column.stored)
            if values.shape != (number, *column.shape):
                raise ValueError(f"{name}: rows of {values.shape[1:]}, {len(values)} of them, do not fit {column}")
            _write(self._arrays[name], values.reshape(-1).view(np.uint8).data)
        self.done += number

    def sync(self) -> int:
        """Wait until the disk has all rows, and return how many they are."""
        for file in (*self._texts.values(), *self._arrays.values()):
            file.flush()
            os.fsync(file.fileno())
        return self.done

    def close(self) -> None:
        for file in (*self._texts.values(), *self._arrays.values()):
            file.close()


def _opened(path: Path) -> BinaryIO:
    """Open for reading and writing from the beginning, without emptying what is there."""
    path.touch()
    return open(path, "rb+", buffering=0)


def _cut(file: BinaryIO, size: int) -> None:
    """Shorten to `size` bytes and go to the end."""
    if file.seek(0, os.SEEK_END) < size:
        raise ValueError(f"{file.name} has lost rows that were written; delete {Path(file.name).parent} and build anew")
    file.truncate(size)
    file.seek(size)


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all; the operating system may take less at a time."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _last_end(file: BinaryIO, begin: int, done: int) -> int:
    """Read where the text of row `done` - 1 ends."""
    if done == 0:
        return 0
    file.seek(begin + 8 * (done - 1))
    return int.from_bytes(file.read(8), sys.byteorder)


class Table:
    """Rows on disk, mapped into memory when the first is asked for; workers that inherit a table map it themselves."""

    def __init__(self, folder: Path, table: str, num_rows: int, columns: Mapping[str, Column]) -> None:
        self.folder, self.table, self.num_rows, self.columns = folder, table, num_rows, dict(columns)
        self._mapped: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}

    def __len__(self) -> int:
        return self.num_rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}

    def array(self, name: str) -> np.ndarray:
        """The whole column, read from disk where it is indexed: (num_rows, *shape); of texts, their ends."""
        return self._map(name)[0]

    def texts(self, name: str, rows: Sequence[int]) -> list[str]:
        ends, characters = self._map(name)
        begins = [int(ends[row - 1]) if row else 0 for row in rows]
        return [bytes(characters[begin : ends[row]]).decode(*ENCODING) for begin, row in zip(begins, rows, strict=True)]

    def _map(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        if name not in self._mapped:
            self._mapped[name] = self._checked(name, self.columns[name])
        return self._mapped[name]

    def _checked(self, name: str, column: Column) -> tuple[np.ndarray, np.ndarray | None]:
        """Map a column. Raises ValueError where a file is gone, cut short or another than was written."""
        path = array_path(self.folder, self.table, name, column)
        try:
            array = np.load(path, mmap_mode="r").view(np.ndarray)
            if (array.dtype, array.shape) != (column.stored, (self.num_rows, *column.shape)):
                raise ValueError(f"it holds {array.dtype} {array.shape}")
            if column.dtype != TEXT:
                return array, None
            path = text_path(self.folder, self.table, name)
            size = int(array[-1])
            if path.stat().st_size != size:
                raise ValueError(f"it should have {size} bytes")
            return array, np.memmap(path, np.uint8, "r").view(np.ndarray) if size else np.empty(0, np.uint8)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} is missing or damaged ({error}); copy it again, or delete {self.folder} and build it anew"
            ) from error

    def check(self) -> None:
        """Open every column. Raises ValueError where one is not as it was written."""
        for name in self.columns:
            self._map(name)


def shard_name(table: str, number: int) -> str:
    """Name a shard of a table: train-00000."""
    return f"{table}-{number:05d}"


class ShardedTable:
    """A table in shards of `shard_rows` rows each, the last one perhaps shorter, read as one."""

    def __init__(
        self, folder: Path, table: str, num_rows: int, columns: Mapping[str, Column], *, shard_rows: int
    ) -> None:
        self.num_rows, self.columns, self.shard_rows = num_rows, dict(columns), shard_rows
        self.shards = [
            Table(folder, shard_name(table, number), min(shard_rows, num_rows - begin), columns)
            for number, begin in enumerate(range(0, num_rows, shard_rows))
        ]

    def __len__(self) -> int:
        return self.num_rows

    def take(self, name: str, rows: np.ndarray, *inner: np.ndarray) -> np.ndarray:
        """Read these rows of a column, (B, *shape); `inner` (B,) each picks within a row's first axes."""
        shard, row = np.divmod(rows, self.shard_rows)
        values = None
        for number in np.unique(shard):
            chosen = np.flatnonzero(shard == number)
            read = self.shards[number].array(name)[(row[chosen], *(part[chosen] for part in inner))]
            if len(chosen) == len(rows):
                return read
            values = np.empty((len(rows), *read.shape[1:]), read.dtype) if values is None else values
            values[chosen] = read
        return values

    def texts(self, name: str, rows: np.ndarray) -> list[str]:
        """Read these rows of a column of texts."""
        places = zip(*np.divmod(rows, self.shard_rows), strict=True)
        return [self.shards[shard].texts(name, [row])[0] for shard, row in places]

    def check(self) -> None:
        """Open every column of every shard. Raises ValueError where one is not as it was written."""
        for shard in self.shards:
            shard.check()
