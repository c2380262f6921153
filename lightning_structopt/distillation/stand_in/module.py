"""A LightningModule in the place of another, with the same parameters under the same names."""

import inspect
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from typing_extensions import override

# The tree of parts: one and the same object in both, so that neither can have a part that the other lacks.
_TREE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_STATE = (set(vars(pl.LightningModule())) - set(vars(nn.Module()))) | {
    "training", "_hparams", "_hparams_name", "_hparams_initial"
}  # fmt: skip


class StandIn(pl.LightningModule):
    """Stands in for ``student`` before the trainer: has its parts and its state, and does what it does.

    The two share their parameters, buffers and modules, so names and state-dict keys are the student's. What
    Lightning keeps in a module (its trainer, hyperparameters, the hook that runs) is kept in the student, so
    ``self.log`` and ``self.trainer`` work there. Hooks that the student overrides are the student's own bound
    methods; those it doesn't are Lightning's, so Lightning sees what it would see of the student. Other attributes
    that the student has are the student's, read or written; all else belongs to the stand-in.

    Args:
        student: The module to stand in for.
    """

    def __init__(self, student: pl.LightningModule) -> None:
        nn.Module.__init__(self)  # not Lightning's: its state is the student's
        own = self.__dict__
        own.update({name: vars(student)[name] for name in _TREE})
        del own["training"]
        own.update({name: getattr(student, name) for name in _hooks_of(student, type(self))})
        own["_student"] = student

    @property
    def student(self) -> pl.LightningModule:
        """The module that this one stands in for."""
        student: pl.LightningModule = self.__dict__["_student"]
        return student

    @property
    def stands_in_for(self) -> pl.LightningModule:
        """The student, to those that don't know of students."""
        return self.student

    # mypy doesn't see `@override` on a property that can be set.
    @property  # type: ignore[explicit-override]
    def example_input_array(self) -> Any:
        """The student's, which may be a property of its class."""
        return self.student.example_input_array

    @example_input_array.setter
    def example_input_array(self, example: Any) -> None:
        self.student.example_input_array = example

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the student returns."""
        return self.student(*args, **kwargs)

    @override
    def __getattr__(self, name: str) -> Any:
        student = self.__dict__.get("_student")
        if student is None:  # before it is there, as while unpickling
            raise AttributeError(name)
        return getattr(student, name)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        student = self.__dict__.get("_student")
        if student is None:
            super().__setattr__(name, value)
        elif name in _STATE:
            student.__dict__[name] = value  # several times a step: the way around `nn.Module.__setattr__`
        elif name in self.__dict__ or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        elif hasattr(student, name):
            setattr(student, name, value)
        elif isinstance(value, nn.Module | nn.Parameter):
            raise TypeError(
                f"`{type(self).__name__}` has no parts but the student's, so that checkpoints fit the student. Found "
                f"`{name}`, a `{type(value).__name__}`. Put what trains into a `DistillationLoss`."
            )
        else:
            object.__setattr__(self, name, value)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # without Lightning's `_trainer = None`, which would hide the student's


def _hooks_of(student: pl.LightningModule, stand_in: type[StandIn]) -> list[str]:
    """Return the methods of LightningModule that ``student`` overrides and ``stand_in`` doesn't."""
    methods = inspect.getmembers(pl.LightningModule, inspect.isfunction)
    return [
        name
        for name, method in methods
        if not name.startswith("__")
        and getattr(stand_in, name) is method
        and (name in vars(student) or is_overridden(name, student))
    ]
