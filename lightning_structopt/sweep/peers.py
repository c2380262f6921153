"""Several drivers on one study: one at a time looks and writes, and each sees whether the others still live.

Optuna's storages order the trials that are created in a study, and let exactly one process finish each. That is all
that is built on: whoever wants its turn creates a trial in a study of its own, and has it once all before are finished.
"""

import os
import socket
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic, sleep

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from typing_extensions import override

BEAT = 3.0  # seconds between two signs of life of a driver
GONE = 30.0  # seconds without one after which others take over what it was at
POLL = 0.5  # seconds after which to look what the others did
_AWAIT = 0.01  # seconds between two looks whether it is our turn
_LEFT = -1  # the last sign of life of a driver that ended in order


class Peers(ABC):
    """The drivers that work on a study, as one of them sees them.

    Attributes:
        name: The name of the driver that looks.
        poll: Seconds after which to look what the others did.
    """

    name: str
    poll: float

    @abstractmethod
    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep the others from looking and writing."""

    @abstractmethod
    def is_gone(self, name: str) -> bool:
        """Return whether a driver will not go on with what it has begun."""

    @abstractmethod
    @contextmanager
    def join(self) -> Iterator[None]:
        """Give signs of life."""


class NoPeers(Peers):
    """There is one driver: a lock on the directory keeps others out, and whoever was there before is gone."""

    poll = float("inf")

    def __init__(self) -> None:
        self.name = _new_name()

    @override
    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    @override
    def is_gone(self, name: str) -> bool:
        return name != self.name

    @override
    @contextmanager
    def join(self) -> Iterator[None]:
        yield


class SharedPeers(Peers):
    """Any number of drivers, on any machines that see the storage.

    Clocks are never compared: a driver is gone if others see its count stand still, or if it said so.

    Args:
        storage: Where the study is.
        study: The name of the study that turns are taken in and lives are counted in.
    """

    poll = POLL

    def __init__(self, storage: BaseStorage, study: str) -> None:
        self.name = _new_name()
        self._storage = storage
        self._study = optuna.create_study(storage=storage, study_name=study, load_if_exists=True)._study_id
        self._seen: dict[str, tuple[int, float]] = {}

    @override
    @contextmanager
    def turn(self) -> Iterator[None]:
        wish = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={"driver": self.name})
        ticket = self._storage.create_new_trial(self._study, wish)
        try:
            while not self._is_first(ticket):
                sleep(_AWAIT)
            yield
        finally:
            self._hand_on(ticket)

    @override
    def is_gone(self, name: str) -> bool:
        if name == self.name:
            return False
        count = int(self._storage.get_study_user_attrs(self._study).get(name, 0))
        if name not in self._seen or self._seen[name][0] != count:
            self._seen[name] = count, monotonic()
        return count == _LEFT or monotonic() - self._seen[name][1] > GONE

    @override
    @contextmanager
    def join(self) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=self._live, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._storage.set_study_user_attr(self._study, self.name, _LEFT)

    def _live(self, over: threading.Event) -> None:
        count = 0
        while not over.wait(BEAT):
            count += 1
            with suppress(Exception):  # the storage may be there again at the next
                self._storage.set_study_user_attr(self._study, self.name, count)

    def _is_first(self, ticket: int) -> bool:
        waiting = self._storage.get_all_trials(self._study, deepcopy=False, states=(TrialState.RUNNING,))
        for trial in waiting:  # in the order of their creation
            if trial._trial_id == ticket:
                return True
            # An older one of our own is of a turn that was interrupted as it began.
            if trial.user_attrs["driver"] != self.name and not self.is_gone(trial.user_attrs["driver"]):
                return False
            self._hand_on(trial._trial_id)
        return True  # others have taken us for gone, and will see when we write that we weren't

    def _hand_on(self, ticket: int) -> None:
        with suppress(RuntimeError):  # another has done so for us
            self._storage.set_trial_state_values(ticket, TrialState.COMPLETE, [0.0])


def _new_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
