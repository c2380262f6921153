"""Growth as a Lightning callback."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich import print as rich_print
from typing_extensions import override

from lightning_structopt._checks import require_lightning, require_type, require_whole
from lightning_structopt._release import HearsLoading
from lightning_structopt.growth.host import (
    count_of,
    grow_on_load,
    grown_plan,
    order_of,
    require_fitting_trainer,
    restore_order,
    shapes_of,
)
from lightning_structopt.growth.plan import GrowthPlan
from lightning_structopt.growth.plateau import Plateau
from lightning_structopt.growth.steps import Deepen, GrowthStep, Widen
from lightning_structopt.shrinking.examples import example_for
from lightning_structopt.shrinking.host import change_during_fit
from lightning_structopt.shrinking.saved_plan import class_name


class NetworkGrowth(HearsLoading, Callback):
    """Makes the module wider or deeper while it trains, with its function kept, and trains on.

    It grows at the start of an epoch, once a metric has reached a plateau or at given epochs. Optimizers go on with
    what they know, learning-rate schedules go on, averaged models (EMA) grow too, and all ranks of ``ddp`` grow alike.
    Before the first step it is tried on a copy, so that what can't work is known then.

    Checkpoints have the plan of growth. A training resumes from any of them with this callback and a fresh module;
    :func:`~lightning_structopt.load_grown` makes the grown module of one.

    Args:
        when: A :class:`Plateau`, or the epochs at whose start to grow, counted from 0, each above 0.
        widen: What gets wider.
        deepen: What gets deeper; after ``widen`` if both are given. The ``n``-th growth adds ``n - 1`` to the seeds of
            both.
        max_parameters: Growth beyond as many parameters is left out, with a warning, and so is all that follows.
        example_input: What the module's ``forward`` takes, a tuple for several; by default the module's
            ``example_input_array``, or else the inputs of a training batch.
        verbose: Whether to print a line for each growth.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range. Before the first training step: if growth would change the function,
            or a strategy, optimizer or other callback does not fit. After an epoch: if the metric is not logged.

    Example:
        >>> callback = NetworkGrowth(Plateau("val_loss", patience=2, times=2), widen=Widen(1.5))
        >>> trainer = pl.Trainer(max_epochs=20, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.fit(module, loader, val_loader)  # doctest: +SKIP
        >>> callback.plan.save("plan.json")  # doctest: +SKIP

    See Chen et al., "Net2Net: Accelerating Learning via Knowledge Transfer" (2016), https://arxiv.org/abs/1511.05641.
    """

    changes_shapes = True
    """Of the module, while it trains; other callbacks may ask."""

    def __init__(
        self,
        when: Plateau | list[int],
        widen: Widen | None = None,
        deepen: Deepen | None = None,
        max_parameters: int | None = None,
        example_input: Any = None,
        verbose: bool = True,
    ) -> None:
        self.when = when if isinstance(when, Plateau) else _epochs(when)
        for name, step, kind in (("widen", widen, Widen), ("deepen", deepen, Deepen)):
            if step is not None:
                require_type(name, step, kind)
        if widen is None and deepen is None:
            raise ValueError(
                "`NetworkGrowth` needs `widen` or `deepen`, or both. Found neither. Give `widen=Widen(1.5)`."
            )
        if max_parameters is not None:
            require_whole("max_parameters", max_parameters, 1)
        self.widen, self.deepen = widen, deepen
        self.max_parameters = max_parameters
        self.example_input = example_input
        require_type("verbose", verbose, bool)
        self.verbose = verbose
        self._state: dict[str, Any] = {}  # plain data, no reference to a module
        self._from_checkpoint = self._rehearsed = self._validated = False

    @property
    def plan(self) -> GrowthPlan | None:
        """How the module grew; None before a ``fit``."""
        data = self._state.get("plan")
        return None if data is None else GrowthPlan.from_data(data)

    @property
    def times(self) -> int:
        """How often it has grown."""
        return len(self._state.get("grown_at", ()))

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        require_lightning("NetworkGrowth", trainer, pl_module)
        self._from_checkpoint = False
        self._listen(grow_on_load(trainer, pl_module))

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._stop_listening()
        require_fitting_trainer(trainer, pl_module)
        goes_on = self._from_checkpoint or self._is_of(pl_module)
        self._from_checkpoint = self._rehearsed = self._validated = False
        if not goes_on:
            plan = GrowthPlan(class_name(pl_module)).as_data()
            self._state = {"plan": plan, "grown_at": [], "best": None, "waited": 0, "latest": None}
        elif "order" in self._state:
            restore_order(trainer, pl_module, self._state["order"])

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if (
            not self._rehearsed and self._may_grow
        ):  # not earlier: the module is traced with the inputs of a batch
            self._planned(trainer, pl_module, batch)
        self._rehearsed = True
        if batch_idx == 0 and self._is_due(trainer):
            self._grow(trainer, pl_module, batch)

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if isinstance(self.when, Plateau) and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._validated = True
            if self.when.monitor in trainer.callback_metrics:  # as checkpoints may be saved right now
                self._look(trainer, self.when.monitor)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # Metrics of earlier epochs are still there where this one has no validation.
        validates = trainer.enable_validation and sum(trainer.num_val_batches) > 0
        if isinstance(self.when, Plateau) and (self._validated or not validates):
            self._look(trainer, self.when.monitor)
        self._validated = False
        if not trainer.barebones:
            pl_module.log("growth/parameters", float(count_of(pl_module)), sync_dist=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict)
        self._from_checkpoint = True

    @override
    def __repr__(self) -> str:
        return (
            f"NetworkGrowth({self.when!r}, widen={self.widen!r}, deepen={self.deepen!r}, "
            f"max_parameters={self.max_parameters!r}, example_input={self.example_input!r}, "
            f"verbose={self.verbose!r})"
        )

    @property
    def _may_grow(self) -> bool:
        """Whether growth is still to come."""
        if self._state.get("stopped"):
            return False
        limit = self.when.times if isinstance(self.when, Plateau) else len(self.when)
        return self.times < limit

    def _is_of(self, module: "pl.LightningModule") -> bool:
        """Whether the last ``fit`` left this module, grown."""
        shapes = self._state.get("shapes")
        return shapes is not None and shapes == {n: list(shape) for n, shape in shapes_of(module).items()}

    def _look(self, trainer: Any, monitor: str) -> None:
        """Remember the metric; it is judged at the start of the next epoch, whenever checkpoints are saved.

        Raises:
            ValueError: If it is not logged.
        """
        metrics = trainer.callback_metrics
        if monitor not in metrics:
            raise ValueError(
                f"A plateau is one of a metric that is logged. Found no `{monitor}` after an epoch; there are "
                f"{', '.join(f'`{each}`' for each in metrics) or 'none'}. Log it by `self.log`, or give another."
            )
        value = torch.as_tensor(metrics[monitor], dtype=torch.float64, device="cpu")
        if trainer.world_size > 1:  # ranks may have logged numbers of their own
            value = value.float().to(trainer.strategy.root_device)
            value = trainer.strategy.reduce(value, reduce_op="mean")
        self._state["latest"] = float(value)

    def _is_due(self, trainer: Any) -> bool:
        if not isinstance(self.when, Plateau):
            epoch = trainer.current_epoch
            return epoch in self.when and epoch not in self._state["grown_at"] and self._may_grow
        latest, self._state["latest"] = self._state["latest"], None
        if latest is not None:
            self._state["best"], self._state["waited"] = self.when.observe(
                self._state["best"], self._state["waited"], latest
            )
        return self._state["waited"] >= self.when.patience and self._may_grow

    def _steps(self) -> list[GrowthStep]:
        """Return what grows now, each growth with seeds of its own."""
        given = [step for step in (self.widen, self.deepen) if step is not None]
        return [replace(step, seed=step.seed + self.times) for step in given]

    def _planned(self, trainer: Any, pl_module: "pl.LightningModule", batch: Any) -> GrowthPlan:
        example = example_for(pl_module, self.example_input, batch, "NetworkGrowth")
        inputs = trainer.precision_plugin.convert_input(example)
        plan = grown_plan(pl_module, self._steps(), inputs)
        # The batches of ranks differ; the plan must not.
        return GrowthPlan.from_data(trainer.strategy.broadcast(plan.as_data()))

    def _grow(self, trainer: Any, pl_module: "pl.LightningModule", batch: Any) -> None:
        plan = self._planned(trainer, pl_module, batch)
        before, after = count_of(pl_module), count_of(plan.apply(pl_module))
        self._state["waited"] = 0
        if after > (math.inf if self.max_parameters is None else self.max_parameters):
            self._state["stopped"] = True
            rank_zero_warn(
                f"Growth ends here: from {before:,} parameters it would go to {after:,}, above `max_parameters = "
                f"{self.max_parameters:,}`."
            )
            return
        change_during_fit(trainer, pl_module, plan.apply_in_place)
        whole = self.plan
        assert whole is not None
        self._state |= {
            "plan": whole.then(plan).as_data(),
            "grown_at": [*self._state["grown_at"], trainer.current_epoch],
            "shapes": {name: list(shape) for name, shape in shapes_of(pl_module).items()},
            "order": order_of(trainer, pl_module),
        }
        if self.verbose and trainer.is_global_zero:
            rich_print(f"Epoch {trainer.current_epoch}: grown from {before:,} to {after:,} parameters.")


def _epochs(when: Sequence[int]) -> list[int]:
    """Return the epochs to grow at.

    Raises:
        TypeError: If it is no list of whole numbers.
        ValueError: If it is empty, has one twice, or one below 1.
    """
    if isinstance(when, str) or not isinstance(when, Sequence):
        raise TypeError(f"`when` must be a `Plateau` or a list of epochs. Found `when = {when!r}`.")
    for epoch in when:
        require_whole("when", epoch, 1)
    if not when or len(set(when)) < len(when):
        raise ValueError(f"`when` must have epochs, each once. Found `when = {list(when)!r}`.")
    return list(when)
