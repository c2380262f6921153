"""Everything a sweep was asked to do, and where each thing lies in its directory."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from lightning_structopt._files import as_a_whole
from lightning_structopt.sweep.budget import Budget
from lightning_structopt.sweep.candidates import Candidate, fingerprint
from lightning_structopt.sweep.constraints import Rule
from lightning_structopt.sweep.space import SearchSpace
from lightning_structopt.sweep.spec import TrialSpec
from lightning_structopt.sweep.storage import Record


@dataclass(frozen=True)
class Plan:
    """A sweep's arguments, checked; see :class:`~lightning_structopt.ArchitectureSweep`."""

    candidates: Mapping[str, Candidate]
    space: SearchSpace | None
    monitor: str
    mode: str
    budget: Budget
    trainer: Mapping[str, Any]
    constraints: tuple[Rule, ...]
    directory: Path
    seed: int
    patience: int | None
    repeats: int
    timeout: float | None

    @property
    def names(self) -> list[str]:
        """The candidates, in order."""
        return list(self.candidates)

    @property
    def seeds(self) -> list[int]:
        """The seeds: the first for all candidates, the others for finalists."""
        return [self.seed + repeat for repeat in range(self.repeats)]

    @property
    def data_file(self) -> Path:
        """Where the pickled data lie."""
        return self.directory / "data.pkl"

    def trainer_of(self, name: str) -> dict[str, Any]:
        """Return the Trainer's arguments for a candidate."""
        return {**self.trainer, **self.candidates[name].trainer}

    def home(self, name: str) -> Path:
        """Return the folder of a candidate."""
        readable = re.sub(r"[^\w.-]+", "_", name)[:60]
        return self.directory / "trials" / f"{self.names.index(name):03d}-{readable}"

    def folder(self, record: Record) -> Path:
        """Return the folder of a candidate with one seed."""
        return self.home(record.candidate) / f"seed-{record.seed}"

    def seed_of(self, record: Record) -> int:
        """Return what seeds a trial: the sweep's seed or the candidate's own, and on from there for repeats."""
        own = self.candidates[record.candidate].seed
        return record.seed if own is None else own + record.seed - self.seed

    def spec(self, record: Record, epochs: int, threads: int | None) -> TrialSpec:
        """Return what a trial is told to bring ``record`` to ``epochs``."""
        folder = self.folder(record)
        return TrialSpec(
            name=record.candidate,
            candidate=str(self.home(record.candidate) / "candidate.pkl"),
            data=str(self.data_file),
            seed=self.seed_of(record),
            monitor=self.monitor,
            epochs=epochs,
            total_epochs=self.budget.total_epochs,
            directory=str(folder),
            save=str(folder / f"epoch-{epochs}.ckpt"),
            resume=str(self.directory / record.rungs[-1].checkpoint) if record.rungs else None,
            threads=threads,
            import_path=tuple(sys.path),
        )

    def write_candidate(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Write what a trial needs to build and train a candidate."""
        candidate = self.candidates[name]
        content = (candidate, self.trainer_of(name), self.constraints, dict(parameters))
        self.home(name).mkdir(parents=True, exist_ok=True)
        _dump(content, self.home(name) / "candidate.pkl", f"candidate {name!r}")

    def write_data(self, data: tuple[Any, Any]) -> None:
        """Write the data for all trials."""
        _dump(data, self.data_file, "the data")

    def describe(self) -> dict[str, Any]:
        """Return what makes this sweep another than others, as plain data."""
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "budget": repr(self.budget),
            "seed": self.seed,
            "repeats": self.repeats,
            "patience": self.patience,
            "space": None if self.space is None else self.space.describe(),
            "candidates": {name: fingerprint(candidate) for name, candidate in self.candidates.items()},
        }


def require_same(found: Mapping[str, Any], asked: Mapping[str, Any], directory: Path) -> None:
    """Raise unless the sweep that was ``found`` is the one that is ``asked`` for.

    Raises:
        ValueError: If it is another, naming what differs.
    """
    old, new = found["candidates"], asked["candidates"]
    differences = [
        *(f"candidate {name!r} is new" for name in new if name not in old),
        *(f"candidate {name!r} is missing" for name in old if name not in new),
        *(f"candidate {name!r} has changed" for name in new if name in old and new[name] != old[name]),
        *(f"`{key}` was {found[key]!r}, now {asked[key]!r}" for key in asked
          if key != "candidates" and found.get(key) != asked[key]),
    ]  # fmt: skip
    if not differences and list(old) != list(new):
        differences = ["the candidates are in another order"]
    if differences:
        raise ValueError(
            f"`directory` must hold this sweep or none. Found another in {str(directory)!r}: {'; '.join(differences)}. "
            "Undo the change to go on with it, or give a new directory."
        )


def _dump(content: Any, path: Path, what: str) -> None:
    try:
        pickled = cloudpickle.dumps(content)
    except Exception as error:  # whatever the user's objects raise
        raise TypeError(
            f"What goes to other processes must be picklable. Found that {what} isn't: {error}. Build what can't be "
            "pickled within the candidate's function."
        ) from error
    with as_a_whole(path) as beside:  # trials of other drivers may be reading
        beside.write_bytes(pickled)
