"""Half of every group goes: the smaller module computes what the masked one does."""

import copy
import warnings
from typing import Any

import pytest
import torch
from small_nets import NETS, HardCoded, make
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_structopt.shrinking.copies import copied
from lightning_structopt.shrinking.graph_form import GraphForm
from lightning_structopt.shrinking.plan import ShrinkPlan, as_tuple
from lightning_structopt.shrinking.removal import remove
from lightning_structopt.shrinking.report import ShrinkReport
from lightning_structopt.shrinking.structure import structure_of


def halve(module: nn.Module, inputs: Any, seed: int = 0, include_normalized: bool = False) -> ShrinkReport:
    """Remove a random half of every group."""
    structure = structure_of(module, inputs)
    generator = torch.Generator().manual_seed(seed)
    groups = structure.groups(include_normalized)
    halves = [
        group.classes[torch.randperm(group.size, generator=generator)[: group.size // 2]] for group in groups
    ]
    return remove(structure, torch.cat(halves), include_normalized)


def masked_by(plan: ShrinkPlan, module: nn.Module) -> nn.Module:
    """Zero what the plan does not keep, one index at a time."""
    masked = copied(module)
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            for dim, indices in plan.kept.get(name, {}).items():
                for index in set(range(parameter.shape[dim])) - set(indices):
                    if (
                        not name.endswith(("original1", "_v")) or dim != 0
                    ):  # a direction of no length is no direction
                        parameter.select(dim, index).zero_()
    return masked


def run(module: nn.Module, inputs: Any) -> list[Tensor]:
    return [each for each in tree_leaves(module(*as_tuple(inputs))) if isinstance(each, Tensor)]


@pytest.mark.parametrize("name", NETS)
def test_smaller_module_computes_what_the_masked_one_does(name: str) -> None:
    module, inputs = make(name)
    before = copy.deepcopy(module.state_dict())
    report = halve(module, inputs)
    small, masked = report.module, masked_by(report.plan, module)
    assert type(small) is type(module)
    assert report.form == "module"
    assert report.parameters[1] < report.parameters[0]
    for training in (False, True):
        for network in (small, masked):
            network.train(training)
            for part in network.modules():  # which draw other numbers
                if "Drop" in type(part).__name__ or "StochasticDepth" in type(part).__name__:
                    part.eval()
        for mine, theirs in zip(run(small, inputs), run(masked, inputs), strict=True):
            torch.testing.assert_close(
                mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max())
            )
            assert theirs.abs().max() > 0
    sum(each.sum() for each in run(small, inputs) if each.is_floating_point()).backward()
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    "name", ["resnet", "timm_vit", "lstm", "tied", "split", "weight_norm", "old_weight_norm"]
)
def test_plan_makes_the_same_module_of_a_fresh_one(name: str, tmp_path: Any) -> None:
    module, inputs = make(name)
    report = halve(module, inputs)
    report.plan.save(tmp_path / "plan.json")
    plan = ShrinkPlan.load(tmp_path / "plan.json")
    assert plan == report.plan
    fresh = plan.apply(NETS[name][0]())
    fresh.load_state_dict(report.module.state_dict())
    for mine, theirs in zip(run(fresh.eval(), inputs), run(report.module.eval(), inputs), strict=True):
        assert torch.equal(mine, theirs)


def test_torch_layers_say_their_new_sizes() -> None:
    module, inputs = make("mobilenet_v2")
    small = halve(module, inputs).module
    for part in small.modules():
        if isinstance(part, nn.Conv2d):
            assert part.weight.shape[:2] == (part.out_channels, part.in_channels // part.groups)
        if isinstance(part, nn.BatchNorm2d):
            assert part.weight.shape[0] == part.num_features == len(part.running_mean)


def test_weights_stay_tied() -> None:
    module, inputs = make("tied")
    small = halve(module, inputs).module
    assert small.head.weight is small.embed.weight
    assert small.embed.weight.shape == (11, 4)


def test_what_is_frozen_stays_frozen_and_names_stay() -> None:
    module, inputs = make("resnet")
    module.conv1.weight.requires_grad_(False)
    small = halve(module, inputs).module
    assert not small.conv1.weight.requires_grad
    assert small.fc.weight.requires_grad
    assert list(small.state_dict()) == list(module.state_dict())
    assert isinstance(small.conv1.weight, nn.Parameter)


def test_features_under_a_norm_stay_unless_asked() -> None:
    module, inputs = make("layer_norm")
    assert halve(module, inputs).plan.kept.keys() == {"3.weight", "3.bias", "5.weight"}
    small = halve(module, inputs, include_normalized=True).module
    assert small[1].normalized_shape == (4,)
    assert run(small, inputs)[0].isfinite().all()


class TestGraphs:
    @pytest.fixture
    def report(self) -> ShrinkReport:
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="sizes written into its code.*exported graph"):
            return halve(HardCoded().eval(), torch.randn(2, 5, 6))

    def test_computes_the_same_for_any_batch_in_either_mode(self, report: ShrinkReport) -> None:
        torch.manual_seed(0)
        masked = masked_by(report.plan, HardCoded())
        small = report.module
        kept = report.plan.kept["shift"][0]
        assert torch.equal(small.shift, masked.shift[kept])
        assert isinstance(small, GraphForm)
        assert report.form == "graph"
        assert "not the same class" in report.explain()
        inputs = torch.randn(7, 5, 6)
        torch.testing.assert_close(small.eval()(inputs), masked.eval()(inputs))
        small.train()
        assert not torch.equal(small(inputs), small(inputs))  # dropout
        small(inputs).sum().backward()
        assert all(parameter.grad is not None for parameter in small.parameters())
        assert list(small.state_dict()) == list(masked.state_dict())

    def test_copies_and_exports(self, report: ShrinkReport) -> None:
        inputs = torch.randn(2, 5, 6)
        small = report.module.eval()
        assert torch.equal(copy.deepcopy(small)(inputs), small(inputs))
        with torch.no_grad():
            again = torch.export.export(small, (inputs,), strict=False).module()
        torch.testing.assert_close(again(inputs), small(inputs))

    def test_plan_needs_the_example_input(self, report: ShrinkReport) -> None:
        with pytest.raises(ValueError, match="needs an example input"):
            report.plan.apply(HardCoded())
        inputs = torch.randn(2, 5, 6)
        again = report.plan.apply(HardCoded(), inputs)
        again.load_state_dict(report.module.state_dict())
        torch.testing.assert_close(again.eval()(inputs), report.module.eval()(inputs))

    def test_other_inputs_than_the_example_are_an_error(self, report: ShrinkReport) -> None:
        with pytest.raises(ValueError, match="takes inputs as the example input was"):
            report.module(torch.randn(2, 5, 6), torch.randn(2, 5, 6))


def test_multihead_attention_of_torch_as_a_graph() -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = halve(module, torch.randn(2, 3, 8))
    assert report.module.state_dict()["self_attn.in_proj_weight"].shape == (12, 8)
    assert report.difference < 1e-5
