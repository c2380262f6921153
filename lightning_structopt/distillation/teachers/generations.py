"""Born-again networks: each generation learns from the one before."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from lightning_structopt._checks import require_whole

Student = TypeVar("Student", bound=nn.Module)


def born_again(
    make_student: Callable[[], Student],
    teach: Callable[[nn.Module, Student], Any],
    train: Callable[[Any], Any],
    generations: int = 3,
) -> list[Student]:
    """Train a student from labels, the next one from that and so on; return all of them, the first one first.

    Furlanello et al., "Born Again Neural Networks", 2018 (https://arxiv.org/abs/1805.04770); the mean of their outputs
    (:class:`~lightning_structopt.Teachers`) is often better than the last.

    Args:
        make_student: Makes an untrained student.
        teach: Makes of a teacher and a student what is to be trained, such as ``DistillationModule``.
        train: Trains that, or a student alone; it makes a trainer of its own each time.
        generations: How many students are trained, at least 1.

    Raises:
        ValueError: If ``generations`` is smaller than 1.
        TypeError: If ``generations`` is not a whole number.

    Example:
        >>> from lightning_structopt import DistillationModule  # doctest: +SKIP
        >>> students = born_again(
        ...     MyModule, DistillationModule, lambda module: pl.Trainer(max_epochs=20).fit(module, datamodule)
        ... )  # doctest: +SKIP
    """
    require_whole("generations", generations, 1)
    students: list[Student] = []
    for _ in range(generations):
        student = make_student()
        train(teach(students[-1], student) if students else student)
        students.append(student)
    return students
