"""RegularizedEvolution against what the paper says of parents, ages and changes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from lightning_structopt.sweep import RegularizedEvolution
from lightning_structopt.sweep.storage import quiet

GENES = {f"gene{i}": CategoricalDistribution(list("abcde")) for i in range(6)}
Objective = Callable[[Mapping[str, Any], int], float]


def evolved(
    sampler: optuna.samplers.BaseSampler,
    space: Mapping[str, BaseDistribution],
    objective: Objective,
    count: int,
    direction: str = "maximize",
) -> list[FrozenTrial]:
    with quiet():
        study = optuna.create_study(direction=direction, sampler=sampler)
        for number in range(count):
            trial = study.ask(dict(space))
            study.tell(trial, objective(trial.params, number))
    return study.get_trials()


def distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    return sum(one[name] != other[name] for name in one)


def matches(params: Mapping[str, Any], number: int) -> float:
    return sum(value == "abcdea"[index] for index, value in enumerate(params.values()))


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_best_of_a_full_tournament_is_the_parent(direction: str) -> None:
    trials = evolved(RegularizedEvolution(5, 5), GENES, matches, 40, direction)
    best = max if direction == "maximize" else min
    changes = []
    for number in range(5, 40):
        parent = best(trials[number - 5 : number], key=lambda trial: trial.value)
        assert trials[number].params not in [trial.params for trial in trials[:number]]
        changes.append(distance(parent.params, trials[number].params))
    assert changes.count(1) > 20  # more than one where the first child had been tried
    assert max(changes) <= 4


def test_the_old_die_however_good_they_were() -> None:
    """The first is the best of all, and the last of its population the only one that may be a parent."""
    trials = evolved(RegularizedEvolution(1, 1), GENES, lambda params, number: -number, 20)
    assert all(distance(trials[n].params, trials[n - 1].params) <= 2 for n in range(1, 20))
    assert distance(trials[-1].params, trials[0].params) > 2


def test_a_small_tournament_gives_others_a_chance() -> None:
    trials = evolved(RegularizedEvolution(10, 1), GENES, matches, 60)
    best = [max(trials[n - 10 : n], key=lambda trial: trial.value) for n in range(10, 60)]
    children_of_others = sum(
        distance(parent.params, child.params) > 2 for parent, child in zip(best, trials[10:], strict=True)
    )
    assert children_of_others > 10


def test_nothing_is_tried_twice_before_everything_was() -> None:
    space = {name: CategoricalDistribution([0, 1]) for name in "abc"}
    trials = evolved(RegularizedEvolution(1, 1), space, lambda params, number: sum(params.values()), 8)
    assert len({tuple(trial.params.values()) for trial in trials}) == 8
    assert len(evolved(RegularizedEvolution(1, 1), space, lambda params, number: 0.0, 12)) == 12


NUMBERS: dict[str, IntDistribution | FloatDistribution] = {
    "int": IntDistribution(3, 40),
    "two": IntDistribution(0, 1),
    "int step": IntDistribution(8, 64, step=8),
    "int log": IntDistribution(1, 4096, log=True),
    "float": FloatDistribution(-2.0, 3.0),
    "float step": FloatDistribution(0.0, 1.0, step=0.1),
    "float log": FloatDistribution(1e-5, 1.0, log=True),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_change_to_near_ones(name: str) -> None:
    domain = NUMBERS[name]
    trials = evolved(RegularizedEvolution(1, 1, spread=0.1), {"x": domain}, lambda params, number: 0.0, 200)
    to = math.log if domain.log else float
    span = to(domain.high) - to(domain.low)
    values = [trial.params["x"] for trial in trials]
    assert all(domain._contains(domain.to_internal_repr(value)) for value in values)
    assert all(isinstance(value, int) == isinstance(domain, IntDistribution) for value in values)
    moves = [abs(to(b) - to(a)) / span for a, b in zip(values, values[1:], strict=False)]
    if domain.step is None or (domain.high - domain.low) / domain.step > 100:  # so that none is tried twice
        assert 0.03 < sum(moves) / len(moves) < 0.15  # of a normal distribution: 0.08
    assert min(moves) > 0 or len(set(values)) < 200
    assert max(values) > min(values)


def test_conditional_parameters_are_inherited_and_drawn_where_they_are_new() -> None:
    sampler = RegularizedEvolution(2, 1, seed=4)
    with quiet():
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for _ in range(60):
            trial = study.ask()
            if trial.suggest_categorical("kind", ["plain", "leaky"]) == "leaky":
                trial.suggest_float("slope", 0.0, 0.3)
            trial.suggest_int("width", 2, 400)
            study.tell(trial, 0.0)
    trials = study.get_trials()
    inherited = [
        (old, new)
        for new in trials[2:]
        for old in trials[new.number - 2 : new.number]
        if old.params.get("slope") == new.params.get("slope") is not None
    ]
    assert len(inherited) > 5
    assert len({trial.params["slope"] for trial in trials if "slope" in trial.params}) > 5


def test_failed_candidates_are_no_parents() -> None:
    with quiet():
        study = optuna.create_study(direction="maximize", sampler=RegularizedEvolution(2, 2))
        for number in range(30):
            trial = study.ask(GENES)
            state = optuna.trial.TrialState.FAIL if number % 2 else optuna.trial.TrialState.COMPLETE
            study.tell(trial, None if number % 2 else 1.0, state=state)
    trials = study.get_trials()
    for number in range(4, 30):
        finished = [trial for trial in trials[:number] if trial.number % 2 == 0][-2:]
        assert min(distance(trial.params, trials[number].params) for trial in finished) <= 2


def test_it_finds_more_than_random_search() -> None:
    def best(sampler: optuna.samplers.BaseSampler) -> float:
        return max(trial.value for trial in evolved(sampler, GENES, matches, 80))

    ours = [best(RegularizedEvolution(seed=seed)) for seed in range(5)]
    random = [best(optuna.samplers.RandomSampler(seed)) for seed in range(5)]
    assert sum(ours) > sum(random) + 5
    assert ours == [best(RegularizedEvolution(seed=seed)) for seed in range(5)]
    assert ours != [best(RegularizedEvolution(population=80, seed=seed)) for seed in range(5)]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`tournament` must be at most `population`. Found 10 of 2"):
        RegularizedEvolution(population=2)
    with pytest.raises(ValueError, match="`population` must be at least 1"):
        RegularizedEvolution(population=0)
    with pytest.raises(ValueError, match=r"`spread` must be in \(0, 1\]. Found `spread = 0`"):
        RegularizedEvolution(spread=0)
    with pytest.raises(ValueError, match="`seed` must be at least 0"):
        RegularizedEvolution(seed=-1)
    with quiet():
        study = optuna.create_study(directions=["minimize", "maximize"], sampler=RegularizedEvolution())
    with pytest.raises(ValueError, match="needs a study of one objective. Found 2 directions"):
        study.ask()
