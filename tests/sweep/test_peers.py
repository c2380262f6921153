"""Drivers that take turns, and see who is gone."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from optuna.storages import RDBStorage

from lightning_structopt.sweep import peers
from lightning_structopt.sweep.peers import NoPeers, SharedPeers
from lightning_structopt.sweep.storage import opened, quiet

Join = Callable[[], SharedPeers]


@pytest.fixture
def join(storage: str) -> Iterator[Join]:
    """Makes drivers, each of which opens the storage as another process would."""
    with ExitStack() as stack:

        def driver() -> SharedPeers:
            with quiet():
                return SharedPeers(stack.enter_context(opened(storage)), "study")

        yield driver


def test_they_may_start_together(join: Join) -> None:
    # What a storage loads on use: these drivers are threads, and imports that refer to each other can't be shared.
    RDBStorage("sqlite://")
    with ThreadPoolExecutor(4) as pool:
        started = [pool.submit(join) for _ in range(4)]
    for one in [each.result() for each in started]:
        with one.turn():
            pass


def test_one_at_a_time(join: Join) -> None:
    busy, drivers = threading.Lock(), [join() for _ in range(4)]

    def work(mine: SharedPeers) -> None:
        for count in range(8):
            with mine.turn():
                assert busy.acquire(blocking=False), "two have their turn at once"
                # Long enough for others to come between: it waits for the disk or the server.
                mine._storage.set_study_user_attr(mine._study, mine.name, count)
                busy.release()

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(work, mine) for mine in drivers]
    for each in done:
        each.result()  # raises what went wrong there


def cut_off_in_its_turn(driver: SharedPeers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it take a turn and never end it."""
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_hand_on", lambda ticket: None)
        with driver.turn():
            pass


def test_who_is_silent_is_gone_and_its_turn_with_it(
    join: Join,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(peers, "monotonic", lambda: clock[0])
    killed, other = join(), join()
    assert not other.is_gone(killed.name)
    cut_off_in_its_turn(killed, monkeypatch)
    clock[0] = peers.GONE - 1
    assert not other.is_gone(killed.name)
    clock[0] = peers.GONE + 1
    assert other.is_gone(killed.name)
    assert not killed.is_gone(killed.name)
    with other.turn():
        pass


def test_signs_of_life(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "BEAT", 0.01)
    lives, other = join(), join()
    with lives.join():
        while not other.is_gone(lives.name) and other._seen[lives.name][0] < 3:
            pass
        assert not other.is_gone(lives.name)
    assert other.is_gone(lives.name), "it has said so"


def test_a_turn_that_was_interrupted_as_it_began(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = join(), join()
    cut_off_in_its_turn(mine, monkeypatch)
    with mine.turn():
        pass
    with other.turn():
        pass


def test_turns_end_with_an_error_too(join: Join) -> None:
    mine, other = join(), join()
    with pytest.raises(KeyboardInterrupt), mine.turn():
        raise KeyboardInterrupt
    with other.turn():
        pass


def test_alone_everyone_else_is_gone() -> None:
    one, other = NoPeers(), NoPeers()
    assert one.is_gone(other.name)
    assert not one.is_gone(one.name)
    with one.join(), one.turn():
        pass
