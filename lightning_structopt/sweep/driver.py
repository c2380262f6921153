"""The loop of a sweep: starts what the budget lets start, hears what trials say, writes it down, cleans up."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from lightning_structopt.sweep.budget import Decision, Standing
from lightning_structopt.sweep.callback import remove
from lightning_structopt.sweep.executors import Executor
from lightning_structopt.sweep.plan import Plan
from lightning_structopt.sweep.progress import Display
from lightning_structopt.sweep.spec import Message
from lightning_structopt.sweep.storage import Ledger, Record, RungRecord

_LINGER = 20.0  # seconds that a trial may take to exit after its last word
Job = tuple[str, int, int]  # candidate, seed, epochs


@dataclass
class _Active:
    """A trial that runs."""

    record: Record
    epochs: int
    slot: int
    process: Any
    save: Path
    curve: dict[int, float] = field(default_factory=dict)
    outcome: Message | None = None
    outcome_at: float = 0.0


class Driver:
    """Runs a plan to its end. Nothing that it knows is only here: the ledger has it.

    Args:
        plan: What to do.
        ledger: The state of all trials.
        executor: Where trials run.
        display: Shows what goes on.
    """

    def __init__(self, plan: Plan, ledger: Ledger, executor: Executor, display: Display) -> None:
        self._plan, self._ledger, self._executor, self._display = plan, ledger, executor, display
        self._active: list[_Active] = []
        self._written: set[str] = set()

    def run(self) -> None:
        """Go on until no trial may start any more."""
        self._remove_leftovers()
        try:
            while True:
                self._start(self._jobs())
                if not self._active:
                    break
                self._executor.wait([active.process for active in self._active], self._patience())
                for active in list(self._active):
                    self._attend(active)
        finally:
            for active in self._active:
                active.process.kill()
        for record in self._ledger.records():
            if record.state == "running" and record.rungs:
                self._ledger.finish(record.number, record.rungs[-1].score)

    def _jobs(self) -> list[Job]:
        """Return what may run now, those that do run included; and stop who is out."""
        records = {(record.candidate, record.seed): record for record in self._ledger.records()}
        plan, first = self._plan, self._plan.seed
        standings = [self._standing(name, records.get((name, first))) for name in plan.names]
        decision = plan.budget.decide(standings, plan.patience)
        for index in decision.stopped:
            self._stop(records[plan.names[index], first])
        jobs: list[Job] = [(plan.names[index], first, epochs) for index, epochs in decision.start]
        if jobs or plan.repeats == 1 or any(active.record.seed == first for active in self._active):
            return jobs
        return self._repeats(records, standings, decision)

    def _repeats(
        self, records: dict[tuple[str, int], Record], standings: Sequence[Standing], decision: Decision
    ) -> list[Job]:
        """Return the finalists with each further seed that they haven't been trained with."""
        total = self._plan.budget.total_epochs
        finalists = [
            name
            for index, (name, standing) in enumerate(zip(self._plan.names, standings, strict=True))
            if standing.at(total) is not None and index not in decision.stopped
        ]
        jobs = [(name, seed, total) for name in finalists for seed in self._plan.seeds[1:]]
        return [job for job in jobs if (record := records.get(job[:2])) is None or _is_open(record)]

    def _standing(self, name: str, record: Record | None) -> Standing:
        target = max((a.epochs for a in self._active if a.record.candidate == name), default=0)
        if record is None:
            return Standing(target=target)
        sign = 1 if self._plan.mode == "max" else -1
        return Standing(
            scores={rung.epochs: sign * rung.score for rung in record.rungs},
            failed=record.state in {"failed", "refused"},
            ended=any(rung.ended for rung in record.rungs),
            target=target,
        )

    def _start(self, jobs: list[Job]) -> None:
        running = {(active.record.candidate, active.record.seed) for active in self._active}
        free = sorted(set(range(self._executor.workers)) - {active.slot for active in self._active})
        waiting = [job for job in jobs if job[:2] not in running]
        for slot, (name, seed, epochs) in zip(free, waiting, strict=False):
            record = self._record(name, seed)
            if name not in self._written:
                self._plan.write_candidate(name, self._record(name, self._plan.seed).parameters)
                self._written.add(name)
            trainer = self._plan.trainer_of(name)
            spec = self._plan.spec(record, epochs, self._executor.threads(trainer))
            process = self._executor.start(spec, slot, trainer)
            self._active.append(_Active(record, epochs, slot, process, Path(spec.save)))
            self._display.started(name, seed, record.rungs[-1].epochs if record.rungs else 0, epochs)

    def _record(self, name: str, seed: int) -> Record:
        for record in self._ledger.records():
            if (record.candidate, record.seed) == (name, seed):
                return record
        space = self._plan.space if seed == self._plan.seed else None
        return self._ledger.begin(name, seed, space)

    def _attend(self, active: _Active) -> None:
        """Hear one trial, and settle it if it is over."""
        self._hear(active)
        status = active.process.status()
        if status is None and monotonic() < self._deadline(active):
            return
        if status is not None:  # it may have said its last words between our looking and its end
            self._hear(active)
        active.process.kill()
        self._active.remove(active)
        self._settle(active, status)

    def _hear(self, active: _Active) -> None:
        record = active.record
        for message in active.process.messages():
            if "epoch" in message:
                active.curve[message["epoch"]] = message["score"]
                self._display.reached(record.candidate, record.seed, message["epoch"], message["score"])
            elif "costs" in message:
                self._ledger.measured(record.number, message["costs"])
            else:
                active.outcome, active.outcome_at = message, monotonic()

    def _settle(self, active: _Active, status: int | None) -> None:
        outcome = active.outcome or {"failed": self._why(status)}
        record, name = active.record, active.record.candidate
        if "done" not in outcome:
            ((kind, reason),) = outcome.items()
            self._ledger.fail(record.number, reason, refused=kind == "refused")
            self._clear(record, keep=None)
            self._display.ended(name, record.seed, f"{kind}: {reason}")
            return
        done = outcome["done"]
        rung = RungRecord(
            epochs=done["epochs"],
            score=done["score"],
            seconds=done["seconds"],
            checkpoint=str(active.save.relative_to(self._plan.directory)),
            ended=done["ended"],
        )
        self._ledger.advance(record, rung, active.curve)
        if rung.epochs >= self._plan.budget.total_epochs:
            self._ledger.finish(record.number, rung.score)
        self._clear(record, keep=active.save)
        self._display.ended(
            name, record.seed, f"{self._plan.monitor} {rung.score:.4g} after {rung.epochs} epochs"
        )

    def _stop(self, record: Record) -> None:
        if record.state == "running":
            self._ledger.stop(record.number)
            self._clear(record, keep=None)

    def _clear(self, record: Record, keep: Path | None) -> None:
        """Remove the checkpoints of ``record`` but one."""
        folder = self._plan.home(record.candidate) / f"seed-{record.seed}"
        for path in [*folder.glob("epoch-*.ckpt"), *folder.glob("epoch-*.part")]:
            if path != keep:
                remove(path)

    def _remove_leftovers(self) -> None:
        """Remove what trials wrote that a driver before us has not seen the end of."""
        for record in self._ledger.records():
            lives = record.rungs and record.state in {"running", "finished"}
            self._clear(record, keep=self._plan.directory / record.rungs[-1].checkpoint if lives else None)

    def _deadline(self, active: _Active) -> float:
        if active.outcome is not None:
            return active.outcome_at + _LINGER
        began = active.process.began
        return float("inf") if began is None or self._plan.timeout is None else began + self._plan.timeout

    def _patience(self) -> float:
        """Return the seconds until something has to be done even if nobody says anything."""
        return max(0.0, min(self._deadline(active) for active in self._active) - monotonic())

    def _why(self, status: int | None) -> str:
        if status is None:
            return f"did not end within {self._plan.timeout} s"
        return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def _is_open(record: Record) -> bool:
    return record.state == "running" and not record.rungs
