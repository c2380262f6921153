"""Gated blocks: the residual net when open, the shortcut when closed, and only open rows in the body."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_structopt.blocks import (
    Annealed,
    Gate,
    GateBudget,
    GatedBlock,
    ResidualBlock,
    StraightThrough,
    auxiliary_loss,
    dense,
    projection,
)


class Sign(nn.Module):
    """Opens where the first number of a sample is not negative."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(1)[:, 0]


class Fixed(nn.Module):
    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits.expand(len(inputs)) if len(self.logits) == 1 else self.logits


def rows_seen(module: nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_hook(lambda part, args, output: seen.append(len(args[0])))
    return seen


def convolutions(inputs: int = 3, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_open_everywhere_it_is_the_residual_block(training: bool, activation: str | None) -> None:
    block = ResidualBlock(convolutions(3, 5), projection(3, 5), activation=activation)
    gated = GatedBlock.around(copy.deepcopy(block), Fixed(50.0))
    inputs = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(gated.train(training)(inputs), block.train(training)(inputs), rtol=0, atol=0)
    assert gated.executed_fraction == 1


@pytest.mark.parametrize("training", [True, False])
def test_closed_everywhere_it_is_the_shortcut(training: bool) -> None:
    gated = GatedBlock(convolutions(), Fixed(-50.0)).train(training)
    seen = rows_seen(gated.body)
    inputs = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(gated(inputs), inputs, rtol=0, atol=1e-6)
    assert seen == ([4] if training else [])
    assert gated.executed_fraction == 0


@pytest.mark.parametrize("batch", [1, 2, 16, 0])
def test_skips_for_real_and_gives_what_the_dense_form_gives(batch: int) -> None:
    gated = GatedBlock(convolutions(), Sign(), activation="relu").eval()
    inputs = torch.randn(batch, 3, 6, 6)
    opened = int((inputs[:, 0, 0, 0] >= 0).sum())
    with dense(gated):
        expected = gated(inputs)
    seen = rows_seen(gated.body)
    torch.testing.assert_close(gated(inputs), expected, rtol=1e-5, atol=1e-6)
    assert seen == ([opened] if opened else [])
    mask = (inputs[:, 0, 0, 0] >= 0).float()[:, None, None, None]
    torch.testing.assert_close(expected, torch.relu(inputs + mask * gated.body(inputs)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logit", [-3.0, -1e-9, 0.0, 3.0, float("nan")])
@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
def test_a_single_sample_is_decided_as_in_a_batch(logit: float, shape: tuple[int, ...]) -> None:
    given = torch.full(shape, logit)
    gated = GatedBlock(convolutions(3, 5), Gate(3), projection(3, 5), activation="relu").eval()
    gated.gate.forward = lambda inputs: given.expand(len(inputs), *shape[1:])
    image = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(gated(image), gated(image.expand(2, -1, -1, -1))[:1], rtol=1e-5, atol=1e-6)
    gated(image)
    assert gated.executed_fraction == float(logit >= 0)


def test_a_logit_of_zero_is_open() -> None:
    gated = GatedBlock(nn.Linear(2, 2), Fixed(0.0, -1e-9)).eval()
    gated(torch.ones(2, 2))
    assert gated.executed_fraction == 0.5


def test_evaluation_is_deterministic_and_training_samples() -> None:
    gated = GatedBlock(nn.Linear(2, 2), Fixed(0.1))
    inputs = torch.ones(64, 2)
    torch.testing.assert_close(gated.eval()(inputs), gated(inputs), rtol=0, atol=0)
    drawn = torch.stack([gated.train()(inputs)[:, 0] for _ in range(3)])
    assert len(drawn.unique()) == 2  # open or closed, nothing between
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_gates_open_as_often_as_the_sigmoid_says(logit: float, temperature: float) -> None:
    gates = StraightThrough(temperature)(torch.full((40_000,), logit), torch.tensor(0))
    assert set(gates.tolist()) == {0.0, 1.0}
    assert gates.mean() == pytest.approx(torch.sigmoid(torch.tensor(logit)).item(), abs=0.01)


def test_straight_through_has_the_gradient_of_the_soft_gate() -> None:
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(4)
    StraightThrough(0.7)(logits, torch.tensor(0)).sum().backward()
    torch.manual_seed(4)
    noise = torch.logit(torch.rand(50, dtype=torch.float64))
    soft = torch.sigmoid((logits.detach() + noise) / 0.7)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 0.7)


def test_annealed_gates_follow_their_temperature() -> None:
    block = GatedBlock(nn.Linear(2, 2), Fixed(0.5), relaxation=Annealed(1.0, 0.01, steps=4))
    for step in range(6):
        block(torch.ones(3, 2))
        temperature = 0.01 ** (min(step, 4) / 4)
        assert block.executed_fraction == pytest.approx(
            1 / (1 + 2.718281828 ** (-0.5 / temperature)), abs=1e-5
        )
    assert block.state_dict()["passes"] == 6
    block.eval()(torch.ones(3, 2))
    assert block.passes == 6


def test_annealed_gates_have_exact_gradients() -> None:
    block = GatedBlock(nn.Linear(3, 3), Gate(3), relaxation=Annealed()).double()
    block.passes.fill_(1000)

    def run(inputs: Tensor) -> Tensor:
        block.passes.fill_(0)
        return block(inputs)

    assert torch.autograd.gradcheck(run, torch.randn(4, 3, dtype=torch.float64, requires_grad=True))


def test_every_parameter_has_a_gradient_when_the_gate_closes_for_all() -> None:
    block = GatedBlock(convolutions(), nn.Sequential(Gate(3, opening=1e-6)), budget=GateBudget(0.5))
    block(torch.randn(4, 3, 5, 5)).sum().backward()
    assert block.executed_fraction == 0
    assert all(parameter.grad is not None for parameter in block.parameters())
    assert not any(parameter.grad.any() for parameter in block.body.parameters())


def test_expected_cost_counts_operations() -> None:
    block = GatedBlock(nn.Linear(8, 8), Gate(8, hidden=4), shortcut=nn.Linear(8, 8))
    inputs = torch.randn(5, 8)
    costs = block.expected_cost(inputs)
    always = 2 * 8 * 8 + 2 * (8 * 4 + 4)
    torch.testing.assert_close(costs, always + torch.sigmoid(block.gate(inputs)) * 2 * 8 * 8)
    costs.sum().backward()
    assert block.gate.net[0].weight.grad.any()


def test_the_gate_learns_its_budget() -> None:
    torch.manual_seed(1)
    block = GatedBlock(nn.Linear(4, 4), Gate(4), budget=GateBudget(0.3, strength=5.0))
    optimizer = torch.optim.Adam(block.gate.parameters(), lr=3e-2)
    inputs = torch.randn(256, 4)
    for _ in range(150):
        _ = block(inputs)
        optimizer.zero_grad()
        auxiliary_loss(block).backward()
        optimizer.step()
    shares = []
    for _ in range(20):
        block(inputs)
        shares.append(block.executed_fraction)
    assert sum(shares) / 20 == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("dim", [1, -1])
def test_gate_pools_all_but_its_channels(dim: int) -> None:
    gate = Gate(6, dim=dim)
    inputs = torch.randn(3, 6, 5) if dim == 1 else torch.randn(3, 5, 6)
    means = inputs.mean(2 if dim == 1 else 1)
    torch.testing.assert_close(gate(inputs), gate.net(means)[:, 0])
    torch.testing.assert_close(torch.sigmoid(gate(inputs)).mean().item(), 0.85, rtol=0.05, atol=0.0)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled(part: nn.Module, *given: Any) -> Any:
    return 2 * given[-1] if isinstance(given[-1], Tensor) else (2 * given[-1][0],)


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "nothing": lambda net: None,
    "hook of a layer": lambda net: net[0].register_forward_hook(doubled),
    "hook before the last": lambda net: net[2].register_forward_pre_hook(doubled),
    "hook of the activation": lambda net: net[1].register_forward_hook(doubled),
    "hook of all": lambda net: net.register_forward_hook(doubled),
    "parametrization": lambda net: nn.utils.parametrize.register_parametrization(net[0], "weight", Double()),
    "another layer": lambda net: net.__setitem__(0, nn.Sequential(net[0], nn.Tanh())),
    "another activation": lambda net: net.__setitem__(1, nn.Tanh()),
    "one more layer": lambda net: net.append(nn.Tanh()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("batch", [1, 5])
def test_gate_is_its_layers_in_evaluation_too(change: str, batch: int) -> None:
    gate = Gate(4)
    nn.init.normal_(gate.net[2].weight)
    CHANGES[change](gate.net)
    inputs = torch.randn(batch, 4)
    training = gate(inputs)
    torch.testing.assert_close(gate.eval()(inputs), training, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GatedBlock(nn.Linear(4, 3), Gate(4))(torch.zeros(2, 4)), r"Found \(2, 3\) from the body"),
        (
            lambda: GatedBlock(nn.Linear(4, 3), Fixed(1.0)).eval()(torch.zeros(2, 4)),
            r"Found \(2, 3\) from the body",
        ),
        (
            lambda: GatedBlock(nn.Linear(4, 4), nn.Linear(4, 2))(torch.zeros(3, 4)),
            r"one logit a sample, of shape \(3,\). Found \(3, 2\)",
        ),
        (lambda: GatedBlock(nn.Linear(4, 4), Gate(4), cost=0), r"`cost` must be in \(0"),
        (lambda: Gate(4, opening=1.0), r"`opening` must be in \(0, 1\)"),
        (lambda: GateBudget(1.2), r"`target` must be in \[0, 1\]. Found `target = 1.2`"),
        (lambda: GateBudget(0.5, strength=0.0), "`strength` must be in"),
        (lambda: StraightThrough(0.0), "`temperature` must be in"),
        (lambda: Annealed(0.1, 0.5), "`end` must be in"),
        (lambda: Annealed(steps=0), "`steps` must be at least 1"),
    ],
)
def test_bad_values(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: GatedBlock(ResidualBlock(nn.Linear(4, 4)), Gate(4)),
            r"Use `GatedBlock.around\(block, gate\)`",
        ),
        (lambda: GatedBlock(nn.Linear(4, 4), Gate), r"Did you mean `Gate\(\)`"),
        (lambda: GatedBlock(nn.Linear(4, 4), Gate(4), budget=0.5), "`budget` must be a `GateBudget`"),
        (lambda: GatedBlock.around(nn.Linear(4, 4), Gate(4)), "`block` must be a `ResidualBlock`"),
    ],
)
def test_bad_types(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
