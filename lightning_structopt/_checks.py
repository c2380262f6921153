"""Checks of arguments and of the host, each raising one error: the rule, what was found, the remedy."""

import math
import os
from collections.abc import Mapping, Sequence, Set
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
    # Not of other types: a tensor compares element by element.
    if not isinstance(value, (str, int, float, type(None))) or value not in choices:
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
    if value >= 2**63:
        raise ValueError(f"`{name}` must be less than 2**63, to fit 64 bits. Found `{name} = {value}`.")


def require_type(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    """Raise unless ``value`` is an instance of ``kind``.

    Args:
        name: What the argument is called.
        value: What was given.
        kind: What it must be; of several, one.

    Raises:
        TypeError: If ``value`` is something else, with a hint where a class was given for an object.
    """
    if not isinstance(value, kind):
        remedy = f" Did you mean `{value.__name__}()`?" if isinstance(value, type) else ""
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(f"`{each.__name__}`" for each in kinds)
        raise TypeError(f"`{name}` must be a {wanted}. Found `{name} = {value!r}`.{remedy}")


def require_list(name: str, value: object) -> None:
    """Raise unless ``value`` is a list, a tuple or the like: of a known length and order.

    Args:
        name: What the argument is called.
        value: What was given. Text is no list of letters.

    Raises:
        TypeError: If ``value`` is something else.
    """
    listed = hasattr(value, "__iter__") and hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0
    if not listed or isinstance(value, (str, bytes, Mapping, Set, type)):
        raise TypeError(f"`{name}` must be a list. Found `{name} = {value!r}`.")


def require_mapping(name: str, value: object) -> None:
    """Raise unless ``value`` is a dict or the like.

    Args:
        name: What the argument is called.
        value: What was given.

    Raises:
        TypeError: If ``value`` is something else.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a dict. Found `{name} = {value!r}`.")


def require_callable(name: str, value: object) -> None:
    """Raise unless ``value`` can be called.

    Args:
        name: What the argument is called.
        value: What was given.

    Raises:
        TypeError: If ``value`` can't be.
    """
    if not callable(value):
        raise TypeError(f"`{name}` must be a function. Found `{name} = {value!r}`.")


def require_path(name: str, value: object) -> None:
    """Raise unless ``value`` is a path.

    Args:
        name: What the argument is called.
        value: What was given.

    Raises:
        TypeError: If ``value`` is something else.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"`{name}` must be a path. Found `{name} = {value!r}`.")


def as_names(name: str, value: str | Sequence[str] | None) -> list[str]:
    """Return ``value`` as a list of texts; one text is a list of one, None is an empty one.

    Args:
        name: What the argument is called.
        value: What was given.

    Raises:
        TypeError: If ``value`` is something else.
    """
    given = [] if value is None else [value] if isinstance(value, str) else value
    require_list(name, given)
    for each in given:
        require_type(name, each, str)
    return list(given)


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
