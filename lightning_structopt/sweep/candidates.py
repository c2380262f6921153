"""What a sweep chooses among: named callables that build LightningModules, and how to tell that one has changed."""

import functools
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_structopt._checks import require_mapping, require_whole

Build = Callable[..., Any]
_DEEPEST = 20  # levels of objects within objects; some hold themselves
# What the budget and the directory decide.
_OWNED = (
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "max_time",
    "default_root_dir",
    "fast_dev_run",
)


@dataclass(frozen=True)
class Candidate:
    """A callable that builds a LightningModule, with what it brings along.

    Args:
        build: Takes no arguments and returns a new LightningModule each time.
        data: A LightningDataModule, or a pair of training and validation loaders, instead of those given to ``run``;
            or a function from those to this candidate's own, such as ``Fold`` and ``Bootstrap``.
        trainer: Arguments of the Trainer, over those of the sweep: callbacks, precision, gradient clipping.
        seed: Seeds it instead of the sweep's; further ``repeats`` count up from it.

    Raises:
        TypeError: If ``build`` can't be called, or ``seed`` is not a whole number.
        ValueError: If ``trainer`` has an argument that the budget decides, or ``seed`` is negative.

    Example:
        >>> Candidate(dict).trainer
        {}
    """

    build: Build
    data: Any = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.build):
            raise TypeError(
                f"A candidate must be a callable that returns a LightningModule. Found {self.build!r}. "
                "Give a function, a class or a `functools.partial`, not a module that is built."
            )
        require_free_arguments(self.trainer)
        if self.seed is not None:
            require_whole("seed", self.seed, 0)


def as_candidates(candidates: Mapping[str, Any] | Sequence[Any]) -> dict[str, Candidate]:
    """Return the candidates by name; those of a list are called by their functions.

    Raises:
        TypeError: If ``candidates`` is neither a dict nor a list, or one isn't callable.
        ValueError: If there are none, or two have one name.
    """
    if isinstance(candidates, Mapping):
        named = list(candidates.items())
    elif isinstance(candidates, Sequence) and not isinstance(candidates, str):
        named = [(_name(candidate), candidate) for candidate in candidates]
    else:
        raise TypeError(
            f"`candidates` must be a dict of callables by name, or a list of callables. Found {candidates!r}."
        )
    if not named:
        raise ValueError("`candidates` must have at least one candidate. Found none.")
    names = [name for name, _ in named]
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"Names of `candidates` must be strings. Found {names!r}.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Candidates need names of their own. Found {twice[0]!r} twice. Give a dict.")
    return {name: c if isinstance(c, Candidate) else Candidate(c) for name, c in named}


def require_free_arguments(trainer: Mapping[str, Any]) -> None:
    """Raise if ``trainer`` has an argument that isn't the user's to give.

    Raises:
        ValueError: If it has.
    """
    require_mapping("trainer", trainer)
    if taken := [name for name in _OWNED if name in trainer]:
        raise ValueError(
            f"`trainer` must leave {taken[0]!r} to the sweep. Found `{taken[0]}={trainer[taken[0]]!r}`. "
            "Say by `budget` how long candidates train and by `directory` where they write."
        )


def fingerprint(candidate: Candidate) -> str:
    """Return a short text that differs where ``candidate`` does: its code, its defaults, what it closes over.

    Of functions that it calls only the names count, of data only a function that chooses a part of them.
    """
    found = hashlib.sha256()
    for part in _parts(candidate.build):
        found.update(part)
    if candidate.trainer:
        found.update(repr(sorted(candidate.trainer)).encode())
    if callable(candidate.data):
        for part in _parts(candidate.data):
            found.update(part)
    if candidate.seed is not None:
        found.update(f"seed {candidate.seed}".encode())
    return found.hexdigest()[:16]


def _name(candidate: Any) -> str:
    build = candidate.build if isinstance(candidate, Candidate) else candidate
    while isinstance(build, functools.partial):
        build = build.func
    return str(getattr(build, "__name__", type(build).__name__))


def _parts(value: Any, depth: int = 0) -> list[bytes]:
    """Return what tells ``value`` from others, alike in every process: pickles of one object differ between them."""
    if depth > _DEEPEST:
        return []
    if isinstance(value, functools.partial):
        held: list[Any] = [value.func, value.args, value.keywords]
    elif isinstance(value, types.MethodType):
        held = [value.__func__, value.__self__]
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = [value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    elif isinstance(value, types.CodeType):
        return _code(value)
    elif isinstance(value, type):
        held = [value.__qualname__, [m for m in vars(value).values() if isinstance(m, types.FunctionType)]]
    elif isinstance(value, Tensor):
        held = [str(value.dtype), tuple(value.shape), value.detach().cpu().double().flatten().tolist()]
    elif isinstance(value, dict):
        held = [item for pair in value.items() for item in pair]
    elif isinstance(value, (set, frozenset)):
        held = sorted(map(repr, value))
    elif isinstance(value, (list, tuple)):
        held = list(value)
    elif isinstance(value, (str, bytes, int, float, complex, type(None))):
        return [repr(value).encode()]
    else:
        held = [type(value), getattr(value, "__dict__", {})]
    return [type(value).__name__.encode(), *(part for item in held for part in _parts(item, depth + 1))]


def _code(code: types.CodeType) -> list[bytes]:
    inner = [part for c in code.co_consts if isinstance(c, types.CodeType) for part in _code(c)]
    plain = [repr(c) for c in code.co_consts if not isinstance(c, (types.CodeType, frozenset))]
    # A function's first constant is its docstring, which changes nothing.
    return [code.co_code, repr((plain, code.co_names)).encode(), *inner]
