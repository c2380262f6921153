"""The teacher: kept out of the student's sight, frozen, on the student's device."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_structopt._checks import require_choice
from lightning_structopt.distillation.batches import call_with, require_takes, with_dtype
from lightning_structopt.distillation.taps import Taps

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
_CHECK_EVERY = 50  # batches: looking at a number on an accelerator waits for it


class FrozenTeacher:
    """A model that is asked and never trained.

    It is no module, so what it holds stays out of state dicts, optimizers, DDP and summaries, and copies of the
    student (as averages of weights are) ask the same teacher. Each call runs it in ``eval`` mode without gradients.

    Args:
        module: The teacher.
        places: What to return: names of its modules, or "logits".
        read: From a batch to its input: a tensor, a tuple of arguments or a mapping of named arguments.
        precision: What autocast computes in; None for what the trainer's precision says.

    Raises:
        ValueError: If ``precision`` is none of these. When called or attached: if a place doesn't fit, or an output
            is NaN or requires a gradient.

    Example:
        >>> teacher = FrozenTeacher(nn.Linear(3, 2), ["logits"], read=lambda batch: batch[0])
        >>> teacher.attach()
        >>> teacher((torch.ones(4, 3), torch.ones(4)), batch_idx=0)["logits"].shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        module: nn.Module,
        places: Iterable[str],
        read: Callable[[Any], Any],
        precision: Precision | None = None,
    ) -> None:
        if precision is not None:
            require_choice("teacher_precision", precision, ("float32", "bfloat16", "float16"))
        self.module = module
        self.read = read
        self.precision = precision
        self.taps = Taps(module, places, "teacher")
        self.device = torch.device("cpu")
        self._parts: tuple[nn.Module, ...] = ()
        self._first_nan: Tensor | None = None

    def attach(self) -> None:
        """Get ready for calls.

        Raises:
            ValueError: If there is no module of a name.
        """
        self._parts = tuple(self.module.modules())
        self._first_nan = None
        self.taps.attach()

    def to(self, device: torch.device) -> None:
        """Move the module, and have answers there."""
        self.device = device
        self.module.to(device)

    def start_epoch(self) -> None:
        """Get ready for an epoch: nothing to do."""
        return

    def require_data(self, loader: Any) -> None:
        """Raise if the teacher can't be asked about what ``loader`` gives; it can be about anything."""
        return

    def detach(self) -> None:
        """Leave the module as it was, but in ``eval`` mode."""
        self.taps.remove()
        self._parts = ()

    @torch.no_grad()
    def __call__(self, batch: Any, batch_idx: int, ids: Tensor | None = None) -> dict[str, Tensor]:
        """Return what the teacher says of a batch, by place.

        Args:
            batch: What the student's ``training_step`` is given.
            batch_idx: Its number, for messages.
            ids: Numbers of its samples, for teachers that remember them.

        Raises:
            TypeError: If the teacher does not take what is read of the batch.
            ValueError: If an output is NaN or requires a gradient.
        """
        if not self._parts:
            self.attach()
        for part in self._parts:
            if part.training:  # someone called `train()`, or Lightning restored a mode
                part.training = False
        inputs = self._as_weights(self.read(batch))
        if batch_idx == 0:
            require_takes(self.module, inputs)
        with self.taps, self._autocast():
            call_with(self.module, inputs)
        caught = self.taps.take()
        if any(output.grad_fn is not None for output in caught.values()):
            raise ValueError(
                "The teacher must be frozen. Found an output that requires a gradient, so its `forward` switches "
                "gradients on. Remove `torch.enable_grad()` from it; to train both, use `MutualDistillation`."
            )
        outputs = {place: output.detach() for place, output in caught.items()}  # a weight's view requires one
        self._look_for_nan(outputs, batch_idx)
        return outputs

    def follow(self) -> None:
        """Learn from the student, which has taken a step; a frozen teacher doesn't."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs of the teacher: nothing of a frozen one."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        return

    def require_numbers(self) -> None:
        """Raise if an output has been NaN.

        Raises:
            ValueError: If one has, with the first batch.
        """
        if self._first_nan is not None and (batch := int(self._first_nan)) >= 0:
            raise ValueError(
                f"The teacher must put out numbers. Found NaN for batch {batch}. Check that its weights are loaded and "
                "finite, that its input is scaled as in its own training, and its precision."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def _look_for_nan(self, outputs: dict[str, Tensor], batch_idx: int) -> None:
        sums = [output.sum() for output in outputs.values()]
        if all(one.device.type == "cpu" for one in sums):
            if any(math.isnan(one) for one in sums):
                self._first_nan = torch.tensor(batch_idx)
            self.require_numbers()
            return
        # On an accelerator the first bad batch is kept there, and looked at now and then.
        found = torch.stack([one.isnan() for one in sums]).any()
        seen = torch.where(found, batch_idx, -1)
        first = self._first_nan
        self._first_nan = seen if first is None else torch.where(first >= 0, first, seen)
        if batch_idx % _CHECK_EVERY == 0:
            self.require_numbers()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        dtype: torch.dtype = getattr(torch, self.precision)
        device = next((weight.device.type for weight in self.module.parameters()), "cpu")
        return torch.autocast(device, dtype, enabled=self.precision != "float32")

    def _as_weights(self, inputs: Any) -> Any:
        """Return ``inputs`` in the precision of the weights: under "bf16-true" only the student's are bfloat16."""
        weight = next((w for w in self.module.parameters() if w.is_floating_point()), None)
        return inputs if weight is None else with_dtype(inputs, weight.dtype)


def require_apart(teacher: nn.Module, student: nn.Module) -> None:
    """Raise if training ``student`` trains parts of ``teacher``.

    Raises:
        ValueError: If they share a parameter that requires a gradient.
    """
    theirs = {id(parameter) for parameter in teacher.parameters() if parameter.requires_grad}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in theirs]
    if shared:
        raise ValueError(
            f"The teacher is frozen, so it can't be trained with the student. Found that both hold `{shared[0]}`, "
            "which requires a gradient. Give `copy.deepcopy(student)` as teacher, or `EMATeacher()`."
        )
