"""What a sweep found: a ranking, a table, and the trained modules."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table
from typing_extensions import override

from lightning_structopt._checks import require_whole
from lightning_structopt.profiling.loggers import Content, log_content
from lightning_structopt.profiling.tabular import Tabular, as_csv, as_markdown, written
from lightning_structopt.sweep.heirs import Heirs, root
from lightning_structopt.sweep.loading import load_candidate
from lightning_structopt.sweep.pareto import Point, front
from lightning_structopt.sweep.plan import Plan
from lightning_structopt.sweep.plots import draw
from lightning_structopt.sweep.storage import Record


@dataclass(frozen=True)
class CandidateResult:
    """What came of one candidate.

    Args:
        name: Its name.
        state: ``"finished"``, ``"stopped"`` (others were better), ``"failed"`` or ``"refused"`` (by a constraint).
        score: The metric where it stopped, the mean over seeds; None if it has none.
        spread: The standard deviation over seeds; None if there is one seed.
        scores: The metric by epochs, at each rung.
        curve: The metric by epoch.
        epochs: Epochs trained, with the first seed.
        seconds: What all its trials took.
        costs: Parameters, bytes, and for one sample FLOPs and milliseconds, as far as they could be measured.
        parameters: What the search space drew.
        reason: Why it failed or was refused.
        parent: Whose child it is; its epochs begin with those of its parent.
        checkpoint: Its last checkpoint (of the seed with the best score), None if it was deleted.
        plan: The sweep that it is of.
    """

    name: str
    state: str
    score: float | None = None
    spread: float | None = None
    scores: Mapping[int, float] = field(default_factory=dict)
    curve: Mapping[int, float] = field(default_factory=dict)
    epochs: int = 0
    seconds: float = 0.0
    costs: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    parent: str | None = None
    checkpoint: Path | None = None
    plan: Plan | None = field(default=None, repr=False, compare=False)
    heirs: Heirs = field(default_factory=dict, repr=False, compare=False)

    def load(self) -> Any:
        """Return the trained LightningModule, on the CPU.

        Raises:
            ValueError: If its checkpoint was deleted, as others were better or it failed.
        """
        if self.checkpoint is None or self.plan is None:
            raise ValueError(
                f"Only candidates that came to the last rung can be loaded. Found that {self.name!r} is {self.state}. "
                "Take one of `result.top(k)`, or a budget that keeps more."
            )
        candidate = self.plan.candidates[root(self.name, self.heirs)]
        changes = self.plan.changes(self.name, self.heirs)
        return load_candidate(self.name, candidate, self.parameters, self.checkpoint, changes)

    def row(self) -> dict[str, Any]:
        """Return it as flat plain data."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NESTED}
        rungs = {f"epoch {epochs}": score for epochs, score in self.scores.items()}
        return plain | rungs | dict(self.costs) | dict(self.parameters)


_INTERNAL = {"checkpoint", "plan", "heirs"}
_NESTED = {"scores", "curve", "costs", "parameters", *_INTERNAL}


