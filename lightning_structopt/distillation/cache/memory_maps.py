"""Rows on disk that one process adds to, any other reads, and nobody trusts before they are complete.

A shard is a folder that belongs to the process that made it. ``rows.bin`` holds rows of the same number of bytes;
``records.bin`` holds for each of them the sample's number and a checksum, and is written after the row;
``index.json`` says what the rows are. Rows are only ever added, by ordinary writing: where a memory map can't be
written to as the disk is full, the process is killed, while a write is refused.
"""

import errno
import json
import os
import uuid
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

_RECORD = np.dtype([("id", "<i8"), ("checksum", "<u4"), ("written", "<u4")])
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LARGEST = 2**30  # bytes of a shard, more or less


class Shard:
    """The complete rows of a shard, as of the last :meth:`update`.

    Args:
        folder: Of the shard.
        row_bytes: Bytes of a row.
    """

    def __init__(self, folder: Path, row_bytes: int) -> None:
        self.folder = folder
        self.row_bytes = row_bytes
        self._seen = 0
        self._map: Bytes = np.empty((0, row_bytes), np.uint8)

    def update(self) -> tuple[Numbers, Numbers]:
        """Return which samples' rows are new since the last call, and where: two arrays of the same length."""
        records = self._new_records()
        first, self._seen = self._seen, self._seen + len(records)
        rows = self._rows_up_to(self._seen)[first : self._seen]
        numbers = records["id"].astype(np.int64)
        sums = [_checksum(number, row) for number, row in zip(numbers.tolist(), rows, strict=True)]
        complete = (records["written"] == 1) & (records["checksum"] == np.array(sums, np.uint32))
        return numbers[complete], first + np.flatnonzero(complete)

    def read(self, rows: Numbers) -> Bytes:
        """Return ``rows``, (number of rows, bytes of a row)."""
        taken: Bytes = self._rows_up_to(int(rows.max()) + 1).take(rows, axis=0)
        return taken

    def _new_records(self) -> NDArray[Any]:
        """Return the records since the last ones that have a row to go with: either file may have been cut off."""
        path = self.folder / "records.bin"
        if not path.exists():  # nothing was written yet
            return np.empty(0, _RECORD)
        rows = (self.folder / "rows.bin").stat().st_size // self.row_bytes
        count = min(path.stat().st_size // _RECORD.itemsize, rows)
        if count <= self._seen:
            return np.empty(0, _RECORD)
        return np.fromfile(path, _RECORD, count - self._seen, offset=self._seen * _RECORD.itemsize)

    def _rows_up_to(self, end: int) -> Bytes:
        if end > len(self._map):  # the file has grown
            path = self.folder / "rows.bin"
            whole = path.stat().st_size // self.row_bytes
            self._map = np.asarray(np.memmap(path, np.uint8, mode="r", shape=(whole, self.row_bytes)))
        return self._map


class ShardWriter:
    """Adds rows to a new shard.

    Args:
        directory: In which the shard's folder is made.
        index: What the rows are; becomes ``index.json``.
    """

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        self.folder = directory / f"shard-{uuid.uuid4().hex}"
        self._process = os.getpid()
        self._bytes = 0
        self.folder.mkdir()
        unfinished = self.folder / "index.json.unfinished"
        unfinished.write_text(json.dumps(index, indent=2))
        unfinished.replace(self.folder / "index.json")  # so that it is there as a whole or not at all

    @property
    def takes_more(self) -> bool:
        """Whether this process may add rows: not one that was forked since, nor without end."""
        return self._process == os.getpid() and self._bytes < _LARGEST

    def append(self, numbers: Numbers, rows: Bytes) -> None:
        """Write ``rows`` (N, bytes of a row) of the samples with these ``numbers`` (N,).

        After an error the writer is of no more use, as a row may have been written in part.
        """
        records = np.zeros(len(numbers), _RECORD)
        records["id"] = numbers
        records["checksum"] = [
            _checksum(number, row) for number, row in zip(numbers.tolist(), rows, strict=True)
        ]
        records["written"] = 1
        _append(self.folder / "rows.bin", rows)
        _append(self.folder / "records.bin", records)
        self._bytes += rows.nbytes


def read_index(folder: Path) -> dict[str, Any] | None:
    """Return what is in the shard at ``folder``; None where its writer didn't get to say so."""
    try:
        index = json.loads((folder / "index.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return index if isinstance(index, dict) else None


def is_full(error: OSError) -> bool:
    """Tell whether ``error`` says that there is no more room."""
    return error.errno in _FULL


def _append(path: Path, array: NDArray[Any]) -> None:
    left = np.ascontiguousarray(array).data.cast("B")
    with path.open("ab", buffering=0) as file:
        while left:
            left = left[file.write(left) :]  # it may write a part, and refuse the rest


def _checksum(number: int, row: Bytes) -> int:
    return zlib.crc32(row.data, zlib.crc32(number.to_bytes(8, "little", signed=True)))
