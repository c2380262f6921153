"""A stand-in is to Lightning what the student is: the same hooks, state, names and signatures."""

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from support import Classifier, adamw, assert_same_state, loader, trainer
from torch import nn

from lightning_structopt.distillation import DistillationModule
from lightning_structopt.distillation.stand_in import StandIn

STEPS = {"training_step", "validation_step", "test_step", "predict_step", "configure_optimizers"}
MORE = {
    "backward", "configure_callbacks", "configure_gradient_clipping", "forward", "lr_scheduler_step",
    "optimizer_step", "optimizer_zero_grad", "state_dict", "load_state_dict", "train",
}  # fmt: skip
LEGACY = {"configure_sharded_model"}  # Lightning asks not to have both this and `configure_model`
LOADERS = {"train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"}
KINDS = (ModelHooks, DataHooks, CheckpointHooks)
HOOKS = {name for kind in KINDS for name, _ in inspect.getmembers(kind, inspect.isfunction)}
HOOKS -= {"__init__"} | LEGACY | LOADERS


def recorder(names: set[str], calls: list[str]) -> type[Classifier]:
    """Make a student that overrides every hook, and writes down which is called."""

    def recording(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return getattr(super(kind, self), name)(*args, **kwargs)

        return hook

    kind = type("Recorder", (Classifier,), {})
    for name in names:
        setattr(kind, name, recording(name))
    for name in LOADERS:
        setattr(kind, name, lambda self, name=name: (calls.append(name), loader())[1])
    return kind


def all_calls(root: Path, wrap: Any) -> tuple[list[str], pl.LightningModule]:
    calls: list[str] = []
    module = wrap(recorder(HOOKS | MORE | STEPS, calls)(adamw))
    calls.clear()
    run = trainer(root, max_epochs=2, gradient_clip_val=1.0)
    run.fit(module)
    run.save_checkpoint(root / "last.ckpt")
    run.fit_loop.max_epochs = 3
    run.fit(module, ckpt_path=root / "last.ckpt")
    run.validate(module, verbose=False)
    run.test(module, verbose=False)
    run.predict(module)
    return calls, module


def test_every_hook_of_the_student_is_called_as_without_the_stand_in(tmp_path: Path) -> None:
    alone, student = all_calls(tmp_path, lambda student: student)
    wrapped, module = all_calls(
        tmp_path, lambda student: DistillationModule(Classifier(seed=3), student, alpha=0.0)
    )
    assert wrapped == alone
    expected = HOOKS - {"on_validation_model_zero_grad", "prepare_data"} | STEPS
    assert expected <= set(alone)
    assert_same_state(module.student.state_dict(), student.state_dict())


@pytest.mark.parametrize(
    "wrap", [StandIn, lambda s: DistillationModule(Classifier(), s)], ids=["plain", "distilling"]
)
def test_lightning_sees_the_same_overrides(wrap: Any) -> None:
    class Bare(pl.LightningModule):
        def training_step(self, batch: Any) -> None:
            return None

    for student in (Bare(), Classifier()):
        module = wrap(student)
        for name in (STEPS | LOADERS | MORE) - {"configure_optimizers", "forward", "training_step"}:
            assert is_overridden(name, module) == is_overridden(name, student), name


def test_parts_and_state_are_the_students() -> None:
    student = Classifier()
    module = StandIn(student)
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in student.named_parameters()]
    assert module.state_dict().keys() == student.state_dict().keys()
    assert module.net is student.net
    module.net = nn.Linear(2, 2)  # as growth or surgery would
    assert student.net is module.net
    assert dict(student.named_parameters()).keys() == {"net.weight", "net.bias"}
    student.new = nn.Linear(1, 1)
    assert "new.weight" in module.state_dict()
    module.eval()
    assert not student.training
    assert not student.new.training
    module.train()
    assert student.training
    module.to(torch.float64)
    assert student.dtype == module.dtype == torch.float64
    assert student.new.weight.dtype == torch.float64


def test_attributes_that_the_student_has_are_the_students() -> None:
    student = Classifier()
    student.lr = 0.1
    student.loss = "mine"
    module = StandIn(student)
    module.lr = 0.2  # as a learning-rate finder would
    module.own = 3
    assert (student.lr, module.lr, module.loss, module.own) == (0.2, 0.2, "mine", 3)
    assert not hasattr(student, "own")
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing
    with pytest.raises(
        TypeError, match="`StandIn` has no parts but the student's.*Found `extra`, a `Linear`"
    ):
        module.extra = nn.Linear(1, 1)


def test_calling_it_is_calling_the_student() -> None:
    student = Classifier().eval()
    seen: list[int] = []
    student.register_forward_hook(lambda *args: seen.append(1))
    inputs = torch.randn(3, 12)
    assert torch.equal(StandIn(student)(inputs), student(inputs))
    assert len(seen) == 2


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_are_whole_and_apart(twin: Any, tmp_path: Path) -> None:
    module = DistillationModule(Classifier(seed=3), Classifier())
    trainer(tmp_path, max_epochs=1).fit(module, loader(), loader())
    before = copy.deepcopy(module.state_dict())
    other = twin(module)
    assert other.net is other.student.net
    assert other.net is not module.net
    assert other.validation_step.__self__ is other.student
    trainer(tmp_path, max_epochs=1).fit(other, loader(), loader())
    assert_same_state(module.state_dict(), before)
    assert other.trainer is other.student.trainer


class ExampleByProperty(Classifier):
    @property
    def example_input_array(self) -> torch.Tensor:
        return torch.ones(2, 12)


def test_a_property_of_the_students_class() -> None:
    assert StandIn(ExampleByProperty()).example_input_array.shape == (2, 12)
    module = StandIn(Classifier())
    module.example_input_array = torch.ones(3, 12)
    assert module.student.example_input_array.shape == (3, 12)
