"""How good a module is on data: torchmetrics for the whole, and one number for each sample to compare by."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_structopt._devices import device_of, moved
from lightning_structopt._undisturbed import evaluating
from lightning_structopt.profiling.tasks import as_metrics_want, by_sample, described, metrics_for, task_of

Predict = Callable[[nn.Module, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Quality:
    """What an evaluation found.

    Args:
        task: What the outputs and targets look like: ``"multiclass"``, ``"binary"``, ``"segmentation"``,
            ``"tokens"``, ``"regression"`` or ``"text"``; None for others, which need metrics of their own.
        metrics: The metrics by name.
        lower_is_better: Those of them of which less is better, as they say themselves.
        samples: (samples,) by which two modules are compared: 1 where a class is right and 0 where it is wrong, the
            share of right pixels or tokens, the squared error, or a line's BLEU; empty where there is no task.
        first_batch: The first batch, to profile with.
    """

    task: str | None
    metrics: dict[str, float]
    lower_is_better: frozenset[str]
    samples: Tensor
    first_batch: Any


def predict_pair(module: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Return the outputs of ``module`` and the targets for a batch that is a pair of inputs and targets.

    Raises:
        TypeError: If the batch is no such pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"A batch must be a pair of inputs and targets. Found a `{type(batch).__name__}`"
            f"{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}. Give `predict`, a function of the "
            "module and the batch that returns outputs and targets."
        )
    inputs, target = batch
    return module(inputs), target


@torch.no_grad()
def evaluate(
    module: nn.Module,
    loader: Iterable[Any],
    metrics: Metric | MetricCollection | None = None,
    predict: Predict = predict_pair,
) -> Quality:
    """Run ``module`` over ``loader`` in evaluation mode and score it.

    Args:
        module: Left as it was.
        loader: Batches, at least one; they are moved to the module's device.
        metrics: What to score by, left as they were; chosen by the task if not given.
        predict: From module and batch to outputs and targets.

    Raises:
        TypeError: If a batch is not what ``predict`` takes.
        ValueError: If there are no batches, no metrics are known for such outputs and targets, or those given don't
            fit them.
    """
    device = device_of(module)
    scored: MetricCollection | None = None
    samples: list[Tensor] = []
    task, first, order = None, None, list[str]()
    with evaluating(module):
        for batch in loader:
            batch = moved(batch, device)
            outputs, target = predict(module, batch)
            if scored is None:
                task, first = _task(outputs, target, metrics), batch
                chosen = metrics_for(task, outputs) if metrics is None and task is not None else metrics
                order = list(chosen) if isinstance(chosen, dict) else []
                scored = _collection(chosen).to(device)
            wanted = as_metrics_want(task, outputs, target)
            # A metric for text of one's own may want its references in another form than BLEU does.
            _update(scored, *(wanted if metrics is None or task != "text" else (outputs, target)))
            samples.append(by_sample(task, *wanted).cpu())
    if scored is None:
        raise ValueError("The data must have at least one batch. Found none. Check the loader.")
    # Collections sort by name; the first metric is the one that counts.
    values = sorted(
        scored.compute().items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)
    )
    found = {name: number for key, value in values for name, number in _numbers(key, value)}
    falling = {name for name, metric in scored.items() if metric.higher_is_better is False}
    lower = frozenset(name for name in found if name.partition("[")[0] in falling)
    return Quality(task, found, lower, torch.cat(samples), first)


def _task(outputs: Any, target: Any, metrics: Metric | MetricCollection | None) -> str | None:
    """Return the task; where it can't be told, metrics of one's own know what to do.

    Raises:
        ValueError: If it can't be told and there are no metrics.
    """
    try:
        return task_of(outputs, target)
    except ValueError:
        if metrics is None:
            raise
        return None


def _update(metrics: MetricCollection, outputs: Any, target: Any) -> None:
    """Give a batch to ``metrics``.

    Raises:
        ValueError: If they don't fit.
    """
    try:
        metrics.update(outputs, target)
    except Exception as error:  # metrics have many ways to say so
        names = ", ".join(type(metric).__name__ for metric in metrics.values())
        raise ValueError(
            f"Metrics must fit what the module gives. Found {described(outputs, target)} for {names}, which say "
            f"{' '.join(str(error).split()) or type(error).__name__} Give metrics of that task, or `predict`, which "
            "returns outputs and targets as they want them."
        ) from error


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield a metric's value under its name; of several values, such as one for each class, each with its index."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        yield name, float(value)
        return
    for index, each in enumerate(value.flatten().tolist()):
        yield f"{name}[{index}]", each


def _collection(metrics: Metric | MetricCollection | dict[str, Metric] | None) -> MetricCollection:
    """Return a collection of fresh copies."""
    if isinstance(metrics, dict):
        return MetricCollection(dict(metrics))
    assert metrics is not None
    metrics = metrics.clone()
    metrics.reset()
    return metrics if isinstance(metrics, MetricCollection) else MetricCollection([metrics])
