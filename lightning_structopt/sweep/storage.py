"""Optuna's storage as the one owner of the state of trials."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import sleep
from typing import Any, Literal

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lightning_structopt.sweep.heirs import Heir
from lightning_structopt.sweep.peers import NoPeers, Peers, SharedPeers
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
        driver: Who is at it; None if nobody is.
        target: The epochs that it is being brought to.
        heir: Whose child it is, if it is one.
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
    driver: str | None = None
    target: int = 0
    heir: Heir | None = None

    def checkpoint_at(self, epochs: int) -> str | None:
        """Return the checkpoint after ``epochs``, or after fewer if it stopped by itself."""
        return next((r.checkpoint for r in reversed(self.rungs) if r.epochs <= epochs), None)


class Ledger:
    """The study of a sweep: every change is in the storage before anything follows from it.

    What depends on what others did belongs into a :meth:`~lightning_structopt.sweep.peers.Peers.turn` of ``peers``.

    Args:
        storage: Where it is; see :func:`opened`.
        name: The study's name in it.
        mode: ``"min"`` or ``"max"``.
        sampler: Where parameters come from; None if there are none to draw.
        shared: Whether other drivers may work on it at the same time.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        mode: str,
        sampler: optuna.samplers.BaseSampler | None = None,
        shared: bool = False,
    ) -> None:
        direction: Literal["maximize", "minimize"] = "maximize" if mode == "max" else "minimize"
        self._storage = storage
        with quiet():
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                direction=direction,
                sampler=sampler,
                load_if_exists=True,
            )
            self._unseen = optuna.create_study(direction=direction, sampler=sampler)
            self.peers: Peers = SharedPeers(self._storage, f"{name} (drivers)") if shared else NoPeers()
        self._over: dict[int, Record] = {}  # what nobody can change any more
        self._drawn: set[int] = set()

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
        found = []
        for trial in self._study.get_trials(deepcopy=False):
            if "candidate" not in trial.user_attrs:
                continue
            record = self._over.get(trial.number) or _record(trial)
            if trial.state.is_finished():
                self._over[trial.number] = record
            found.append(record)
        return found

    def begin(
        self, candidate: str, seed: int, epochs: int, space: SearchSpace | None, heir: Heir | None = None
    ) -> Record:
        """Write down that a candidate starts, and draw its parameters if there is a ``space``."""
        if space is not None:
            self._catch_up(space, seed)
        trial = self._study.ask()
        if space is not None:
            space.draw(trial)
            self._drawn.add(trial.number)
        trial.set_user_attr("claim", [self.peers.name, epochs])
        trial.set_user_attr("seed", seed)
        if heir is not None:
            trial.set_user_attr("heir", vars(heir))
        trial.set_user_attr("candidate", candidate)  # last: from here on it counts
        return Record(
            trial.number, candidate, seed, parameters=trial.params, driver=self.peers.name, target=epochs, heir=heir,
        )  # fmt: skip

    def claim(self, record: Record, epochs: int) -> Record:
        """Write down that this driver is at it."""
        self._set(record.number, "claim", [self.peers.name, epochs])
        return replace(record, driver=self.peers.name, target=epochs)

    def release(self, number: int) -> None:
        """Write down that nobody is at it."""
        self._set(number, "claim", None)

    def holds(self, number: int) -> bool:
        """Return whether this driver is at it, and no other has taken over."""
        return _record(self._study.get_trials(deepcopy=False)[number]).driver == self.peers.name

    def measured(self, number: int, costs: Mapping[str, float]) -> None:
        """Write down what a candidate costs."""
        self._set(number, "costs", dict(costs))

    def advance(self, record: Record, rung: RungRecord, curve: Mapping[int, float]) -> None:
        """Write down that a rung is over."""
        for epoch, score in curve.items():
            if epoch not in record.curve:
                self._storage.set_trial_intermediate_value(self._id(record.number), epoch, score)
        self._set(record.number, "rungs", [vars(done) for done in (*record.rungs, rung)])

    def fail(self, number: int, reason: str, *, refused: bool) -> None:
        """Write down that a candidate is out because something was wrong with it."""
        self._set(number, "refused", refused)
        self._set(number, "reason", reason)
        self._tell(number, state=TrialState.FAIL)

    def stop(self, number: int) -> None:
        """Write down that others were better."""
        self._tell(number, state=TrialState.PRUNED)

    def finish(self, number: int, score: float) -> None:
        """Write down that a candidate came to the end."""
        self._tell(number, values=score)

    def _catch_up(self, space: SearchSpace, seed: int) -> None:
        """Bring the sampler's random state to where it would be had it drawn all itself: let it do so, unseen."""
        for trial in self._study.get_trials(deepcopy=False):
            attributes = trial.user_attrs
            drawn = attributes.get("seed") == seed and "candidate" in attributes and "heir" not in attributes
            if trial.number in self._drawn or not drawn:
                continue
            self._drawn.add(trial.number)
            again = self._unseen.ask()
            space.draw(again)
            if trial.state == TrialState.COMPLETE:
                with suppress(RuntimeError):  # see `_tell`
                    self._unseen.tell(again, trial.value)

    def _tell(self, number: int, **outcome: Any) -> None:
        try:
            self._study.tell(number, **outcome)
        except RuntimeError:  # a sampler of grids that is at the end asks Optuna's own loop to stop
            if not self._study.get_trials(deepcopy=False)[number].state.is_finished():
                raise

    def _set(self, number: int, name: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._id(number), name, value)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)


@contextmanager
def opened(storage: str) -> Iterator[BaseStorage]:
    """Open the storage at ``storage``, a journal file or the URL of a database, and close it in the end."""
    if storage.startswith("journal:"):
        path = Path(storage.removeprefix("journal:")).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        with as_written(storage):
            journal = JournalStorage(JournalFileBackend(str(path)))
        yield journal
        return
    _make_tables(storage)
    database = RDBStorage(
        storage, engine_kwargs={"pool_pre_ping": True}
    )  # trials are longer than connections last
    try:
        yield optuna.storages.get_storage(database)
    finally:
        database.engine.dispose()


def cut_half_entry(journal: Path) -> None:
    """Remove what a full disk or a lost power left of the last entry, which the next one would be glued to.

    Args:
        journal: Optuna's, which nobody else writes to. It may be missing.
    """
    if journal.is_file() and not (content := journal.read_bytes()).endswith(b"\n"):
        os.truncate(journal, content.rfind(b"\n") + 1)


@contextmanager
def as_written(url: str) -> Iterator[None]:
    """Say that a storage is damaged where Optuna stumbles over what it reads.

    Raises:
        ValueError: If it does.
    """
    try:
        yield
    except (
        AssertionError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        UnicodeDecodeError,
        json.JSONDecodeError,
    ) as error:
        raise ValueError(
            f"The storage of a sweep must be as it was written. Found {url!r}, which is damaged: "
            f"{type(error).__name__}: {error}. Restore it, or give a new `directory`."
        ) from error


def _make_tables(url: str) -> None:
    """See to the tables: drivers that start together all make them, and one of them is first."""
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.pool import NullPool

    for pause in (0.1, 0.2, 0.4, 0.8):
        try:
            RDBStorage(url, engine_kwargs={"poolclass": NullPool})
            return
        except DBAPIError:
            sleep(pause)
    RDBStorage(url, engine_kwargs={"poolclass": NullPool})


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
    claim = attributes.get("claim") if state == "running" else None
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
        driver=claim[0] if claim else None,
        target=claim[1] if claim else 0,
        heir=Heir(**attributes["heir"]) if "heir" in attributes else None,
    )
