"""How good outputs are: by one metric, and by all that are usual for a task."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_structopt._checks import require_type
from lightning_structopt._precision import widened
from lightning_structopt.profiling.tasks import metrics_for, task_of

Score: TypeAlias = Metric | Callable[[Tensor, Tensor], Any]
Metrics: TypeAlias = Metric | MetricCollection | Mapping[str, Metric]


@torch.no_grad()
def score(metric: Score, outputs: Tensor, target: Tensor) -> tuple[float, bool]:
    """Return what ``metric`` says, and whether more of it is better.

    Args:
        metric: A torchmetrics metric, left as it was; or a function of outputs and target, more being better.
        outputs: (N, ...).
        target: (N, ...).

    Raises:
        TypeError: If it is neither.
        ValueError: If the metric doesn't say whether more is better.
    """
    if isinstance(metric, Metric):
        if metric.higher_is_better is None:
            raise ValueError(
                f"`metric` must say whether more is better. Found `{type(metric).__name__}`, which doesn't. Give a "
                "function of outputs and target to a number that is higher for better ones."
            )
        fresh = metric.clone()
        fresh.reset()
        return float(fresh(outputs, target)), bool(metric.higher_is_better)
    if isinstance(metric, type) or not callable(metric):
        raise TypeError(
            "`metric` must be a torchmetrics metric or a function of outputs and target. Found "
            f"`metric = {metric!r}`.{f' Did you mean `{metric.__name__}(...)`?' if isinstance(metric, type) else ''}"
        )
    return float(metric(outputs, target)), True


def signed_score(metric: Score, outputs: Tensor, target: Tensor) -> float:
    """Return what ``metric`` says, with the sign turned where less is better."""
    value, higher_is_better = score(metric, outputs, target)
    return value if higher_is_better else -value


class Scores:
    """Metrics of several outputs over one epoch, the same for each; chosen by the first batch if not given.

    It is no module, so nothing of it is in a state dict.

    Args:
        metrics: A metric, a collection, or metrics by name; left as they are.
    """

    def __init__(self, metrics: Metrics | None = None) -> None:
        if metrics is not None:
            require_type("metrics", metrics, (Metric, MetricCollection, Mapping))
        self._given = metrics
        self._running: dict[str, MetricCollection] = {}
        self._task = ""

    def update(self, outputs: Mapping[str, Tensor], target: Tensor) -> None:
        """Take in a batch.

        Args:
            outputs: By what goes before the names of its metrics.
            target: (N, ...).
        """
        first = next(iter(outputs.values()))
        if not self._running:
            self._task = task_of(first, target)
            chosen = metrics_for(self._task, first) if self._given is None else self._given
            self._running = {name: _fresh(chosen).to(target.device) for name in outputs}
        for name, values in outputs.items():
            flat = self._task in {"binary", "regression"}
            self._running[name].update(widened(values.reshape(target.shape) if flat else values), target)

    def take(self) -> dict[str, Tensor]:
        """Return the scalar values of all ranks by name, and start again."""
        found = {
            before + re.sub(r"\W+", "_", name): value
            for before, metrics in self._running.items()
            for name, value in metrics.compute().items()
            if value.numel() == 1
        }
        self._running = {}
        return found


def _fresh(metrics: Metrics) -> MetricCollection:
    if isinstance(metrics, Mapping) and not isinstance(metrics, MetricCollection):
        return MetricCollection({name: metric.clone() for name, metric in metrics.items()})
    fresh: Any = metrics.clone()
    fresh.reset()
    return fresh if isinstance(fresh, MetricCollection) else MetricCollection([fresh])
