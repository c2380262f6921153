"""Members of an ensemble, trained independently of one another, each as a candidate of a sweep."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_structopt._checks import require_choice, require_whole
from lightning_structopt.sweep.architecture import AllFailedError, ArchitectureSweep
from lightning_structopt.sweep.budget import FixedRounds
from lightning_structopt.sweep.candidates import Candidate
from lightning_structopt.sweep.executors import Executor
from lightning_structopt.sweep.parts import Bootstrap, DataPart, Fold
from lightning_structopt.sweep.result import CandidateResult

Vary: TypeAlias = Literal["seed", "bootstrap", "fold"]


class MemberFailedError(RuntimeError):
    """Some members could not be trained.

    Args:
        message: Which, and why.
        trained: The others.
    """

    def __init__(self, message: str, trained: list[CandidateResult]) -> None:
        super().__init__(message)
        self.trained = trained


def train_members(
    make: Callable[[], Any],
    data: Any,
    count: int,
    *,
    epochs: int,
    monitor: str,
    mode: Literal["min", "max"] = "max",
    vary: Vary = "seed",
    val_dataloaders: Any = None,
    trainer: Mapping[str, Any] | None = None,
    executor: Executor | None = None,
    directory: str | Path = "members",
    seed: int = 0,
    timeout: float | None = None,
    progress: bool = True,
) -> list[CandidateResult]:
    """Train ``count`` members from one recipe, side by side where the executor has several workers.

    It is an :class:`ArchitectureSweep` in which all candidates train in full, so each member has a process of its own,
    and a run that was killed goes on where it was when it is called again.

    ``vary`` says in what members differ beside their seeds ``seed``, ``seed + 1``, ...: ``"seed"`` in nothing else;
    ``"bootstrap"`` in the samples drawn for them (bagging); ``"fold"`` in the fold that they aren't trained on, but
    validated. What these say of their folds is gathered by :func:`~lightning_structopt.gather_out_of_fold`, to train a
    combiner on.

    Args:
        make: Returns a new LightningModule each time, of a new start: it must not seed by itself.
        data: A LightningDataModule, or a training loader.
        count: How many members, at least 1, or 2 of ``"fold"``.
        epochs: Epochs of each member.
        monitor: A metric that the module logs, which becomes the member's ``score``.
        mode: Whether more or less of it is better.
        vary: ``"seed"``, ``"bootstrap"`` or ``"fold"``.
        val_dataloaders: Validation loaders, beside a training loader.
        trainer: Arguments of each member's ``Trainer``.
        executor: Where members are trained; by default ``LocalProcesses()``, one at a time.
        directory: Where everything is written; new, empty, or of this very call.
        seed: Of the first member, and of the order in which samples are dealt to folds.
        timeout: Seconds that a member may take; None for no limit.
        progress: Whether to show live progress.

    Returns:
        Members in order, for ``ParallelEnsemble(members)``; each has a ``score``, and ``load()`` gives its module.

    Raises:
        MemberFailedError: If some could not be trained; ``trained`` of it has the others.
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of range, or ``directory`` is that of another call.

    Example:
        >>> members = train_members(Net, datamodule, 5, epochs=10, monitor="val_acc")  # doctest: +SKIP
        >>> ensemble = so.ParallelEnsemble(members)  # doctest: +SKIP
    """
    require_choice("vary", vary, ("seed", "bootstrap", "fold"))
    require_whole("count", count, 2 if vary == "fold" else 1)
    require_whole("seed", seed, 0)
    members = {
        f"member-{index}": Candidate(make, data=_part(vary, index, count, seed), seed=seed + index)
        for index in range(count)
    }
    sweep = ArchitectureSweep(
        members,
        monitor,
        mode,
        budget=FixedRounds(rounds=1, epochs=epochs),
        trainer=trainer,
        executor=executor,
        directory=directory,
        seed=seed,
        timeout=timeout,
        progress=progress,
    )
    try:
        result = sweep.run(data, val_dataloaders)
    except AllFailedError as error:
        raise MemberFailedError(str(error), []) from error
    found = [result[name] for name in members]
    if failed := [member for member in found if member.checkpoint is None]:
        raise MemberFailedError(
            f"All {count} members must train. Found {len(failed)} that did not: "
            f"{'; '.join(f'{member.name}: {member.state}: {member.reason}' for member in failed)}. Their output is in "
            f"log.txt under {str(Path(directory) / 'trials')!r}. Correct it and give a new directory, or go on with "
            "the `trained` of this error.",
            [member for member in found if member not in failed],
        )
    curves = [dict(member.curve) for member in found]
    if vary == "seed" and len(curves) > 1 and all(curve == curves[0] for curve in curves):
        rank_zero_warn(
            f"Members should differ, or an ensemble of them is no better than one. Found the same `{monitor}` at all "
            "epochs for all of them. Leave seeding to `train_members`: look for `manual_seed` and `seed_everything` "
            "where the module is made."
        )
    return found


def _part(vary: Vary, index: int, count: int, seed: int) -> DataPart | None:
    if vary == "fold":
        return Fold(index, count, seed)
    return Bootstrap(seed + index) if vary == "bootstrap" else None
