"""Penalties against brute force, finite differences and optimality conditions."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_structopt.regularization import L1, L2, GroupLasso, Penalty

PENALTIES = [L1(0.7), L2(0.7), GroupLasso(0.7), GroupLasso(0.7, groups="channel")]
every_penalty = pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
double = {"dtype": torch.float64}


def distance(x: Tensor, weight: Tensor, step: float | Tensor) -> Tensor:
    return ((x - weight).square() / (2 * step)).sum()


def test_values() -> None:
    weight = torch.tensor([[3.0, -4.0], [0.0, 1.0], [0.0, 0.0]])
    assert L1(2.0).value(weight) == 2 * 8
    assert L2(2.0).value(weight) == 26
    assert GroupLasso(2.0).value(weight) == pytest.approx(2 * math.sqrt(2) * (5 + 1))
    channels = 3 + math.sqrt(17)
    assert GroupLasso(2.0, "channel").value(weight) == pytest.approx(2 * math.sqrt(3) * channels)


@every_penalty
@pytest.mark.parametrize("shape", [(3, 4), (4, 3, 2, 2)])
def test_gradient_is_the_slope_of_the_value(penalty: Penalty, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, **double)
    gradient = penalty.gradient(weight)
    assert gradient.shape == shape
    for index in itertools.product(*map(range, shape)):
        nudge = torch.zeros(shape, **double)
        nudge[index] = 1e-6
        slope = (penalty.value(weight + nudge) - penalty.value(weight - nudge)) / 2e-6
        assert gradient[index] == pytest.approx(float(slope), abs=1e-7)


@every_penalty
@pytest.mark.parametrize("step", [0.3, torch.tensor([[0.1, 0.9]], **double)], ids=["one step", "a step each"])
@pytest.mark.parametrize("weight", [[[1.2, -0.9]], [[0.3, 0.05]], [[0.15, -2.0]], [[0.0, 0.4]]], ids=str)
def test_proximal_map_is_the_best_point_of_a_fine_grid(penalty: Penalty, step: Any, weight: Any) -> None:
    weight = torch.tensor(weight, **double)
    ticks = torch.linspace(-2.2, 2.2, 441, **double)
    grid = torch.cartesian_prod(ticks, ticks)
    if penalty == L1(0.7):
        values = 0.7 * grid.abs().sum(1)
    elif penalty == L2(0.7):
        values = 0.35 * grid.square().sum(1)
    elif penalty == GroupLasso(0.7):
        values = 0.7 * math.sqrt(2) * grid.norm(dim=1)
    else:  # a column of one weight is a group of its own
        values = 0.7 * grid.abs().sum(1)
    costs = values + ((grid - weight).square() / (2 * step)).sum(1)
    mapped = penalty.proximal(weight, step)
    assert mapped == pytest.approx(grid[costs.argmin()][None], abs=0.0101)
    assert penalty.value(mapped) + distance(mapped, weight, step) <= costs.min() + 1e-12


@every_penalty
@pytest.mark.parametrize("shape", [(5, 4), (4, 5, 3, 3), (1, 6), (6, 1)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 12.0])
@pytest.mark.parametrize("strength", [1e-4, 0.1, 3.0])
def test_proximal_map_satisfies_the_optimality_condition(
    penalty: Penalty, shape: tuple[int, ...], spread: float, strength: float
) -> None:
    """Where x is not zero, w - x is s times the gradient at x; the groups that go have w / s within reach."""
    penalty = type(penalty)(strength, *([penalty.groups] if isinstance(penalty, GroupLasso) else []))
    weight, step = torch.randn(shape, **double), torch.exp(spread * torch.randn(shape, **double))
    mapped = penalty.proximal(weight, step)
    alive = mapped != 0
    expected = weight - step * penalty.gradient(mapped)
    slack = 1e-6 * torch.maximum(weight.abs(), (weight - expected).abs())
    assert ((mapped - expected).abs() <= slack)[alive].all()
    if isinstance(penalty, GroupLasso):
        rows = 0 if penalty.groups == "neuron" else 1
        groups = weight.transpose(0, rows).flatten(1), step.transpose(0, rows).flatten(1)
        alive = alive.transpose(0, rows).flatten(1)
        assert torch.equal(alive.all(1), alive.any(1))  # a group goes as a whole
        pulls = (groups[0] / groups[1]).norm(dim=1)
        rate = strength * math.sqrt(weight.numel() / shape[rows])
        assert torch.equal(alive.any(1), pulls > rate)
    elif isinstance(penalty, L1):
        assert torch.equal(alive, weight.abs() > step * strength)
    else:
        assert alive.all()


@every_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_step_sizes_and_weights_give_no_nan(penalty: Penalty, dtype: torch.dtype) -> None:
    tiny, huge = torch.finfo(dtype).tiny, 1e30
    rows = [[0.0, 0.0, 0.0], [tiny, -tiny, 0.0], [1e-25, 1e-20, 0.0], [1.0, -1e-20, 1e5], [1e-3, 2.0, -3.0]]
    weight = torch.tensor(rows, dtype=dtype)
    steps = [torch.full_like(weight, value) for value in (0.0, tiny, 1e-6, 1.0, huge)]
    steps.append(torch.tensor([0.0, 1e-9, huge], dtype=dtype).expand(5, 3))
    for step in (*steps, 0.0, tiny, 1.0, huge):
        mapped = penalty.proximal(weight, step)
        assert mapped.isfinite().all(), step
        assert (mapped.abs() <= weight.abs()).all()
        assert not mapped[weight == 0].any()
    assert penalty.gradient(weight).isfinite().all()
    assert (penalty.gradient(weight).abs() <= 0.7 * 3 * weight.abs().clamp_min(1)).all()


@every_penalty
def test_zero_stays_zero(penalty: Penalty) -> None:
    zero = torch.zeros(3, 4)
    assert not penalty.gradient(zero).any()
    for step in (0.1, torch.full((3, 4), 0.1), torch.full((3, 4), 1e12)):
        assert torch.equal(penalty.proximal(zero, step), zero)
    weight = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    assert not penalty.gradient(weight)[weight == 0].any()
    assert torch.equal(penalty.proximal(weight, 0.01) == 0, weight == 0)


@every_penalty
def test_one_step_for_all_is_the_same_as_equal_steps(penalty: Penalty) -> None:
    weight = torch.randn(4, 5, 3, **double)
    for step in (0.0, 1e-3, 0.5, 3.0):
        each = penalty.proximal(weight, torch.full_like(weight, step))
        torch.testing.assert_close(penalty.proximal(weight, step), each, rtol=1e-9, atol=1e-12)


@every_penalty
def test_strength_and_step_enter_as_a_product(penalty: Penalty) -> None:
    weight, step = torch.randn(4, 5, **double), torch.rand(4, 5, **double)
    groups = [penalty.groups] if isinstance(penalty, GroupLasso) else []
    weaker = type(penalty)(0.7 / 4, *groups)
    torch.testing.assert_close(weaker.proximal(weight, 4 * step), penalty.proximal(weight, step))
    assert 4 * weaker.value(weight) == pytest.approx(penalty.value(weight))


@every_penalty
def test_arguments_are_left_as_they_are(penalty: Penalty) -> None:
    weight, step = torch.randn(4, 5), torch.rand(4, 5)
    copies = weight.clone(), step.clone()
    penalty.proximal(weight, step).zero_()
    penalty.gradient(weight).zero_()
    assert torch.equal(weight, copies[0])
    assert torch.equal(step, copies[1])


def test_channels_are_the_neurons_of_the_transposed_weight() -> None:
    weight, step = torch.randn(4, 5, 3, 3), torch.rand(4, 5, 3, 3)
    neuron, channel = GroupLasso(0.2), GroupLasso(0.2, "channel")
    swapped = neuron.proximal(weight.transpose(0, 1), step.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(channel.proximal(weight, step), swapped)
    torch.testing.assert_close(channel.value(weight), neuron.value(weight.transpose(0, 1)))


@pytest.mark.parametrize("kind", [L1, L2, GroupLasso])
@pytest.mark.parametrize("strength", [-1e-3, math.inf, math.nan])
def test_a_strength_out_of_range_is_refused(kind: Any, strength: float) -> None:
    with pytest.raises(ValueError, match=r"`strength` must be in \[0, inf\)"):
        kind(strength)


def test_other_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="`strength` must be a number"):
        L1("strong")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`groups` must be 'neuron' or 'channel'. Found `groups = 'row'`"):
        GroupLasso(0.1, groups="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"two or more dimensions. Found shape \(3,\). Use `L1`"):
        GroupLasso(0.1).value(torch.ones(3))
