"""Models that the tests of distillation share, and distillation as one would write it by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from support import Classifier, adamw, loader, trainer
from torch import Tensor, nn

from lightning_structopt.distillation import DistillationModule


def a_teacher(hidden: int = 24) -> Classifier:
    """A frozen-looking teacher, always the same, with nothing but its weights to tell of training."""
    return Classifier(hidden=hidden, seed=7)


class ByHand(Classifier):
    """What a user would write: the teacher called within ``training_step``, and the total returned."""

    def __init__(
        self,
        teacher: nn.Module,
        loss: Callable[..., Tensor],
        factors: Callable[[int], tuple[float, float]] = lambda step: (0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        vars(self).update(teacher=teacher.eval(), loss=loss, factors=factors)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        student = self(inputs)
        task = nn.functional.cross_entropy(student.float(), labels)
        with torch.no_grad():
            teacher = self.teacher(inputs)
        of_task, of_teacher = self.factors(self.trainer.global_step)
        return of_task * task + of_teacher * self.loss(student, teacher, labels)


def fit(
    root: Path, module: pl.LightningModule, *callbacks: pl.Callback, ckpt: Any = None, **kwargs: Any
) -> pl.Trainer:
    run = trainer(root, *callbacks, **kwargs)
    run.fit(module, loader(), loader(), ckpt_path=ckpt)
    return run


def distilling(
    loss: Any = None, student: pl.LightningModule | None = None, **kwargs: Any
) -> DistillationModule:
    return DistillationModule(a_teacher(), Classifier(adamw) if student is None else student, loss, **kwargs)
