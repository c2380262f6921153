"""What outputs and targets are about, the metrics that are usual for it, and one number for each sample."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
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
from torchmetrics.functional.text import bleu_score
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score
from torchmetrics.text import BLEUScore, Perplexity, ROUGEScore
from typing_extensions import override

_IGNORED = -100  # the target that losses and perplexity pass over
_VOID = 255  # the same in the masks of most data sets of pixels


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
        "`metrics` can be chosen for classes, numbers, pixels, tokens and text. Found "
        f"{described(outputs, target)}. Give `metrics`, and `predict` if outputs need a change."
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
        return {"BLEU": BLEUScore(), "ROUGE": ROUGEScore(rouge_keys=("rouge1", "rougeL"))}
    classes = outputs.shape[1]
    if task == "segmentation":
        accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=_IGNORED)
        return {"IoU": MulticlassJaccardIndex(classes, ignore_index=_IGNORED), "accuracy": accuracy}
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


def as_metrics_want(task: str | None, outputs: Any, target: Any) -> tuple[Any, Any]:
    """Return outputs and targets as the metrics of ``task`` take them; as they are where there is no task."""
    if task is None:
        return outputs, target
    if task == "text":
        return outputs, [[line] if isinstance(line, str) else line for line in target]
    if task in {"binary", "regression"}:
        outputs = outputs.reshape(target.shape)
    if task == "binary":
        target = target.long()
    if task == "segmentation" and outputs.shape[1] <= _VOID:
        target = target.long().masked_fill(target == _VOID, _IGNORED)
    return outputs.float(), target


def by_sample(task: str | None, outputs: Any, target: Any) -> Tensor:
    """Return one number for each sample, (samples,), of what :func:`as_metrics_want` gives.

    1 where a class is right and 0 where it is wrong, the share of right pixels or tokens, the squared error, or the
    BLEU of a line of text (smoothed, as one line may have no four words in common). Empty where there is no task.
    """
    if task is None:
        return torch.empty(0)
    if task == "text":
        pairs = zip(outputs, target, strict=True)
        return torch.tensor([float(bleu_score([line], [known], smooth=True)) for line, known in pairs])
    if task == "regression":
        return _mean(outputs.sub(target).square())
    if task == "binary":
        return _mean(((outputs > _threshold(outputs)).long() == target).float())
    counted = target != _IGNORED
    right = (outputs.argmax(2 if task == "tokens" else 1) == target).float()
    return _mean(right * counted) / _mean(counted.float()).clamp_min(1e-9)


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def _threshold(outputs: Tensor) -> float:
    """Return where torchmetrics cuts: at 0.5 if all outputs are probabilities, else at the logit 0."""
    return 0.5 if bool(((outputs >= 0) & (outputs <= 1)).all()) else 0.0


def described(outputs: Any, target: Any) -> str:
    """Say in words what a module gave and what it should have."""
    return f"outputs {_kind(outputs)} and targets {_kind(target)}"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return f"a `{type(value).__name__}`"
