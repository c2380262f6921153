"""The report of a comparison: for the terminal, for documents, for machines, and as a page."""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from typing_extensions import override

from lightning_structopt.profiling.loggers import Content, log_content
from lightning_structopt.profiling.page import Cell, Row, page
from lightning_structopt.profiling.profiler import Profile
from lightning_structopt.profiling.significance import Difference
from lightning_structopt.profiling.tabular import Tabular, as_csv, as_markdown, written
from lightning_structopt.profiling.training_cost import TrainingCost

_COSTS: dict[str, Callable[[Profile], float]] = {
    "parameters": lambda found: found.parameters,
    "nonzero": lambda found: found.nonzero,
    "bytes": lambda found: found.size_bytes,
    "compressed": lambda found: found.compressed_bytes,
    "FLOPs": lambda found: found.flops,
    "effective FLOPs": lambda found: found.effective_flops,
    "latency (ms)": lambda found: found.latency_ms,
}
_TRAINING: dict[str, Callable[[TrainingCost], float]] = {
    "training (s)": lambda cost: cost.seconds,
    "samples/s": lambda cost: cost.samples_per_second,
    "epochs": lambda cost: cost.epochs,
    "training peak (bytes)": lambda cost: cost.peak_bytes,
}


@dataclass(frozen=True)
class Entry:
    """One module of a comparison.

    Args:
        name: Its name.
        metrics: Its quality by metric; empty if it failed.
        profile: Its costs; None if it failed.
        against_first: How its samples differ from those of the first module; None for the first, and where metrics are
            of one's own for outputs of no known kind.
        training: What its training cost, where that was given.
        is_pareto: Whether no other module is at least as good in the first metric and as fast, and better in one.
        failure: Why it has no figures.
    """

    name: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    profile: Profile | None = None
    against_first: Difference | None = None
    training: TrainingCost | None = None
    is_pareto: bool = False
    failure: str | None = None

    @property
    def costs(self) -> dict[str, float]:
        """Its costs by name, as the report shows them; empty if it failed."""
        return (
            {} if self.profile is None else {name: float(cost(self.profile)) for name, cost in _COSTS.items()}
        )

    @property
    def trained(self) -> dict[str, str]:
        """What training it took, by name, as the report shows it; empty if that wasn't given."""
        if self.training is None:
            return {}
        return {name: _number(cost(self.training)) for name, cost in _TRAINING.items()}


