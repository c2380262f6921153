"""Adaptive computation: weights by brute force over steps, one step when halting at once, rows that cells see."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_structopt.blocks import AdaptiveComputationUnit, Gate, Pondered, auxiliary_loss, dense
from lightning_structopt.blocks.halting import act_distribution, kl_to_geometric, ponder_distribution


def unit(
    halting: str = "act", steps: int = 6, opening: float = 0.3, **options: Any
) -> AdaptiveComputationUnit:
    cell = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    gate = Gate(4, opening=opening)
    nn.init.normal_(gate.net[2].weight, std=1.0)
    return AdaptiveComputationUnit(cell, gate, steps, halting, **options)


def literal_act(halts: list[float], epsilon: float) -> tuple[list[float], int, float]:
    total, weights = 0.0, []
    for index, halt in enumerate(halts):
        if total + halt >= 1 - epsilon or index == len(halts) - 1:
            weights.append(1 - total)
            return weights + [0.0] * (len(halts) - index - 1), index + 1, 1 - total
        weights.append(halt)
        total += halt
    raise AssertionError


def test_act_weights_by_brute_force() -> None:
    halts = torch.rand(7, 200, dtype=torch.float64) * torch.rand(200, dtype=torch.float64)
    weights, steps, remainder = act_distribution(halts, 0.05)
    for row in range(200):
        expected, count, rest = literal_act(halts[:, row].tolist(), 0.05)
        assert weights[:, row].tolist() == pytest.approx(expected)
        assert steps[row] == count
        assert remainder[row].item() == pytest.approx(rest)
    torch.testing.assert_close(weights.sum(0), torch.ones(200, dtype=torch.float64))


def test_ponder_weights_by_brute_force() -> None:
    halts = torch.rand(5, 50, dtype=torch.float64)
    found = ponder_distribution(halts)
    for row in range(50):
        left = 1.0
        for step in range(5):
            halt = halts[step, row].item() if step < 4 else 1.0
            assert found[step, row].item() == pytest.approx(left * halt)
            left *= 1 - halt
    prior = [0.3 * 0.7**n for n in range(4)] + [0.7**4]
    expected = [
        sum(p * math.log(p / q) for p, q in zip(column.tolist(), prior, strict=True)) for column in found.T
    ]
    assert kl_to_geometric(found, 0.3).tolist() == pytest.approx(expected)


def test_kl_has_finite_gradients_at_certainty() -> None:
    halts = torch.tensor([[1.0], [0.5], [0.5]], requires_grad=True)
    kl_to_geometric(ponder_distribution(halts), 0.2).sum().backward()
    assert halts.grad.isfinite().all()


def outputs_by_hand(module: AdaptiveComputationUnit, inputs: Tensor) -> tuple[Tensor, list[int]]:
    outputs, counts = [], []
    for sample in inputs:
        states, halts, state = [], [], sample[None]
        for _ in range(module.max_steps):
            state = module.cell(state)
            states.append(state[0])
            halts.append(torch.sigmoid(module.gate(state)).item())
        if module.halting == "act":
            weights, count, _ = literal_act(halts, module.epsilon)
            outputs.append(sum(w * s for w, s in zip(weights, states, strict=True)))
        else:
            left, count = 1.0, 0
            for halt in halts:
                left *= 1 - halt
                count += 1
                if left <= 0.5:
                    break
            outputs.append(states[count - 1])
        counts.append(count)
    return torch.stack(outputs), counts


@pytest.mark.parametrize("halting", ["act", "ponder"])
@pytest.mark.parametrize("batch", [1, 30])
def test_evaluation_by_hand_with_rows_that_have_not_halted(halting: str, batch: int) -> None:
    module = unit(halting).eval()
    inputs = torch.randn(batch, 4)
    expected, counts = outputs_by_hand(module, inputs)
    seen: list[int] = []
    module.cell.register_forward_hook(lambda part, args, output: seen.append(len(args[0])))
    torch.testing.assert_close(module(inputs), expected, rtol=1e-4, atol=1e-5)
    assert seen == [sum(c > n for c in counts) for n in range(max(counts))]
    assert module.executed_fraction == pytest.approx(sum(counts) / batch / 6)
    with dense(module):
        torch.testing.assert_close(module(inputs), expected, rtol=1e-4, atol=1e-5)
    assert module.executed_fraction == pytest.approx(sum(counts) / batch / 6)


def test_training_and_evaluation_of_act_agree() -> None:
    module = unit()
    inputs = torch.randn(20, 4)
    torch.testing.assert_close(module(inputs), module.eval()(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_halting_at_once_is_one_step(training: bool) -> None:
    module = unit(opening=0.9999).train(training)
    nn.init.zeros_(module.gate.net[2].weight)
    inputs = torch.randn(5, 4)
    seen: list[int] = []
    module.cell.register_forward_hook(lambda part, args, output: seen.append(len(args[0])))
    torch.testing.assert_close(module(inputs), module.cell(inputs))
    assert seen == [5, 5]  # the second is the oracle's own
    assert module.executed_fraction == pytest.approx(1 / 6)


def test_ponder_cost_is_steps_plus_remainder() -> None:
    module = unit(strength=0.5)
    inputs = torch.randn(9, 4)
    output = module(inputs)
    _, steps, remainder = act_distribution(module._steps(inputs, None)[1], module.epsilon)
    torch.testing.assert_close(auxiliary_loss(module), 0.5 * (steps + remainder).mean())
    (output.sum() + auxiliary_loss(module)).backward()
    assert module.gate.net[0].weight.grad.any()


def test_the_gate_has_gradients_even_if_all_halt_at_once() -> None:
    module = unit(opening=0.9999)
    nn.init.zeros_(module.gate.net[2].weight)
    module(torch.randn(3, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_pondernet_trains_on_expected_losses() -> None:
    module = unit("ponder", strength=0.1, prior=0.4)
    inputs = torch.randn(8, 4)
    found = module(inputs)
    assert isinstance(found, Pondered)
    losses = found.states.square().mean(-1)
    expected = sum(found.probabilities[n] * losses[n] for n in range(6)).mean()
    torch.testing.assert_close(found.expected(losses), expected)
    torch.testing.assert_close(auxiliary_loss(module), 0.1 * kl_to_geometric(found.probabilities, 0.4).mean())
    (found.expected(losses) + auxiliary_loss(module)).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    with pytest.raises(ValueError, match=r"of shape \(6, 8\). Found \(8,\)"):
        found.expected(losses[0])


@pytest.mark.parametrize("halting", ["act", "ponder"])
def test_recurrent_cells_read_their_inputs(halting: str) -> None:
    module = AdaptiveComputationUnit(nn.GRUCell(3, 4), Gate(4, opening=0.3), 5, halting).eval()
    nn.init.normal_(module.gate.net[2].weight)
    inputs, state = torch.randn(12, 3), torch.randn(12, 4)
    rows = [module(x[None], s[None]) for x, s in zip(inputs, state, strict=True)]
    torch.testing.assert_close(module(inputs, state), torch.cat(rows), rtol=1e-4, atol=1e-5)
    assert module.expected_cost(inputs, state).shape == (12,)


def test_gradients_are_exact() -> None:
    module = unit(steps=4).double()
    module.gate.net[1] = nn.Tanh()
    inputs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, inputs)


@pytest.mark.parametrize("halting", ["act", "ponder"])
def test_expected_cost_is_steps_times_a_step(halting: str) -> None:
    module = unit(halting).eval()
    inputs = torch.randn(10, 4)
    _, counts = outputs_by_hand(module, inputs)
    one_step = 2 * 4 * 4 + 2 * (4 * 16 + 16)
    assert module.expected_cost(inputs).tolist() == [one_step * count for count in counts]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unit(steps=0), "`max_steps` must be at least 1. Found `max_steps = 0`"),
        (lambda: unit("sometimes"), "`halting` must be 'act' or 'ponder'"),
        (lambda: unit(epsilon=0.0), "`epsilon` must be in"),
        (lambda: unit(prior=1.0), "`prior` must be in"),
        (lambda: unit(strength=-1.0), "`strength` must be in"),
        (
            lambda: AdaptiveComputationUnit(nn.Linear(4, 3), Gate(3), 2)(torch.zeros(2, 4)),
            r"Found \(2, 3\) from",
        ),
        (
            lambda: AdaptiveComputationUnit(nn.Linear(4, 4), nn.Linear(4, 2), 2)(torch.zeros(3, 4)),
            r"one logit a sample, of shape \(3,\). Found \(3, 2\)",
        ),
    ],
)
def test_bad_values(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="`max_steps` must be a whole number"):
        unit(steps=2.5)
