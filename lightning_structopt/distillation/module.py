"""Distillation as a LightningModule that stands in for the student."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.compile import from_compiled
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from typing_extensions import override

from lightning_structopt._checks import require_callable, require_lightning, require_type
from lightning_structopt.distillation.balance import Balance
from lightning_structopt.distillation.batches import default_input
from lightning_structopt.distillation.cache.sample_ids import Identified
from lightning_structopt.distillation.cache.teacher_cache import TeacherCache
from lightning_structopt.distillation.comparison import Comparison
from lightning_structopt.distillation.distiller import Distiller
from lightning_structopt.distillation.export import export
from lightning_structopt.distillation.losses.logits import DistillationLoss, SoftTarget
from lightning_structopt.distillation.pairs import Place, Weighted, pairs_from
from lightning_structopt.distillation.stand_in import StandIn
from lightning_structopt.distillation.taps import LOGITS, Taps
from lightning_structopt.distillation.teachers.appointment import appoint
from lightning_structopt.distillation.teachers.following import EMATeacher
from lightning_structopt.distillation.teachers.frozen import Precision
from lightning_structopt.distillation.teachers.sharding import shard
from lightning_structopt.schedules import Schedule

Outputs: TypeAlias = Tensor | dict[str, Tensor]
_KEY = "lightning_structopt.distillation"  # in checkpoints, beside what is the student's


class DistillationModule(StandIn):
    r"""Trains ``student`` by its own ``training_step`` plus what ``teacher`` knows.

    .. math:: (1 - \alpha) \, L_\mathrm{task} + \alpha \sum_k w_k L_k(s_k, t_k)

    Give it to the trainer in the student's place. The student's steps, optimizers, schedulers, logging, data loaders
    and other hooks work as they did; the outputs that losses compare are caught in the very pass that its
    ``training_step`` makes. Parameters, state-dict keys and hyperparameters are the student's, so every checkpoint
    loads into the student's own class. Logged as means over each epoch: ``kd/task``, ``kd/`` and the name of each
    loss, and ``kd/agreement``, how often both rate the same class highest; every ``log_every_n_steps`` steps a logger
    gets them with ``_step`` after the name.

    A subclass may override :meth:`distillation_loss`. A hook that it overrides takes the place of the student's; call
    that as ``self.student.on_train_epoch_end()``. An attribute that the student has is the student's, so call those of
    the subclass otherwise.

    Args:
        teacher: A model, trained already. It is not changed, but moved to the student's device and put in ``eval``
            mode. Several: :class:`~lightning_structopt.Teachers` or an ensemble; the student's own past:
            :class:`~lightning_structopt.EMATeacher`.
        student: The module to train, with automatic optimization.
        loss: What to compare the outputs with, by default :class:`~lightning_structopt.SoftTarget`; or a mapping from
            places to losses, as in ``{"logits": SoftTarget(), ("layer2", "stage1.1"): (0.1, Hint())}``: a module's
            name in student and teacher, "logits" for a model's output, and a weight if it is not 1. Adapters in losses
            join the fastest parameter group of the student's first optimizer.
        alpha: The teacher's share of the total, in [0, 1]; by default 0.5.
        weight: Instead of ``alpha``: the factor on what the teacher adds to a task that counts in full, in [0, inf).
        schedule: What ``alpha`` or ``weight`` is multiplied by over optimizer steps.
        teacher_input: From a batch to the teacher's input: a tensor, a tuple of arguments or a mapping of named ones.
            By default the first part of a tuple, or a mapping whole.
        target: From a batch to its labels, for losses that need them; by default its second part.
        mask: From a batch to which positions count, as for padded sequences; by default all.
        teacher_precision: What autocast runs the teacher in: "float32", "bfloat16" or "float16"; by default what the
            trainer's precision says.
        shard_teacher: Whether ranks share the teacher's weights, under ``ModelParallelStrategy`` (FSDP2); by default
            each holds all of them.
        cache: Keeps the teacher's outputs by sample, so that it runs once for each. The training data set must be
            wrapped in :class:`~lightning_structopt.WithIds`; the student sees its batches as without.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, the student optimizes by hand or shares trained parameters with
            the teacher; at the start of ``fit`` if a tap names nothing; in the first step if outputs don't fit the
            losses; and whenever the teacher's output is NaN.

    Example:
        >>> module = DistillationModule(teacher, student, SoftTarget(4.0), alpha=0.9)  # doctest: +SKIP
        >>> pl.Trainer(max_epochs=20).fit(module, datamodule)  # doctest: +SKIP

    See Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (https://arxiv.org/abs/1503.02531).
    """

    _kd: Distiller
    _by_place: bool
    _takes_index: bool
    _shards_teacher: bool
    _ids: Tensor | None

    def __init__(
        self,
        teacher: nn.Module | EMATeacher,
        student: pl.LightningModule,
        loss: DistillationLoss | Mapping[Place, Weighted] | None = None,
        alpha: float | None = None,
        weight: float | None = None,
        schedule: Schedule | None = None,
        teacher_input: Callable[[Any], Any] | None = None,
        target: Callable[[Any], Tensor] | None = None,
        mask: Callable[[Any], Tensor] | None = None,
        teacher_precision: Precision | None = None,
        shard_teacher: bool = False,
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__(_require_student(student))
        require_type("shard_teacher", shard_teacher, bool)
        for name, function in (("teacher_input", teacher_input), ("target", target), ("mask", mask)):
            if function is not None:
                require_callable(name, function)
        if shard_teacher and cache is not None:
            raise ValueError(
                "A teacher in shards is asked by all ranks together, and a cache may answer some of them. Found "
                "`shard_teacher=True` and a `cache`. Leave one of them out."
            )
        pairs = pairs_from(SoftTarget() if loss is None else loss)
        read = default_input if teacher_input is None else teacher_input
        # Straight into the dict: what a student has of this name stays the student's.
        vars(self)["_kd"] = Distiller(
            appoint(teacher, self.student, pairs, read, teacher_precision, cache),
            Taps(self.student, [pair.student for pair in pairs], "student"),
            Comparison(pairs, target, mask),
            Balance(alpha, weight, schedule),
        )
        vars(self)["_by_place"] = isinstance(loss, Mapping)
        vars(self)["_shards_teacher"] = shard_teacher
        vars(self)["_ids"] = None
        if isinstance(teacher, EMATeacher):
            # Not at the end of the batch: checkpoints are saved before that.
            vars(self)["optimizer_step"] = self._step_and_follow
        # As Lightning asks it: `training_step(self, batch)` is not given the index.
        step = self.student.training_step
        vars(self)["_takes_index"] = is_param_in_hook_signature(step, "batch_idx", min_args=2)

    @property
    def teacher(self) -> nn.Module:
        """The model that the student learns from."""
        return self._kd.teacher.module

    def distillation_loss(self, student_out: Outputs, teacher_out: Outputs, batch: Any) -> Tensor:
        """Return what is to be learned from the teacher for a batch, a scalar; override it for a loss of your own.

        Args:
            student_out: The student's output; where ``loss`` is a mapping, all its tapped outputs by place.
            teacher_out: The teacher's, likewise.
            batch: The batch, as the student's ``training_step`` is given it.
        """
        student, teacher = self._places_of(student_out), self._places_of(teacher_out)
        values = self._kd.comparison.values(student, teacher, batch)
        self._note({f"kd/{title}": value for title, value in values.items()}, student)
        return self._kd.comparison.total(values)

    def export_student(self, path: str | Path) -> None:
        """Write the student alone to a file that ``StudentClass.load_from_checkpoint(path)`` takes.

        So does ``trainer.validate(StudentClass(), ckpt_path=path)``, both with ``weights_only=True``. Under sharding
        strategies all ranks call it together.

        Args:
            path: Where to.

        Raises:
            ValueError: If hyperparameters are not plain data.
        """
        export(self.student, path)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        kd, trainer = self._kd, self._trainer
        kd.advance(trainer)
        with kd.taps:
            arguments = (batch, batch_idx) if self._takes_index else (batch,)
            output = self.student.training_step(*arguments)
        if output is None:  # the student skips this batch
            return None
        student, teacher = kd.taps.take(), kd.teacher(batch, batch_idx, self._ids)
        kd.adapt(student, teacher, trainer)
        distillation = self.distillation_loss(self._shown(student), self._shown(teacher), batch)
        task = output["loss"] if isinstance(output, Mapping) else output
        logged = {"kd/task": task, "kd/agreement": kd.comparison.agreement(student, teacher, batch)}
        self._note({name: value for name, value in logged.items() if value is not None}, student)
        total = kd.total(task, distillation)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    @override
    def setup(self, stage: str) -> None:
        require_lightning("DistillationModule", self.trainer, self.student)
        if stage == "fit":
            self._place_teacher(self.trainer.strategy.root_device)
        self.student.setup(stage)

    @override
    def on_fit_start(self) -> None:
        self._kd.attach(self.trainer)
        self.student.on_fit_start()

    @override
    def on_train_start(self) -> None:
        # Not earlier: asking for the horizon loads the data, after which a stateful loader is not restored.
        self._kd.start(self.trainer)
        self._kd.teacher.require_data(self.trainer.train_dataloader)
        self.student.on_train_start()

    @override
    def on_train_epoch_start(self) -> None:
        self._kd.teacher.start_epoch()
        self.student.on_train_epoch_start()

    @override
    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        # Before any hook of student or data module, and on the CPU, where a cache wants the numbers.
        vars(self)["_ids"] = None
        if isinstance(batch, Identified):
            vars(self)["_ids"], batch = batch
        return super()._on_before_batch_transfer(batch, dataloader_idx)

    @override
    def on_after_backward(self) -> None:
        self._kd.average_gradients(self.trainer)
        self.student.on_after_backward()

    @override
    def on_train_epoch_end(self) -> None:
        self._kd.teacher.require_numbers()
        if not self.trainer.barebones:
            samples = self._kd.means.samples
            self.log_dict(self._kd.means.take(), sync_dist=True, batch_size=samples)
        self.student.on_train_epoch_end()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if state := self._kd.state_dict():
            checkpoint[_KEY] = state
        self.student.on_save_checkpoint(checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if state := checkpoint.get(_KEY):
            self._kd.load_state_dict(state, self.device)
        self.student.on_load_checkpoint(checkpoint)

    @override
    def teardown(self, stage: str) -> None:
        self._kd.detach()
        self.student.teardown(stage)

    def _step_and_follow(self, *args: Any, **kwargs: Any) -> None:
        self.student.optimizer_step(*args, **kwargs)
        self._kd.teacher.follow()

    def _place_teacher(self, device: torch.device) -> None:
        if self._shards_teacher:
            shard(self.teacher, self.device_mesh, device)
        self._kd.teacher.to(device)

    def _shown(self, outputs: dict[str, Tensor]) -> Outputs:
        return outputs if self._by_place else next(iter(outputs.values()))

    def _places_of(self, outputs: Outputs) -> dict[str, Tensor]:
        return outputs if isinstance(outputs, dict) else {LOGITS: outputs}

    def _note(self, values: dict[str, Tensor], student: Mapping[str, Tensor]) -> None:
        """Take ``values`` into the means of the epoch; where the logger writes this step, log them as they are."""
        output = next(iter(student.values()))
        samples = len(output) if output.ndim else 1
        self._kd.means.add(values, samples)
        trainer: Any = self._trainer
        if (
            trainer is not None
            and trainer.logger
            and (trainer.global_step + 1) % trainer.log_every_n_steps == 0
        ):
            steps = {f"{name}_step": value for name, value in values.items()}
            self.log_dict(steps, on_step=True, on_epoch=False, batch_size=samples)


def _require_student(student: object) -> pl.LightningModule:
    """Return the module to train, unwrapped where it is compiled.

    Raises:
        TypeError: If it is no LightningModule, or reads its own batches.
        ValueError: If it optimizes by hand.
    """
    if isinstance(student, OptimizedModule):
        student = from_compiled(student)
    require_lightning("DistillationModule", None, student)
    require_type("student", student, pl.LightningModule)
    assert isinstance(student, pl.LightningModule)
    if not student.automatic_optimization:
        raise ValueError(
            "The student must leave its optimization to Lightning, as its loss is added to before `backward`. Found "
            f"`automatic_optimization = False` in `{type(student).__name__}`. Return the loss from `training_step`, or "
            "call a `DistillationLoss` in it yourself."
        )
    if is_param_in_hook_signature(student.training_step, "dataloader_iter", explicit=True):
        raise TypeError(
            "The teacher sees the batch that the student's `training_step` is given. Found a `training_step` that "
            f"takes `dataloader_iter`, in `{type(student).__name__}`. Let it take `batch`."
        )
    return student
