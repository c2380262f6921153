"""Which output of the student is compared with which of the teacher, by which loss, and how much it counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_structopt._checks import require_in, require_type
from lightning_structopt.distillation.losses.logits import DistillationLoss
from lightning_structopt.distillation.taps import LOGITS

Place: TypeAlias = str | tuple[str, str]
Weighted: TypeAlias = DistillationLoss | tuple[float, DistillationLoss]


@dataclass(frozen=True, eq=False)
class Pair:
    """One comparison.

    Args:
        student: Name of the student's module, or "logits" for its output.
        teacher: Name of the teacher's module, likewise.
        loss: What compares them.
        weight: Factor on the loss, in [0, inf).
        title: What to call it in logs.
    """

    student: str
    teacher: str
    loss: DistillationLoss
    weight: float
    title: str


def pairs_from(loss: DistillationLoss | Mapping[Place, Weighted]) -> tuple[Pair, ...]:
    """Return the comparisons that the argument ``loss`` stands for.

    Args:
        loss: One loss, on both outputs, or a mapping from places to losses. A place is the name of a module that
            both have, or a pair of names, the student's first; "logits" is a model's output. A loss may come with
            a weight before it.

    Raises:
        TypeError: If something is of the wrong kind.
        ValueError: If there is nothing to compare, a weight is out of range or one loss is in two places.

    Example:
        >>> from lightning_structopt.distillation.losses.features import Hint
        >>> from lightning_structopt.distillation.losses.logits import SoftTarget
        >>> for pair in pairs_from({"logits": SoftTarget(), ("layer2", "stage1.1"): (0.1, Hint())}):
        ...     print(pair.student, pair.teacher, pair.weight, pair.title)
        logits logits 1.0 SoftTarget
        layer2 stage1.1 0.1 Hint
    """
    if not isinstance(loss, Mapping):
        require_type("loss", loss, DistillationLoss)
        return (Pair(LOGITS, LOGITS, loss, 1.0, type(loss).__name__),)
    entries = [(*_places(place), *_weighted(value)) for place, value in loss.items()]
    if not entries or len({id(one) for *_, one in entries}) != len(entries):
        raise ValueError(
            f"`loss` must have a loss of its own for each place, one at least. Found `loss = {dict(loss)}`. Make an "
            "object for each."
        )
    titles = _titles([(type(one).__name__, student, teacher) for student, teacher, _, one in entries])
    return tuple(
        Pair(student, teacher, one, weight, title)
        for title, (student, teacher, weight, one) in zip(titles, entries, strict=True)
    )


def _places(place: Any) -> tuple[str, str]:
    names = (place, place) if isinstance(place, str) else place
    if not isinstance(names, tuple) or len(names) != 2 or not all(isinstance(n, str) and n for n in names):
        raise TypeError(
            "A key of `loss` must be a module's name or a pair of them, the student's and the teacher's. Found "
            f"`{place!r}`."
        )
    return names


def _weighted(value: Any) -> tuple[float, DistillationLoss]:
    weight, loss = value if isinstance(value, (tuple, list)) and len(value) == 2 else (1.0, value)
    require_type("loss", loss, DistillationLoss)
    require_in("weight of a loss", weight, 0, float("inf"), closed="left")
    return float(weight), loss


def _titles(pairs: list[tuple[str, str, str]]) -> list[str]:
    """Return for each as short a name as tells it apart: of the loss, with the student's place, with both."""

    def length(pair: tuple[str, str, str]) -> int:
        return next((n for n in (1, 2) if sum(other[:n] == pair[:n] for other in pairs) == 1), 3)

    return ["/".join(pair[: length(pair)]) for pair in pairs]
