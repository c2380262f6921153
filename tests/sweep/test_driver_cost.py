"""What the driver itself takes, with trials that end at once: little time a trial, and no more memory for many."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lightning_structopt.sweep import ArchitectureSweep, Budget, FixedRounds, InProcess, SuccessiveHalving
from lightning_structopt.sweep.executors import _Finished
from lightning_structopt.sweep.spec import Message, TrialSpec

TRIALS = 200


class Instant(InProcess):
    """Says what a trial would say."""

    def __init__(self) -> None:
        self.resident: list[float] = []

    def start(self, spec: TrialSpec, slot: int, trainer: Mapping[str, Any]) -> _Finished:
        statistics = Path("/proc/self/statm").read_text().split()
        self.resident.append(int(statistics[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
        Path(spec.save).parent.mkdir(parents=True, exist_ok=True)
        Path(spec.save).touch()
        score = int(spec.name) / TRIALS
        said: list[Message] = [{"costs": {"parameters": 1}}]
        said += [{"epoch": epoch, "score": score} for epoch in range(1, spec.epochs + 1)]
        return _Finished([
            *said,
            {"done": {"epochs": spec.epochs, "score": score, "ended": False, "seconds": 0.0}},
        ])


@pytest.mark.parametrize("budget", [FixedRounds(1, 1), SuccessiveHalving(1, 9, 3)], ids=["full", "halving"])
def test_two_hundred_trials(budget: Budget, tmp_path: Path) -> None:
    executor = Instant()
    sweep = ArchitectureSweep(
        {str(number): dict for number in range(TRIALS)},
        "val_acc",
        budget=budget,
        trainer={"accelerator": "cpu"},
        executor=executor,
        directory=tmp_path / "sweep",
        progress=False,
    )
    before = time.process_time()
    result = sweep.run([])
    seconds = (time.process_time() - before) / TRIALS
    assert result.best.name == str(TRIALS - 1)
    assert seconds < 0.1, "seconds of the driver a candidate; about 0.01"
    grown = executor.resident[-1] - executor.resident[20]
    assert grown < 8, f"{grown} MiB more after {len(executor.resident)} trials than after 20"
