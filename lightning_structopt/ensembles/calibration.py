"""Probabilities that mean what they say: temperature scaling and the calibration error."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error
from typing_extensions import Self, override

from lightning_structopt._checks import require_in, require_type, require_whole
from lightning_structopt.ensembles.batches import Read, read_pair, tensor_of
from lightning_structopt.ensembles.predictions import predictions


def expected_calibration_error(outputs: Tensor, target: Tensor, bins: int = 15) -> Tensor:
    r"""Return how far confidence is from accuracy, :math:`\sum_b \frac{n_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|`.

    Computed by torchmetrics, over bins of equal width.

    Args:
        outputs: (N, C), logits or log-probabilities.
        target: (N,), classes.
        bins: How many bins, at least 1.

    Raises:
        TypeError: If ``bins`` is not a whole number.
        ValueError: If ``bins`` is below 1, or shapes don't fit.

    Example:
        >>> logits = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
        >>> expected_calibration_error(logits, torch.tensor([0, 1]))
        tensor(0.3000)
    """
    require_whole("bins", bins, 1)
    if outputs.ndim != 2 or target.shape != outputs.shape[:1]:
        raise ValueError(
            f"`outputs` must be of shape (samples, classes) and `target` of shape (samples,). Found "
            f"{tuple(outputs.shape)} and {tuple(target.shape)}. Flatten them."
        )
    probabilities = outputs.float().softmax(1)
    return multiclass_calibration_error(probabilities, target, outputs.shape[1], n_bins=bins)


class TemperatureScaling(nn.Module):
    r"""Divides a classifier's logits by a temperature that makes its probabilities honest, :math:`z / T`.

    Classes stay as they are; only how sure it is of them changes. It may be a member of an ensemble, whose confidence
    thresholds then mean what they say. Guo et al., "On Calibration of Modern Neural Networks", 2017
    (https://arxiv.org/abs/1706.04599).

    Args:
        module: A classifier that returns logits, with classes in dimension 1. It is held, and not changed.
        temperature: :math:`T` until it is fitted, above 0.

    Raises:
        TypeError: If ``module`` is no module or ``temperature`` no number.
        ValueError: If ``temperature`` is out of range.

    Example:
        >>> sure = nn.Linear(1, 2)
        >>> with torch.no_grad():
        ...     _ = sure.weight.zero_(), sure.bias.copy_(torch.tensor([9.0, 0.0]))
        >>> data = [(torch.ones(4, 1), torch.tensor([0, 0, 0, 1]))]
        >>> TemperatureScaling(sure).fit(data)(torch.ones(1, 1)).softmax(1).detach()
        tensor([[0.7500, 0.2500]])
    """

    def __init__(self, module: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        require_type("module", module, nn.Module)
        require_in("temperature", temperature, 0, float("inf"), closed="neither")
        self.module = module
        self.register_buffer("log_temperature", torch.tensor(float(temperature)).log())

    log_temperature: Tensor

    @property
    def temperature(self) -> float:
        """What logits are divided by: above 1 where the module is too sure of itself."""
        return float(self.log_temperature.exp())

    def fit(self, loader: Iterable[Any], *, read: Read = read_pair, steps: int = 100) -> Self:
        """Fit the temperature to the cross-entropy of held-out data, by L-BFGS.

        Args:
            loader: Data that the module was not trained on.
            read: From a batch to inputs and target.
            steps: At most so many, at least 1.

        Raises:
            TypeError: If ``steps`` is not a whole number, or a batch has no target.
            ValueError: If ``steps`` is below 1, there are no batches, or the data say nothing of a temperature.
        """
        require_whole("steps", steps, 1)
        found = predictions([self.module], loader, read)
        logits, start = found.outputs[0], self.log_temperature.detach().float().cpu()
        _require_minimum(logits, found.target)
        fitted = _fitted(logits, found.target, start, steps)
        with torch.no_grad():
            self.log_temperature.copy_(fitted)
        return self

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return tensor_of(self.module(*args, **kwargs)) / self.log_temperature.exp()


def _require_minimum(logits: Tensor, target: Tensor) -> None:
    """Raise unless some temperature is best; the cross-entropy is convex in its inverse.

    Raises:
        ValueError: If cold is always better, as all answers are right, or hot, as they are no better than chance.
    """
    right = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    all_right = bool((logits.amax(1) - right).mean() <= 0)
    if all_right or bool((right - logits.mean(1)).mean() <= 0):
        reason = "all answers are right" if all_right else "answers are no better than chance"
        raise ValueError(
            f"Held-out data must say which temperature is best. Found that {reason}. Give more data that the module "
            "was not trained on."
        )


def _fitted(logits: Tensor, target: Tensor, start: Tensor, steps: int) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        logits, target = logits.clone(), target.clone()  # none of inference mode
        value = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([value], max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            entropy = nn.functional.cross_entropy(logits / value.exp(), target)
            entropy.backward()  # type: ignore[no-untyped-call]
            return entropy

        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return value.detach()
