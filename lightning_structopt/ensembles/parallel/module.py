"""Members that all answer, put together into one answer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_type
from lightning_structopt._precision import widened
from lightning_structopt.ensembles.batches import Read, as_inputs, mean_and_variance_of, tensor_of
from lightning_structopt.ensembles.combine import FOR_CLASSES, Combine, combined, variance
from lightning_structopt.ensembles.members import Member
from lightning_structopt.ensembles.module import Ensemble
from lightning_structopt.ensembles.scores import Metrics
from lightning_structopt.ensembles.stacked import Runner, Stack
from lightning_structopt.ensembles.weights import weights_for


class ParallelEnsemble(Ensemble):
    r"""Asks all members and puts what they say together, with weights :math:`w` that sum to 1.

    ======================  =======================================================================================
    ``"probabilities"``     :math:`\log \sum_m w_m \, \mathrm{softmax}(z_m)`
    ``"logits"``            :math:`\log \mathrm{softmax}(\sum_m w_m z_m)`
    ``"vote"``              the logarithm of each class's share of the votes, :math:`w_m` for each member's best class
    ``"mean"``              :math:`\sum_m w_m y_m`
    ``"median"``            the weighted median of :math:`y_m`
    ``"gaussian"``          the mean and variance of the mixture of all :math:`N(\mu_m, \sigma_m^2)`, (N, ..., 2)
    ======================  =======================================================================================

    The first three return log-probabilities of classes, which are logits as well; the others numbers. For
    ``"gaussian"`` members return a pair of means and variances (not their logarithms), or a tensor with both in its
    last dimension; :math:`\bar\mu = \sum_m w_m \mu_m` and :math:`\bar\sigma^2 = \sum_m w_m (\sigma_m^2 + (\mu_m -
    \bar\mu)^2)`. Its loss is the negative logarithm of that normal density, its metrics are those of the mean.
    ``validate`` and ``test`` log the metrics of the ensemble as ``val_accuracy`` and of each member as
    ``0/val_accuracy``. Members are held as they are, so ``load_from_checkpoint(path, members=[...])`` wants them again.

    Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", 2017
    (https://arxiv.org/abs/1612.01474).

    Args:
        members: Modules that return logits (or log-probabilities) or numbers, of any classes: LightningModules, pairs
            of a LightningModule's class and the path of a checkpoint, objects with ``load()``, or other ensembles.
            They are frozen: in evaluation mode and without gradients.
        weights: One for each member, not negative, with sum 1; None for all the same; ``"learned"`` to have ``fit``
            train them, on data that no member was trained on. :func:`~lightning_structopt.weights_by_metric` and
            :func:`~lightning_structopt.select_greedily` find some.
        combine: How, see above.
        train_members: Whether ``fit`` trains members, together, by the loss of the ensemble.
        stack: Whether members of one class run as one vectorized forward pass, for which their weights are copied
            once: ``"auto"`` where that is measured to be faster, and never while training, which is to repeat exactly;
            True always, False never. Outputs are the same to rounding.
        class_dim: Which dimension of a member's output the classes are in.
        read: From a batch to inputs (a tensor, a tuple of arguments or a dict of named ones) and target; by default
            batches are pairs.
        metrics: What ``validate`` and ``test`` log; chosen by the task if not given.
        lr: The learning rate of Adam; by default 0.01.
        optimizer: Instead of ``lr``: from parameters to the optimizer.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        TypeError: If an argument is of the wrong kind.
        ValueError: If there is no member, a checkpoint doesn't fit its class, weights are negative or don't sum to 1,
            learned ones can't be, or an argument is none of its choices. At the start of ``fit``: if there is nothing
            to train. When called: if members' outputs differ in shape.

    Example:
        >>> members = [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))]
        >>> ensemble = ParallelEnsemble(members, weights=[0.25, 0.75])
        >>> ensemble(torch.ones(5, 3)).exp().sum(1).round(decimals=4)
        tensor([1., 1., 1., 1., 1.])
    """

    def __init__(
        self,
        members: Sequence[Member],
        weights: Sequence[float] | Literal["learned"] | None = None,
        combine: Combine = "probabilities",
        *,
        train_members: bool = False,
        stack: Stack = "auto",
        class_dim: int = 1,
        read: Read | None = None,
        metrics: Metrics | None = None,
        lr: float | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        require_choice("combine", combine, (*FOR_CLASSES, "mean", "median", "gaussian"))
        require_choice("stack", stack, ("auto", True, False))
        require_type("class_dim", class_dim, int)
        _require_learnable(weights, combine, train_members)
        if stack is True and train_members:
            raise ValueError(
                "Members are trained one by one. Found `train_members=True` and `stack=True`. Leave `stack` out."
            )
        super().__init__(
            members, train_members=train_members, read=read, metrics=metrics, lr=lr, optimizer=optimizer
        )
        self.weights = weights_for(len(self.members), weights)
        self.combine = combine
        self.class_dim = class_dim
        nested = any(isinstance(member, Ensemble) for member in self.members)  # each chooses for itself
        output = mean_and_variance_of if combine == "gaussian" else tensor_of
        self._runner = Runner(self.members, False if nested and stack == "auto" else stack, output)

    @property
    @override
    def is_classifier(self) -> bool:
        return self.combine in FOR_CLASSES

    def member_outputs(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what each member puts out, (M, N, ...)."""
        self._keep_members_still()
        with nullcontext() if self.train_members else torch.no_grad():
            return self._runner(as_inputs(args, kwargs), reproducible=self.training or self.train_members)

    def predict_with_variance(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        r"""Return the prediction and its variance: how far members are apart, :math:`\sum_m w_m (y_m - \bar y)^2`.

        With ``"gaussian"`` it is that and the mean of the variances that members predict.

        Raises:
            ValueError: If the ensemble predicts classes.
        """
        if self.is_classifier:
            raise ValueError(
                f'The variance is one of numbers. Found `combine="{self.combine}"`, which predicts classes. Give '
                '`combine="mean"`, "median" or "gaussian".'
            )
        outputs, weights = self.member_outputs(*args, **kwargs), self.weights()
        if self.combine == "gaussian":
            mean, spread = combined(self.combine, outputs, weights).unbind(-1)
            return mean, spread
        return combined(self.combine, outputs, weights), variance(outputs, weights)

    @override
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        if self.combine != "gaussian":
            return super().loss(output, target)
        mean, variance = output.unbind(-1)  # torch refuses variances below 0
        return nn.functional.gaussian_nll_loss(
            mean.reshape(target.shape), widened(target), variance.reshape(target.shape)
        )

    @override
    def answer(self, inputs: Any) -> Tensor:
        # What members say by themselves is left out, which takes longer than small members do.
        return combined(self.combine, self._outputs(inputs), self.weights(), self.class_dim)

    @override
    def answers(self, inputs: Any) -> Mapping[str, Tensor]:
        outputs = self._outputs(inputs)
        whole = combined(self.combine, outputs, self.weights(), self.class_dim)
        return {"": whole, **{f"{index}/": widened(output) for index, output in enumerate(outputs)}}

    def _outputs(self, inputs: Any) -> Tensor:
        if isinstance(inputs, Mapping):
            return self.member_outputs(**inputs)
        return self.member_outputs(*inputs) if isinstance(inputs, tuple) else self.member_outputs(inputs)

    @override
    def _what_to_train(self) -> str:
        return (
            'frozen members and fixed weights. Give `weights="learned"` to train the weights, `train_members=True` to '
            "train members, or go on to `validate`, `test` and `predict`."
        )

    @override
    def _classes_second(self, output: Tensor) -> Tensor:
        if self.combine == "gaussian":
            return output[..., 0]
        return output.movedim(self.class_dim, 1) if self.is_classifier else output


def _require_learnable(weights: Any, combine: Combine, train_members: bool) -> None:
    """Raise if ``fit`` is to train what ``combine`` gives no gradients to.

    Raises:
        ValueError: If so.
    """
    if combine in {"vote", "median"} and isinstance(weights, str):
        raise ValueError(
            f'Weights are learned through the outputs that they weigh. Found `weights="learned"` and `combine='
            f'"{combine}"`, which has no gradients. Give `combine="probabilities"` or "mean".'
        )
    if combine == "vote" and train_members:
        raise ValueError(
            'Members are trained through their outputs. Found `train_members=True` and `combine="vote"`, which has '
            'no gradients. Give `combine="probabilities"` or "logits".'
        )
