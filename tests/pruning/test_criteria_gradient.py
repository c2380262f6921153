"""Criteria of first gradients against loops over batches, and what a calibration leaves untouched."""

import copy
from collections import namedtuple
from typing import Any

import jsonargparse
import pytest
import torch
from support import assert_same_state
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_structopt.pruning import Unstructured, prune
from lightning_structopt.pruning.calibration import Calibration
from lightning_structopt.pruning.criteria import Criterion, Evidence
from lightning_structopt.pruning.curvature import HessianDiagonal
from lightning_structopt.pruning.gradient_criteria import (
    GradientCriterion,
    GradientSquared,
    Movement,
    Taylor,
)
from lightning_structopt.pruning.jacobian import JacobianImportance
from lightning_structopt.pruning.wanda import Wanda

Pair = namedtuple("Pair", "inputs labels")


def net() -> nn.Module:
    torch.manual_seed(5)
    module = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(6, 3)
    )
    module[1].running_mean.uniform_(-0.5, 0.5)
    module[1].running_var.uniform_(0.5, 2)
    return module


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator))
        for _ in range(count)
    ]


def scores_of(criterion: Criterion, module: nn.Module) -> dict[str, Tensor]:
    weights = {name: p.detach() for name, p in module.named_parameters() if p.ndim > 1}
    return dict(criterion.score(weights, Evidence(module)).values)


def gradients(module: nn.Module, data: Any) -> list[dict[str, Tensor]]:
    """The oracle's gradients, batch by batch, by plain `backward` on a copy in evaluation mode."""
    found = []
    for inputs, labels in data:
        twin = copy.deepcopy(module).eval()
        nn.functional.cross_entropy(twin(inputs), labels).backward()
        found.append({name: p.grad for name, p in twin.named_parameters() if p.ndim > 1})
    return found


MAKES = {
    "Taylor": (lambda c: Taylor(calibration=c), lambda w, gs: sum((w * g).abs() for g in gs) / len(gs)),
    "Taylor, squared": (lambda c: Taylor(2, c), lambda w, gs: sum((w * g) ** 2 for g in gs) / len(gs)),
    "GradientSquared": (GradientSquared, lambda w, gs: w**2 * sum(g**2 for g in gs) / len(gs)),
}
every_criterion = pytest.mark.parametrize(("make", "oracle"), MAKES.values(), ids=MAKES)


@every_criterion
@pytest.mark.parametrize("limit", [None, 1, 2, 9])
def test_scores_are_the_formula_over_batches(make: Any, oracle: Any, limit: int | None) -> None:
    module, data = net(), batches()
    scores = scores_of(make(Calibration(data, limit=limit)), module)
    found = gradients(module, data[:limit])
    assert scores.keys() == {"0.weight", "4.weight"}
    for name, score in scores.items():
        weight = module.get_parameter(name).detach()
        torch.testing.assert_close(score, oracle(weight, [g[name] for g in found]))


@every_criterion
def test_scores_in_training_are_the_same_formula_over_steps(make: Any, oracle: Any) -> None:
    criterion = make(None)
    weight = torch.randn(3, 4)
    steps = [torch.randn(3, 4) for _ in range(3)]
    total = torch.zeros(3, 4)
    for gradient in steps:
        criterion.accumulate(total, weight, gradient)
    scores = criterion.score({"a": weight}, Evidence(totals={"a": total}, steps={"a": 3})).values["a"]
    torch.testing.assert_close(scores, oracle(weight, steps))


def test_movement_is_the_sum_over_steps_of_moving_weights() -> None:
    weights, steps = [torch.randn(3, 4) for _ in range(3)], [torch.randn(3, 4) for _ in range(3)]
    total = torch.zeros(3, 4)
    for weight, gradient in zip(weights, steps, strict=True):
        Movement().accumulate(total, weight, gradient)
    scores = Movement().score({"a": weights[-1]}, Evidence(totals={"a": total}, steps={"a": 3})).values["a"]
    expected = -sum(w * g for w, g in zip(weights, steps, strict=True))
    torch.testing.assert_close(scores, expected)


def test_taylor_predicts_what_cutting_a_weight_costs() -> None:
    module, data = net(), batches(1)
    with torch.no_grad():
        module[4].weight.mul_(1e-3)  # small enough for the first order to be all there is
    score = scores_of(Taylor(calibration=Calibration(data)), module)["4.weight"]
    module.eval()
    loss = nn.functional.cross_entropy(module(data[0][0]).double(), data[0][1])
    for row, column in [(0, 0), (1, 3), (2, 5)]:
        cut = copy.deepcopy(module).double()
        cut[4].weight.data[row, column] = 0
        change = abs(nn.functional.cross_entropy(cut(data[0][0].double()), data[0][1]) - loss)
        assert score[row, column].item() == pytest.approx(change.item(), rel=0.02, abs=1e-7)


