"""Neuron and connection importance against loops over outputs, finite changes and known matrices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_structopt.pruning import prune
from lightning_structopt.pruning.calibration import Calibration
from lightning_structopt.pruning.criteria import Evidence
from lightning_structopt.pruning.jacobian import JacobianImportance
from lightning_structopt.pruning.neuron_importance import neuron_importance


class Perceptron(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3)
        )


class Convolutional(nn.Module):
    """With a way around the layer in question, and an output of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Conv2d(4, 2, 2, stride=2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.first(inputs)).relu_()
        return self.head(hidden + self.second(hidden).tanh())


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attend = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.recur = nn.GRU(8, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recur(self.attend(self.embed(tokens)))[0][:, -1])


class OneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.line(inputs).square().sum(1)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str, int]] = {
    "perceptron, linear": (Perceptron, lambda: torch.randn(5, 4), "0", 1),
    "perceptron, norm": (Perceptron, lambda: torch.randn(5, 4), "1", 1),
    "perceptron, output": (Perceptron, lambda: torch.randn(5, 4), "4", 1),
    "convolution": (Convolutional, lambda: torch.randn(3, 2, 4, 4), "first", 1),
    "norm of feature maps": (Convolutional, lambda: torch.randn(3, 2, 4, 4), "norm", 1),
    "around it": (Convolutional, lambda: torch.randn(3, 2, 4, 4), "second", 1),
    "attention": (Sequences, lambda: torch.randint(7, (3, 4)), "attend.linear1", -1),
    "embedding": (Sequences, lambda: torch.randint(7, (3, 4)), "embed", -1),
    "one number": (OneNumber, lambda: torch.randn(4, 4), "line", 1),
}
every_case = pytest.mark.parametrize(("make", "inputs", "layer", "axis"), CASES.values(), ids=CASES)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(4)
    module = make().double()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 2)
    return module


def data(inputs: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(6)
    batch = inputs()
    return batch.double() if batch.is_floating_point() else batch


def brute_force_neurons(module: nn.Module, layer: str, batch: Tensor, axis: int) -> Tensor:
    """One sample, one output, one `backward` at a time, through the layer's retained gradient."""
    module.eval()
    kept: list[Tensor] = []

    def keep(part: nn.Module, args: Any, output: Tensor) -> Tensor:
        output.retain_grad()
        kept.append(output)
        return output.clone()

    handle = module.get_submodule(layer).register_forward_hook(keep)
    totals = 0
    for sample in batch.split(1):
        count = module(sample).numel()
        for output in range(count):
            kept.clear()
            module(sample).flatten()[output].backward()
            squares = kept[0].grad.square()
            totals = totals + squares.movedim(axis, 0).flatten(1).sum(1)
    handle.remove()
    return totals / len(batch)


def brute_force_weights(module: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    module.eval()
    totals = {name: torch.zeros_like(p) for name, p in module.named_parameters() if p.ndim > 1}
    for sample in batch.split(1):
        for output in range(module(sample).numel()):
            module.zero_grad()
            module(sample).flatten()[output].backward()
            for name in totals:
                totals[name] += (module.get_parameter(name) * module.get_parameter(name).grad) ** 2
    return {name: total.detach() / len(batch) for name, total in totals.items()}


def scores(criterion: JacobianImportance, module: nn.Module) -> dict[str, Tensor]:
    weights = {name: p.detach() for name, p in module.named_parameters() if p.ndim > 1}
    return dict(criterion.score(weights, Evidence(module)).values)


@every_case
@pytest.mark.parametrize("elements", [2**24, 7])
def test_neurons_exactly(make, inputs, layer, axis, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_structopt.pruning.jacobian._ELEMENTS", elements)  # in chunks, too
    module, batch = build(make), data(inputs)
    found = neuron_importance(module, layer, batch)
    torch.testing.assert_close(found, brute_force_neurons(module, layer, batch, axis))


@every_case
def test_neurons_by_probes(make, inputs, layer, axis) -> None:
    module, batch = build(make), data(inputs)
    exact = neuron_importance(module, layer, batch)
    many = neuron_importance(module, layer, batch, probes=4000)
    # A probe's relative variance is 2 at most.
    torch.testing.assert_close(many, exact, rtol=4 * (2 / 4000) ** 0.5, atol=1e-9)


@every_case
@pytest.mark.parametrize("elements", [2**24, 7])
def test_connections_exactly(
    make, inputs, layer, axis, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_structopt.pruning.jacobian._ELEMENTS", elements)
    module, batch = build(make), data(inputs)
    found = scores(JacobianImportance(Calibration(batch)), module)
    expected = brute_force_weights(module, batch)
    assert found.keys() == expected.keys()
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name])


@every_case
def test_connections_by_probes(make, inputs, layer, axis) -> None:
    module, batch = build(make), data(inputs)
    exact = scores(JacobianImportance(Calibration(batch)), module)
    probed = scores(JacobianImportance(Calibration(batch), probes=3000), module)
    for name, score in probed.items():
        torch.testing.assert_close(score, exact[name], rtol=5 * (2 / 3000) ** 0.5, atol=1e-9)


def test_of_a_linear_map_it_is_the_squared_matrix() -> None:
    module = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    weight = module[1].weight.detach()
    found = neuron_importance(module, "0", torch.randn(10, 4))
    torch.testing.assert_close(found, weight.square().sum(0))
    inputs = torch.randn(10, 4)
    score = scores(JacobianImportance(Calibration(inputs)), module)["1.weight"]
    torch.testing.assert_close(score, weight.square() * inputs.square().mean(0))


def test_it_is_the_variance_that_noise_on_the_neuron_causes() -> None:
    module, inputs = build(Perceptron).eval(), torch.randn(1, 4).double()
    importance = neuron_importance(module, "0", inputs)
    noise = torch.randn(20000, 1, 6).double() * 1e-4
    hidden = module[0](inputs) + noise * torch.eye(6).double()[:, None, None]  # on one neuron at a time
    outputs = nn.Sequential(*list(module)[1:])(hidden.reshape(-1, 6)).view(6, 20000, 3)
    variance = outputs.var(1).sum(1) / 1e-8
    torch.testing.assert_close(variance.detach(), importance, rtol=0.05, atol=1e-6)


def test_many_outputs_are_probed_on_their_own() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 300, bias=False))
    batch = torch.randn(40, 3)
    exact = wide[1].weight.detach().square().sum(0)
    found = neuron_importance(wide, "0", batch)
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0)
    assert torch.equal(found, neuron_importance(wide, "0", batch))
    assert not torch.equal(found, neuron_importance(wide, "0", batch, seed=1))
    score = scores(JacobianImportance(Calibration(batch)), wide)["1.weight"]
    hidden = wide[0](batch).detach().square().mean(0)
    torch.testing.assert_close(
        score.mean(0), (wide[1].weight.detach() ** 2).mean(0) * hidden, rtol=0.2, atol=0
    )


