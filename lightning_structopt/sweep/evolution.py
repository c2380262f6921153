"""Regularized evolution, as a sampler of Optuna."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from typing_extensions import override

from lightning_structopt._checks import require_in, require_whole

_CHILD = "evolution:child"  # what a trial inherits, as Optuna's own numbers
_TRIES = 100  # mutations after which a child may be one that was tried before


@dataclass(frozen=True)
class RegularizedEvolution(BaseSampler):
    """Aging evolution: each candidate is the best of a few recent ones with one parameter changed.

    The parent is the best of ``tournament`` candidates drawn from the ``population`` that finished last; older ones
    die, however good they were. A choice changes to any other one, a number to a near one. A child that has been tried
    before changes once more. What a change makes necessary, by a conditional parameter, is drawn at random, and so are
    candidates until ``population`` of them have finished.

    Every draw follows from ``seed``, the trial's number and the trials that had finished, so a search that was
    interrupted goes on as it would have.

    Args:
        population: How many of the last finished candidates may be parents, at least 1.
        tournament: How many of these compete to be the parent, from 1 to ``population``. More is greedier, which pays
            as no child is tried twice: ``benchmarks/replay.py`` compares.
        spread: Standard deviation of a changed number, as a fraction of its range (of its logarithm's where that is how
            it is distributed), in (0, 1].
        seed: Of all draws, at least 0.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of range.

    Example:
        >>> RegularizedEvolution(population=10, tournament=3).seed
        0

    Reference:
        Real et al., "Regularized Evolution for Image Classifier Architecture Search", AAAI 2019.
    """

    population: int = 20
    tournament: int = 10
    spread: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("population", self.population, 1)
        require_whole("tournament", self.tournament, 1)
        require_whole("seed", self.seed, 0)
        require_in("spread", self.spread, 0, 1, closed="right")
        if self.tournament > self.population:
            raise ValueError(
                f"`tournament` must be at most `population`. Found {self.tournament} of {self.population}."
            )

    @override
    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Choose the parent, and what changes in it.

        Raises:
            ValueError: If the study has several objectives.
        """
        if len(study.directions) > 1:
            raise ValueError(
                f"`RegularizedEvolution` needs a study of one objective. Found {len(study.directions)} directions."
            )
        trials = study.get_trials(deepcopy=False)
        finished = [one for one in trials if one.state == TrialState.COMPLETE and one.params]
        if len(finished) < self.population:
            return
        rng = random.Random(f"{self.seed}-{trial.number}")
        rivals = sorted(rng.sample(finished[-self.population :], self.tournament), key=_number)
        best = max if study.direction == StudyDirection.MAXIMIZE else min
        parent = best(rivals, key=_value)
        child = self._child(parent, {_internal(one) for one in trials}, rng)
        study._storage.set_trial_system_attr(trial._trial_id, _CHILD, child)

    @override
    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    @override
    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    @override
    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        child: Mapping[str, float] = trial.system_attrs.get(_CHILD, {})
        if param_name in child and param_distribution._contains(child[param_name]):
            return param_distribution.to_external_repr(child[param_name])
        seed = random.Random(f"{self.seed}-{trial.number}-{param_name}").getrandbits(32)
        return RandomSampler(seed).sample_independent(study, trial, param_name, param_distribution)

    def _child(
        self, parent: FrozenTrial, tried: set[frozenset[tuple[str, float]]], rng: random.Random
    ) -> dict[str, float]:
        child = dict(_internal(parent))
        free = [name for name, domain in parent.distributions.items() if not domain.single()]
        for _ in range(_TRIES if free else 0):
            name = rng.choice(free)
            child[name] = self._changed(child[name], parent.distributions[name], rng)
            if frozenset(child.items()) not in tried:
                break
        return child

    def _changed(self, value: float, domain: BaseDistribution, rng: random.Random) -> float:
        """Return another value of ``domain``; both are its internal numbers."""
        if isinstance(domain, CategoricalDistribution):
            return float(rng.choice([index for index in range(len(domain.choices)) if index != value]))
        assert isinstance(domain, IntDistribution | FloatDistribution)
        for _ in range(_TRIES):
            changed = _near(value, domain, self.spread, rng)
            if changed != value:
                return changed
        return value


def _near(
    value: float, domain: IntDistribution | FloatDistribution, spread: float, rng: random.Random
) -> float:
    """Return a value nearby, from a normal distribution that is reflected at the ends of the range."""
    to, back = (math.log, math.exp) if domain.log else (float, float)
    low, high = to(domain.low), to(domain.high)
    step = 0.0 if domain.step is None else (to(value + domain.step) - to(value)) / (high - low)
    place = (to(value) - low) / (high - low) + rng.gauss(0, max(spread, step))
    place = 1 - abs(1 - place % 2)
    moved = back(low + place * (high - low))
    if domain.step is not None:
        moved = domain.low + round((moved - domain.low) / domain.step) * domain.step
    return min(max(moved, domain.low), domain.high)


def _internal(trial: FrozenTrial) -> frozenset[tuple[str, float]]:
    return frozenset(
        (name, trial.distributions[name].to_internal_repr(value)) for name, value in trial.params.items()
    )


def _number(trial: FrozenTrial) -> int:
    return trial.number


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value
