"""Members put together by a combiner that is trained."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_structopt._checks import require_choice
from lightning_structopt._precision import widened
from lightning_structopt.ensembles.batches import Read, require_target
from lightning_structopt.ensembles.members import Member
from lightning_structopt.ensembles.mixed.combiners import ByEstimator, mixer_for
from lightning_structopt.ensembles.mixed.out_of_fold import Held, OutOfFold, overlaps
from lightning_structopt.ensembles.module import Ensemble
from lightning_structopt.ensembles.predictions import predictions
from lightning_structopt.ensembles.scores import Metrics
from lightning_structopt.ensembles.stacked import OneByOne


class MixedEnsemble(Ensemble):
    """Asks all members, and has a combiner make one answer of theirs.

    Combiners: a module from the members' probabilities (or values) side by side, (N, M * C), to logits (or values); a
    :class:`~lightning_structopt.GatingNetwork`, which weighs members by the inputs; or an estimator of scikit-learn.
    The first two are trained by ``fit``, the last by :meth:`fit_combiner`. Members are frozen. As a member may be an
    ensemble itself, this makes trees of them.

    On data that members were trained on, all look better than they are, so combiners learn from what
    :func:`~lightning_structopt.ensembles.out_of_fold` gathers, or from data that was held out. Wolpert, "Stacked
    Generalization", 1992.

    Args:
        members: As those of :class:`~lightning_structopt.ParallelEnsemble`.
        combiner: See above.
        task: ``"classification"``, where members return logits (N, C), or ``"regression"``.
        trained_on: The data set that members were trained on, such as ``OutOfFold.dataset``; combiners that are to be
            trained on any of it are refused.
        read: From a batch to inputs and target; by default batches are pairs.
        metrics: What ``validate`` and ``test`` log; chosen by the task if not given.
        lr: The learning rate of Adam; by default 0.01.
        optimizer: Instead of ``lr``: from parameters to the optimizer.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        TypeError: If an argument is of the wrong kind.
        ValueError: If there is no member or an argument is out of range. Before the first step: if there is nothing to
            train, or the data are those that members were trained on. On saving a checkpoint: if the combiner is an
            estimator of scikit-learn.

    Example:
        >>> members = [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))]
        >>> MixedEnsemble(members, nn.Linear(4, 2))(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        members: Sequence[Member],
        combiner: Any,
        task: Literal["classification", "regression"] = "classification",
        *,
        trained_on: Any = None,
        read: Read | None = None,
        metrics: Metrics | None = None,
        lr: float | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        require_choice("task", task, ("classification", "regression"))
        super().__init__(members, read=read, metrics=metrics, lr=lr, optimizer=optimizer)
        self.task = task
        self.combiner = combiner
        self.trained_on = trained_on
        mixer_for(combiner, self.is_classifier)  # raises

    @property
    @override
    def is_classifier(self) -> bool:
        return self.task == "classification"

    def fit_combiner(self, data: OutOfFold | Iterable[Any]) -> None:
        """Fit a combiner of scikit-learn.

        Args:
            data: Out-of-fold predictions, or batches that no member was trained on, which members are then asked about.

        Raises:
            TypeError: If the combiner is a module, which ``fit`` trains.
            ValueError: If the data are those that members were trained on.
        """
        mixer = mixer_for(self.combiner, self.is_classifier)
        if not isinstance(mixer, ByEstimator):
            raise TypeError(
                f"`fit_combiner` is for estimators of scikit-learn. Found a `{type(self.combiner).__name__}`. Train it "
                "by `trainer.fit(ensemble, ...)`."
            )
        if isinstance(data, OutOfFold):
            mixer.fit(data.outputs, data.target)
            return
        self._require_held_out(data)
        found = predictions(list(self.members), data, self.read)
        mixer.fit(found.outputs, found.target)

    @override
    def answers(self, inputs: Any) -> Mapping[str, Tensor]:
        self._keep_members_still()
        with torch.no_grad():
            way = OneByOne(self.members)
            outputs = way(**inputs) if isinstance(inputs, Mapping) else way(*_positional(inputs))
        return self._mixed(outputs, inputs)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not isinstance(batch, Held):
            return super().training_step(batch, batch_idx)
        output = self._mixed(batch.outputs.transpose(0, 1), batch.inputs)[""]
        loss = self.loss(output, require_target(batch.target))
        self.log("train_loss", loss, batch_size=len(output))
        return loss

    @override
    def on_train_start(self) -> None:
        loaders = self.trainer.train_dataloader
        for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
            self._require_held_out(loader)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not isinstance(self.combiner, nn.Module):
            raise ValueError(
                "A checkpoint must hold the whole ensemble, in a form that runs no code when it is loaded. Found a "
                f"combiner of type `{type(self.combiner).__name__}`, which is none. Save it by itself, as by skops, "
                "and members by themselves; or give a module as combiner."
            )

    def _mixed(self, outputs: Tensor, inputs: Any) -> Mapping[str, Tensor]:
        if self.is_classifier and (outputs.ndim != 3 or outputs.shape[2] < 2):
            raise ValueError(
                f"Members must return a score for each class, (samples, classes). Found {tuple(outputs.shape[1:])}. "
                'Give `task="regression"` for numbers.'
            )
        whole = mixer_for(self.combiner, self.is_classifier)(outputs, inputs)
        return {"": whole, **{f"{index}/": widened(output) for index, output in enumerate(outputs)}}

    def _require_held_out(self, loader: Any) -> None:
        """Raise if the data are those that members were trained on.

        Raises:
            ValueError: If they are.
        """
        dataset = loader.dataset if isinstance(loader, DataLoader) else loader
        if (
            self.trained_on is not None
            and not isinstance(dataset, OutOfFold)
            and overlaps(dataset, self.trained_on)
        ):
            raise ValueError(
                "A combiner must learn from data that members were not trained on, where they look better than they "
                "are. Found samples of `trained_on`. Give the data set that `out_of_fold` returns, or held-out data."
            )

    @override
    def _what_to_train(self) -> str:
        return (
            "frozen members and a combiner without parameters. Fit an estimator of scikit-learn by "
            "`ensemble.fit_combiner(...)`, or give a module that has some."
        )


def _positional(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)
