"""Budgets against straightforward simulations of what they are meant to do."""

import random
from collections.abc import Sequence

import pytest

from lightning_structopt.sweep import AsynchronousHalving, Budget, FixedRounds, Hyperband, SuccessiveHalving
from lightning_structopt.sweep.budget import Standing


def simulate(
    budget: Budget,
    curves: Sequence[Sequence[float]],
    workers: int = 1,
    failing: frozenset[int] = frozenset(),
    patience: int | None = None,
    seed: int = 0,
) -> tuple[list[Standing], set[int], int]:
    """Play a sweep: who runs ends in random order. Returns standings, who was stopped, and the epochs spent."""
    order = random.Random(seed)
    scores: list[dict[int, float]] = [{} for _ in curves]
    failed, stopped, active, spent = set(), set(), {}, 0
    while True:
        standings = [Standing(s, i in failed, target=active.get(i, 0)) for i, s in enumerate(scores)]
        decision = budget.decide(standings, patience)
        assert stopped <= decision.stopped, "who is out stays out"
        assert not decision.stopped & active.keys()
        stopped = set(decision.stopped)
        for index, epochs in decision.start:
            assert index not in stopped
            if index not in active and len(active) < workers:
                active[index] = epochs
        if not active:
            return standings, stopped, spent
        index = order.choice(sorted(active))
        epochs = active.pop(index)
        spent += epochs - max(scores[index], default=0)
        if index in failing:
            failed.add(index)
        else:
            scores[index][epochs] = curves[index][epochs - 1]


def curves(count: int, epochs: int, seed: int = 0) -> list[list[float]]:
    draw = random.Random(seed)
    return [[draw.random() for _ in range(epochs)] for _ in range(count)]


def halving_by_hand(
    members: list[int], values: list[list[float]], rungs: Sequence[int], factor: int
) -> dict[int, list[int]]:
    """Return the rungs that each candidate comes to, as the paper has it."""
    reached: dict[int, list[int]] = {i: [] for i in members}
    for rung in rungs:
        for i in members:
            reached[i].append(rung)
        ranking = sorted(members, key=lambda i: (-values[i][rung - 1], i))
        members = ranking[: max(1, len(members) // factor)]
        if len(members) == 1 and rung != rungs[-1]:
            reached[members[0]].append(rungs[-1])
            break
    return reached


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 27])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("workers", [1, 3])
def test_successive_halving_is_the_papers(count: int, factor: int, workers: int) -> None:
    budget, values = SuccessiveHalving(1, 9, factor), curves(count, 9)
    standings, stopped, _ = simulate(budget, values, workers)
    if count == 1:
        assert set(standings[0].scores) == {9}  # nobody to compare with
        return
    expected = halving_by_hand(list(range(count)), values, budget.rungs, factor)
    assert {i: sorted(s.scores) for i, s in enumerate(standings)} == expected
    finalists = {i for i, rungs in expected.items() if 9 in rungs}
    assert stopped == set(range(count)) - finalists


def test_the_order_of_finishing_does_not_matter() -> None:
    values = curves(9, 9)
    found = [simulate(SuccessiveHalving(1, 9, 3), values, 4, seed=seed)[0] for seed in range(5)]
    assert all(standings == found[0] for standings in found)


def test_rungs_end_at_max_epochs() -> None:
    assert SuccessiveHalving(2, 9, 2).rungs == (2, 4, 8, 9)


@pytest.mark.parametrize("keep", [2, 0.5, 1.0])
def test_fixed_rounds(keep: float) -> None:
    values = curves(4, 6)
    standings, stopped, spent = simulate(FixedRounds(3, 2, keep), values)
    sizes = {2: [4, 2, 2], 0.5: [4, 2, 1], 1.0: [4, 4, 4]}[keep]
    for number, size in enumerate(sizes, start=1):
        assert sum(2 * number in s.scores for s in standings) == size
    assert spent == 2 * sum(sizes)
    assert len(stopped) == 4 - sizes[-1]


def test_failed_candidates_leave_their_place_to_the_next() -> None:
    values = [[9.0] * 9, [8.0] * 9, [7.0] * 9, [6.0] * 9]
    standings, _, _ = simulate(FixedRounds(2, 1, keep=2), values, failing=frozenset({0}))
    assert [sorted(s.scores) for s in standings] == [[], [1, 2], [1, 2], [1]]


