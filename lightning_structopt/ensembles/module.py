"""What all ensembles share as LightningModules: members, steps, metrics, the optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self, override

from lightning_structopt._checks import (
    require_callable,
    require_in,
    require_lightning,
    require_type,
)
from lightning_structopt._precision import widened
from lightning_structopt.ensembles.batches import Read, as_inputs, read_pair, require_target
from lightning_structopt.ensembles.members import Member, settle
from lightning_structopt.ensembles.scores import Metrics, Scores

_LR = 1e-2


class Ensemble(pl.LightningModule, ABC):
    """Several models that answer as one; subclasses say how.

    For classes ``forward`` returns log-probabilities: they are logits as well, so ``softmax``, ``argmax`` and losses
    on logits take them. For numbers it returns values. ``predict_step`` returns probabilities or values. Logged:
    ``train_loss``, ``val_loss``, ``test_loss`` and metrics such as ``val_accuracy``.

    Args:
        members: Modules, pairs of a LightningModule's class and the path of a checkpoint, objects with ``load()``, or
            other ensembles.
        train_members: Whether ``fit`` trains members, too.
        read: From a batch to inputs (a tensor, a tuple of arguments or a dict of named ones) and target.
        metrics: What ``validate`` and ``test`` log; chosen by the task if not given.
        lr: The learning rate of Adam; by default 0.01.
        optimizer: Instead of ``lr``: from parameters to the optimizer.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range. At the start of ``fit``: if there is nothing to train.
    """

    train_members = False  # until members are there

    def __init__(
        self,
        members: Sequence[Member],
        *,
        train_members: bool = False,
        read: Read | None = None,
        metrics: Metrics | None = None,
        lr: float | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        super().__init__()
        if lr is not None:
            require_in("lr", lr, 0, float("inf"), closed="neither")
        require_type("train_members", train_members, bool)
        for name, function in (("read", read), ("optimizer", optimizer)):
            if function is not None:
                require_callable(name, function)
        if lr is not None and optimizer is not None:
            raise ValueError(
                "An optimizer has its own rate. Found `lr` and `optimizer`. Leave one of them out."
            )
        self.members = nn.ModuleList(settle(members, trained=train_members))
        self.train_members = train_members
        self.read = read_pair if read is None else read
        self.lr = _LR if lr is None else lr
        self.make_optimizer = optimizer
        self.scores = Scores(metrics)

    @property
    @abstractmethod
    def is_classifier(self) -> bool:
        """Whether outputs are log-probabilities of classes; values if not."""

    @abstractmethod
    def answers(self, inputs: Any) -> Mapping[str, Tensor]:
        """Return the ensemble's own output as ``""``, and others to be scored, by what goes before their names.

        Args:
            inputs: A tensor, a tuple of arguments or a dict of named ones.
        """

    def answer(self, inputs: Any) -> Tensor:
        """Return the ensemble's own output alone."""
        return self.answers(inputs)[""]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of the ensemble's output: cross-entropy or mean squared error. Override it for another.

        Args:
            output: (N, ...), log-probabilities or values.
            target: (N, ...).
        """
        if self.is_classifier:
            return nn.functional.nll_loss(self._classes_second(output), target)
        return nn.functional.mse_loss(output.reshape(target.shape), widened(target))

    def as_teacher(self) -> Self:
        """Return the ensemble in evaluation mode, ready for ``DistillationModule(teacher=...)``."""
        return self.eval()

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return log-probabilities of classes, or values; called as a member is."""
        return self.answer(as_inputs(args, kwargs))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, target = self.read(batch)
        output = self.answer(inputs)
        loss = self.loss(output, require_target(target))
        self.log("train_loss", loss, batch_size=len(output))
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", batch)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return probabilities of classes, or values, for a batch with or without target."""
        output = self.answer(self.read(batch)[0])
        return output.exp() if self.is_classifier else output

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    @override
    def setup(self, stage: str) -> None:
        require_lightning(type(self).__name__, self.trainer, self)
        if stage == "fit" and not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"`fit` must have something to train. Found {self._what_to_train()}")

    @override
    def configure_optimizers(self) -> Optimizer:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.make_optimizer is not None:
            return self.make_optimizer(parameters)
        return torch.optim.Adam(parameters, lr=self.lr)

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not self.train_members and "members" in self._modules:
            self.members.eval()
        return self

    def _what_to_train(self) -> str:
        """Return what is there instead of something to train, and the remedy."""
        return "frozen members and nothing else. Give `train_members=True`."

    def _classes_second(self, output: Tensor) -> Tensor:
        """Return ``output`` as losses and metrics of torch want it."""
        return output

    def _evaluate(self, stage: str, batch: Any) -> None:
        inputs, target = self.read(batch)
        answers, target = self.answers(inputs), require_target(target)
        loss = self.loss(answers[""], target)
        self.log(f"{stage}_loss", loss, batch_size=len(target), sync_dist=True)
        self.scores.update({name: self._classes_second(answer) for name, answer in answers.items()}, target)

    def _log_scores(self, stage: str) -> None:
        # "0/accuracy" of a member is to be "0/val_accuracy".
        named = {_with_stage(name, stage): value for name, value in self.scores.take().items()}
        self.log_dict(named)

    def _keep_members_still(self) -> None:
        """Put members that someone has put in training mode back, unless they are trained."""
        if not self.train_members and any(member.training for member in self.members):
            self.members.eval()


def _with_stage(name: str, stage: str) -> str:
    before, slash, metric = name.rpartition("/")
    return f"{before}{slash}{stage}_{metric}"