def test_batches_count_by_their_samples() -> None:
    module, batch = build(Perceptron), torch.randn(7, 4).double()
    labels = torch.zeros(7)
    expected = neuron_importance(module, "0", batch)
    for inputs in (
        [batch[:5], batch[5:]],
        [(batch[:1], labels[:1]), (batch[1:], labels[1:])],
        DataLoader(TensorDataset(batch, labels), batch_size=3),
    ):
        torch.testing.assert_close(neuron_importance(module, "0", inputs), expected)
        whole, parts = (
            scores(JacobianImportance(Calibration(b)), module)["0.weight"] for b in (batch, [*batch.split(3)])
        )
        torch.testing.assert_close(whole, parts)


def test_a_neuron_that_leads_nowhere_has_none() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spare, self.used = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            self.spare(inputs)
            return self.used(inputs)

    for frozen in (False, True):
        module = Spare().requires_grad_(not frozen)
        assert neuron_importance(module, "spare", torch.randn(2, 4)).tolist() == [0.0] * 3
    assert neuron_importance(module, "used", torch.randn(2, 4)).tolist() == [1.0] * 2


def test_the_dimension_of_neurons() -> None:
    module = nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    batch = torch.rand(2, 2, 4)
    with pytest.raises(ValueError, match=r"dimension 1 or 2 of the output of `1`, a `ReLU`.*Give `dim`"):
        neuron_importance(module, "1", batch)
    assert neuron_importance(module, "0", batch).shape == (3,)
    by_channel, by_place = (neuron_importance(module, "1", batch, dim=dim) for dim in (1, -1))
    assert by_channel.shape == (3,)
    assert by_place.shape == (4,)
    torch.testing.assert_close(by_channel.sum(), by_place.sum())
    maps = nn.Sequential(nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU()), nn.Flatten(), nn.Linear(48, 2))
    assert neuron_importance(maps, "0", torch.rand(2, 1, 4, 4)).shape == (3,)


class Twice(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return self[0](self[0](inputs))


class Turned(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).T


class Several(nn.Sequential):
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(inputs), inputs


@pytest.mark.parametrize(
    ("module", "layer", "error", "message"),
    [
        (Twice(nn.Linear(4, 4)), "0", ValueError, "`0` must run once in a pass of the module. Found .* 2 times"),
        (nn.Sequential(nn.Linear(4, 4)), "1", ValueError, r"`layer` must be one of \['0'\]. Found `layer = '1'`"),
        (Turned(nn.Linear(4, 3)), "0", ValueError, r"Samples must be along dimension 0. .* \(3, 5\) for 5 samples"),
        (Several(nn.Linear(4, 3)), "0", TypeError, "The module must return a tensor. Found a `tuple`"),
        (
            nn.Sequential(nn.LSTM(4, 4), nn.Identity()), "0",
            TypeError, "`0` must return a tensor. Found a `tuple`",
        ),
    ],
)  # fmt: skip
def test_modules_that_do_not_fit(module: nn.Module, layer: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        neuron_importance(module, layer, torch.randn(5, 4))
    assert not any(m._forward_hooks for m in module.modules())
    if layer == "0" and error is TypeError and isinstance(module, Several):
        with pytest.raises(error, match=message):
            scores(JacobianImportance(Calibration(torch.randn(5, 4))), module)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: JacobianImportance(probes=0), ValueError, "`probes` must be at least 1"),
        (lambda: JacobianImportance(seed=-1), ValueError, "`seed` must be at least 0"),
        (lambda: JacobianImportance(torch.ones(2, 2)), TypeError, "`calibration` must be a `Calibration`"),
        (lambda: JacobianImportance().require(nn.Linear(2, 2), {}), ValueError, "Found no `calibration`"),
        (
            lambda: prune(nn.Linear(2, 2), 0.5, criterion=JacobianImportance()),
            ValueError,
            "`JacobianImportance` runs the module on data. Found no `calibration`",
        ),
        (
            lambda: prune(nn.Linear(2, 2), 0.5, criterion=JacobianImportance(Calibration([{"x": 1}]))),
            TypeError,
            "must be a tensor of inputs or begin with one. Found a `dict`",
        ),
        (lambda: neuron_importance(nn.Linear(2, 2), "", torch.ones(1, 2), probes=0), ValueError, "`probes` must"),
    ],
)  # fmt: skip
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
