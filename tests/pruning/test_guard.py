"""Zero stays zero under every optimizer of torch, with and without the gradient being masked first."""

import pytest
import torch
from torch import nn

from lightning_structopt.pruning.guard import _LEAVES_ZEROS_ALONE, ZeroGuard
from lightning_structopt.pruning.masks import MaskSet

HARD_SETTINGS = {
    "SGD": [
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        {"lr": 0.1, "maximize": True},
    ],
    "Adam": [{"weight_decay": 0.1, "amsgrad": True}, {"eps": 1e-12}],
    "AdamW": [{"weight_decay": 0.1, "amsgrad": True}],
    "NAdam": [{"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{"weight_decay": 0.1}],
    "RMSprop": [{"momentum": 0.9, "centered": True, "weight_decay": 0.1}],
    "Adagrad": [{"weight_decay": 0.1}],
    "Adadelta": [{"weight_decay": 0.1}],
    "Adamax": [{"weight_decay": 0.1}],
}
OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in {"Optimizer", "LBFGS", "SparseAdam"}
)
CASES = [(name, settings) for name in OPTIMIZERS for settings in HARD_SETTINGS.get(name, [{}])]


def test_every_trusted_optimizer_is_tried_hard() -> None:
    assert {kind.__name__ for kind in _LEAVES_ZEROS_ALONE} == set(HARD_SETTINGS)


def guarded(name: str, settings: dict) -> tuple[nn.Linear, torch.optim.Optimizer, MaskSet, ZeroGuard]:
    layer = nn.Linear(6, 5, bias=False)
    optimizer = getattr(torch.optim, name)(layer.parameters(), **settings)
    masks = MaskSet({"weight": layer.weight})
    guard = ZeroGuard(masks)
    guard.attach([optimizer])
    return layer, optimizer, masks, guard


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("masked_first", [True, False])
def test_zero_stays_zero(name: str, settings: dict, masked_first: bool) -> None:
    torch.manual_seed(0)
    layer, optimizer, masks, guard = guarded(name, settings)
    for step in range(8):
        optimizer.zero_grad()
        (layer(torch.randn(4, 6)) ** 2).sum().backward()
        if masked_first:
            guard.mask_gradients(optimizer)
        optimizer.step()
        if step == 3:  # in the middle, so that momentum has built up
            masks.update({"weight": torch.rand(5, 6) > 0.5})
            masks.apply_to_state(optimizer)
        if step >= 3:
            assert torch.equal(layer.weight != 0, masks.masks()["weight"])


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("Adam", {"betas": (0.9, 0.9), "amsgrad": True}, "exp_avg_sq"),
        ("AdamW", {"betas": (0.9, 0.9), "weight_decay": 0.1}, "exp_avg_sq"),
        ("RMSprop", {"alpha": 0.9, "centered": True, "momentum": 0.9}, "square_avg"),
        ("Adadelta", {"rho": 0.9}, "square_avg"),
    ],
)
def test_second_moments_of_dead_weights_never_come_near_zero(name: str, settings: dict, key: str) -> None:
    """A square root of zero takes 12 times as long, and decay would get there within 1,000 steps."""
    layer, optimizer, masks, guard = guarded(name, settings)
    masks.update({"weight": torch.rand(5, 6) > 0.5})
    for _ in range(1000):
        optimizer.zero_grad()
        (layer(torch.ones(4, 6)) ** 2).sum().backward()
        guard.mask_gradients(optimizer)
        optimizer.step()
        mask = masks.masks()["weight"]
        assert optimizer.state[layer.weight][key][~mask].min() > 1e-6
        assert not layer.weight[~mask].any()


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda value: str(value))
def test_masked_gradients_after_others_do_not_revive(name: str, settings: dict) -> None:
    """Gradients that weren't masked, of steps before or of another run, have left momentum to dead weights."""
    torch.manual_seed(0)
    layer, optimizer, masks, guard = guarded(name, settings)
    masks.update({"weight": torch.rand(5, 6) > 0.5})
    for masked in (False, False, True, True, False, True, True):
        optimizer.zero_grad()
        (layer(torch.randn(4, 6)) ** 2).sum().backward()
        if masked:
            guard.mask_gradients(optimizer)
        optimizer.step()
        assert torch.equal(layer.weight != 0, masks.masks()["weight"])


def test_gradients_changed_after_masking_do_not_revive() -> None:
    layer = nn.Linear(6, 5, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    masks = MaskSet({"weight": layer.weight})
    masks.update({"weight": torch.rand(5, 6) > 0.5})
    guard = ZeroGuard(masks)
    guard.attach([optimizer], gradients_are_final=False)
    layer.weight.grad = torch.ones(5, 6)
    guard.mask_gradients(optimizer)
    layer.weight.grad += 1
    optimizer.step()
    assert torch.equal(layer.weight != 0, masks.masks()["weight"])


def test_detach_leaves_no_hook() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    guard = ZeroGuard(MaskSet({}))
    guard.attach([optimizer])
    guard.attach([optimizer])
    assert len(optimizer._optimizer_step_post_hooks) == 1
    guard.detach()
    assert not optimizer._optimizer_step_post_hooks
