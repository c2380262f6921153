"""Which Python attributes held the sizes that a graph has as literals."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

from torch import nn

from lightning_structopt.shrinking.literals import Literal

_TRIALS = 24
Edits = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """An attribute that may have to change.

    Args:
        path: The submodule.
        name: The attribute.
        values: What it may be afterwards, the likeliest first. It may equal a size by chance (eight heads and
            windows of eight), so that its old value is the last.
        doubtful: Whether the submodule has an operator in which the same number stays.
    """

    path: str
    name: str
    values: tuple[Any, ...]
    doubtful: bool


def candidate_edits(module: nn.Module, literals: Sequence[Literal]) -> list[Candidate]:
    """Return the attributes that equal a literal which an operator of their submodule has, and which changes.

    Args:
        module: The module.
        literals: All literals that stand for sizes.
    """
    found: dict[tuple[str, str], list[Any]] = {}
    stay = {
        (literal.place, number) for literal in literals for number, new in _pairs(literal) if number == new
    }
    for literal in literals:
        part = module.get_submodule(literal.place)
        for name, old, new in _matches(part, literal) if literal.changed else ():
            values = found.setdefault((literal.place, name), [])
            if new not in values:
                values.insert(-1 if old in values else len(values), new)
            if old not in values and name != literal.argument:
                values.append(old)
    return [
        Candidate(path, name, tuple(values), (path, values[-1]) in stay if _is_number(values[-1]) else False)
        for (path, name), values in found.items()
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int)


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
    module: nn.Module, candidates: Sequence[Candidate], works: Callable[[Edits], bool | list[str]]
) -> Edits | None:
    """Find values of attributes with which the module works; None if there are none.

    Submodules of one class are alike in which of their attributes hold sizes, so that the choice is made by
    class and attribute; apart for those that are doubtful.

    Args:
        module: The module.
        candidates: Its attributes and what they may be.
        works: Tries some edits, and returns whether they do, or the names of the submodules that failed, the
            innermost first.
    """
    kinds = [(type(module.get_submodule(each.path)), each.doubtful, each.name) for each in candidates]
    sizes: dict[_Kind, int] = {}
    for each, kind in zip(candidates, kinds, strict=True):
        sizes[kind] = max(sizes.get(kind, 1), len(each.values))
    choice = dict.fromkeys(sizes, 0)
    having = {each.path for each in candidates}
    for _ in range(_TRIALS):
        edits: Edits = {}
        for each, kind in zip(candidates, kinds, strict=True):
            edits.setdefault(each.path, {})[each.name] = each.values[min(choice[kind], len(each.values) - 1)]
        outcome = works(edits)
        if outcome is True:
            return edits
        failed = [type(module.get_submodule(path)) for path in outcome or () if path in having]
        if not failed or not _advance(choice, sizes, failed[0]):
            return None
    return None


_Kind: TypeAlias = "tuple[type, bool, str]"


def _advance(choice: dict[_Kind, int], sizes: dict[_Kind, int], failed: type) -> bool:
    """Go on to the next choice for one class, the doubtful ones first; False after the last."""
    keys = sorted((key for key in sizes if key[0] is failed), key=lambda key: key[1])
    options = list(product(*(range(sizes[key]) for key in keys)))
    at = options.index(tuple(choice[key] for key in keys)) + 1
    if at >= len(options):
        return False
    choice.update(zip(keys, options[at], strict=True))
    return True
