"""One training's worth of channel pruning, as plain tensor code: the callback tells it when."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_whole
from lightning_structopt._horizon import Horizon
from lightning_structopt.pruning.criteria import Criterion
from lightning_structopt.pruning.evidence import EvidenceCollector
from lightning_structopt.pruning.holding import Holding
from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.pruning.rewinding import Rewind, Rewinder
from lightning_structopt.shrinking.budget import NOTHING, Budget
from lightning_structopt.shrinking.choice import Order, Scope, importance, scored_parameters
from lightning_structopt.shrinking.costs import flop_count
from lightning_structopt.shrinking.graph_form import kept_labels
from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.lasso import CoupledLasso
from lightning_structopt.shrinking.plan import require_same_shapes
from lightning_structopt.shrinking.removal import dropped_indices, remove
from lightning_structopt.shrinking.report import ShrinkReport
from lightning_structopt.shrinking.structure import Structure
from lightning_structopt.shrinking.targets import Target
from lightning_structopt.shrinking.trial import kept_indices


@dataclass(frozen=True)
class Limits:
    """What restricts the choice of channels.

    Args:
        scope: Whether all groups lose the same fraction, or members of all groups are compared.
        round_to: What remains of a group is a multiple of it, or all.
        minimum: How many members of a group remain at least.
        include_normalized: Whether what a normalization reduces over may go.

    Raises:
        TypeError: If a number is not whole.
        ValueError: If an argument is out of range.
    """

    scope: Scope
    round_to: int
    minimum: int
    include_normalized: bool

    def __post_init__(self) -> None:
        require_choice("scope", self.scope, ("layer", "global"))
        require_whole("round_to", self.round_to, 1)
        require_whole("minimum", self.minimum, 1)


class ChannelRun(Holding):
    """The channels of one training that are gone, with what holds them at zero.

    Args:
        structure: The module that is trained, traced.
        groups: Its groups that can get smaller.
        target: How small it shall get.
        criterion: How important a weight is.
        limits: What restricts the choice.
        lasso: The strength of a group lasso over channels, until :meth:`close`; 0 for none.
        rewind: What goes back after each pruning, if anything.
    """

    def __init__(
        self,
        structure: Structure,
        groups: list[ChannelGroup],
        target: Target,
        criterion: Criterion,
        limits: Limits,
        lasso: float = 0.0,
        rewind: Rewind | None = None,
    ) -> None:
        self.structure = structure
        self.groups = groups
        self.budget = Budget(structure, groups, target)
        self.dropped = NOTHING
        names = {name for group in groups for name, _ in group.slots}
        module = structure.module
        masks = MaskSet({n: p for n, p in module.named_parameters() if n in names})
        super().__init__(masks, EvidenceCollector(criterion, scored_parameters(module, groups)), module)
        self.rewinder = Rewinder(rewind, module) if rewind is not None else None
        self._limits = limits
        self._lasso = CoupledLasso(structure, groups, lasso) if lasso else None
        self._keep = 1.0  # what was asked for last

    @property
    def left(self) -> float:
        """The fraction of the cost that is left now."""
        return self.budget.left(self.dropped)

    @property
    def flops(self) -> tuple[int, int]:
        """The floating-point operations for the example input: of the whole module, and of what is left."""
        count = flop_count(self.structure.traced)
        return count(self.structure.kept_without(NOTHING)), count(self.structure.kept_without(self.dropped))

    @torch.no_grad()
    def rehearse(self) -> ShrinkReport:
        """Remove as much from a copy as the target says, to see that it works.

        Raises:
            ValueError: If the target is out of reach, or the smaller module would not be of the same class.
        """
        order = self._order([torch.zeros(group.size) for group in self.groups])
        self.budget.require_reachable(order)
        return self._removed(self.budget.choose(order))

    def start(self, optimizers: Sequence[Optimizer], *, penalize: bool) -> None:
        """Begin to watch the module and its ``optimizers``; with the penalty, if there is one and it goes on.

        Raises:
            ValueError: If the criterion can't score the weights of the module.
        """
        self.attach(optimizers, gradients_are_final=False)  # callbacks that come later may still change them
        if self._lasso is not None and penalize:
            self._lasso.attach(optimizers)

    def close(self) -> None:
        """End the penalty, as no more channels will go."""
        if self._lasso is not None:
            self._lasso.detach()

    @override
    def detach(self) -> None:
        self.close()
        super().detach()

    @torch.no_grad()
    def prune(self, keep: float) -> bool:
        """Drop channels until ``keep`` of the cost is left, and tell whether any went."""
        if keep >= self._keep:
            return False
        self._keep = keep
        evidence = self.collector.evidence(self.structure.module, self.masks.sharding)
        scores = importance(self.structure.module, self.groups, self.collector.criterion, evidence)
        chosen = self.budget.choose(self._order(scores), keep)
        dropped = torch.unique(torch.cat([self.dropped, chosen]))
        if len(dropped) == len(self.dropped):
            return False
        self._drop(dropped)
        self.collector.forget()
        return True

    def go_back(self, optimizers: Sequence[Optimizer], now: Horizon) -> None:
        """Rewind what is to be rewound; what is gone stays zero."""
        if self.rewinder is not None:
            self.rewinder.go_back(optimizers, now)
            self.masks.apply()

    def _order(self, scores: Sequence[Tensor]) -> Order:
        gone = [torch.isin(group.classes, self.dropped) for group in self.groups]
        limits = self._limits
        return Order.by(self.groups, scores, limits.scope, limits.round_to, limits.minimum, gone)

    def _drop(self, dropped: Tensor) -> None:
        self.dropped = dropped
        self.masks.update(self._masks_without(dropped))

    def _masks_without(self, dropped: Tensor) -> dict[str, Tensor]:
        masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self.masks.parameters.items()}
        gone = dropped_indices(self.structure, self.structure.kept_without(dropped))
        for name, dims in gone.items():
            for dim, indices in dims.items():
                masks[name].index_fill_(dim, indices.to(masks[name].device), False)
        return masks

    def removed(self) -> ShrinkReport:
        """Return a copy of the module without what is gone.

        Raises:
            ValueError: If it would compute something else, or not be of the same class.
        """
        return self._removed(self.dropped)

    def _removed(self, dropped: Tensor) -> ShrinkReport:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has sizes written into its code")  # an error here
            report = remove(self.structure, dropped, self._limits.include_normalized)
        if report.form == "graph":
            raise ValueError(
                "`ChannelPruning` makes a smaller module of the same class. Found sizes in the code of "
                f"`{type(self.structure.module).__name__}` that no attribute can change. Name parameters of that part "
                "in `exclude`, or prune after training by `prune_channels`, which can return the exported graph."
            )
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return everything to go on from, as plain data: names, indices and what the criterion has seen."""
        kept = kept_indices(self.structure.traced, self.structure.kept_without(self.dropped))
        parameters = self.masks.parameters
        return {
            "kept": kept,
            "shapes": {name: list(parameter.shape) for name, parameter in parameters.items()},
            "asked": self._keep,
            "left": self.left,
            "evidence": self.collector.state_dict(),
            "rewinding": None if self.rewinder is None else self.rewinder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: If it does not fit the module.
        """
        require_same_shapes("The state of `ChannelPruning`", state["shapes"], self.masks.parameters)
        self._keep = state["asked"]
        self._drop(self._dropped_of(state))
        if self.rewinder is not None and state.get("rewinding"):
            self.rewinder.load_state_dict(state["rewinding"])
        if state["evidence"]:
            self.collector.load_state_dict(state["evidence"])

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Tell whether ``state`` describes the module as it is: its shapes, and zeros where channels are gone."""
        shapes = {name: list(parameter.shape) for name, parameter in self.masks.parameters.items()}
        if not state.get("kept") or state["shapes"] != shapes:
            return False
        weights = self.masks.weights()
        masks = self._masks_without(self._dropped_of(state))
        return not any(bool(weights[name][~mask].any()) for name, mask in masks.items())

    def _dropped_of(self, state: Mapping[str, Any]) -> Tensor:
        kept = kept_labels(self.structure.traced, state["kept"])
        return torch.unique(self.structure.found.classes[~kept])  # type: ignore[no-any-return]