def test_low_precision_is_added_up_in_float32() -> None:
    module = nn.Linear(4, 3).bfloat16()
    data = [(torch.randn(2, 4).bfloat16() * 1e-3, torch.randint(3, (2,)))] * 300
    one, many = (
        scores_of(Taylor(calibration=Calibration(data, limit=limit)), module)["weight"] for limit in (1, 300)
    )
    assert many.dtype == torch.float32
    torch.testing.assert_close(one, many)
    (gradient,) = gradients(module, data[:1])
    assert torch.equal(one, (module.weight.detach().float() * gradient["weight"].float()).abs())


@pytest.mark.parametrize(
    "data",
    [
        [list(pair) for pair in batches(1)],
        [Pair(*pair) for pair in batches(1)],
        DataLoader(TensorDataset(*batches(1)[0]), batch_size=5),
        (pair for pair in batches(1)),
    ],
    ids=["lists", "named tuples", "loader", "generator"],
)
def test_batches_of_many_kinds(data: Any) -> None:
    expected = scores_of(Taylor(calibration=Calibration(batches(1))), net())
    assert_same_state(scores_of(Taylor(calibration=Calibration(data)), net()), expected)


def test_a_loss_of_ones_own() -> None:
    data = [{"x": x, "y": y} for x, y in batches(2)]

    def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(module(batch["x"]), batch["y"])

    expected = scores_of(Taylor(calibration=Calibration(batches(2))), net())
    assert_same_state(scores_of(Taylor(calibration=Calibration(data, loss)), net()), expected)


def test_a_shuffling_loader_gives_the_same_scores_each_time() -> None:
    inputs, labels = (torch.cat(parts) for parts in zip(*batches(8), strict=True))
    shuffled = DataLoader(TensorDataset(inputs, labels), batch_size=4, shuffle=True)
    criterion = Taylor(calibration=Calibration(shuffled, limit=2))
    module = net()
    first = scores_of(criterion, module)
    torch.manual_seed(99)
    assert_same_state(scores_of(criterion, module), first)


