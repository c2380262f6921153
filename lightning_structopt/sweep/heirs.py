"""Children of survivors: who they are, and the changes that make them."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import Optimizer

from lightning_structopt._checks import require_list


class Change(Protocol):
    """What a mutation does to one module, as data."""

    def apply_in_place(self, module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """Change ``module``, which has any weights, and what ``optimizers`` remember of it."""

    def save(self, path: str | Path) -> None:
        """Write it to a file."""


@runtime_checkable
class Mutation(Protocol):
    """A change of architecture that keeps the function, such as ``Widen`` and ``Deepen``.

    The growth package stands above this one, which knows it by these two methods alone.
    """

    def plan(self, module: nn.Module, example_input: Any) -> Change:
        """Return what is to be done to ``module``, which stays as it is."""

    def saved_plan(self, path: str | Path) -> Change:
        """Return what was written to a file."""


@dataclass(frozen=True)
class Heir:
    """A child.

    Args:
        name: Its name among the candidates.
        parent: Its parent's name.
        born: The epochs that its parent had trained when it was born.
        mutation: The place of its change in ``mutate``.
    """

    name: str
    parent: str
    born: int
    mutation: int


Heirs = Mapping[str, Heir]


def child_of(parent: str, born: int, mutations: Sequence[Mutation], index: int) -> Heir:
    """Return the child that ``mutations[index]`` makes of ``parent``."""
    return Heir(f"{parent} + {label(mutations[index])} @{born}", parent, born, index)


def lineage(name: str, heirs: Heirs) -> list[Heir]:
    """Return ``name`` and its ancestors that are children, the eldest first; nothing for one that was always there."""
    found: list[Heir] = []
    while name in heirs:
        found.insert(0, heirs[name])
        name = heirs[name].parent
    return found


def root(name: str, heirs: Heirs) -> str:
    """Return the candidate that ``name`` comes from."""
    line = lineage(name, heirs)
    return line[0].parent if line else name


def label(mutation: Mutation) -> str:
    """Return a mutation in short: without arguments that are as they are by default.

    Example:
        >>> from lightning_structopt.growth import Widen
        >>> label(Widen(1.5))
        'Widen(factor=1.5)'
    """
    if not is_dataclass(mutation):
        return repr(mutation)
    values = {f.name: getattr(mutation, f.name) for f in fields(mutation) if f.init and f.repr}
    defaults = {f.name: f.default for f in fields(mutation) if f.default is not MISSING}
    given = [f"{name}={value!r}" for name, value in values.items() if (name, value) not in defaults.items()]
    return f"{type(mutation).__name__}({', '.join(given)})"


def as_mutations(mutate: Sequence[Mutation]) -> tuple[Mutation, ...]:
    """Return ``mutate``, checked.

    Raises:
        TypeError: If it is no list, or one is no mutation.
        ValueError: If two are the same.
    """
    require_list("mutate", mutate)
    for mutation in mutate:
        if isinstance(mutation, type) or not isinstance(mutation, Mutation):
            raise TypeError(
                "`mutate` must be steps of growth, such as `Widen(1.5)` or `Deepen()`. Found "
                f"{getattr(mutation, '__name__', repr(mutation))}."
            )
    for index, mutation in enumerate(mutate):
        if any(mutation == other or label(mutation) == label(other) for other in mutate[:index]):
            raise ValueError(
                f"`mutate` must make children that differ. Found `{label(mutation)}` twice. Give them other seeds or "
                "factors."
            )
    return tuple(mutate)
