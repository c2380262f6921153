"""What optimizers remember after growth is what they would remember of the grown module's gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_structopt.growth import Deepen, GrowthPlan, Widen
from lightning_structopt.growth.optimizer_state import wider_state


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 3),
    ).double()  # fmt: skip


INPUTS = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def backward(module: nn.Module) -> None:
    module.zero_grad()
    nn.functional.cross_entropy(module(INPUTS), torch.arange(5) % 3).backward()


def plan(factor: float) -> GrowthPlan:
    return Widen(factor, noise=0.0).plan(net(), INPUTS)


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {"amsgrad": True, "eps": 1e-30}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "eps": 1e-30}),
    "adamax": (torch.optim.Adamax, {"eps": 1e-30}),
    "adafactor": (torch.optim.Adafactor, {"eps": (1e-30, 1e-30)}),
}


@pytest.mark.parametrize("factor", [1.5, 2.0])
def test_gradients_are_those_of_the_wider_module(factor: float) -> None:
    module, fresh = net(), plan(factor).apply(net())
    backward(module)
    plan(factor).apply_in_place(module)
    backward(fresh)
    for mine, theirs in zip(module.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adafactor"])
def test_states_are_those_of_the_wider_module(name: str) -> None:
    """One step of each, from the same weights: what is remembered agrees, whether it grew before or after."""
    kind, options = OPTIMIZERS[name]
    states = []
    for grows_first in (True, False):
        module = net()
        if grows_first:
            plan(2.0).apply_in_place(module)
        optimizer = kind(module.parameters(), lr=1e-3, **options)
        backward(module)
        optimizer.step()
        if not grows_first:
            plan(2.0).apply_in_place(module, [optimizer])
        states.append([optimizer.state[parameter] for parameter in module.parameters()])
    for first, after in zip(*states, strict=True):
        assert first.keys() == after.keys()
        for key, value in first.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(after[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    module = net()
    optimizer = kind(module.parameters(), lr=1e-3, **options)
    for step in range(4):
        backward(module)
        optimizer.step()
        if step == 1:
            plan(1.5).apply_in_place(module, [optimizer])
            before = module[0].weight.clone()
    assert module[0].weight.shape == (6, 2, 3, 3)
    assert not torch.equal(module[0].weight, before)


def test_a_state_of_another_shape_is_refused_and_nothing_has_changed() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    optimizer.state[module[6].weight]["strange"] = torch.ones(5)
    with pytest.raises(
        ValueError, match=r"Found `strange` of shape \(5,\) for a parameter of shape \(3, 96\)"
    ):
        plan(2.0).apply_in_place(module, [optimizer])
    assert module[0].weight.shape == (4, 2, 3, 3)


def test_numbers_stay() -> None:
    assert wider_state({"step": torch.tensor(3.0), "name": "x"}, (2,), {0: [0, 0, 1]}, []) == {
        "step": torch.tensor(3.0),
        "name": "x",
    }


class TestNewLayers:
    def groups(self, optimizer: torch.optim.Optimizer) -> list[list[tuple[int, ...]]]:
        return [[tuple(each.shape) for each in group["params"]] for group in optimizer.param_groups]

    def test_join_the_group_of_those_before_them(self) -> None:
        module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        weights, biases = [module[0].weight, module[2].weight], [module[0].bias, module[2].bias]
        optimizer = torch.optim.AdamW(
            [{"params": weights}, {"params": biases, "weight_decay": 0.0}], weight_decay=0.1
        )
        Deepen().plan(module, torch.randn(2, 4)).apply_in_place(module, [optimizer])
        assert self.groups(optimizer) == [[(6, 4), (3, 6), (6, 6)], [(6,), (3,), (6,)]]
        module(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        assert not torch.equal(module[1][1][0].weight, torch.eye(6))

    def test_join_the_optimizer_of_those_before_them(self) -> None:
        module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        body, head = (torch.optim.SGD(module[at].parameters(), 0.1) for at in (0, 2))
        Deepen().plan(module, torch.randn(2, 4)).apply_in_place(module, [body, head])
        assert self.groups(body) == [[(6, 4), (6,), (6, 6), (6,)]]
        assert self.groups(head) == [[(3, 6), (3,)]]

    def test_train_where_what_is_before_them_is_frozen(self) -> None:
        module = nn.Sequential(nn.Linear(4, 6).requires_grad_(False), nn.ReLU(), nn.Linear(6, 3))
        optimizer = torch.optim.SGD(module[2].parameters(), 0.1)
        Deepen().plan(module, torch.randn(2, 4)).apply_in_place(module, [optimizer])
        assert self.groups(optimizer) == [[(3, 6), (3,), (6, 6), (6,)]]
