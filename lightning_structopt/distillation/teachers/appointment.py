"""Which kind of teacher an argument stands for."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightning_structopt._checks import require_type
from lightning_structopt.distillation.cache.teacher_cache import TeacherCache
from lightning_structopt.distillation.pairs import Pair
from lightning_structopt.distillation.teachers.following import EMATeacher, FollowingTeacher
from lightning_structopt.distillation.teachers.frozen import FrozenTeacher, Precision, require_apart
from lightning_structopt.distillation.teachers.remembering import RememberingTeacher


def appoint(
    teacher: nn.Module | EMATeacher,
    student: nn.Module,
    pairs: Sequence[Pair],
    read: Callable[[Any], Any],
    precision: Precision | None,
    cache: TeacherCache | None,
) -> FrozenTeacher:
    """Return the teacher to ask.

    Args:
        teacher: A model, or what makes one of the student.
        student: Whom it teaches.
        pairs: What is compared.
        read: From a batch to its input.
        precision: What autocast computes in; None for what the trainer's precision says.
        cache: Where its outputs are kept; None for nowhere.

    Raises:
        TypeError: If ``teacher`` or ``cache`` is something else.
        ValueError: If it is trained with the student, or changes although there is a cache.
    """
    places = [pair.teacher for pair in pairs]
    if cache is not None:
        require_type("cache", cache, TeacherCache)
    if isinstance(teacher, EMATeacher):
        if cache is not None:
            raise ValueError(
                "A cache keeps what a teacher says for good. Found an `EMATeacher`, which changes with every step. "
                "Leave `cache` out."
            )
        return FollowingTeacher(student, places, read, teacher, precision)
    require_type("teacher", teacher, nn.Module)
    require_apart(teacher, student)
    if cache is not None:
        return RememberingTeacher(teacher, places, read, cache, precision)
    return FrozenTeacher(teacher, places, read, precision)