@dataclass(frozen=True)
class SweepResult(Tabular):
    """All candidates of a sweep, the best first: ``rich.print(result)``.

    Args:
        candidates: Those that came furthest first, among them the best score first, what failed last.
        monitor: The metric.
        mode: Whether more or less of it is better.
    """

    candidates: tuple[CandidateResult, ...]
    monitor: str
    mode: str

    def __getitem__(self, name: str) -> CandidateResult:
        return next(candidate for candidate in self.candidates if candidate.name == name)

    @property
    def best(self) -> CandidateResult:
        """The winner."""
        return self.candidates[0]

    def top(self, count: int) -> list[CandidateResult]:
        """Return the ``count`` best, which can all be loaded: members of an ensemble.

        Raises:
            ValueError: If the sweep kept fewer.
        """
        require_whole("count", count, 1)
        kept = [candidate for candidate in self.candidates if candidate.checkpoint is not None]
        if count > len(kept):
            raise ValueError(
                f"`count` must be at most the number of candidates that came to the last rung. Found {count}, and "
                f"{len(kept)} of them. Take a budget that keeps more: `FixedRounds(..., keep={count})`."
            )
        return kept[:count]

    def pareto(self, x: str | None = None, y: str = "parameters") -> list[CandidateResult]:
        """Return the candidates that no other beats in both figures.

        Args:
            x: A figure: the monitor (if not given), ``"seconds"``, ``"epochs"`` or a cost: ``"parameters"``,
                ``"bytes"``, ``"flops"``, ``"latency_ms"``. Only of the monitor with ``mode="max"`` is more better.
            y: Another.

        Raises:
            ValueError: If there is no such figure.
        """
        return [
            candidate for candidate, _, _ in front(self._points(x or self.monitor, y), *self._signs(x, y))
        ]

    def plot(self, path: str | Path | None = None, *, cost: str = "parameters") -> Any:
        """Draw the learning curves with their rungs, and the metric over a cost with its Pareto front.

        Args:
            path: Where to save it, if anywhere.
            cost: See :meth:`pareto`.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is no such cost.
        """
        best = {candidate.name for candidate in self.pareto(cost, self.monitor)}
        figure = draw(self.candidates, self._points(cost, self.monitor), best, self.monitor, cost)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    @override
    def table(self) -> Table:
        """Return the ranking as a table."""
        header, rows = self.rows()
        table = Table(title=f"{self.monitor} by epochs ({self.mode})")
        for index, name in enumerate(header):
            last = index == len(header) - 1
            table.add_column(name, justify="left" if index == 0 or last else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of the table as text."""
        rungs = sorted({epochs for candidate in self.candidates for epochs in candidate.scores})
        header = [
            "candidate",
            *map(str, rungs),
            "score",
            "epochs",
            "seconds",
            "parameters",
            "FLOPs",
            "ms",
            "state",
        ]
        return header, [list(_cells(candidate, rungs)) for candidate in self.candidates]

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Return the table as Markdown, and write it to ``path`` if given."""
        return written(as_markdown(*self.rows()), path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return one row of plain numbers for each candidate as CSV, and write it to ``path`` if given."""
        return written(as_csv([candidate.row() for candidate in self.candidates]), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return everything that was found as JSON, and write it to ``path`` if given."""
        found = [
            {f.name: getattr(candidate, f.name) for f in fields(candidate) if f.name not in _INTERNAL}
            for candidate in self.candidates
        ]
        return written(
            json.dumps({"monitor": self.monitor, "mode": self.mode, "candidates": found}, indent=2), path
        )

    def log_to(self, logger: Any, name: str = "sweep") -> None:
        """Write the sweep to the logger of a run: learning curves and costs as metrics, the table, and the plot.

        Args:
            logger: One of Lightning's: TensorBoard, W&B, MLflow, CSV and others.
            name: What names begin with, as in ``sweep/wide/val_acc``. Steps are epochs.

        Raises:
            TypeError: If ``logger`` is none.
        """
        last = max((candidate.epochs for candidate in self.candidates), default=0)
        metrics: dict[int, dict[str, float]] = {}
        for candidate in self.candidates:
            for epoch, score in candidate.curve.items():
                metrics.setdefault(epoch, {})[f"{candidate.name}/{self.monitor}"] = score
            costs = {**candidate.costs, "epochs": candidate.epochs, "seconds": candidate.seconds}
            metrics.setdefault(last, {}).update({f"{candidate.name}/{k}": float(v) for k, v in costs.items()})
        try:
            figure = self.plot()
        except (ImportError, ValueError):  # no matplotlib, or no candidate that has come to a score or a cost
            figure = None
        log_content(logger, name, Content(metrics, *self.rows(), figure), last)

    def _signs(self, *names: str | None) -> list[int]:
        return [1 if (name or self.monitor) == self.monitor and self.mode == "max" else -1 for name in names]

    def _points(self, x: str, y: str) -> list[Point]:
        points = [
            (candidate, _figure(candidate, x, self), _figure(candidate, y, self))
            for candidate in self.candidates
        ]
        for name, place in ((x, 1), (y, 2)):
            if all(point[place] is None for point in points):
                known = sorted({
                    self.monitor,
                    "seconds",
                    "epochs",
                    *(n for c in self.candidates for n in c.costs),
                })
                raise ValueError(f"A figure must be one of {', '.join(map(repr, known))}. Found {name!r}.")
        return [(c, one, other) for c, one, other in points if one is not None and other is not None]


def ranked(plan: Plan, records: Sequence[Record]) -> SweepResult:
    """Return the result of ``plan`` as its ``records`` tell it."""
    heirs = {record.candidate: record.heir for record in records if record.heir is not None}
    drawn = {record.candidate: record.parameters for record in records if record.seed == plan.seed}
    names = [*plan.names, *heirs]
    found = [_candidate(plan, name, [r for r in records if r.candidate == name]) for name in names]
    for place, candidate in enumerate(found[len(plan.names) :], start=len(plan.names)):
        own = drawn[root(candidate.name, heirs)]
        found[place] = replace(candidate, parent=heirs[candidate.name].parent, parameters=own, heirs=heirs)
    sign = 1 if plan.mode == "max" else -1

    def rank(candidate: CandidateResult) -> tuple[bool, int, float]:
        ended = candidate.state == "finished"  # also if by itself, early
        reach = plan.budget.total_epochs if ended else candidate.epochs
        return candidate.state in {"failed", "refused"}, -reach, -sign * (candidate.score or 0.0)

    return SweepResult(tuple(sorted(found, key=rank)), plan.monitor, plan.mode)


def _candidate(plan: Plan, name: str, records: Sequence[Record]) -> CandidateResult:
    if not records:
        return CandidateResult(name, "stopped", reason="the sweep ended before its turn", plan=plan)
    first = next(record for record in records if record.seed == plan.seed)
    sound = [r for r in records if r.rungs and r.state not in {"failed", "refused"}]
    final = [record.rungs[-1].score for record in sound]
    sign = 1 if plan.mode == "max" else -1
    kept = [r for r in sound if (plan.directory / r.rungs[-1].checkpoint).exists()]
    kept.sort(key=lambda record: -sign * record.rungs[-1].score)
    lost = [f"seed {r.seed}: {r.reason}" for r in records if r.seed != plan.seed and r.reason is not None]
    return CandidateResult(
        name=name,
        state=first.state,
        score=mean(final) if final and first in sound else None,
        spread=stdev(final) if len(final) > 1 else None,
        scores={rung.epochs: rung.score for rung in first.rungs},
        curve=first.curve,
        epochs=first.rungs[-1].epochs if first.rungs else 0,
        seconds=sum(rung.seconds for record in records for rung in record.rungs),
        costs=first.costs,
        parameters=first.parameters,
        reason=first.reason or "; ".join(lost) or None,
        checkpoint=plan.directory / kept[0].rungs[-1].checkpoint if kept else None,
        plan=plan,
    )


def _figure(candidate: CandidateResult, name: str, result: SweepResult) -> float | None:
    if name == result.monitor:
        return candidate.score
    if name in {"seconds", "epochs"}:
        return float(getattr(candidate, name))
    return candidate.costs.get(name)


def _cells(candidate: CandidateResult, rungs: Sequence[int]) -> Iterator[str]:
    yield candidate.name
    for epochs in rungs:
        yield f"{candidate.scores[epochs]:.4f}" if epochs in candidate.scores else ""
    spread = "" if candidate.spread is None else f" ± {candidate.spread:.4f}"
    yield "" if candidate.score is None else f"{candidate.score:.4f}{spread}"
    yield str(candidate.epochs)
    yield f"{candidate.seconds:.1f}"
    for cost in ("parameters", "flops", "latency_ms"):
        value = candidate.costs.get(cost)
        yield "" if value is None else f"{value:,.0f}" if cost != "latency_ms" else f"{value:.3g}"
    yield candidate.state if candidate.reason is None else f"{candidate.state}: {candidate.reason}"
