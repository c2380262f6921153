"""How good a module is on data: torchmetrics for the whole, and one number for each sample to compare by."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryCalibrationError,
    BinaryF1Score,
    BinaryPrecision,
    BinaryRecall,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score
from torchmetrics.text import BLEUScore, Perplexity, ROUGEScore
from torchmetrics.utilities.imports import _NLTK_AVAILABLE
from typing_extensions import override

from lightning_structopt._devices import device_of, moved
from lightning_structopt._undisturbed import evaluating

Predict = Callable[[nn.Module, Any], tuple[Any, Any]]
_IGNORED = -100  # the target that losses and perplexity pass over


@dataclass(frozen=True)
class Quality:
    """What an evaluation found.

    Args:
        task: What the outputs and targets look like: ``"multiclass"``, ``"binary"``, ``"segmentation"``,
            ``"tokens"``, ``"regression"`` or ``"text"``.
        metrics: The metrics by name.
        samples: (samples,) by which two modules are compared: 1 where a class is right and 0 where it is wrong, the
            share of right pixels or tokens, or the squared error; empty for text.
        first_batch: The first batch, to profile with.
    """

    task: str
    metrics: dict[str, float]
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
        ValueError: If there are no batches, or no metrics are known for such outputs and targets.
    """
    device = device_of(module)
    scored: MetricCollection | None = None
    samples: list[Tensor] = []
    task, first, order = "", None, list[str]()
    with evaluating(module):
        for batch in loader:
            batch = moved(batch, device)
            outputs, target = predict(module, batch)
            if scored is None:
                task, first = task_of(outputs, target), batch
                chosen = metrics_for(task, outputs) if metrics is None else metrics
                order = list(chosen) if isinstance(chosen, dict) else []
                scored = _collection(chosen).to(device)
            outputs, target = _as_metrics_want(task, outputs, target)
            scored.update(outputs, target)
            samples.append(_by_sample(task, outputs, target).cpu())
    if scored is None:
        raise ValueError("The data must have at least one batch. Found none. Check the loader.")
    values = scored.compute()
    # Collections sort by name; the first metric is the one that counts.
    names = sorted(values, key=lambda name: order.index(name) if name in order else len(order))
    found = {name: float(values[name]) for name in names if values[name].numel() == 1}
    return Quality(task, found, torch.cat(samples), first)


def _collection(metrics: Metric | MetricCollection | dict[str, Metric]) -> MetricCollection:
    """Return a collection of fresh copies."""
    if isinstance(metrics, dict):
        return MetricCollection(dict(metrics))
    metrics = metrics.clone()
    metrics.reset()
    return metrics if isinstance(metrics, MetricCollection) else MetricCollection([metrics])


def task_of(outputs: Any, target: Any) -> str:
    """Tell by their shapes and types what ``outputs`` and ``target`` are about.

    Raises:
        ValueError: If it can't be told.
    """
    if isinstance(outputs, (list, tuple)) and outputs and isinstance(outputs[0], str):
        return "text"
    if isinstance(outputs, Tensor) and isinstance(target, Tensor) and outputs.is_floating_point():
        if target.is_floating_point() and outputs.numel() == target.numel():
            return "regression"
        if not target.is_floating_point():
            if outputs.numel() == target.numel():
                return "binary"
            if target.dim() == 1 and outputs.dim() == 2:
                return "multiclass"
            if target.dim() == 2 and outputs.shape[:2] == target.shape and outputs.dim() == 3:
                return "tokens"
            if target.dim() == outputs.dim() - 1 and outputs.shape[2:] == target.shape[1:]:
                return "segmentation"
    raise ValueError(
        f"`metrics` can be chosen for classes, numbers, pixels, tokens and text. Found outputs {_kind(outputs)} and "
        f"targets {_kind(target)}. Give `metrics`, and `predict` if outputs need a change."
    )


def metrics_for(task: str, outputs: Any) -> dict[str, Metric]:
    """Return what is usual for ``task``, for outputs of the shape of ``outputs``."""
    if task == "binary":
        return {
            "accuracy": BinaryAccuracy(),
            "precision": BinaryPrecision(),
            "recall": BinaryRecall(),
            "F1": BinaryF1Score(),
            "AUROC": BinaryAUROC(thresholds=200),
            "calibration error": BinaryCalibrationError(),
        }
    if task == "regression":
        return {
            "MSE": MeanSquaredError(),
            "RMSE": MeanSquaredError(squared=False),
            "MAE": MeanAbsoluteError(),
            "R2": R2Score(),
        }
    if task == "tokens":
        classes = outputs.shape[2]
        by_token = _TokenAccuracy(classes, average="micro", ignore_index=_IGNORED)
        return {"accuracy": by_token, "perplexity": Perplexity(ignore_index=_IGNORED)}
    if task == "text":
        scores: dict[str, Metric] = {"BLEU": BLEUScore()}
        if _NLTK_AVAILABLE:
            scores["ROUGE"] = ROUGEScore(rouge_keys=("rouge1", "rougeL"))
        return scores
    classes = outputs.shape[1]
    if task == "segmentation":
        accuracy = MulticlassAccuracy(classes, average="micro")
        return {"IoU": MulticlassJaccardIndex(classes), "accuracy": accuracy}
    return {
        "accuracy": MulticlassAccuracy(classes, average="micro"),
        "precision": MulticlassPrecision(classes),
        "recall": MulticlassRecall(classes),
        "F1": MulticlassF1Score(classes),
        "AUROC": MulticlassAUROC(classes, thresholds=200),
        "calibration error": MulticlassCalibrationError(classes),
    }


class _TokenAccuracy(MulticlassAccuracy):
    """Takes the vocabulary as the last dimension, as perplexity does."""

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.transpose(1, 2), target)


def _as_metrics_want(task: str, outputs: Any, target: Any) -> tuple[Any, Any]:
    if task == "text":
        return outputs, [[line] if isinstance(line, str) else line for line in target]
    if task in {"binary", "regression"}:
        outputs = outputs.reshape(target.shape)
    if task == "binary":
        target = target.long()
    return outputs.float(), target


def _by_sample(task: str, outputs: Any, target: Any) -> Tensor:
    """Return one number for each sample; see :class:`Quality`."""
    if task == "text":
        return torch.empty(0)
    if task == "regression":
        errors: Tensor = (outputs - target).square()
        return errors.flatten(1).mean(1) if errors.dim() > 1 else errors
    if task == "binary":
        right = ((outputs > _threshold(outputs)).long() == target).float()
    elif task == "tokens":
        counted = (target != _IGNORED).float()
        right = (
            (outputs.argmax(2) == target).float() * counted / counted.mean(1, keepdim=True).clamp_min(1e-9)
        )
    else:
        right = (outputs.argmax(1) == target).float()
    samples: Tensor = right.flatten(1).mean(1) if right.dim() > 1 else right
    return samples


def _threshold(outputs: Tensor) -> float:
    """Return where torchmetrics cuts: at 0.5 if all outputs are probabilities, else at the logit 0."""
    return 0.5 if bool(((outputs >= 0) & (outputs <= 1)).all()) else 0.0


def _kind(value: Any) -> str:
    return (
        f"{tuple(value.shape)} of {value.dtype}"
        if isinstance(value, Tensor)
        else f"a `{type(value).__name__}`"
    )
