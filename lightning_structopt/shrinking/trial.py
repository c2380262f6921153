"""Trying out a smaller module of the same class."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_structopt.shrinking.attributes import Edits, candidate_edits, choose_edits
from lightning_structopt.shrinking.literals import all_literals
from lightning_structopt.shrinking.structure import Structure
from lightning_structopt.shrinking.surgery import set_attributes, sizes_that_tell, smaller_copy
from lightning_structopt.shrinking.tracing import Trace
from lightning_structopt.shrinking.verify import (
    TOLERANCE,
    difference,
    failing_parts,
    largest_difference,
    outputs_of,
)

Lists = dict[str, dict[int, list[int]]]


@dataclass(frozen=True)
class _Worked:
    """A smaller module that computes what it shall in evaluation, and what made it."""

    edits: Edits
    small: nn.Module
    attributes: dict[str, dict[str, Any]]
    gap: float


class Trial:
    """Tries what makes the smaller module work.

    Args:
        structure: The module.
        masked: What it is compared with; None to see only whether it runs.
        lists: The indices that are kept.
        changes_outputs: Whether a difference is expected.
    """

    def __init__(
        self, structure: Structure, masked: nn.Module | None, lists: Lists, changes_outputs: bool
    ) -> None:
        self.reason = ""
        self.failed: list[str] = []
        self._structure, self._masked, self._lists = structure, masked, lists
        self._changes_outputs = changes_outputs
        self._worked: _Worked | None = None
        self._expected = [] if masked is None else outputs_of(masked, structure.inputs)

    def choose(self, kept: Tensor) -> Edits | None:
        """Return the attributes with which the smaller module works; None if there are none.

        Args:
            kept: For each label, whether it is kept.
        """
        module = self._structure.module
        literals = all_literals(self._structure.traced, kept)
        return choose_edits(module, candidate_edits(module, literals), self.works)

    def small(self, edits: Edits) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
        """Return the smaller module and all attributes that it has of its own."""
        if self._worked is not None and self._worked.edits == edits:
            return self._worked.small, self._worked.attributes
        small = smaller_copy(self._structure.module, self._lists)
        set_attributes(small, edits)
        told = sizes_that_tell(small)
        set_attributes(small, told)
        paths = [*edits, *(path for path in told if path not in edits)]
        return small, {path: {**edits.get(path, {}), **told.get(path, {})} for path in paths}

    def works(self, edits: Edits) -> bool | list[str]:
        """Tell whether the smaller module computes the same, or where it failed."""
        small, attributes = self.small(edits)
        try:
            found = outputs_of(small, self._structure.inputs)
        except Exception as error:  # whatever the user's code raises when sizes don't fit
            self.failed = failing_parts(small, error)
            self.reason = f" (`{self.failed[0]}`: {str(error).strip().splitlines()[0]})"
            return self.failed
        gap = 0.0 if self._masked is None else largest_difference(self._expected, found)
        if gap > TOLERANCE and not self._changes_outputs:
            gap = self._gap(small, self._expected, training=False)
        if gap > TOLERANCE and not self._changes_outputs:
            return False
        self._worked = _Worked(edits, small, attributes, gap)
        return True

    def _gap(self, small: nn.Module, expected: list[Tensor], training: bool) -> float:
        assert self._masked is not None
        try:
            return difference(self._masked, expected, small, self._structure.inputs, training)
        except Exception as error:  # whatever the user's code raises when sizes don't fit
            mode = "training" if training else "evaluation"
            raise ValueError(
                f"A smaller module must run in {mode} where the masked one does. Found {type(error).__name__}: "
                f"{error}. Name parameters of that part in `exclude`."
            ) from error

    def checked(self, small: nn.Module) -> float:
        """Return the largest difference in evaluation and training; last, as it changes the masked module.

        Raises:
            ValueError: If outputs differ that should not.
        """
        if self._worked is not None and self._worked.small is small:
            gap = self._worked.gap
        else:
            gap = self._gap(small, self._expected, training=False)
        expected = self._trained()
        if expected is not None:
            gap = max(gap, self._gap(small, expected, training=True))
        if gap > TOLERANCE and not self._changes_outputs:
            raise ValueError(
                "A smaller module must compute what the masked one does. Found outputs that differ by "
                f"{gap:.1e} of the largest. Please report the module; name parameters in `exclude` to go around it."
            )
        return gap

    def _trained(self) -> list[Tensor] | None:
        """Return the outputs of the masked module in training; None where it has none for a batch of one.

        Raises:
            ValueError: If the module itself raises one.
        """
        assert self._masked is not None
        try:
            return outputs_of(self._masked, self._structure.inputs, training=True)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):  # of a batch norm
                return None
            raise


def kept_indices(traced: Trace, kept: Tensor) -> Lists:
    """Return which indices of parameters and buffers are kept, of those that get smaller.

    Args:
        traced: The module's graph with labels.
        kept: For each label, whether it is kept.
    """
    lists: Lists = {}
    for origin in traced.origins:
        own = kept[origin.first : origin.first + origin.size]
        if not bool(own.all()):
            lists.setdefault(origin.name, {})[origin.dim] = own.nonzero()[:, 0].tolist()
    return lists