class Counting(nn.Module):
    """Counts passes in buffers, in place and by assignment, even in evaluation mode, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("assigned", torch.zeros(1))
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.count += 1
        self.assigned = self.assigned + 1
        outputs = self.frozen(self.net(inputs))
        return outputs + torch.randn_like(outputs)


CALIBRATED = {
    "Taylor": lambda c: Taylor(calibration=c),
    "GradientSquared": GradientSquared,
    "HessianDiagonal": HessianDiagonal,
    "JacobianImportance": JacobianImportance,
    "JacobianImportance, probes": lambda c: JacobianImportance(c, probes=2),
    "Wanda": Wanda,
}
every_calibrated = pytest.mark.parametrize("make", CALIBRATED.values(), ids=CALIBRATED)


@every_calibrated
def test_calibration_leaves_the_module_as_it_was(make: Any) -> None:
    module = Counting().train()
    module.net[1].eval()
    module(batches()[0][0]).sum().backward()
    before = copy.deepcopy(module)
    gradients = [p.grad for p in module.parameters()]
    values = [None if g is None else g.clone() for g in gradients]
    buffers = dict(module.named_buffers())
    random = torch.get_rng_state()

    masks = prune(module, 0.5, criterion=make(Calibration(batches())))
    assert set(masks) == {"net.0.weight", "net.4.weight", "frozen.weight"}

    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in before.named_parameters():
        parameter.data *= masks.get(name, 1)
    assert_same_state(dict(module.state_dict()), dict(before.state_dict()))
    assert [m.training for m in module.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is g for p, g in zip(module.parameters(), gradients, strict=True))
    assert_same_state([g for g in gradients if g is not None], [v for v in values if v is not None])
    assert all(b is buffers[name] for name, b in module.named_buffers())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not any(p.requires_grad for p in module.frozen.parameters())


@every_calibrated
def test_calibration_leaves_the_module_as_it_was_after_an_error(make: Any) -> None:
    module = Counting().train()
    handle = module.frozen.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(module, 0.5, criterion=make(Calibration(batches())))
    handle.remove()
    assert module.training
    assert module.count == module.assigned == 0
    assert not any(p.requires_grad for p in module.frozen.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert torch.backends.mha.get_fastpath_enabled()


@every_calibrated
def test_scoring_works_without_gradients_and_in_inference_mode(make: Any) -> None:
    module, criterion = net(), make(Calibration(batches()))
    expected = scores_of(criterion, module)
    with torch.no_grad():
        assert_same_state(scores_of(criterion, module), expected)
    with torch.inference_mode():
        assert_same_state(scores_of(criterion, module), expected)


@pytest.mark.parametrize("make", [make for name, make in CALIBRATED.items() if name != "Wanda"])
def test_frozen_weights_and_weights_without_part_are_scored(make: Any) -> None:
    module = nn.ModuleDict({"used": nn.Linear(4, 3), "spare": nn.Linear(4, 3)})
    module.forward = module["used"].forward  # type: ignore[method-assign]
    module["used"].requires_grad_(False)
    scores = scores_of(make(Calibration(batches())), module)
    assert scores["used.weight"].abs().sum() > 0
    assert scores["spare.weight"].abs().sum() == 0


@every_calibrated
def test_transformers_and_recurrent_layers(make: Any) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
            self.recur = nn.LSTM(8, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.recur(self.attend(inputs))[0][:, -1])

    torch.manual_seed(1)
    module = Both()
    data = [(torch.randn(3, 4, 8), torch.randint(3, (3,)))]
    exclude = ["recur.*", "attend.self_attn.*"] if make is Wanda else None
    scores = scores_of(make(Calibration(data)), module) if make is not Wanda else {}
    assert all(score.abs().sum() > 0 for score in scores.values())
    masks = prune(
        module, 0.5, criterion=make(Calibration(data)), pattern=Unstructured("layer"), exclude=exclude
    )
    assert all(mask.sum() == mask.numel() // 2 for mask in masks.values())


@every_calibrated
def test_recurrent_layers_run_without_cudnn_which_needs_training_mode(make: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recur, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.enabled)
            return self.head(self.recur(inputs[:, None])[0][:, -1])

    seen: list[bool] = []
    prune(Recurrent(), 0.5, criterion=make(Calibration(batches())), include="head.*")
    assert set(seen) == {False}
    assert torch.backends.cudnn.enabled


def test_a_criterion_of_ones_own_takes_a_line() -> None:
    class Signed(GradientCriterion):
        def accumulate(self, total: Tensor, weight: Tensor, gradient: Tensor) -> None:
            total += weight * gradient

    weight, total = torch.ones(2, 2), torch.zeros(2, 2)
    Signed().accumulate(total, weight, torch.full((2, 2), 3.0))
    assert (
        Signed().score({"a": weight}, Evidence(totals={"a": total}, steps={"a": 2})).values["a"] == 1.5
    ).all()


def test_a_calibration_can_come_from_yaml() -> None:
    """As in a LightningCLI file."""
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--criterion", type=Criterion)
    data = {"class_path": f"{TensorDataset.__module__}.TensorDataset"}
    config = {
        "class_path": "lightning_structopt.pruning.gradient_criteria.Taylor",
        "init_args": {
            "p": 2,
            "calibration": {
                "batches": {
                    "class_path": "torch.utils.data.DataLoader",
                    "init_args": {"dataset": data, "batch_size": 4},
                },
                "loss": "torch.nn.functional.mse_loss",
                "limit": 3,
            },
        },
    }
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # renamed in jsonargparse 4.49
    criterion = instantiate(parser.parse_object({"criterion": config})).criterion
    assert (criterion.p, criterion.calibration.limit, criterion.calibration.batches.batch_size) == (2, 3, 4)
    assert criterion.calibration.loss is nn.functional.mse_loss


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (lambda: 3, TypeError, "`calibration` must be a `Calibration`. Found `calibration = 3`"),
        (lambda: Calibration(3), TypeError, "`batches` must be a loader, a list of batches or a tensor"),
        (lambda: Calibration([], loss=3), TypeError, "`loss` must be a function of a module and a batch"),
        (lambda: Calibration([], limit=0), ValueError, "`limit` must be at least 1. Found `limit = 0`"),
        (lambda: Calibration([]), ValueError, "`batches` must hold at least one batch. Found none"),
        (lambda: Calibration([torch.ones(2, 4)]), TypeError, r"must be `\(inputs, labels\)`. Found a tensor"),
        (lambda: Calibration(batches(), lambda m, b: m(b[0])), TypeError, "scalar tensor. Found a tensor of shape"),
        (lambda: Calibration(batches(), lambda m, b: 1.0), TypeError, "scalar tensor. Found a `float`"),
        (lambda: Calibration(batches(), lambda m, b: m(b[0]).sum().detach()), ValueError, "Found one without a"),
        (lambda: None, ValueError, "needs gradients of every weight it scores. Found none of `0.weight` and 1 more"),
    ],
)  # fmt: skip
@every_criterion
def test_bad_calibrations(make: Any, oracle: Any, calibration: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        prune(net(), 0.5, criterion=make(calibration()))


def test_a_loss_that_is_nan_is_an_error() -> None:
    data = [(torch.full((5, 4), torch.nan), torch.zeros(5, dtype=torch.long))]
    with pytest.raises(ValueError, match="Scores must not be NaN"):
        prune(net(), 0.5, criterion=Taylor(calibration=Calibration(data)))


def test_movement_needs_training() -> None:
    with pytest.raises(ValueError, match="`Movement` needs gradients of every weight"):
        prune(net(), 0.5, criterion=Movement())


def test_bad_power() -> None:
    with pytest.raises(ValueError, match="`p` must be 1 or 2. Found `p = 3`"):
        Taylor(3)
