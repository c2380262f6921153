"""What is seen while a sweep runs: one bar for the sweep, a line for each trial that runs."""

from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Display:
    """Live progress on the terminal.

    Args:
        monitor: The metric to show.
        shown: Whether to show anything.
    """

    def __init__(self, monitor: str, shown: bool) -> None:
        self._monitor = monitor
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn(),
            disable=not shown, transient=True,
        )  # fmt: skip
        self._sweep = self._progress.add_task("sweep", total=None, note="")
        self._lines: dict[tuple[str, int], TaskID] = {}
        self._over = 0

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, name: str, seed: int, begin: int, end: int) -> None:
        """Show that a trial trains from one epoch to another."""
        self._lines[name, seed] = self._progress.add_task(
            name, total=end, completed=begin, note=f"to epoch {end}"
        )

    def reached(self, name: str, seed: int, epoch: int, score: float) -> None:
        """Show how far a trial has come."""
        self._progress.update(self._lines[name, seed], completed=epoch, note=f"{self._monitor} {score:.4g}")

    def ended(self, name: str, seed: int, note: str) -> None:
        """Take a trial's line away."""
        self._progress.remove_task(self._lines.pop((name, seed)))
        self._over += 1
        self._progress.update(self._sweep, note=f"{self._over} trials over; {name}: {note}")
