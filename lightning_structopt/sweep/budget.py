"""Who trains next, and for how long: pure functions from what is known so far."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from typing_extensions import override

from lightning_structopt._checks import require_in, require_whole


@dataclass(frozen=True)
class Standing:
    """What is known of one candidate.

    Args:
        scores: By the epochs it had trained, what it reached; more is better.
        failed: Whether it can't go on.
        ended: Whether it stopped by itself (early stopping): it keeps its last score at every later rung.
        target: The epochs that it has been sent to, where it is in training.
        parent: Whose child it is, by index; None if it was there from the start.
        born: The epochs that its parent had trained when it was born.
    """

    scores: Mapping[int, float] = field(default_factory=dict)
    failed: bool = False
    ended: bool = False
    target: int = 0
    parent: int | None = None
    born: int = 0

    def at(self, epochs: int) -> float | None:
        """Return the score after ``epochs``, None if there is none."""
        if epochs in self.scores:
            return self.scores[epochs]
        if self.ended and self.scores and epochs > max(self.scores):
            return self.scores[max(self.scores)]
        return None


@dataclass(frozen=True)
class Decision:
    """What may be done now.

    Args:
        start: Candidates, by index, and the epochs that each may train up to, most urgent first.
        stopped: Candidates that are out of the race: nothing that others reach will bring them back.
        survivors: Of each round that is over and not the last, its epochs and those who go on: parents, if there are
            to be children.
    """

    start: tuple[tuple[int, int], ...] = ()
    stopped: frozenset[int] = frozenset()
    survivors: tuple[tuple[int, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Round:
    """One round: all that are in it train up to ``epochs``, and ``keep`` go on."""

    epochs: int
    keep: int


class Budget(ABC):
    """How training is shared among candidates.

    A budget decides by the standings alone, so a sweep that was killed goes on as if it had not been.
    """

    @property
    @abstractmethod
    def total_epochs(self) -> int:
        """The epochs of a candidate that goes all the way, which its schedules are sized by."""

    @abstractmethod
    def decide(
        self, standings: Sequence[Standing], patience: int | None = None, children: int = 0
    ) -> Decision:
        """Return who may start and who is out.

        Args:
            standings: One for each candidate; those of children, as far as they are born, come last.
            patience: Rounds without a better best after which the sweep ends; None for no such end.
            children: How many each survivor of a round gives; not given where there is no ``mutate``.
        """


def play(
    rounds: Sequence[Round],
    members: Sequence[int],
    standings: Sequence[Standing],
    patience: int | None,
    skip: bool,
) -> Decision:
    """Play ``rounds`` among ``members``: each waits until the one before is over.

    The children of those who go on join them.

    Args:
        rounds: At least one.
        members: Indices into ``standings``.
        standings: What is known.
        patience: See :meth:`Budget.decide`.
        skip: Whether one that is left alone goes straight to the last round.
    """
    alive, stopped = list(members), set[int]()
    survivors: list[tuple[int, tuple[int, ...]]] = []
    best, waited = float("-inf"), 0
    for round_ in rounds:
        if skip and len(alive) == 1 and patience is None:
            round_ = rounds[-1]
        waiting = [i for i in alive if not standings[i].failed and standings[i].at(round_.epochs) is None]
        done = _ranked(alive, standings, round_.epochs)
        stopped |= set(done[round_.keep :])  # who comes later can only push them further down
        if waiting:
            start = tuple((i, round_.epochs) for i in waiting)
            return Decision(start, frozenset(stopped), tuple(survivors))
        top = standings[done[0]].at(round_.epochs) if done else None
        waited = 0 if top is not None and top > best else waited + 1
        best = best if top is None else max(best, top)
        if patience is not None and waited >= patience:
            break
        alive = done[: round_.keep]
        if round_.epochs < rounds[-1].epochs:
            survivors.append((round_.epochs, tuple(alive)))
            alive += _children(alive, standings, round_.epochs)
    return Decision((), frozenset(stopped), tuple(survivors))


def _children(parents: Sequence[int], standings: Sequence[Standing], epochs: int) -> list[int]:
    return [i for i, one in enumerate(standings) if one.parent in parents and one.born == epochs]


def founders(standings: Sequence[Standing]) -> int:
    """Return how many candidates were there from the start."""
    return sum(standing.parent is None for standing in standings)


def _ranked(members: Sequence[int], standings: Sequence[Standing], epochs: int) -> list[int]:
    """Return those with a score after ``epochs``, best first, ties by index."""
    scores = {i: standings[i].at(epochs) for i in members}
    return sorted((i for i in members if scores[i] is not None), key=lambda i: (-(scores[i] or 0.0), i))


@dataclass(frozen=True)
class Rungs(Budget):
    r"""Compares candidates after :math:`\min(r \eta^i, R)` epochs.

    Args:
        min_epochs: Epochs :math:`r` of the first rung, at least 1.
        max_epochs: Epochs :math:`R` of the last one, more than ``min_epochs``.
        factor: :math:`\eta`, at least 2.

    Raises:
        TypeError: If an argument is not a whole number.
        ValueError: If one is too small.
    """

    min_epochs: int = 1
    max_epochs: int = 9
    factor: int = 3

    def __post_init__(self) -> None:
        require_whole("min_epochs", self.min_epochs, 1)
        require_whole("max_epochs", self.max_epochs, 1)
        require_whole("factor", self.factor, 2)
        if self.min_epochs >= self.max_epochs:
            raise ValueError(
                f"`min_epochs` must be less than `max_epochs`. Found {self.min_epochs} and {self.max_epochs}, which "
                f"make no second rung. Use `FixedRounds(rounds=1, epochs={self.max_epochs})` to train every candidate "
                "in full."
            )

    @property
    @override
    def total_epochs(self) -> int:
        return self.max_epochs

    @property
    def rungs(self) -> tuple[int, ...]:
        """The epochs after which candidates are compared."""
        rungs = [self.min_epochs]
        while rungs[-1] * self.factor < self.max_epochs:
            rungs.append(rungs[-1] * self.factor)
        return (*rungs, self.max_epochs)


@dataclass(frozen=True)
class SuccessiveHalving(Rungs):
    r"""Trains all for a short while, one in ``factor`` for ``factor`` times as long, and so on.

    Rungs are at :math:`\min(r \eta^i, R)` epochs, and :math:`\max(1, \lfloor n / \eta^i \rfloor)` of :math:`n`
    candidates reach the i-th. With ``mutate`` as many go on, and their children with them.

    Args:
        min_epochs: Epochs :math:`r` of the first rung, at least 1.
        max_epochs: Epochs :math:`R` of the last one, more than ``min_epochs``.
        factor: :math:`\eta`, at least 2.

    Raises:
        TypeError: If an argument is not a whole number.
        ValueError: If one is too small.

    Example:
        >>> SuccessiveHalving(min_epochs=1, max_epochs=9, factor=3).rungs
        (1, 3, 9)

    Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2016
    (https://arxiv.org/abs/1502.07943).
    """

    @override
    def decide(
        self, standings: Sequence[Standing], patience: int | None = None, children: int = 0
    ) -> Decision:
        size = founders(standings)
        rounds = halving_rounds(self.rungs, size, self.factor, children)
        return play(rounds, range(size), standings, patience, skip=not children)


@dataclass(frozen=True)
class FixedRounds(Budget):
    """Trains all for ``epochs``, keeps some, and again.

    Args:
        rounds: How many rounds, at least 1. One round trains every candidate in full.
        epochs: Epochs of each round, at least 1.
        keep: How many go on after each round: a whole number, or a fraction in (0, 1] of those in the round (children
            of ``mutate`` among them), rounded down and at least one.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of range.

    Example:
        >>> FixedRounds(rounds=3, epochs=2, keep=0.5).total_epochs
        6
    """

    rounds: int = 3
    epochs: int = 1
    keep: int | float = 0.5

    def __post_init__(self) -> None:
        require_whole("rounds", self.rounds, 1)
        require_whole("epochs", self.epochs, 1)
        if isinstance(self.keep, int):
            require_whole("keep", self.keep, 1)
        else:
            require_in("keep", self.keep, 0, 1, closed="right")

    @property
    @override
    def total_epochs(self) -> int:
        return self.rounds * self.epochs

    @override
    def decide(
        self, standings: Sequence[Standing], patience: int | None = None, children: int = 0
    ) -> Decision:
        size, rounds = founders(standings), list[Round]()
        for number in range(1, self.rounds + 1):
            kept = self.keep if isinstance(self.keep, int) else max(1, int(size * self.keep + 1e-9))
            kept = size if number == self.rounds else min(size, kept)  # all finalists stay
            rounds.append(Round(number * self.epochs, kept))
            size = kept * (1 + children)
        return play(rounds, range(founders(standings)), standings, patience, skip=False)


def halving_rounds(rungs: Sequence[int], size: int, factor: int, children: int = 0) -> list[Round]:
    """Return the rounds of successive halving among ``size`` candidates, each survivor of which gives ``children``."""
    rounds = []
    for epochs in rungs[:-1]:
        size = max(1, size // factor)
        rounds.append(Round(epochs, size))
    finalists = size * (1 + children) if rounds else size
    return [*rounds, Round(rungs[-1], finalists)]
