"""Everything a sweep was asked to do, and where each thing lies in its directory."""

import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_structopt.sweep.budget import Budget
from lightning_structopt.sweep.candidates import Candidate, fingerprint
from lightning_structopt.sweep.constraints import Rule
from lightning_structopt.sweep.heirs import Heirs, Mutation, lineage, root
from lightning_structopt.sweep.pickles import dump
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
    mutate: tuple[Mutation, ...] = ()

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

    def trainer_of(self, name: str, heirs: Heirs | None = None) -> dict[str, Any]:
        """Return the Trainer's arguments for a candidate; those of a child are its ancestor's."""
        return {**self.trainer, **self.candidates[root(name, heirs or {})].trainer}

    def home(self, name: str) -> Path:
        """Return the folder of a candidate."""
        readable = re.sub(r"[^\w.-]+", "_", name)[:60]
        if name in self.candidates:
            return self.directory / "trials" / f"{self.names.index(name):03d}-{readable}"
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]  # names of children may be long
        return self.directory / "trials" / f"child-{readable}-{digest}"

    def folder(self, record: Record) -> Path:
        """Return the folder of a candidate with one seed."""
        return self.home(record.candidate) / f"seed-{record.seed}"

    def changes(self, name: str, heirs: Heirs) -> list[tuple[Mutation, Path]]:
        """Return the mutations that make a candidate of its ancestor, and where each keeps what it did."""
        return [
            (self.mutate[heir.mutation], self.home(heir.name) / "change.json")
            for heir in lineage(name, heirs)
        ]

    def seed_of(self, record: Record, heirs: Heirs) -> int:
        """Return what seeds a trial: the sweep's seed or the candidate's own, and on from there for repeats."""
        own = self.candidates[root(record.candidate, heirs)].seed
        return record.seed if own is None else own + record.seed - self.seed

    def spec(
        self,
        record: Record,
        epochs: int,
        threads: int | None,
        heirs: Heirs,
        inherited: Path | None = None,
    ) -> TrialSpec:
        """Return what a trial is told to bring ``record`` to ``epochs``.

        Args:
            record: A candidate.
            epochs: The rung.
            threads: CPU threads; None to leave them as they are.
            heirs: All children.
            inherited: The checkpoint of its parent that a child begins with.
        """
        folder = self.folder(record)
        resume = self.directory / record.rungs[-1].checkpoint if record.rungs else inherited
        return TrialSpec(
            name=record.candidate,
            candidate=str(self.home(record.candidate) / "candidate.pkl"),
            data=str(self.data_file),
            seed=self.seed_of(record, heirs),
            monitor=self.monitor,
            epochs=epochs,
            total_epochs=self.budget.total_epochs,
            directory=str(folder),
            save=str(folder / f"epoch-{epochs}.ckpt"),
            resume=str(resume) if resume else None,
            newborn=inherited is not None,
            threads=threads,
            import_path=tuple(sys.path),
        )

    def write_candidate(self, name: str, parameters: Mapping[str, Any], heirs: Heirs) -> None:
        """Write what a trial needs to build and train a candidate."""
        candidate, changes = self.candidates[root(name, heirs)], self.changes(name, heirs)
        content = (candidate, self.trainer_of(name, heirs), self.constraints, dict(parameters), changes)
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
            "mutate": [repr(mutation) for mutation in self.mutate] or None,
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
        dump(content, path)
    except OSError:  # a full disk
        raise
    except Exception as error:  # whatever the user's objects raise
        raise TypeError(
            f"What goes to other processes must be picklable. Found that {what} isn't: {error}. Build what can't be "
            "pickled within the candidate's function."
        ) from error
