"""Optimizer state is cut as parameters are: equal, bit for bit, to slicing by hand."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_structopt.shrinking.optimizer_state import smaller_state
from lightning_structopt.shrinking.replacement import shrink_in_place
from lightning_structopt.shrinking.shrink import shrink_report

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd without momentum": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}
LEFT = [1, 2, 4, 7]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module(torch.ones(5, 4)).square().sum().backward()
    optimizer.step()


def plan_of(module: nn.Module) -> Any:
    with torch.no_grad():
        module[2].weight[:, [0, 3, 5, 6]] = 0
    return shrink_report(module, torch.randn(5, 4)).plan


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_slicing_by_hand_and_steps_on(name: str) -> None:
    module = network()
    optimizer = OPTIMIZERS[name](module.parameters())
    step(module, optimizer)
    first, last = module[0].weight, module[2].weight
    before = {key: dict(optimizer.state[each]) for key, each in (("rows", first), ("columns", last))}
    gradients = first.grad.clone(), last.grad.clone()
    shrink_in_place(module, plan_of(module), [optimizer])
    assert module[0].weight is first, "whoever refers to it still does"
    assert first.shape == (4, 4)
    assert last.shape == (3, 4)
    assert torch.equal(first.grad, gradients[0][LEFT])
    assert torch.equal(last.grad, gradients[1][:, LEFT])
    for key, value in optimizer.state[first].items():
        old = before["rows"][key]
        assert torch.equal(value, old[LEFT] if old.ndim and len(old) == 8 else old), key
    for key, value in optimizer.state[last].items():
        old = before["columns"][key]
        assert torch.equal(value, old[:, LEFT] if old.ndim == 2 and old.shape[1] == 8 else old), key
    step(module, optimizer)
    assert all(each.isfinite().all() for each in module.parameters())


def test_the_node_that_adds_up_gradients_is_made_anew() -> None:
    module = network()
    held = [each.view_as(each).grad_fn.next_functions[0][0] for each in module.parameters()]
    shrink_in_place(module, plan_of(module))
    module(torch.ones(5, 4)).sum().backward()
    assert len(held) == 4
    assert module[0].weight.grad.shape == (4, 4)


def test_leaves_the_state_that_it_is_given() -> None:
    state = {"step": torch.tensor(3.0), "exp_avg": torch.arange(6.0).reshape(2, 3), "name": "x", "none": None}
    found = smaller_state(state, (2, 3), {0: [1], 1: [0, 2]})
    assert torch.equal(found["exp_avg"], torch.tensor([[3.0, 5.0]]))
    assert (found["step"], found["name"], found["none"]) == (state["step"], "x", None)
    assert state["exp_avg"].shape == (2, 3)


@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 3, 1)])
def test_what_has_another_shape_is_refused_and_nothing_changes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Found `basis` of shape .* for a parameter of shape \(2, 3\)"):
        smaller_state({"basis": torch.zeros(shape)}, (2, 3), {0: [1]})
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    step(module, optimizer)
    optimizer.state[module[2].weight]["basis"] = torch.zeros(7, 7)
    with pytest.raises(ValueError, match="Found `basis`"):
        shrink_in_place(module, plan_of(module), [optimizer])
    assert module[0].weight.shape == (8, 4)
    assert optimizer.state[module[0].weight]["momentum_buffer"].shape == (8, 4)
