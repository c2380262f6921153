"""A directory of shards: which samples are in it, and where."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lightning_structopt.distillation.cache.layout import Layout
from lightning_structopt.distillation.cache.memory_maps import (
    Bytes,
    Numbers,
    Shard,
    ShardWriter,
    is_full,
    read_index,
)

_FORMAT = 1
_ROW_BITS = 40  # of a place, which is the shard's number and then the row's


class Store:
    """All shards of a directory, of whoever writes them.

    Args:
        directory: Where they are; it is made if need be.
        fingerprint: Of the teacher whose outputs they are.
        settings: How outputs are kept. Shards with other settings are refused.

    Raises:
        ValueError: If there are outputs of another teacher, or with other settings.
    """

    def __init__(self, directory: Path, fingerprint: str, settings: dict[str, Any]) -> None:
        self.directory = directory
        self.layout: Layout | None = None
        self._header = {"format": _FORMAT, "fingerprint": fingerprint, **settings}
        self._shards: list[Shard] = []
        self._folders: set[Path] = set()
        self._places: dict[int, int] = {}
        self._writer: ShardWriter | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def is_of(self, fingerprint: str) -> bool:
        """Tell whether the outputs are of the teacher with this ``fingerprint``."""
        return bool(self._header["fingerprint"] == fingerprint)

    def is_whole(self) -> bool:
        """Tell whether all that was found is still there, and not removed by someone."""
        return all(folder.is_dir() for folder in self._folders)

    def refresh(self) -> None:
        """Take in what has been written since, by any process.

        Raises:
            ValueError: If it is of another teacher, or with other settings.
        """
        for folder in sorted(set(self.directory.glob("shard-*")) - self._folders):
            index = read_index(folder)
            if index is not None:  # otherwise its writer is just starting, or was killed
                self._require_header(index)
                layout = Layout.from_json(index["layout"])
                self.require_layout(layout)
                self.layout = layout
                self._folders.add(folder)
                self._shards.append(Shard(folder, index["row_bytes"]))
        for place, shard in enumerate(self._shards):
            for number, row in zip(*(array.tolist() for array in shard.update()), strict=True):
                self._places.setdefault(number, place << _ROW_BITS | row)

    def find(self, numbers: Iterable[int]) -> Numbers | None:
        """Return the places of all samples with these ``numbers``; None if one is missing."""
        numbers = list(numbers)
        places = [self._places.get(number, -1) for number in numbers]
        if -1 in places:
            self.refresh()
            places = [self._places.get(number, -1) for number in numbers]
        return None if -1 in places else np.array(places, np.int64)

    def read(self, places: Numbers) -> Bytes:
        """Return the rows at ``places``, in this order."""
        shards, rows = places >> _ROW_BITS, places & (1 << _ROW_BITS) - 1
        within = np.unique(shards)
        if len(within) == 1:
            return self._shards[int(within[0])].read(rows)
        assert self.layout is not None
        whole = np.empty((len(places), self.layout.row_bytes), np.uint8)
        for shard in within.tolist():
            whole[shards == shard] = self._shards[shard].read(rows[shards == shard])
        return whole

    def write(self, numbers: Numbers, rows: Bytes, layout: Layout) -> None:
        """Add ``rows`` of samples with these ``numbers``.

        Raises:
            OSError: If they can't be written; what was there stays.
        """
        if self._writer is not None and not self._writer.takes_more:
            self._writer = None
        writer, self._writer = self._writer, None  # whatever stops it, it isn't used again
        try:
            if writer is None:
                index = {**self._header, "layout": layout.to_json(), "row_bytes": layout.row_bytes}
                writer = ShardWriter(self.directory, index)
            writer.append(numbers, rows)
        except OSError as error:
            raise self._explained(error) if is_full(error) else error from None
        self._writer = writer
        self.refresh()

    def require_layout(self, layout: Layout) -> None:
        """Raise unless ``layout`` is that of the rows that are there.

        Raises:
            ValueError: If it isn't.
        """
        if self.layout is not None and layout != self.layout:
            raise ValueError(
                "A cache holds the same outputs of every sample, of the same shapes. Found "
                f"{self.layout.described} in '{self.directory}', and now {layout.described}. Give another `directory`, "
                "or bring samples to one size, as by padding."
            )

    def _require_header(self, index: dict[str, Any]) -> None:
        """Raise unless the shard that ``index`` belongs to was written as this process would.

        Raises:
            ValueError: If it wasn't.
        """
        theirs, mine = str(index.get("fingerprint")), str(self._header["fingerprint"])
        if theirs != mine:
            raise ValueError(
                f"A cache belongs to one teacher. Found outputs of teacher {theirs[:12]} in '{self.directory}', "
                f"and now teacher {mine[:12]}, whose class, weights or buffers differ. Give another `directory`, or "
                "remove that one."
            )
        for name, value in self._header.items():
            if index.get(name) != value:
                raise ValueError(
                    f"A cache is read as it was written. Found `{name} = {index.get(name)!r}` in '{self.directory}', "
                    f"and now `{name} = {value!r}`. Give what was given then, or another `directory`."
                )

    def _explained(self, error: OSError) -> OSError:
        return OSError(
            error.errno,
            f"A cache needs room on the disk. Found none left for '{self.directory}', which holds {len(self)} samples "
            "and stays usable. Free some space and run again, which goes on from there; or give fewer outputs, "
            "`dtype='float16'` or `top_k`",
        )