def test_one_that_fails_later_does_not_bring_others_back() -> None:
    def standings(last: Standing) -> list[Standing]:
        return [last, Standing({1: 0.5}), Standing({1: 0.4})]

    budget = FixedRounds(2, 1, keep=1)
    assert budget.decide(standings(Standing({1: 0.9}))).start == ((0, 2),)
    decision = budget.decide(standings(Standing({1: 0.9}, failed=True)))
    assert decision.start == ()
    assert decision.stopped == {1, 2}


def test_who_is_certain_to_lose_is_out_before_the_round_is_over() -> None:
    decision = FixedRounds(2, 1, keep=1).decide([Standing({1: 0.5}), Standing({1: 0.4}), Standing()])
    assert decision.stopped == {1}
    assert decision.start == ((2, 1),)


def test_ties_go_to_the_first() -> None:
    standings = [Standing({1: 0.5}) for _ in range(3)]
    assert SuccessiveHalving(1, 3, 3).decide(standings).start == ((0, 3),)


def test_who_stops_by_itself_keeps_its_score() -> None:
    early = Standing({2: 0.9}, ended=True)
    assert early.at(1) is None
    assert early.at(9) == 0.9
    decision = SuccessiveHalving(3, 9, 3).decide([early, Standing({3: 0.5}), Standing({3: 0.4})])
    assert decision.start == ()
    assert decision.stopped == {1, 2}


def test_patience_ends_the_sweep() -> None:
    values = [[0.5, 0.4, 0.4, 0.9], [0.1, 0.2, 0.3, 0.4]]
    standings, _, _ = simulate(FixedRounds(4, 1, keep=2), values, patience=2)
    assert sorted(standings[0].scores) == [1, 2, 3]
    standings, _, _ = simulate(FixedRounds(4, 1, keep=2), values, patience=3)
    assert sorted(standings[0].scores) == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 5, 17])
def test_hyperband_is_halving_in_each_bracket(count: int) -> None:
    budget, values = Hyperband(1, 9, 3), curves(count, 9)
    brackets = budget.brackets(count)
    assert sorted(i for _, members in brackets for i in members) == list(range(count))
    standings, _, _ = simulate(budget, values, workers=3)
    for rungs, members in brackets:
        if len(members) > 1:
            expected = halving_by_hand(list(members), values, rungs, 3)
            assert {i: sorted(standings[i].scores) for i in members} == expected


def test_hyperbands_shares_are_the_papers() -> None:
    sizes = [len(members) for _, members in Hyperband(1, 81, 3).brackets(143)]
    assert sizes == [81, 34, 15, 8, 5]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 9, 20])
def test_asynchronous_halving_brings_one_to_the_end_and_stops_the_rest(count: int, workers: int) -> None:
    standings, stopped, spent = simulate(AsynchronousHalving(1, 9, 3), curves(count, 9), workers)
    finalists = [i for i, s in enumerate(standings) if 9 in s.scores]
    assert finalists
    assert stopped == set(range(count)) - set(finalists)
    assert spent <= 9 * count
    if count >= 9:
        assert spent <= 4 * count + 9


def test_asynchronous_halving_survives_failures() -> None:
    for failing in ({0}, {0, 1, 2}, set(range(8))):
        standings, _, _ = simulate(AsynchronousHalving(1, 9, 3), curves(9, 9), 3, frozenset(failing))
        assert any(9 in s.scores for s in standings)


@pytest.mark.parametrize("kind", [SuccessiveHalving, Hyperband, AsynchronousHalving])
def test_budgets_that_make_no_round(kind: type) -> None:
    with pytest.raises(ValueError, match="`min_epochs` must be less than `max_epochs`. Found 3 and 3"):
        kind(3, 3, 2)
    with pytest.raises(ValueError, match="`factor` must be at least 2"):
        kind(1, 3, 1)
    with pytest.raises(ValueError, match="`min_epochs` must be at least 1"):
        kind(0, 3, 2)
    with pytest.raises(TypeError, match="`max_epochs` must be a whole number"):
        kind(1, 3.5, 2)


@pytest.mark.parametrize(
    "arguments", [{"keep": 0}, {"keep": 0.0}, {"keep": 1.5}, {"rounds": 0}, {"epochs": 0}]
)
def test_fixed_rounds_out_of_range(arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
        FixedRounds(**arguments)