@dataclass(frozen=True)
class ComparisonReport(Tabular):
    """What :func:`compare` found: ``rich.print(report)``, or write it.

    Args:
        entries: One for each module, in the order given.
        lower_is_better: Names of the metrics of which less is better.
    """

    entries: tuple[Entry, ...]
    lower_is_better: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of the table as text.

        Metrics come with their difference to the reference, costs with their ratio to it. A star marks a
        difference of samples that is more than chance (95% bootstrap interval).
        """
        metrics = list(self.reference.metrics)
        trained = any(entry.training for entry in self.entries)
        header = ["model", *metrics, *_COSTS, *(_TRAINING if trained else []), "note"]
        return header, [list(self._cells(entry, metrics, trained)) for entry in self.entries]

    @property
    def reference(self) -> Entry:
        """The module that the others are set against: the first that runs."""
        return next(entry for entry in self.entries if entry.profile is not None)

    def _cells(self, entry: Entry, metrics: list[str], trained: bool) -> Iterator[str]:
        yield entry.name
        cells = [self._quality(entry, metric) for metric in metrics]
        for value, against, _ in [*cells, *(self._cost(entry, cost) for cost in _COSTS)]:
            yield f"{value} ({against})" if against else value
        if trained:
            yield from (entry.trained.get(name, "") for name in _TRAINING)
        yield "Pareto" if entry.is_pareto else entry.failure or ""

    @override
    def table(self) -> Table:
        """Return the report as a table for the terminal, one column a module."""
        header, rows = self.rows()
        table = Table(title=f"Against {self.reference.name}", caption=self._notes(), caption_justify="left")
        table.add_column("")
        for row in rows:
            table.add_column(row[0], justify="right")
        for index, name in enumerate(header[1:], start=1):
            table.add_row(name, *(row[index] for row in rows))
        return table

    def _notes(self) -> str:
        notes = []
        for entry in self.entries:
            if (gap := entry.against_first) is not None:
                p_value = "" if gap.p_value is None else f", McNemar p = {gap.p_value:.2g}"
                notes.append(
                    f"{entry.name}: per sample {gap.mean:+.4g} (95%: {gap.low:+.4g} to {gap.high:+.4g}{p_value})"
                )
            if entry.failure is not None:
                notes.append(f"{entry.name}: {entry.failure}")
        return "\n".join(notes)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Return the report as a Markdown table, and write it to ``path`` if given."""
        return written(as_markdown(*self.rows()), path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return one row of plain numbers for each module as CSV, and write it to ``path`` if given."""
        rows = [
            {"model": entry.name, **entry.metrics, **entry.costs}
            | _training_figures(entry)
            | {"pareto": entry.is_pareto, "failure": entry.failure or ""}
            for entry in self.entries
        ]
        return written(as_csv(rows), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return everything that was found as JSON, and write it to ``path`` if given."""
        return written(
            json.dumps([asdict(entry) | {"costs": entry.costs} for entry in self.entries], indent=2), path
        )

    def log_to(self, logger: Any, name: str = "comparison", step: int = 0) -> None:
        """Write the report to the logger of a run: figures, the table and, where matplotlib is installed, the plot.

        Args:
            logger: One of Lightning's: TensorBoard, W&B, MLflow, CSV and others. The table is text or an artifact
                there, where it has a place for one.
            name: What names begin with, as in ``comparison/pruned/accuracy``.
            step: The step that it is logged at.

        Raises:
            TypeError: If ``logger`` is none.
        """
        metrics = {
            f"{entry.name}/{figure}": value
            for entry in self.entries
            for figure, value in [
                *entry.metrics.items(),
                *entry.costs.items(),
                *_training_figures(entry).items(),
            ]
        }
        log_content(logger, name, Content({step: metrics}, *self.rows(), self._drawn()), step)

    def plot(self, path: str | Path | None = None, *, cost: str = "latency (ms)") -> Any:
        """Draw the first metric over a cost, the Pareto front marked; returns a matplotlib figure.

        Args:
            path: Where to save it, if anywhere.
            cost: One of the costs of the report.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is no such cost.
        """
        if cost not in _COSTS:
            raise ValueError(f"`cost` must be one of {', '.join(map(repr, _COSTS))}. Found {cost!r}.")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("A plot needs matplotlib. Install `lightning-structopt[plot]`.") from error
        sound = [entry for entry in self.entries if entry.profile is not None]
        metric = next(iter(self.reference.metrics))
        figure = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for entry in sound:
            place = (entry.costs[cost], entry.metrics[metric])
            axes.plot(*place, "o", color="tab:blue" if entry.is_pareto else "tab:gray")
            axes.annotate(entry.name, place, textcoords="offset points", xytext=(6, 4))
        axes.set(xlabel=cost, ylabel=metric, title="blue: nothing is both better and faster")
        axes.margins(0.15)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def to_html(self, path: str | Path | None = None) -> str:
        """Return the report as one page that needs nothing else, and write it to ``path`` if given."""
        marks = ["failed" if e.failure else "Pareto" if e.is_pareto else "" for e in self.entries]
        models = [(entry.name, mark) for entry, mark in zip(self.entries, marks, strict=True)]
        quality = [
            (name, [self._quality(entry, name) for entry in self.entries]) for name in self.reference.metrics
        ]
        costs = [(name, [self._cost(entry, name) for entry in self.entries]) for name in _COSTS]
        groups: list[tuple[str, Sequence[Row]]] = [("Quality", quality), ("Cost", costs)]
        if any(entry.training for entry in self.entries):
            training = [
                (name, [(entry.trained.get(name, ""), "", "") for entry in self.entries])
                for name in _TRAINING
            ]
            groups.append(("Training", training))
        title = f"Against {self.reference.name}"
        return written(page(title, models, groups, self._notes().splitlines(), self._svg()), path)

    def _quality(self, entry: Entry, metric: str) -> Cell:
        first = self.reference
        if metric not in entry.metrics:
            return "", "", ""
        value, gap = entry.metrics[metric], entry.metrics[metric] - first.metrics[metric]
        if entry is first:
            return f"{value:.4f}", "", ""
        tested = entry.against_first if metric == next(iter(first.metrics)) else None
        star = "*" if tested is not None and tested.is_significant else ""
        return f"{value:.4f}", f"{gap:+.4f}{star}", _kind(-gap if metric in self.lower_is_better else gap)

    def _cost(self, entry: Entry, cost: str) -> Cell:
        if entry.profile is None:
            return "", "", ""
        value, base = entry.costs[cost], self.reference.costs[cost]
        if entry is self.reference or not base:
            return _number(value), "", ""
        return _number(value), f"{value / base:.2f}x", _kind(base - value)

    def _drawn(self) -> Any:
        """Return the plot, or None without matplotlib."""
        try:
            return self.plot()
        except ImportError:
            return None

    def _svg(self) -> str:
        figure = self._drawn()
        if figure is None:
            return ""
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg")
        return drawn.getvalue().partition("<svg")[2].join(["<svg", ""])


def _training_figures(entry: Entry) -> dict[str, float]:
    cost = entry.training
    return {} if cost is None else {f"training_{name}": value for name, value in cost.figures().items()}


def _kind(gain: float) -> str:
    return "" if gain == 0 else "better" if gain > 0 else "worse"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
