"""The loop of a sweep: starts what the budget lets start, hears what trials say, writes it down, cleans up."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from lightning_structopt.sweep.agenda import Agenda, agenda
from lightning_structopt.sweep.callback import remove
from lightning_structopt.sweep.executors import Executor
from lightning_structopt.sweep.heirs import Heirs, root
from lightning_structopt.sweep.plan import Plan
from lightning_structopt.sweep.progress import Display
from lightning_structopt.sweep.spec import Message
from lightning_structopt.sweep.storage import Ledger, Record, RungRecord

_LINGER = 20.0  # seconds that a trial may take to exit after its last word


@dataclass
class _Active:
    """A trial that runs."""

    record: Record
    slot: int
    process: Any
    save: Path
    costs: Message | None = None
    curve: dict[int, float] = field(default_factory=dict)
    outcome: Message | None = None
    outcome_at: float = 0.0


class Driver:
    """Runs a plan to its end, with others if there are any. Nothing that it knows is only here: the ledger has it.

    Args:
        plan: What to do.
        ledger: The state of all trials.
        executor: Where trials run.
        display: Shows what goes on.
    """

    def __init__(self, plan: Plan, ledger: Ledger, executor: Executor, display: Display) -> None:
        self._plan, self._ledger, self._executor, self._display = plan, ledger, executor, display
        self._peers = ledger.peers
        self._active: list[_Active] = []
        self._written: set[str] = set()

    def run(self) -> None:
        """Go on until no trial may start any more, here or at another driver."""
        with self._peers.turn():
            self._remove_leftovers()
        try:
            while self._start():
                if self._active:
                    timeout = min(self._patience(), self._peers.poll)
                    self._executor.wait([active.process for active in self._active], timeout)
                else:
                    sleep(self._peers.poll)
                for active in list(self._active):
                    self._attend(active)
        finally:
            self._withdraw()
        with self._peers.turn():
            for record in self._ledger.records():
                if record.state == "running" and record.rungs:
                    self._ledger.finish(record.number, record.rungs[-1].score)

    def _start(self) -> bool:
        """Start what may start in the free slots; return whether the sweep goes on."""
        while True:
            now = self._agenda()
            free = sorted(set(range(self._executor.workers)) - {active.slot for active in self._active})
            if not (now.lost or now.stopped or (now.jobs and free)):
                return now.busy or bool(now.jobs)
            with self._peers.turn():
                claimed = self._claim(self._agenda(), bool(free))
            if claimed is not None:
                self._launch(claimed, free[0], now.heirs)

    def _agenda(self) -> Agenda:
        return agenda(self._plan, self._ledger.records(), self._peers.is_gone)

    def _claim(self, now: Agenda, free: bool) -> Record | None:
        """Write down who is out, what nobody is at any more, and what we are at next, in our turn."""
        for lost in now.lost:
            self._ledger.release(lost.number)
            self._clear(lost.number)
        for beaten in now.stopped:
            self._ledger.stop(beaten.number)
            self._clear(beaten.number)
        if not (now.jobs and free):
            return None
        name, seed, epochs = now.jobs[0]
        record, heir = self._known(name, seed), now.heirs.get(name)
        if record is None:
            founder = heir is None and seed == self._plan.seed
            begun = self._ledger.begin(name, seed, epochs, self._plan.space if founder else None, heir)
            _require_checkpoint(name, self._inherited(begun))
            return begun
        _require_checkpoint(name, self._checkpoint(record) or self._inherited(record))
        return self._ledger.claim(record, epochs)

    def _launch(self, record: Record, slot: int, heirs: Heirs) -> None:
        name = record.candidate
        if name not in self._written:
            first = self._known(root(name, heirs), self._plan.seed)
            self._plan.write_candidate(name, first.parameters if first else {}, heirs)
            self._written.add(name)
        trainer = self._plan.trainer_of(name, heirs)
        spec = self._plan.spec(
            record, record.target, self._executor.threads(trainer), heirs, self._inherited(record)
        )
        process = self._executor.start(spec, slot, trainer)
        self._active.append(_Active(record, slot, process, Path(spec.save)))
        self._display.started(
            name, record.seed, record.rungs[-1].epochs if record.rungs else 0, record.target
        )

    def _known(self, name: str, seed: int) -> Record | None:
        found = (r for r in self._ledger.records() if (r.candidate, r.seed) == (name, seed))
        return next(found, None)

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
                active.costs = message["costs"]
            else:
                active.outcome, active.outcome_at = message, monotonic()

    def _settle(self, active: _Active, status: int | None) -> None:
        """Write down what came of a trial."""
        record = active.record
        outcome = active.outcome or {"failed": self._why(status)}
        with self._peers.turn():
            if not self._ledger.holds(record.number):
                note = "others have taken it over, as this driver was silent for long"
            elif "done" in outcome:
                note = self._advance(active, outcome["done"])
            else:
                note = self._fail(active, *next(iter(outcome.items())))
        self._display.ended(record.candidate, record.seed, note)

    def _advance(self, active: _Active, done: Message) -> str:
        record, plan = active.record, self._plan
        rung = RungRecord(
            epochs=done["epochs"],
            score=done["score"],
            seconds=done["seconds"],
            checkpoint=str(active.save.relative_to(plan.directory)),
            ended=done["ended"],
        )
        self._measured(active)
        self._ledger.advance(record, rung, active.curve)
        if rung.epochs >= plan.budget.total_epochs:
            self._ledger.finish(record.number, rung.score)
        else:
            self._ledger.release(record.number)
        self._clear(record.number)
        return f"{plan.monitor} {rung.score:.4g} after {rung.epochs} epochs"

    def _fail(self, active: _Active, kind: str, reason: str) -> str:
        self._measured(active)
        self._ledger.fail(active.record.number, reason, refused=kind == "refused")
        self._clear(active.record.number)
        return f"{kind}: {reason}"

    def _measured(self, active: _Active) -> None:
        if active.costs is not None:
            self._ledger.measured(active.record.number, active.costs)

    def _withdraw(self) -> None:
        """End what still runs, and leave it to others."""
        for active in self._active:
            active.process.kill()
        if self._active:
            with self._peers.turn():
                for active in self._active:
                    if self._ledger.holds(active.record.number):
                        self._ledger.release(active.record.number)

    def _clear(self, number: int) -> None:
        """Remove the checkpoints of a trial that nobody will go on from; also its parent's, where it has its own."""
        records = self._ledger.records()
        record = next(record for record in records if record.number == number)
        heirs = self._agenda().heirs if self._plan.mutate else {}
        self._remove(record, records, heirs)
        if record.heir is not None:
            parent = next(r for r in records if r.candidate == record.heir.parent)
            self._remove(parent, records, heirs)

    def _remove(self, record: Record, records: Sequence[Record], heirs: Heirs) -> None:
        goes_on = record.state in {"running", "finished"}
        kept = {self._checkpoint(record)} if goes_on else set()
        settled = {r.candidate for r in records if r.rungs or r.state != "running"}
        for heir in heirs.values():
            if heir.parent == record.candidate and heir.name not in settled:
                kept.add(self._at(record, heir.born))
        folder = self._plan.folder(record)
        for path in {*folder.glob("epoch-*.ckpt"), *folder.glob("epoch-*.part")} - kept:
            remove(path)

    def _remove_leftovers(self) -> None:
        """Remove what trials wrote that nobody has seen the end of."""
        for record in self._ledger.records():
            if record.driver is None:  # others may be at it, or will be seen to be gone
                self._clear(record.number)

    def _inherited(self, record: Record) -> Path | None:
        """Return the checkpoint that a child begins with; None for others, and once it has one of its own."""
        if record.heir is None or record.rungs:
            return None
        parent = self._known(record.heir.parent, record.seed)
        return None if parent is None else self._at(parent, record.heir.born)

    def _at(self, record: Record, epochs: int) -> Path | None:
        found = record.checkpoint_at(epochs)
        return None if found is None else self._plan.directory / found

    def _checkpoint(self, record: Record) -> Path | None:
        return self._plan.directory / record.rungs[-1].checkpoint if record.rungs else None

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


def _require_checkpoint(name: str, checkpoint: Path | None) -> None:
    """Raise unless there is what a candidate goes on from.

    Raises:
        ValueError: If there isn't.
    """
    if checkpoint is not None and not checkpoint.exists():
        raise ValueError(
            f"All drivers of a sweep must see one directory, with nothing removed. Found no {str(checkpoint)!r}, from "
            f"which {name!r} goes on. Give every driver the same `directory`, on a file system that they share."
        )
