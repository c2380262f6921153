"""Mutual learning as a LightningModule: all members train at once, each the others' teacher."""

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.hooks import ModelHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_in, require_lightning, require_list, require_type
from lightning_structopt._horizon import steps_taken, training_horizon
from lightning_structopt.distillation.batches import default_target
from lightning_structopt.distillation.export import export
from lightning_structopt.distillation.losses.logits import DistillationLoss, SoftTarget
from lightning_structopt.distillation.mutual.optimizers import monitored, one_optimizer
from lightning_structopt.distillation.taps import LOGITS, Taps

_STEPS = ("validation_step", "test_step")


class MutualDistillation(pl.LightningModule):
    r"""Trains several students at once, each with the others as teachers.

    .. math:: \sum_i \Big( L_i + \lambda \frac{1}{M - 1} \sum_{j \neq i} L_\mathrm{KD}(z_i, z_j) \Big)

    with :math:`z_j` a constant in the terms of others. Each member is trained by its own ``training_step``, optimizer
    and scheduler; what it logs comes with its name before it, as ``a/val_acc``. Optimization is by hand, so the trainer
    can't clip gradients or accumulate them. Zhang et al., "Deep Mutual Learning", 2018
    (https://arxiv.org/abs/1706.00384).

    Args:
        members: Two modules or more, in a list (called "0", "1", ...) or by name.
        loss: How far one's output is from another's, by default :class:`~lightning_structopt.SoftTarget` at
            temperature 1; one on logits, without adapters.
        weight: The factor :math:`\lambda` on what others teach, in [0, inf).

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If there are fewer than two members, one optimizes by hand or has several optimizers, two share
            parameters, or the weight is out of range.

    Example:
        >>> module = MutualDistillation({"small": small, "large": large})  # doctest: +SKIP
        >>> pl.Trainer(max_epochs=20).fit(module, datamodule)  # doctest: +SKIP
        >>> module.export_student("small", "small.ckpt")  # doctest: +SKIP
    """

    def __init__(
        self,
        members: Sequence[pl.LightningModule] | Mapping[str, pl.LightningModule],
        loss: DistillationLoss | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if not isinstance(members, Mapping):
            require_list("members", members)
        named = dict(members) if isinstance(members, Mapping) else {str(i): m for i, m in enumerate(members)}
        _require_members(named)
        require_in("weight", weight, 0, math.inf, closed="left")
        self.members = nn.ModuleDict(named)
        self.weight = weight
        self.loss: DistillationLoss = SoftTarget(1.0) if loss is None else loss
        require_type("loss", self.loss, DistillationLoss)
        self._horizon = math.inf
        self._monitors: list[str | None] = []
        self._taps = {name: Taps(member, [LOGITS], "student") for name, member in named.items()}
        # As attributes of the object: Lightning asks which hooks are there.
        vars(self).update({step: partial(self._each, step) for step in _STEPS if self._has(step)})
        hooks = [name for name, _ in inspect.getmembers(ModelHooks, inspect.isfunction) if self._has(name)]
        own = [name for name in hooks if getattr(type(self), name) is getattr(pl.LightningModule, name)]
        vars(self).update({hook: partial(self._each, hook) for hook in own})

    def export_student(self, name: str, path: str | Path) -> None:
        """Write one member alone to a file that its class's ``load_from_checkpoint`` takes.

        Args:
            name: Which one; "0" is the first of a list.
            path: Where to.

        Raises:
            KeyError: If there is none of that name.
            ValueError: If its hyperparameters are not plain data.
        """
        export(self._named()[name], path)

    @override
    def setup(self, stage: str) -> None:
        require_lightning("MutualDistillation", self.trainer, self)
        for name, member in self._named().items():
            member.trainer = self.trainer
            vars(member)["log"] = partial(self._log_of, name)
            member.setup(stage)

    @override
    def configure_optimizers(self) -> Any:
        returned = {name: member.configure_optimizers() for name, member in self._named().items()}
        configurations = [one_optimizer(name, given) for name, given in returned.items()]
        watched = [monitored(name, given) for name, given in returned.items()]
        # One for each scheduler, in the order in which the trainer has them.
        pairs = zip(configurations, watched, strict=True)
        self._monitors = [monitor for configuration, monitor in pairs if "lr_scheduler" in configuration]
        return configurations

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.loss.advance(steps_taken(self.trainer), self._horizon)
        tasks, outputs = [], []
        for name, member in self._named().items():
            with self._taps[name] as taps:
                task = _step(member, batch, batch_idx)
            tasks.append(task["loss"] if isinstance(task, Mapping) else task)
            outputs.append(taps.take()[LOGITS])
        taught = [self._taught(index, outputs, batch) for index in range(len(outputs))]
        self._log_kd(outputs, taught)
        self._update(sum(tasks) + self.weight * sum(taught))

    @override
    def on_train_start(self) -> None:
        self._horizon = training_horizon(self.trainer).steps
        self._each("on_train_start")

    @override
    def on_train_epoch_end(self) -> None:
        for config, monitor in self._schedulers():
            if config.interval == "epoch" and (self.current_epoch + 1) % config.frequency == 0:
                scheduler: Any = config.scheduler
                scheduler.step(*() if monitor is None else (self.trainer.callback_metrics[monitor],))
        self._each("on_train_epoch_end")

    @override
    def teardown(self, stage: str) -> None:
        for name, member in self._named().items():
            self._taps[name].remove()
            vars(member).pop("log", None)
            member.teardown(stage)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return each member's output by its name."""
        return {name: member(*args, **kwargs) for name, member in self._named().items()}

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return each member's prediction by its name."""
        return {name: member.predict_step(*args, **kwargs) for name, member in self._named().items()}

    def _named(self) -> dict[str, Any]:
        return dict(self.members.items())

    def _has(self, hook: str) -> bool:
        return any(is_overridden(hook, member) for member in self._named().values())

    def _each(self, hook: str, *args: Any, **kwargs: Any) -> None:
        for member in self._named().values():
            getattr(member, hook)(*args, **kwargs)

    def _log_of(self, member: str, name: str, value: Any, **kwargs: Any) -> None:
        self.log(f"{member}/{name}", value, **kwargs)

    def _taught(self, index: int, outputs: list[Tensor], batch: Any) -> Tensor:
        target = default_target(batch) if self.loss.needs_target else None
        others = [output.detach() for place, output in enumerate(outputs) if place != index]
        return torch.stack([self.loss(outputs[index], other, target) for other in others]).mean()

    def _log_kd(self, outputs: list[Tensor], taught: list[Tensor]) -> None:
        if not self.trainer.barebones:
            names = [f"{name}/kd/{type(self.loss).__name__}" for name in self.members]
            values = dict(zip(names, taught, strict=True))
            self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(outputs[0]))

    def _schedulers(self) -> list[tuple[Any, str | None]]:
        """Return the members' own schedulers with what they watch; others, such as `LRDecay`'s, step themselves."""
        return list(
            zip(self.trainer.lr_scheduler_configs[: len(self._monitors)], self._monitors, strict=True)
        )

    def _update(self, total: Any) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(total)
        for optimizer in optimizers:
            optimizer.step()
        for config, _ in self._schedulers():
            if (
                config.interval == "step"
                and (self.trainer.fit_loop.total_batch_idx + 1) % config.frequency == 0
            ):
                step_scheduler: Any = config.scheduler
                step_scheduler.step()


def _step(member: pl.LightningModule, batch: Any, batch_idx: int) -> Any:
    takes_index = is_param_in_hook_signature(member.training_step, "batch_idx", min_args=2)
    return member.training_step(batch, batch_idx) if takes_index else member.training_step(batch)


def _require_members(members: Mapping[str, Any]) -> None:
    if len(members) < 2 or len({id(member) for member in members.values()}) < len(members):
        raise ValueError(
            f"`members` must be two different modules or more. Found {list(members)}. Make a module for each."
        )
    owner: dict[int, str] = {}
    for name, member in members.items():
        require_type(f"members[{name!r}]", member, pl.LightningModule)
        if not member.automatic_optimization:
            raise ValueError(
                "`MutualDistillation` steps its members' optimizers itself. Found `automatic_optimization = False` in "
                f"member `{name}`. Let its `training_step` return the loss."
            )
        for key, parameter in member.named_parameters():
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(
                    f"Members must have parameters of their own. Found `{key}` in `{owner[id(parameter)]}` and "
                    f"`{name}`. Make a module for each."
                )
