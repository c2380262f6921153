"""What is shown as a table: by ``rich.print``, and as plain text by ``print``."""

from abc import ABC, abstractmethod

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
