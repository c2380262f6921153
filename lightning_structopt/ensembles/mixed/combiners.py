"""What turns the outputs of members into one: a gate, a network, or an estimator of scikit-learn."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_type
from lightning_structopt._precision import widened
from lightning_structopt.ensembles.batches import call, tensor_of
from lightning_structopt.ensembles.combine import combined

_FLOOR = 1e-6  # the probability of a class that an estimator rules out: its logarithm must be a number


class GatingNetwork(nn.Module):
    r"""Gives each sample weights of its own, :math:`w(x) = \mathrm{softmax}(g(x))`.

    Jacobs et al., "Adaptive Mixtures of Local Experts", 1991.

    Args:
        network: From inputs to a score for each member, (N, M). It is called as members are.

    Example:
        >>> GatingNetwork(nn.Linear(3, 2))(torch.ones(4, 3)).sum(1).round(decimals=4).detach()
        tensor([1., 1., 1., 1.])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        require_type("network", network, nn.Module)
        self.network = network

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return weights, (N, M)."""
        return widened(tensor_of(self.network(*args, **kwargs))).softmax(1)


def features_of(outputs: Tensor, is_classifier: bool) -> Tensor:
    """Return what combiners are given: probabilities or values of all members side by side, (N, features).

    Args:
        outputs: (M, N, ...), logits or values.
        is_classifier: Whether they are logits, with classes in the last dimension.

    Example:
        >>> features_of(torch.zeros(3, 5, 2), is_classifier=True).shape
        torch.Size([5, 6])
    """
    outputs = widened(outputs)
    given = outputs.softmax(-1) if is_classifier else outputs
    return given.movedim(0, 1).flatten(1)


class Mixer(ABC):
    """How a combiner is asked.

    Args:
        combiner: The combiner.
        is_classifier: Whether outputs are logits.
    """

    def __init__(self, combiner: Any, is_classifier: bool) -> None:
        self.combiner = combiner
        self.is_classifier = is_classifier

    @abstractmethod
    def __call__(self, outputs: Tensor, inputs: Any) -> Tensor:
        """Return log-probabilities or values, (N, ...).

        Args:
            outputs: (M, N, ...) of the members.
            inputs: What they were called with.
        """


class ByGate(Mixer):
    """Weighs members by a :class:`GatingNetwork`."""

    @override
    def __call__(self, outputs: Tensor, inputs: Any) -> Tensor:
        weights = call(self.combiner, inputs)
        if weights.shape != (outputs.shape[1], outputs.shape[0]):
            raise ValueError(
                "A gate must give each sample a weight for each member, of shape "
                f"{(outputs.shape[1], outputs.shape[0])}. Found {tuple(weights.shape)}. Change the size of its output."
            )
        return combined("probabilities" if self.is_classifier else "mean", outputs, weights.T)


class ByNetwork(Mixer):
    """Has a module turn the features into logits or values."""

    @override
    def __call__(self, outputs: Tensor, inputs: Any) -> Tensor:
        found = widened(tensor_of(self.combiner(features_of(outputs, self.is_classifier))))
        if found.numel() != outputs[0].numel():
            raise ValueError(
                f"A combiner must return outputs as members do, of shape {tuple(outputs.shape[1:])}. Found "
                f"{tuple(found.shape)}, from {features_of(outputs, self.is_classifier).shape[1]} features. Change the "
                "size of its output."
            )
        found = found.reshape(outputs.shape[1:])
        return found.log_softmax(-1) if self.is_classifier else found


class ByEstimator(Mixer):
    """Asks an estimator of scikit-learn, on the CPU."""

    def fit(self, outputs: Tensor, target: Tensor) -> None:
        """Fit the estimator to the outputs of members, (M, N, ...), and their target."""
        features = features_of(outputs, self.is_classifier).cpu().numpy()
        self.combiner.fit(features, target.cpu().numpy())

    @override
    def __call__(self, outputs: Tensor, inputs: Any) -> Tensor:
        features = features_of(outputs, self.is_classifier).detach().cpu().numpy()
        if not self.is_classifier:
            values = torch.from_numpy(self.combiner.predict(features)).to(outputs.device, torch.float32)
            return values.reshape(outputs.shape[1:])
        found = torch.from_numpy(self.combiner.predict_proba(features)).to(outputs.device, torch.float32)
        known = torch.as_tensor(self.combiner.classes_, device=outputs.device)
        # Classes that it never saw have no column.
        probabilities = torch.zeros(outputs.shape[1:], device=outputs.device).index_copy(1, known, found)
        return probabilities.clamp_min(_FLOOR).log().log_softmax(1)


def mixer_for(combiner: Any, is_classifier: bool) -> Mixer:
    """Return how ``combiner`` is asked.

    Raises:
        TypeError: If it is no combiner.
    """
    if isinstance(combiner, GatingNetwork):
        return ByGate(combiner, is_classifier)
    if isinstance(combiner, nn.Module):
        return ByNetwork(combiner, is_classifier)
    needed = ("fit", "predict_proba" if is_classifier else "predict")
    if not isinstance(combiner, type) and all(callable(getattr(combiner, name, None)) for name in needed):
        return ByEstimator(combiner, is_classifier)
    raise TypeError(
        f"`combiner` must be a module, a `GatingNetwork`, or an estimator with `{needed[0]}` and `{needed[1]}`. Found "
        f"`combiner = {combiner!r}`.{' Did you mean an object of it?' if isinstance(combiner, type) else ''}"
    )
