"""Optuna's storage as the one owner of the state of trials."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lightning_structopt.sweep.space import SearchSpace

_STATES = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class RungRecord:
    """What came of one rung.

    Args:
        epochs: Epochs trained by then.
        score: The metric.
        seconds: What this rung took.
        checkpoint: Where training goes on from, in the sweep's directory.
        ended: Whether training stopped by itself before the rung.
    """

    epochs: int
    score: float
    seconds: float
    checkpoint: str
    ended: bool = False


@dataclass(frozen=True)
class Record:
    """One candidate with one seed.

    Args:
        number: Its trial's number in the study.
        candidate: The candidate's name.
        seed: Its seed.
        state: ``"running"``, ``"finished"``, ``"stopped"``, ``"failed"`` or ``"refused"``.
        rungs: What it has been through.
        curve: The metric by epoch.
        costs: What was measured before training.
        parameters: What the search space drew for it.
        reason: Why it failed or was refused.
    """

    number: int
    candidate: str
    seed: int
    state: str = "running"
    rungs: tuple[RungRecord, ...] = ()
    curve: Mapping[int, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None


class Ledger:
    """The study of a sweep: every change is in the storage before anything follows from it.

    Args:
        storage: ``"journal:PATH"`` or the URL of a database.
        name: The study's name in it.
        mode: ``"min"`` or ``"max"``.
        sampler: Where parameters come from; None if there are none to draw.
    """

    def __init__(
        self, storage: str, name: str, mode: str, sampler: optuna.samplers.BaseSampler | None = None
    ) -> None:
        with quiet():
            self._study = optuna.create_study(
                storage=open_storage(storage),
                study_name=name,
                direction="maximize" if mode == "max" else "minimize",
                sampler=sampler,
                load_if_exists=True,
            )
        self._trials: dict[int, optuna.Trial] = {}

    @property
    def description(self) -> dict[str, Any]:
        """What the sweep is, as :meth:`describe` wrote it; empty for a new one."""
        found: dict[str, Any] = self._study.user_attrs.get("sweep", {})
        return found

    def describe(self, description: Mapping[str, Any]) -> None:
        """Write down what the sweep is."""
        self._study.set_user_attr("sweep", dict(description))

    def records(self) -> list[Record]:
        """Return all trials, in the order they were begun."""
        trials = self._study.get_trials(deepcopy=False)
        return [_record(trial) for trial in trials if "candidate" in trial.user_attrs]

    def begin(self, candidate: str, seed: int, space: SearchSpace | None) -> Record:
        """Write down that a candidate starts, and draw its parameters if there is a ``space``."""
        trial = self._study.ask()
        self._trials[trial.number] = trial
        if space is not None:
            space.draw(trial)
        trial.set_user_attr("seed", seed)
        trial.set_user_attr("candidate", candidate)  # last: from here on it counts
        return Record(trial.number, candidate, seed, parameters=trial.params)

    def measured(self, number: int, costs: Mapping[str, float]) -> None:
        """Write down what a candidate costs."""
        self._trial(number).set_user_attr("costs", dict(costs))

    def advance(self, record: Record, rung: RungRecord, curve: Mapping[int, float]) -> None:
        """Write down that a rung is over."""
        trial = self._trial(record.number)
        for epoch, score in curve.items():
            if epoch not in record.curve:
                trial.report(score, epoch)
        trial.set_user_attr("rungs", [vars(done) for done in (*record.rungs, rung)])

    def fail(self, number: int, reason: str, *, refused: bool) -> None:
        """Write down that a candidate is out because something was wrong with it."""
        trial = self._trial(number)
        trial.set_user_attr("refused", refused)
        trial.set_user_attr("reason", reason)
        self._tell(number, state=TrialState.FAIL)

    def stop(self, number: int) -> None:
        """Write down that others were better."""
        self._tell(number, state=TrialState.PRUNED)

    def finish(self, number: int, score: float) -> None:
        """Write down that a candidate came to the end."""
        self._tell(number, values=score)

    def resume(self, space: SearchSpace, seed: int) -> None:
        """Bring the sampler's random state to where it was: let it draw once more what it has drawn, unseen."""
        with quiet():
            unseen = optuna.create_study(direction=self._study.direction, sampler=space.sampler)
        for trial in self._study.get_trials(deepcopy=False):
            if trial.user_attrs.get("seed") == seed:
                again = unseen.ask()
                space.draw(again)
                if trial.state == TrialState.COMPLETE:
                    with suppress(RuntimeError):
                        unseen.tell(again, trial.value)

    def _tell(self, number: int, **outcome: Any) -> None:
        try:
            self._study.tell(number, **outcome)
        except RuntimeError:  # a sampler of grids that is at the end asks Optuna's own loop to stop
            if not self._study.get_trials(deepcopy=False)[number].state.is_finished():
                raise

    def _trial(self, number: int) -> optuna.Trial:
        if number not in self._trials:  # begun by a driver before us
            found = self._study.get_trials(deepcopy=False)[number]
            self._trials[number] = optuna.Trial(self._study, found._trial_id)
        return self._trials[number]


def open_storage(storage: str) -> BaseStorage | str:
    """Return the storage at ``storage``: a journal file, or what Optuna makes of a URL."""
    if storage.startswith("journal:"):
        path = Path(storage.removeprefix("journal:")).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path)))
    return storage


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna from saying that it made a study."""
    logger = logging.getLogger("optuna")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _record(trial: FrozenTrial) -> Record:
    attributes = trial.user_attrs
    state = _STATES[trial.state]
    return Record(
        number=trial.number,
        candidate=attributes["candidate"],
        seed=attributes["seed"],
        state="refused" if state == "failed" and attributes.get("refused") else state,
        rungs=tuple(RungRecord(**rung) for rung in attributes.get("rungs", ())),
        curve=dict(trial.intermediate_values),
        costs=attributes.get("costs", {}),
        parameters=dict(trial.params),
        reason=attributes.get("reason"),
    )
