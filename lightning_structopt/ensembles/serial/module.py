"""Members that answer one after another: a cascade that stops early, or a chain that adds up."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self, override

from lightning_structopt._checks import require_choice, require_in, require_list, require_type
from lightning_structopt._devices import device_of, moved
from lightning_structopt._horizon import steps_taken, training_horizon
from lightning_structopt.ensembles.batches import Read, require_target
from lightning_structopt.ensembles.members import Member
from lightning_structopt.ensembles.module import Ensemble
from lightning_structopt.ensembles.predictions import predictions
from lightning_structopt.ensembles.scores import Metrics
from lightning_structopt.ensembles.serial.calibrate import CascadeReport, Evidence, fit_thresholds
from lightning_structopt.ensembles.serial.cascade import Routed, cascade
from lightning_structopt.ensembles.serial.chain import chain, member_in_turn
from lightning_structopt.profiling.flops import count_flops
from lightning_structopt.profiling.inputs import as_call


class SerialEnsemble(Ensemble):
    r"""Asks members one after another.

    ``mode="cascade"``: cheap classifiers first. Each answers the rows of which it is sure, and the next one runs on
    the others alone, as a smaller batch. :meth:`calibrate` finds thresholds for an accuracy or a cost; members that
    are too sure of themselves want :class:`~lightning_structopt.TemperatureScaling`. ``validate`` and ``test`` log the
    share of rows that each member ran on, as ``1/val_executed_fraction``. Wang et al., "Wisdom of Committees", 2020
    (https://arxiv.org/abs/2012.01988).

    ``mode="chain"``: outputs add up, :math:`F_m = F_{m-1} + \nu f_m`, and each member learns what those before it got
    wrong: residuals of numbers, or what is missing in logits. ``fit`` trains one member after another, each for an
    equal share of all optimizer steps; those done are left alone. ``validate`` logs as ``1/val_accuracy`` how good
    the first two are together. Friedman, "Greedy Function Approximation: A Gradient Boosting Machine", 2001.

    Args:
        members: As those of :class:`~lightning_structopt.ParallelEnsemble`; cascades freeze them, chains train them.
        mode: ``"cascade"`` or ``"chain"``.
        threshold: Of a cascade: how probable a member's class must be for its answer to count, in [0, 1]; one for all,
            or one for each member but the last. By default 0.9.
        task: Of a chain: ``"classification"``, where members return logits, or ``"regression"``.
        shrinkage: Of a chain: the factor :math:`\nu` on all members but the first, in (0, 1]; by default 1.
        pass_on: Of a chain: whether members after the first are called with :math:`F_{m-1}`, too, as the last argument
            (named ``before`` where arguments have names).
        read: From a batch to inputs and target; by default batches are pairs.
        metrics: What ``validate`` and ``test`` log; chosen by the task if not given.
        lr: The learning rate of Adam; by default 0.01.
        optimizer: Instead of ``lr``: from parameters to the optimizer.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        TypeError: If an argument is of the wrong kind.
        ValueError: If there is no member, an argument is out of range or belongs to the other mode. At the start of
            ``fit``: if it is a cascade, or a chain has fewer steps than members.

    Example:
        >>> small, large = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> ensemble = SerialEnsemble([small, large], threshold=0.0)
        >>> ensemble(torch.ones(5, 3)).shape, ensemble.executed_fraction
        (torch.Size([5, 2]), (1.0, 0.0))
    """

    def __init__(
        self,
        members: Sequence[Member],
        mode: Literal["cascade", "chain"] = "cascade",
        threshold: float | Sequence[float] | None = None,
        *,
        task: Literal["classification", "regression"] = "classification",
        shrinkage: float | None = None,
        pass_on: bool = False,
        read: Read | None = None,
        metrics: Metrics | None = None,
        lr: float | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        require_choice("mode", mode, ("cascade", "chain"))
        require_choice("task", task, ("classification", "regression"))
        require_type("pass_on", pass_on, bool)
        _require_of_mode(mode, threshold, task, shrinkage, pass_on)
        if shrinkage is not None:
            require_in("shrinkage", shrinkage, 0, 1, closed="right")
        super().__init__(
            members, train_members=mode == "chain", read=read, metrics=metrics, lr=lr, optimizer=optimizer
        )
        self.mode = mode
        self.task = task
        self.shrinkage = 1.0 if shrinkage is None else shrinkage
        self.pass_on = pass_on
        # Numbers, as a buffer would be rounded with the weights: 0.999 is 1 in bfloat16.
        self.thresholds = _thresholds(0.9 if threshold is None else threshold, len(self.members) - 1)
        self.in_use = len(self.members)  # of a chain: those that are trained, and the one that is
        self._steps = math.inf  # of the whole training, unknown until it starts
        self.reset_counts()

    @property
    @override
    def is_classifier(self) -> bool:
        return self.task == "classification"

    @property
    def executed_fraction(self) -> tuple[float, ...]:
        """For each member of a cascade the share of rows it ran on, since ``validate`` or the like started."""
        return tuple(count / max(1, self._seen[0]) for count in self._seen)

    def reset_counts(self) -> None:
        """Let :attr:`executed_fraction` start again."""
        self._seen = [0] * len(self.members)

    def route(self, inputs: Any) -> Routed:
        """Run a cascade on a tensor, a tuple of arguments or a dict of named ones, and tell which member answered."""
        self._require_cascade("route")
        self._keep_members_still()
        with torch.no_grad():
            routed = cascade(self.members, inputs, self.thresholds)
        self._seen = [total + count for total, count in zip(self._seen, routed.seen, strict=True)]
        return routed

    def calibrate(
        self,
        loader: Iterable[Any],
        *,
        target_accuracy: float | None = None,
        target_cost: float | None = None,
        costs: Sequence[float] | None = None,
    ) -> CascadeReport:
        """Find the thresholds of a cascade, set them, and return what they do.

        Args:
            loader: Held-out data that no member was trained on; all members run on all of it.
            target_accuracy: Find the cheapest cascade that is at least so accurate, in [0, 1].
            target_cost: Instead: find the most accurate one that costs at most so much on average, as a share of what
                running all members on everything would cost, in (0, 1].
            costs: What each member costs, in any unit; by default the floating-point operations of the first batch.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If it is no cascade, there are both targets or none, one is out of range or out of reach, or
                costs can't be counted.
        """
        self._require_cascade("calibrate")
        if (target_accuracy is None) == (target_cost is None):
            found = "neither" if target_cost is None else "both"
            raise ValueError(
                f"`calibrate` needs `target_accuracy` or `target_cost`. Found {found}. Give one of them."
            )
        if target_accuracy is not None:
            require_in("target_accuracy", target_accuracy, 0, 1)
        if target_cost is not None:
            require_in("target_cost", target_cost, 0, 1, closed="right")
        batches = list(loader)
        gathered = predictions(list(self.members), batches, self.read)
        shares = _shares(self._operations(batches[0]) if costs is None else costs, len(self.members))
        confidence, chosen = gathered.outputs.log_softmax(2).max(2)
        evidence = Evidence(confidence.exp(), chosen == gathered.target, shares)
        report = fit_thresholds(evidence, target_accuracy, target_cost)
        self.thresholds = report.thresholds
        return report

    @override
    def answers(self, inputs: Any) -> Mapping[str, Tensor]:
        if self.mode == "cascade":
            return {"": self.route(inputs).output}
        totals = chain(list(self.members[: self.in_use]), inputs, self.shrinkage, self.pass_on)
        outputs = [total.log_softmax(1) if self.is_classifier else total for total in totals]
        return {"": outputs[-1], **{f"{index}/": output for index, output in enumerate(outputs)}}

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, target = self.read(batch)
        turn = self.in_use - 1
        total = chain(list(self.members[: self.in_use]), inputs, self.shrinkage, self.pass_on, trained=turn)[
            -1
        ]
        loss = self.loss(total.log_softmax(1) if self.is_classifier else total, require_target(target))
        self.log("train_loss", loss, batch_size=len(total))
        # DDP waits for every parameter; those whose turn it isn't have no step, see below.
        idle = [p.sum() for m in self._idle() for p in m.parameters() if p.requires_grad]
        return loss + 0 * torch.stack(idle).sum() if idle and self.trainer.world_size > 1 else loss

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for member in self._idle():
            for parameter in member.parameters():
                parameter.grad = None  # a gradient of zero would let momentum and weight decay go on

    @override
    def on_train_start(self) -> None:
        # Not earlier: asking for the horizon loads the data, after which a stateful loader is not restored.
        self._steps = training_horizon(self.trainer).steps
        if math.isinf(self._steps) or (self._steps < len(self.members) and not self._is_trial()):
            raise ValueError(
                f"A chain trains its members in turn, an equal share of all steps each. Found {self._steps} steps for "
                f"{len(self.members)} members. Limit the trainer by `max_epochs` or `max_steps`, to as many or more."
            )
        self._give_turn()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        turn = member_in_turn(steps_taken(self.trainer), int(self._steps), len(self.members))
        turn = len(self.members) - 1 if self._is_trial() else turn
        if self.in_use != turn + 1:
            self.in_use = turn + 1
            self._give_turn()

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and self.train_members:
            self._give_turn()
        return self

    @override
    def on_validation_start(self) -> None:
        self.reset_counts()

    @override
    def on_test_start(self) -> None:
        self.reset_counts()

    @override
    def on_predict_start(self) -> None:
        self.reset_counts()

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return {"thresholds": list(self.thresholds), "in_use": self.in_use}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.thresholds = tuple(state["thresholds"])
        self.in_use = state["in_use"]

    @override
    def _evaluate(self, stage: str, batch: Any) -> None:
        before = list(self._seen)
        super()._evaluate(stage, batch)
        if self.mode == "cascade":
            counts = [now - then for now, then in zip(self._seen, before, strict=True)]
            fractions = {
                f"{i}/{stage}_executed_fraction": n / max(1, counts[0]) for i, n in enumerate(counts)
            }
            self.log_dict(fractions, batch_size=counts[0], sync_dist=True)

    @override
    def _what_to_train(self) -> str:
        return (
            'the frozen members of a cascade. Call `calibrate` to find thresholds, give `mode="chain"` to train '
            "members one after another, or train them by themselves."
        )

    def _is_trial(self) -> bool:
        """Tell whether it is a fast run for debugging, which may have fewer steps than members."""
        return bool(getattr(self.trainer, "fast_dev_run", False))

    def _idle(self) -> list[nn.Module]:
        return [member for index, member in enumerate(self.members) if index != self.in_use - 1]

    def _give_turn(self) -> None:
        """Put the member that is trained in training mode, and the others in evaluation mode."""
        for index, member in enumerate(self.members):
            member.train(index == self.in_use - 1)

    def _operations(self, batch: Any) -> list[float]:
        counts = []
        for member in self.members:
            inputs = self.read(moved(batch, device_of(member)))[0]
            found = count_flops(member, as_call(member, inputs), {})
            counts.append(sum(operations for operations, _ in found.values()))
        return counts

    def _require_cascade(self, method: str) -> None:
        if self.mode != "cascade":
            raise ValueError(
                f'`{method}` is for cascades. Found `mode="{self.mode}"`. Give `mode="cascade"`.'
            )


def _require_of_mode(
    mode: str, threshold: object, task: object, shrinkage: float | None, pass_on: bool
) -> None:
    """Raise if an argument is of the other mode.

    Raises:
        ValueError: If one is.
    """
    given = {"threshold": threshold is not None}
    if mode == "cascade":
        given = {
            'task="regression"': task == "regression",
            "shrinkage": shrinkage is not None,
            "pass_on": pass_on,
        }
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise ValueError(
            f'Each mode has arguments of its own. Found `mode="{mode}"` and `{wrong[0]}`. Leave that out, or change '
            "the mode."
        )


def _thresholds(threshold: float | Sequence[float], count: int) -> tuple[float, ...]:
    """Return one threshold for each of ``count`` members.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is outside [0, 1], or there are more or fewer.
    """
    one = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not one:
        require_list("threshold", threshold)
    given = [threshold] * count if one else list(threshold)  # type: ignore[arg-type]
    for value in [threshold] if one else given:
        require_in("threshold", value, 0, 1)  # type: ignore[arg-type]
    if len(given) != count:
        raise ValueError(
            f"`threshold` must be one for each member but the last, which answers the rest. Found {len(given)} for "
            f"{count + 1} members. Give {count}."
        )
    return tuple(float(value) for value in given)  # type: ignore[arg-type]


def _shares(costs: Sequence[float], count: int) -> tuple[float, ...]:
    """Return costs as shares of their sum.

    Raises:
        TypeError: If one is no number.
        ValueError: If one isn't above 0, or there are more or fewer than members.
    """
    for cost in costs:
        require_in("costs", cost, 0, float("inf"), closed="neither")
    if len(costs) != count:
        raise ValueError(f"`costs` must be one for each of {count} members. Found {len(costs)}.")
    return tuple(cost / sum(costs) for cost in costs)
