"""Which Python attributes held the sizes that a graph has as literals."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from torch import nn

from lightning_structopt.shrinking.literals import Literal

_TRIALS = 24
Edits = dict[str, dict[str, Any]]


def candidate_edits(module: nn.Module, literals: Sequence[Literal]) -> dict[str, dict[str, list[Any]]]:
    """Return for each submodule the attributes that may have to change, and the values they may take.

    An attribute is a candidate where it equals a literal that an operator of that submodule has. It may be so by
    chance (eight heads and windows of eight), so that keeping it is the last of its values.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    for literal in literals:
        part = module.get_submodule(literal.place)
        for name, old, new in _matches(part, literal):
            values = found.setdefault(literal.place, {}).setdefault(name, [])
            if new not in values:
                values.insert(-1 if old in values else len(values), new)
            if old not in values and name != literal.argument:
                values.append(old)
    return found


def _matches(part: nn.Module, literal: Literal) -> Iterator[tuple[str, Any, Any]]:
    """Yield attributes that equal the literal, with their old and new values."""
    named = vars(part).get(literal.argument)
    if named is not None and _as_list(named) == _as_list(literal.old):
        yield literal.argument, named, _like(named, literal.new)
        return
    pairs = _pairs(literal)
    for name, value in vars(part).items():
        if isinstance(value, (list, tuple)) and value and list(value) == _as_list(literal.old):
            yield name, value, _like(value, literal.new)
        elif isinstance(value, int) and not isinstance(value, bool):
            for old, new in pairs:
                if value == old != new:
                    yield name, old, new


def _pairs(literal: Literal) -> list[tuple[Any, Any]]:
    return list(dict.fromkeys(zip(_as_list(literal.old), _as_list(literal.new), strict=True)))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _like(old: Any, new: Any) -> Any:
    return type(old)(_as_list(new)) if isinstance(old, (list, tuple)) else new


def choose_edits(
    module: nn.Module,
    candidates: dict[str, dict[str, list[Any]]],
    works: Callable[[Edits], bool | list[str]],
) -> Edits | None:
    """Find values of attributes with which the module works; None if there are none.

    Submodules of one class are alike in which of their attributes hold sizes, so that the choice is made by
    class and attribute.

    Args:
        module: The module.
        candidates: Its attributes and what they may be, the likeliest first.
        works: Tries some edits, and returns whether they do, or the names of the submodules that failed, the
            innermost first.
    """
    kinds: dict[tuple[type, str], int] = {}
    for path, attributes in candidates.items():
        for name, values in attributes.items():
            key = (type(module.get_submodule(path)), name)
            kinds[key] = max(kinds.get(key, 1), len(values))
    choice = dict.fromkeys(kinds, 0)
    for _ in range(_TRIALS):
        outcome = works(_edits(module, candidates, choice))
        if outcome is True:
            return _edits(module, candidates, choice)
        if not isinstance(outcome, list):
            return None
        failed = [type(module.get_submodule(path)) for path in outcome if path in candidates]
        if not failed or not _advance(choice, kinds, failed[0]):
            return None
    return None


def _edits(
    module: nn.Module, candidates: dict[str, dict[str, list[Any]]], choice: dict[tuple[type, str], int]
) -> Edits:
    edits: Edits = {}
    for path, attributes in candidates.items():
        kind = type(module.get_submodule(path))
        for name, values in attributes.items():
            edits.setdefault(path, {})[name] = values[min(choice[kind, name], len(values) - 1)]
    return edits


def _advance(choice: dict[tuple[type, str], int], kinds: dict[tuple[type, str], int], kind: type) -> bool:
    """Go on to the next choice for one class; False after the last."""
    keys = [key for key in kinds if key[0] is kind]
    options = list(product(*(range(kinds[key]) for key in keys)))
    at = options.index(tuple(choice[key] for key in keys)) + 1
    if at >= len(options):
        return False
    choice.update(zip(keys, options[at], strict=True))
    return True
