"""The step size of each optimizer: how far it moves a weight for a gradient that stays the same."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_structopt.regularization.penalties import knows_steps_of, step_sizes

KNOWN: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "dampening": 0.5}),  # without momentum it has no effect
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("SGD", {"lr": torch.tensor(0.1), "momentum": 0.5}),
    ("Adam", {"lr": 0.1, "eps": 1e-2}),
    ("Adam", {"lr": 0.1, "amsgrad": True, "betas": (0.9, 0.9)}),
    ("Adam", {"lr": 0.1, "betas": (0.8, 0.99), "foreach": True}),
    ("Adam", {"lr": 0.1, "fused": True}),
    ("AdamW", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.0}),
    ("NAdam", {"lr": 0.1}),
    ("RMSprop", {"lr": 0.1, "eps": 1e-2}),
    ("RMSprop", {"lr": 0.1, "momentum": 0.9, "alpha": 0.9}),
    ("RMSprop", {"lr": 0.1, "centered": True, "alpha": 0.9, "eps": 0.1, "momentum": 0.5}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 1e-3, "initial_accumulator_value": 0.2}),
    ("Adamax", {"lr": 0.1}),
]
GRADIENT = torch.tensor([[1.0, -0.3], [1e-2, 3.0]], dtype=torch.float64)


def settled(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.Tensor:
    """Take steps along one gradient until momentum has built up, and return the last move."""
    parameter.grad = 5 * GRADIENT  # a different start, which amsgrad remembers
    optimizer.step()
    parameter.grad = GRADIENT.clone()
    for _ in range(300):
        before = parameter.detach().clone()
        optimizer.step()
    return before - parameter.detach()


@pytest.mark.parametrize(("name", "settings"), KNOWN, ids=str)
def test_a_step_is_the_step_size_times_the_gradient(name: str, settings: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = getattr(torch.optim, name)([parameter], **settings)
    moved = settled(optimizer, parameter)
    assert knows_steps_of(optimizer)
    step = step_sizes(optimizer, optimizer.param_groups[0], parameter)
    torch.testing.assert_close(step * GRADIENT, moved, rtol=1e-2 if name == "NAdam" else 1e-4, atol=0)


def test_each_parameter_group_has_its_own_rate() -> None:
    slow, fast = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.SGD([{"params": slow}, {"params": fast, "lr": 1.0}], lr=0.1)
    steps = [step_sizes(optimizer, group, group["params"][0]) for group in optimizer.param_groups]
    assert steps == [0.1, 1.0]


def test_a_subclass_of_a_known_optimizer_is_known() -> None:
    class Mine(torch.optim.AdamW):
        pass

    assert knows_steps_of(Mine([nn.Parameter(torch.zeros(1))]))


def test_half_precision_state_gives_steps_in_single_precision() -> None:
    parameter = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = torch.optim.Adam([parameter], lr=1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    step = step_sizes(optimizer, optimizer.param_groups[0], parameter)
    assert step.dtype == torch.float32
    assert step == pytest.approx(torch.full((2, 2), 1e-3), rel=1e-2)


def test_a_dead_weight_has_a_finite_step() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.Adam([parameter], eps=0.0, lr=1e-3)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert step_sizes(optimizer, optimizer.param_groups[0], parameter).isfinite().all()


def test_of_another_optimizer_the_rate_is_known() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.Rprop([parameter], lr=0.25)
    assert not knows_steps_of(optimizer)
    assert step_sizes(optimizer, optimizer.param_groups[0], parameter) == 0.25
