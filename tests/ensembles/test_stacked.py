"""Members as one vectorized pass: the same outputs, where it may run and where it runs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import classifiers
from support import CLASSES, Classifier, dataset, loader, trainer
from torch import Tensor, nn

from lightning_structopt.ensembles import ParallelEnsemble, stacked
from lightning_structopt.profiling import profile

INPUTS = dataset().tensors[0]


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(48, CLASSES),
    )  # fmt: skip


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (3, 4)), layer, nn.Flatten(), nn.Linear(12, CLASSES))


def settled(make: Any) -> list[nn.Module]:
    members = [make() for _ in range(4)]
    for member in members:
        for _ in range(3):
            member(torch.randn(16, 12))
    return members


@pytest.mark.parametrize("make", [convolutional, attention, Classifier], ids=["conv", "attention", "module"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_outputs_are_the_same(make: Any, mode: Any) -> None:
    members = settled(make)
    with mode():
        found = ParallelEnsemble(members, stack=True).member_outputs(INPUTS)
        expected = ParallelEnsemble(members, stack=False).member_outputs(INPUTS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], found[1])


def test_follows_weights_that_change_or_move() -> None:
    members = classifiers()
    ensemble = ParallelEnsemble(members, stack=True)
    for change in (
        lambda: members[1].net[0].weight.mul_(2),
        lambda: members[2].load_state_dict(classifiers()[0].state_dict()),
        lambda: setattr(members[0].net[3].bias, "data", torch.ones(CLASSES)),
        lambda: members[0].net[1].running_mean.add_(1),
        lambda: members[1].net.__setitem__(0, copy.deepcopy(members[0].net[0])),
        lambda: ensemble.double(),
    ):
        before = ensemble(INPUTS.to(ensemble.members[0].net[0].weight.dtype))
        change()
        inputs = INPUTS.to(members[0].net[0].weight.dtype)
        found = ensemble.member_outputs(inputs)
        expected = torch.stack([member(inputs) for member in members])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert found.dtype != before.dtype or not torch.equal(ensemble(inputs), before)


class Counted(Classifier):
    """Counts the passes through its own `forward`, of which a vectorized one needs no second member's."""

    calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(inputs)


@pytest.mark.parametrize(
    ("at_once", "alone", "runs"), [(1.0, 2.0, True), (1.0, 1.05, False), (2.0, 1.0, False)]
)
def test_auto_takes_what_is_faster(
    at_once: float, alone: float, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []

    def latency(way: nn.Module, inputs: Any, seconds: float) -> Any:
        timed.append(type(way).__name__)
        found = at_once if isinstance(way, stacked.AllAtOnce) else alone
        return type("Latency", (), {"median_ms": found})

    monkeypatch.setattr(stacked, "latency", latency)
    members = [Counted(seed=seed) for seed in range(3)]
    ensemble = ParallelEnsemble(members).eval()
    for size, timings in ((32, 2), (30, 2), (17, 2), (16, 4), (9, 4)):
        ensemble(INPUTS[:size])
        assert len(timed) == timings  # once for each size, to the next power of two
    before = members[1].calls
    ensemble(INPUTS)
    assert (members[1].calls == before) == runs
    ensemble.train()
    before = members[1].calls
    ensemble(INPUTS)
    assert members[1].calls == before + 1, "training is to repeat, whatever a clock says"


def test_auto_really_measures() -> None:
    ensemble = ParallelEnsemble(classifiers(8)).eval()
    expected = ParallelEnsemble(list(ensemble.members), stack=False)(INPUTS)
    torch.testing.assert_close(ensemble(INPUTS), expected, rtol=1e-5, atol=1e-5)
    assert len(ensemble._runner._is_faster) == 1


class Scaled(Classifier):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        return self.factor * super().forward(inputs)


class Branching(Classifier):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        return outputs if outputs.sum() > 0 else -outputs


class Recurrent(Classifier):
    """Its layer keeps a second list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, CLASSES, batch_first=True)
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.reshape(-1, 3, 4))[0][:, -1]


@pytest.mark.parametrize(
    "members",
    [
        [Scaled(1.0), Scaled(2.0)],
        [Branching(), Branching()],
        [Recurrent(), Recurrent()],
        [Classifier(), Classifier(hidden=3)],
        [Classifier()],
    ],
    ids=["differ in an attribute", "branch", "recurrent", "differ in shape", "single"],
)
def test_auto_leaves_what_can_not_run_as_one(members: list[Any]) -> None:
    ensemble = ParallelEnsemble(members).eval()
    found = ensemble.member_outputs(INPUTS)
    torch.testing.assert_close(found, torch.stack([member(INPUTS) for member in members]))
    assert list(ensemble._runner._is_faster.values()) == [False]


def test_true_refuses_what_gives_other_outputs() -> None:
    with pytest.raises(ValueError, match="Found other outputs than one by one"):
        ParallelEnsemble([Scaled(1.0), Scaled(2.0)], stack=True)(INPUTS)
    with pytest.raises(ValueError, match="Found a single member"):
        ParallelEnsemble([Classifier()], stack=True)


@pytest.mark.parametrize("stack", ["auto", True])
def test_costs_are_those_of_all_members(stack: Any) -> None:
    members = classifiers(3)
    found = profile(ParallelEnsemble(members, stack=stack), INPUTS, seconds=0.01)
    one = profile(copy.deepcopy(members[0]), INPUTS, seconds=0.01)
    assert found.flops == 3 * one.flops


def test_within_a_trainer(tmp_path: Path) -> None:
    members = classifiers()
    found = [
        trainer(tmp_path).validate(ParallelEnsemble(members, stack=stack), loader(), verbose=False)[0]
        for stack in (True, False)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_is_exported_by_torch() -> None:
    ensemble = ParallelEnsemble(classifiers(), stack=True).eval()
    program = torch.export.export(ensemble, (INPUTS,))
    torch.testing.assert_close(program.module()(INPUTS), ensemble(INPUTS), rtol=1e-4, atol=1e-5)


def test_is_exported_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    ensemble = ParallelEnsemble(classifiers()).eval()
    torch.onnx.export(ensemble, (INPUTS,), tmp_path / "ensemble.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "ensemble.onnx")
    found = session.run(None, {session.get_inputs()[0].name: INPUTS.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), ensemble(INPUTS), rtol=1e-4, atol=1e-5)
