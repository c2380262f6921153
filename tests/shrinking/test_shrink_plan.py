"""Plans: what they hold, and what is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_structopt.shrinking.plan import ShrinkPlan
from lightning_structopt.shrinking.shrink import shrink_report


def network(hidden: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 2))


@pytest.fixture
def plan() -> ShrinkPlan:
    module = network()
    with torch.no_grad():
        module[2].weight[:, [0, 5]] = 0
    return shrink_report(module, torch.randn(3, 4)).plan


def test_holds_names_and_numbers(plan: ShrinkPlan, tmp_path: Path) -> None:
    kept = [1, 2, 3, 4, 6, 7]
    assert plan == ShrinkPlan(
        "torch.nn.modules.container.Sequential",
        {"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}},
        {"0.weight": [8, 4], "0.bias": [8], "2.weight": [2, 8]},
        {"0": {"out_features": 6}, "2": {"in_features": 6}},
    )
    plan.save(tmp_path / "plan.json")
    assert ShrinkPlan.load(str(tmp_path / "plan.json")) == plan
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 1


def test_round_trips_by_repr_and_pickle(plan: ShrinkPlan) -> None:
    assert eval(repr(plan)) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_leaves_the_module_and_its_weights(plan: ShrinkPlan) -> None:
    module = network()
    small = plan.apply(module)
    assert module[0].weight.shape == (8, 4)
    small[2].bias.data.fill_(7)
    assert not (module[2].bias == 7).any()


def test_for_another_class(plan: ShrinkPlan) -> None:
    with pytest.raises(
        ValueError, match="made for, `torch.nn.modules.container.Sequential`. Found `.*Linear`"
    ):
        plan.apply(nn.Linear(4, 8))


@pytest.mark.parametrize("module", [network(9), nn.Sequential(nn.ReLU())])
def test_for_other_sizes(plan: ShrinkPlan, module: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"`0.weight` of shape \[8, 4\]. Found .*Make the module with the arguments"
    ):
        plan.apply(module)


def test_applied_twice(plan: ShrinkPlan) -> None:
    with pytest.raises(ValueError, match="don't shrink it twice"):
        plan.apply(plan.apply(network()))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("not JSON", "A plan is a JSON file"),
        ('{"version": 2}', "plans of version 1. Found version 2"),
        ("[1]", "plans of version 1. Found version None"),
        ('{"version": 1, "module_class": "a"}', "Found KeyError"),
        ('{"version": 1, "module_class": "a", "kept": 3}', "A plan has `module_class`"),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        ShrinkPlan.load(tmp_path / "plan.json")


def test_tuples_stay_tuples() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes, self.layer = (2, 3), nn.Linear(5, 5)

    name = f"{Shaped.__module__}.{Shaped.__qualname__}"
    small: Any = ShrinkPlan(name, {}, {}, {"": {"sizes": [1, 3]}}).apply(Shaped())
    assert small.sizes == (1, 3)
