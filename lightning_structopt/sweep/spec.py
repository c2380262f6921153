"""What the driver tells a trial, as JSON: everything else lies in files that the driver wrote."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Send = Callable[[Message], None]


@dataclass(frozen=True)
class TrialSpec:
    """One rung of one candidate with one seed.

    Args:
        name: The candidate's name.
        candidate: File of the pickled candidate, its Trainer arguments and constraints.
        data: File of the pickled data.
        seed: Seeds everything before the candidate is built.
        monitor: The metric that counts.
        epochs: Epochs after which to stop, counted from the start of training.
        total_epochs: The Trainer's ``max_epochs``, the same at every rung.
        directory: Where the trial may write.
        save: Checkpoint to write.
        resume: Checkpoint to go on from; None at the first rung.
        newborn: Whether it is a child and that checkpoint its parent's.
        threads: CPU threads; None to leave them as they are.
        import_path: The driver's ``sys.path``.
    """

    name: str
    candidate: str
    data: str
    seed: int
    monitor: str
    epochs: int
    total_epochs: int
    directory: str
    save: str
    resume: str | None = None
    newborn: bool = False
    threads: int | None = None
    import_path: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """Where it is written."""
        return Path(self.directory) / "spec.json"

    def write(self) -> Path:
        """Write it for the process to read."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(asdict(self), indent=2) + "\n")
        return self.file

    @classmethod
    def read(cls, path: str | Path) -> "TrialSpec":
        """Read what :meth:`write` wrote."""
        found = json.loads(Path(path).read_text())
        return cls(**(found | {"import_path": tuple(found["import_path"])}))


def encode(message: Message) -> bytes:
    """Return ``message`` as it travels."""
    return json.dumps(message).encode()


def decode(message: bytes) -> Message:
    """Return what :func:`encode` was given."""
    found: Message = json.loads(message)
    return found
