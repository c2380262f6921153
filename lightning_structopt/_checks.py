"""Checks of arguments and of the host, each raising one error: the rule, what was found, the remedy."""

import math
from typing import Any


def require_in(name: str, value: float, low: float, high: float, *, closed: str = "both") -> None:
    """Raise unless ``value`` lies between ``low`` and ``high``.

    Args:
        name: What the argument is called.
        value: What was given. NaN is never in range.
        low: Lower bound.
        high: Upper bound; ``math.inf`` for none.
        closed: Which ends belong to the range: ``"both"``, ``"left"``, ``"right"`` or ``"neither"``.

    Raises:
        TypeError: If ``value`` is not a real number.
        ValueError: If ``value`` is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number. Found `{name} = {value!r}`.")
    above = value >= low if closed in {"both", "left"} else value > low
    below = value <= high if closed in {"both", "right"} else value < high
    if not (above and below):
        left = "[" if closed in {"both", "left"} else "("
        right = "]" if closed in {"both", "right"} and not math.isinf(high) else ")"
        raise ValueError(f"`{name}` must be in {left}{low}, {high}{right}. Found `{name} = {value}`.")


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``.

    Args:
        name: What the argument is called.
        value: What was given.
        choices: What is allowed.

    Raises:
        ValueError: If ``value`` is something else.
    """
    if value not in choices:
        allowed = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be {allowed}. Found `{name} = {value!r}`.")


def require_whole(name: str, value: object, low: int) -> None:
    """Raise unless ``value`` is a whole number of at least ``low``.

    Args:
        name: What the argument is called.
        value: What was given.
        low: The smallest number allowed.

    Raises:
        TypeError: If ``value`` is not an ``int``.
        ValueError: If ``value`` is smaller than ``low``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a whole number. Found `{name} = {value!r}`.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}. Found `{name} = {value}`.")


def require_type(name: str, value: object, kind: type) -> None:
    """Raise unless ``value`` is an instance of ``kind``.

    Args:
        name: What the argument is called.
        value: What was given.
        kind: What it must be.

    Raises:
        TypeError: If ``value`` is something else, with a hint where a class was given for an object.
    """
    if not isinstance(value, kind):
        remedy = f" Did you mean `{value.__name__}()`?" if isinstance(value, type) else ""
        raise TypeError(f"`{name}` must be a `{kind.__name__}`. Found `{name} = {value!r}`.{remedy}")


def require_lightning(owner: str, trainer: Any, pl_module: Any) -> None:
    """Raise if ``trainer`` or ``pl_module`` comes from the ``pytorch_lightning`` package.

    ``lightning`` and ``pytorch_lightning`` are two copies of one code base: objects of the one look right to
    the other until an ``isinstance`` quietly says no.

    Args:
        owner: The callback or module that asks.
        trainer: The trainer that called it.
        pl_module: The module that is trained.

    Raises:
        TypeError: If either is of ``pytorch_lightning``.
    """
    for thing in (trainer, pl_module):
        if any(base.__module__.startswith("pytorch_lightning.") for base in type(thing).__mro__):
            raise TypeError(
                f"`{owner}` is built on the package `lightning`. Found a `{type(thing).__name__}` of the package "
                "`pytorch_lightning`. Import the trainer and the module from one package: "
                "`import lightning.pytorch as pl`."
            )
