"""ArchitectureSweep: the front door."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from optuna.storages import BaseStorage
from typing_extensions import override

from lightning_structopt._checks import (
    require_choice,
    require_in,
    require_path,
    require_type,
    require_whole,
)
from lightning_structopt.sweep.agenda import agenda
from lightning_structopt.sweep.brackets import AsynchronousHalving, Hyperband
from lightning_structopt.sweep.budget import Budget, FixedRounds, SuccessiveHalving
from lightning_structopt.sweep.candidates import Candidate, as_candidates, require_free_arguments
from lightning_structopt.sweep.constraints import Rule, as_rules
from lightning_structopt.sweep.driver import Driver
from lightning_structopt.sweep.executors import Executor, LocalProcesses
from lightning_structopt.sweep.heirs import Mutation, as_mutations
from lightning_structopt.sweep.plan import Plan, require_same
from lightning_structopt.sweep.progress import Display
from lightning_structopt.sweep.result import SweepResult, ranked
from lightning_structopt.sweep.space import SearchSpace
from lightning_structopt.sweep.storage import Ledger, as_written, cut_half_entry, opened

Candidates = (
    Mapping[str, Candidate | Callable[[], Any]] | Sequence[Candidate | Callable[[], Any]] | SearchSpace
)


class AllFailedError(RuntimeError):
    """Not one candidate of a sweep could be trained."""


class ArchitectureSweep:
    """Trains many architectures a little and the best of them longer, each in a process of its own.

    Candidates that go on do so from their checkpoints, with optimizer, schedules, callbacks and random states: a
    candidate trained in three rungs ends, on one device, with the bits of one trained straight. What fails or hangs
    is a row of the table with its reason. A sweep that was interrupted goes on where it was when it is run again;
    its state is an Optuna study, which optuna-dashboard shows too.

    The directory holds pickled candidates and data, which are run: only use directories that you trust.

    Args:
        candidates: Callables that return LightningModules, by name; a list of them; or a :class:`SearchSpace`.
        monitor: The metric that counts, as the module logs it.
        mode: Whether more (``"max"``) or less (``"min"``) of it is better.
        budget: How training is shared out; by default ``SuccessiveHalving(1, 9, 3)``.
        trainer: Arguments of each candidate's ``Trainer``. ``logger`` may be a function from the candidate's name to a
            logger, so that each has a run of its own.
        executor: Where trials run; by default :class:`LocalProcesses`, one at a time.
        constraints: What a candidate may cost: :class:`MaxParameters` and others, or functions from a module to the
            reason why it may not train.
        directory: Where everything is written; new, empty, or of this very sweep.
        seed: Seeds every candidate before it is built.
        patience: Rounds without a better best after which the sweep ends; None for no such end.
        repeats: Seeds that each finalist is trained with; they are then ranked by the mean.
        timeout: Seconds that a rung may take before it counts as failed; None for no limit.
        storage: Where Optuna keeps the state: ``"journal:PATH"`` or the URL of a database. Any number of processes,
            also on several machines, may then run this sweep at the same time and share its trials; they must all see
            ``directory``. By default a journal in ``directory``, for one process.
        progress: Whether to show live progress.
        mutate: Changes that keep the function, such as ``[Deepen(), Widen(1.5)]``: after each round but the last, each
            survivor also gives one child by each of them, which goes on in the next round from its parent's weights,
            optimizer, schedules and random states. Callbacks begin anew in it. A change that an architecture doesn't
            permit is a refused candidate.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of range, names are used twice, or the devices asked for aren't there.

    Example:
        >>> sweep = ArchitectureSweep({"small": make_small, "wide": make_wide}, "val_acc")  # doctest: +SKIP
        >>> sweep.run(datamodule).best.load()  # doctest: +SKIP
    """

    def __init__(
        self,
        candidates: Candidates,
        monitor: str,
        mode: Literal["min", "max"] = "max",
        budget: Budget | None = None,
        trainer: Mapping[str, Any] | None = None,
        executor: Executor | None = None,
        constraints: Sequence[Rule] = (),
        directory: str | Path = "sweep",
        seed: int = 0,
        patience: int | None = None,
        repeats: int = 1,
        timeout: float | None = None,
        storage: str | None = None,
        progress: bool = True,
        mutate: Sequence[Mutation] = (),
    ) -> None:
        require_type("monitor", monitor, str)
        require_choice("mode", mode, ("min", "max"))
        budget = SuccessiveHalving() if budget is None else budget
        executor = LocalProcesses() if executor is None else executor
        require_type("budget", budget, Budget)
        require_type("executor", executor, Executor)
        require_path("directory", directory)
        if storage is not None:
            require_type("storage", storage, str)
        require_type("progress", progress, bool)
        require_whole("seed", seed, 0)
        require_whole("repeats", repeats, 1)
        if timeout is not None:
            require_in("timeout", timeout, 0, float("inf"), closed="neither")
        _require_rounds(patience, budget)
        mutations = as_mutations(mutate)
        if mutations:
            _require_parents(budget, repeats)
        require_free_arguments({} if trainer is None else trainer)
        space = candidates if isinstance(candidates, SearchSpace) else None
        named = space.candidates() if space else as_candidates(candidates)  # type: ignore[arg-type]
        self._plan = Plan(
            candidates=named,
            space=space,
            monitor=monitor,
            mode=mode,
            budget=budget,
            trainer=dict(trainer or {}),
            constraints=as_rules(constraints),
            directory=Path(directory).absolute(),
            seed=seed,
            patience=patience,
            repeats=repeats,
            timeout=timeout,
            mutate=mutations,
        )
        for name in named:
            executor.check(self._plan.trainer_of(name), timeout)
        self._executor = executor
        self._storage = storage
        self._progress = progress

    def run(self, data: Any = None, val_dataloaders: Any = None) -> SweepResult:
        """Train until the budget is spent, or go on with a sweep that was interrupted; a finished one is only read.

        Args:
            data: A LightningDataModule, or training loaders. None if candidates have their own.
            val_dataloaders: Validation loaders, beside training loaders.

        Returns:
            All candidates, the best first.

        Raises:
            AllFailedError: If no candidate could be trained, with the reason of each.
            TypeError: If candidates or data can't be pickled.
            ValueError: If the directory holds another sweep, or another process works in it.
        """
        plan = self._plan
        url = self._storage or f"journal:{plan.directory / 'journal.log'}"
        with _locked(plan.directory, shared=self._storage is not None), opened(url) as storage:
            space = None if plan.space is None else copy.deepcopy(plan.space)  # its sampler draws
            if self._storage is None:
                cut_half_entry(plan.directory / "journal.log")
            with as_written(url):
                ledger = self._ledger(storage, space)
                known = ledger.records()
            with ledger.peers.join():
                with ledger.peers.turn():
                    if ledger.description:
                        require_same(ledger.description, plan.describe(), plan.directory)
                    else:
                        ledger.describe(plan.describe())
                if agenda(plan, known, ledger.peers.is_gone).jobs:
                    self._executor.prepare([plan.trainer_of(name) for name in plan.names])
                plan.write_data((data, val_dataloaders))
                with Display(plan.monitor, self._progress) as display:
                    Driver(replace(plan, space=space), ledger, self._executor, display).run()
                result = ranked(plan, ledger.records())
        if result.best.score is None:
            reasons = "; ".join(f"{c.name}: {c.state}: {c.reason}" for c in result.candidates)
            raise AllFailedError(
                f"At least one candidate must train. Found that none does: {reasons}. Their output is in log.txt under "
                f"{str(plan.directory / 'trials')!r}. Correct them and give a new directory."
            )
        return result

    def _ledger(self, storage: BaseStorage, space: SearchSpace | None) -> Ledger:
        return Ledger(
            storage,
            self._plan.directory.name,
            self._plan.mode,
            sampler=None if space is None else space.sampler,
            shared=self._storage is not None,
        )

    @override
    def __repr__(self) -> str:
        plan = self._plan
        return (
            f"ArchitectureSweep({plan.names!r}, monitor={plan.monitor!r}, mode={plan.mode!r}, budget={plan.budget!r}, "
            f"executor={self._executor!r}, directory={str(plan.directory)!r})"
        )


def _require_rounds(patience: int | None, budget: Budget) -> None:
    """Raise unless ``patience`` makes sense for ``budget``.

    Raises:
        ValueError: If it doesn't.
    """
    if patience is None:
        return
    require_whole("patience", patience, 1)
    if isinstance(budget, AsynchronousHalving):
        raise ValueError(
            f"`patience` counts rounds, of which `AsynchronousHalving` has none. Found `patience = {patience}`. "
            "Leave it out, or take `SuccessiveHalving`."
        )


def _require_parents(budget: Budget, repeats: int) -> None:
    """Raise unless there are rounds after which survivors give children.

    Raises:
        ValueError: If there aren't, or finalists are to be trained again from the beginning.
    """
    if isinstance(budget, (AsynchronousHalving, Hyperband)) or (
        isinstance(budget, FixedRounds) and budget.rounds == 1
    ):
        raise ValueError(
            f"`mutate` makes children between the rounds of all candidates. Found `budget = {budget!r}`, which has "
            "none. Take `SuccessiveHalving`, or `FixedRounds` of at least 2 rounds."
        )
    if repeats > 1:
        raise ValueError(
            "`repeats` trains finalists from their beginning with other seeds, and children begin with what their "
            f"parents have learned. Found `mutate` and `repeats = {repeats}`. Leave out one of them."
        )


@contextmanager
def _locked(directory: Path, shared: bool) -> Iterator[None]:
    """Keep other drivers out of ``directory``; the lock goes with the process, however that ends.

    Drivers that share a storage let each other in.

    Raises:
        ValueError: If it holds something else, or another process works in it.
    """
    lock = directory / "sweep.lock"
    if directory.exists() and not lock.exists() and any(directory.iterdir()):
        raise ValueError(
            f"`directory` must be new, empty, or of this sweep. Found {str(directory)!r} with "
            f"{sorted(path.name for path in directory.iterdir())[0]!r} in it. Give another."
        )
    import fcntl  # not on Windows, where everything else can be imported

    directory.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"One process may run a sweep in {str(directory)!r} at a time. Found that process {file.read() or '?'} "
                "does. Wait for it, give another directory, or give all of them one `storage`."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
