"""The group lasso over channels: its proximal map by brute force, and what it does in training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_nets import make
from support import Classifier, adamw, assert_same_state, loader, sgd, trainer
from test_channel_pruning import quiet
from torch import nn

from lightning_structopt.shrinking.lasso import CoupledLasso
from lightning_structopt.shrinking.structure import structure_of


def lasso_of(module: nn.Module, inputs: Any, strength: float) -> tuple[CoupledLasso, Any]:
    structure = structure_of(module, inputs)
    groups = structure.groups(False)
    return CoupledLasso(structure, groups, strength), groups


def rates(module: nn.Module, rate: float) -> dict[int, float]:
    return {id(parameter): rate for parameter in module.parameters()}


def by_hand(module: nn.Module, groups: Any, threshold: float) -> dict[str, torch.Tensor]:
    """Take each member's weights one by one."""
    state = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for group in groups:
        slots = {slot: indices for slot, indices in group.slots.items() if slot[0] in state}
        members = [
            [
                state[name].select(dim, int(i))
                for (name, dim), indices in slots.items()
                for i in indices[member]
            ]
            for member in range(group.size)
        ]
        squares = [sum(float(each.square().sum()) for each in own) for own in members]
        for own, square in zip(members, squares, strict=True):  # views: a weight of two members is met twice
            count = sum(each.numel() for each in own)
            for each in own:
                each.mul_(max(0.0, 1 - threshold * (count / square) ** 0.5))
    return state


@pytest.mark.parametrize("name", ["resnet", "heads", "lstm", "tied", "transposed", "batch_norm"])
@pytest.mark.parametrize("threshold", [1e-3, 0.05])
def test_proximal_map_by_hand(name: str, threshold: float) -> None:
    module, inputs = make(name)
    lasso, groups = lasso_of(module, inputs, 10 * threshold)
    expected = by_hand(module, groups, threshold)
    lasso.shrink(rates(module, 0.1))
    found = {key: parameter.detach() for key, parameter in module.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_directions_keep_their_length() -> None:
    module, inputs = make("weight_norm")
    lasso, _ = lasso_of(module, inputs, 1.0)
    before = module[0].parametrizations.weight.original1.detach().clone()
    lasso.shrink(rates(module, 0.01))
    assert torch.equal(module[0].parametrizations.weight.original1, before)
    assert module[0].parametrizations.weight.original0.abs().max() < 10


def test_only_what_was_moved_gets_smaller() -> None:
    module, inputs = make("batch_norm")
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    lasso_of(module, inputs, 1.0)[0].shrink({})
    assert_same_state(before, {name: parameter.detach() for name, parameter in module.named_parameters()})


def lengths(module: nn.Module) -> torch.Tensor:
    net = module.net
    return (
        (net[0].weight.square().sum(1) + net[1].weight.square() + net[3].weight.square().sum(0))
        .sqrt()
        .detach()
    )


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])
def test_channels_get_smaller_before_they_go(optimizer: Any, tmp_path: Path) -> None:
    found = []
    for lasso in (0.0, 0.5):
        module = Classifier(optimizer)
        trainer(tmp_path, quiet(begin=0.9, end=0.95, remove="never", lasso=lasso)).fit(module, loader())
        found.append(lengths(module).sort().values[8:].mean())
    assert found[1] < 0.9 * found[0]


def test_strong_enough_it_leaves_little(tmp_path: Path) -> None:
    module = Classifier(sgd)
    pruning = quiet(begin=0.9, end=0.95, remove="never", lasso=1.0)
    trainer(tmp_path, pruning, max_epochs=8).fit(module, loader())
    assert lengths(module).max() < 0.05


def test_ends_with_the_window(tmp_path: Path) -> None:
    states = []
    for lasso in (0.0, 0.1):
        module = Classifier(sgd)
        pruning = quiet(begin=0.0, end=0.01, remove="never", lasso=lasso)  # closes before the first step
        trainer(tmp_path, pruning).fit(module, loader())
        states.append(module.state_dict())
    assert_same_state(*states)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_resume_equals_straight(epoch: int, tmp_path: Path) -> None:
    def fit(*more: Any, ckpt: Any = None) -> Any:
        run = trainer(tmp_path, quiet(end=0.5, lasso=0.01, remove="never"), *more)
        run.fit(Classifier(adamw), loader(), ckpt_path=ckpt)
        return run.lightning_module.state_dict()

    straight = fit(ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}"))
    assert_same_state(fit(ckpt=tmp_path / "saved" / f"epoch={epoch}.ckpt"), straight)


@pytest.mark.parametrize("lasso", [-1.0, float("inf"), float("nan")])
def test_wrong_strength(lasso: float) -> None:
    with pytest.raises(ValueError, match=r"`lasso` must be in \[0, inf\)"):
        quiet(lasso=lasso)
