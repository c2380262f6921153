"""What losses ask of the outputs that they compare: shapes that fit, and enough precision."""

import torch
from torch import Tensor


def require_same_shape(owner: str, student: Tensor, teacher: Tensor, remedy: str) -> None:
    """Raise unless both outputs have one shape.

    Args:
        owner: The loss that asks.
        student: The student's output.
        teacher: The teacher's output.
        remedy: What to do about it.

    Raises:
        ValueError: If they differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"`{owner}` needs outputs of the same shape. Found the student's of shape {tuple(student.shape)} and the "
            f"teacher's of shape {tuple(teacher.shape)}. {remedy}"
        )


def require_same_classes(owner: str, student: Tensor, teacher: Tensor, dim: int = 1) -> None:
    """Raise unless both outputs are scores of the same number of classes, two or more, at the same positions.

    Args:
        owner: The loss that asks.
        student: The student's logits.
        teacher: The teacher's logits.
        dim: Which dimension the classes are in; -1 for tokens of a vocabulary.

    Raises:
        ValueError: If they are not.
    """
    for who, output in (("student", student), ("teacher", teacher)):
        if output.ndim < 2 or (dim == -1 and output.ndim < 3):
            layout = "(N, L, V)" if dim == -1 else "(N, C) or (N, C, ...)"
            raise ValueError(
                f"`{owner}` needs logits of shape {layout}. Found the {who}'s output of shape {tuple(output.shape)}. "
                f"Use {'`SoftTarget` for one prediction a sample' if dim == -1 else '`LogitMSE` for regression'}."
            )
    _require_same_count(owner, student.shape[dim], teacher.shape[dim], dim)
    require_same_shape(
        owner, student, teacher, "Let both see the same input, or resize one of the two outputs."
    )


def _require_same_count(owner: str, student: int, teacher: int, dim: int) -> None:
    if student != teacher and dim == -1:
        raise ValueError(
            f"`{owner}` needs one vocabulary. Found {teacher} tokens of the teacher's and {student} of the student's. "
            "Use the same tokenizer; if only padding of the vocabulary differs, cut the longer logits off."
        )
    if student != teacher:
        raise ValueError(
            f"The teacher returned {teacher} classes and the student {student}. `{owner}` compares class by class: "
            "give both the same classes, or distill features with `Hint`, whose adapter fits one to the other."
        )
    if student < 2:
        raise ValueError(
            f"`{owner}` needs two or more classes, as the probability of a single one is always 1. Found one output. "
            "Use `LogitMSE`, also for a single logit."
        )


def require_mask(owner: str, mask: Tensor, positions: torch.Size) -> Tensor:
    """Return ``mask`` as booleans.

    Args:
        owner: The loss that asks.
        mask: Which positions count: booleans, or zeros and ones.
        positions: The shape that it must have.

    Raises:
        ValueError: If it has another shape.
    """
    if mask.shape != positions:
        raise ValueError(
            f"`mask` says for each position whether it counts, so `{owner}` needs one of shape {tuple(positions)} "
            f"here. Found shape {tuple(mask.shape)}. Give True where the output counts."
        )
    return mask.bool()


def mean_over(owner: str, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of ``values``, of those that ``mask`` chooses; zero where it chooses none.

    Args:
        owner: The loss that asks.
        values: One for each position.
        mask: Which positions count, of the same shape; None for all.
    """
    if mask is None:
        return values.mean()
    chosen = require_mask(owner, mask, values.shape)
    return values.where(chosen, 0).sum() / chosen.sum().clamp_min(1)
