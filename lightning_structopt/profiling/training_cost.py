"""What a training run took."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TrainingCost:
    """What training took, over all the times that it was resumed.

    Args:
        seconds: Wall-clock time within ``fit``, validation included.
        epochs: Epochs that were finished.
        steps: Optimizer steps.
        samples: Training samples on this process, each time they were seen.
        peak_bytes: The most memory that was held: on a GPU by PyTorch's allocator, on a CPU by the process.
    """

    seconds: float = 0.0
    epochs: int = 0
    steps: int = 0
    samples: int = 0
    peak_bytes: int = 0

    @property
    def samples_per_second(self) -> float:
        """The throughput, validation included."""
        return self.samples / self.seconds if self.seconds else 0.0

    def figures(self) -> dict[str, float]:
        """Return all of it by name, the throughput included."""
        return asdict(self) | {"samples_per_second": self.samples_per_second}
