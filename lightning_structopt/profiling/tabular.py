"""What is shown as a table: by ``rich.print``, as plain text by ``print``, and in files."""

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from typing_extensions import override

_WIDTH = 120  # of plain text, in characters


class Tabular(ABC):
    """Something with a table."""

    @abstractmethod
    def table(self) -> Table:
        """Return the table."""

    def __rich__(self) -> Table:
        return self.table()

    @override
    def __str__(self) -> str:
        console = Console(width=_WIDTH)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return ``rows`` as CSV; what only some of them have is empty in the others."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def written(text: str, path: str | Path | None) -> str:
    """Return ``text``, and write it to ``path`` if given."""
    if path is not None:
        Path(path).write_text(text + "\n")
    return text
