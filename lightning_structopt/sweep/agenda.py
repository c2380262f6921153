"""What there is to do: a pure function of the plan and of what all drivers have written down."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from lightning_structopt.sweep.budget import Decision, Standing
from lightning_structopt.sweep.heirs import Heir, Heirs, child_of
from lightning_structopt.sweep.plan import Plan
from lightning_structopt.sweep.storage import Record

Job = tuple[str, int, int]  # candidate, seed, epochs
_Records = Mapping[tuple[str, int], Record]


@dataclass(frozen=True)
class Agenda:
    """What there is to do.

    Args:
        jobs: What may start and nobody is at, most urgent first.
        stopped: Those that others have beaten, still to be written down.
        lost: Those that a driver was at which is gone.
        busy: Whether any driver is at anything.
        heirs: All children that are born, whether or not they have begun.
    """

    jobs: tuple[Job, ...] = ()
    stopped: tuple[Record, ...] = ()
    lost: tuple[Record, ...] = ()
    busy: bool = False
    heirs: Heirs = field(default_factory=dict)


def agenda(plan: Plan, records: Sequence[Record], is_gone: Callable[[str], bool]) -> Agenda:
    """Return what there is to do.

    Args:
        plan: What was asked for.
        records: All that is known.
        is_gone: Whether a driver, by its name, will not go on with what it has begun.
    """
    gone = {driver for driver in {r.driver for r in records} - {None} if driver and is_gone(driver)}
    known = {(record.candidate, record.seed): record for record in records}
    taken = {key for key, record in known.items() if record.driver is not None and record.driver not in gone}
    heirs, standings, decision = _played(plan, known, taken)
    names = [*plan.names, *heirs]
    jobs: list[Job] = [(names[index], plan.seed, epochs) for index, epochs in decision.start]
    if not jobs and plan.repeats > 1 and not any(seed == plan.seed for _, seed in taken):
        jobs = _repeats(plan, known, standings, decision)
    beaten = [known[names[index], plan.seed] for index in sorted(decision.stopped)]
    return Agenda(
        jobs=tuple(job for job in jobs if job[:2] not in taken),
        stopped=tuple(record for record in beaten if record.state == "running"),
        lost=tuple(record for record in records if record.driver in gone),
        busy=bool(taken),
        heirs=heirs,
    )


def _played(
    plan: Plan, known: _Records, taken: set[tuple[str, int]]
) -> tuple[dict[str, Heir], list[Standing], Decision]:
    """Return all children, how everybody stands, and what the budget makes of it.

    Who survives a round depends on all that are in it, so families are told round by round.
    """
    heirs: dict[str, Heir] = {}
    for number in count():
        names = [*plan.names, *heirs]
        places = {name: index for index, name in enumerate(names)}
        standings = [_standing(plan, known.get((name, plan.seed)), taken) for name in names]
        for index, heir in enumerate(heirs.values(), start=len(plan.names)):
            standings[index] = replace(standings[index], parent=places[heir.parent], born=heir.born)
        # A budget of one's own need not know of children.
        more = {"children": len(plan.mutate)} if plan.mutate else {}
        decision = plan.budget.decide(standings, plan.patience, **more)
        if not plan.mutate or number >= len(decision.survivors):
            break
        epochs, survivors = decision.survivors[number]
        for parent in survivors:
            born = [child_of(names[parent], epochs, plan.mutate, index) for index in range(len(plan.mutate))]
            heirs |= {heir.name: heir for heir in born}
    return heirs, standings, decision


def _standing(plan: Plan, record: Record | None, taken: set[tuple[str, int]]) -> Standing:
    if record is None:
        return Standing()
    sign = 1 if plan.mode == "max" else -1
    return Standing(
        scores={rung.epochs: sign * rung.score for rung in record.rungs},
        failed=record.state in {"failed", "refused"},
        ended=any(rung.ended for rung in record.rungs),
        target=record.target if (record.candidate, record.seed) in taken else 0,
    )


def _repeats(plan: Plan, known: _Records, standings: Sequence[Standing], decision: Decision) -> list[Job]:
    """Return the finalists with each further seed that they haven't been trained with."""
    total = plan.budget.total_epochs
    finalists = [
        name
        for index, (name, standing) in enumerate(zip(plan.names, standings, strict=True))
        if standing.at(total) is not None and index not in decision.stopped
    ]
    jobs = [(name, seed, total) for name in finalists for seed in plan.seeds[1:]]
    return [job for job in jobs if (record := known.get(job[:2])) is None or _is_open(record)]


def _is_open(record: Record) -> bool:
    return record.state == "running" and not record.rungs
