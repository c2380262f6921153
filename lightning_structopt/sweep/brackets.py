"""Budgets of many rungs at once: Hyperband's brackets and asynchronous promotion."""

from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from lightning_structopt.sweep.budget import Decision, Rungs, Standing, halving_rounds, play


@dataclass(frozen=True)
class Hyperband(Rungs):
    r"""Successive halving in several brackets, of which each begins one rung later than the one before.

    Where short training misleads, the brackets that begin late are right; where it doesn't, the early ones are fast.
    Candidates are dealt to the brackets in turn, by the shares :math:`\lceil (s_{\max} + 1) \eta^s / (s + 1) \rceil`.

    Args:
        min_epochs: Epochs of the first rung of the first bracket, at least 1.
        max_epochs: Epochs of the last rung of each, more than ``min_epochs``.
        factor: :math:`\eta`, at least 2.

    Raises:
        TypeError: If an argument is not a whole number.
        ValueError: If one is too small.

    Example:
        >>> Hyperband(min_epochs=1, max_epochs=4, factor=2).brackets(7)
        [((1, 2, 4), (0, 3, 6)), ((2, 4), (1, 4)), ((4,), (2, 5))]

    Li et al., "Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization", JMLR 2018
    (https://arxiv.org/abs/1603.06560).
    """

    def brackets(self, size: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return the rungs of each bracket, and who of ``size`` candidates is in it."""
        rungs = self.rungs
        count = len(rungs)
        shares = [-(-count * self.factor ** (count - 1 - late) // (count - late)) for late in range(count)]
        members: list[list[int]] = [[] for _ in rungs]
        for index in range(size):
            # To the one that is furthest below its share.
            owed = [
                share * (index + 1) / sum(shares) - len(own)
                for share, own in zip(shares, members, strict=True)
            ]
            members[owed.index(max(owed))].append(index)
        return [(rungs[late:], tuple(own)) for late, own in enumerate(members) if own]

    @override
    def decide(
        self, standings: Sequence[Standing], patience: int | None = None, children: int = 0
    ) -> Decision:
        decisions = [
            play(halving_rounds(rungs, len(own), self.factor), own, standings, patience, skip=True)
            for rungs, own in self.brackets(len(standings))
        ]
        start = tuple(pair for decision in decisions for pair in decision.start)
        return Decision(start, frozenset().union(*(decision.stopped for decision in decisions)))


@dataclass(frozen=True)
class AsynchronousHalving(Rungs):
    """Successive halving in which nobody waits: who is in the best part of a rung so far goes on at once.

    A worker that is free takes the best that may go on, and if there is none a new candidate. Candidates pause at a
    rung, and resume when enough others have come to it. With several workers the order in which they finish counts,
    so that two sweeps may differ.

    Args:
        min_epochs: Epochs of the first rung, at least 1.
        max_epochs: Epochs of the last rung, more than ``min_epochs``.
        factor: One in ``factor`` goes on, at least 2.

    Raises:
        TypeError: If an argument is not a whole number.
        ValueError: If one is too small.

    Example:
        >>> first = [Standing({1: 0.3}), Standing({1: 0.5}), Standing({1: 0.4}), Standing()]
        >>> AsynchronousHalving(min_epochs=1, max_epochs=9, factor=3).decide(first).start
        ((1, 3), (3, 1))

    Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020
    (https://arxiv.org/abs/1810.05934).
    """

    @override
    def decide(
        self, standings: Sequence[Standing], patience: int | None = None, children: int = 0
    ) -> Decision:
        rungs = self.rungs
        entered, closed = list(range(len(standings))), True
        start = [
            (i, rungs[0]) for i in entered if standings[i].at(rungs[0]) is None and not standings[i].failed
        ]
        stopped: set[int] = set()
        for here, above in zip(rungs, rungs[1:], strict=False):
            done = [i for i in entered if standings[i].at(here) is not None]
            done.sort(key=lambda i: (-(standings[i].at(here) or 0.0), i))
            # Closed: nobody will come to this rung any more, so the best of it goes on in any case.
            closed = closed and all(i in done or standings[i].failed for i in entered)
            top = done[: len(done) // self.factor or int(closed)]
            risen = {i for i in done if standings[i].at(above) is not None or standings[i].target >= above}
            start = [(i, above) for i in top if i not in risen and not standings[i].failed] + start
            entered = [i for i in done if i in risen or i in top]
            stopped |= set(done) - set(entered) if closed else set()
        return Decision(tuple(start), frozenset(stopped))
