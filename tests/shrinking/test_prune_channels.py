"""`prune_channels`: targets are met, and the least important members go."""

import copy
from typing import Any

import pytest
import torch
from small_nets import HardCoded, make
from test_removal import masked_by, run
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from lightning_structopt.pruning import LAMP, BatchNormScale, Magnitude, Random
from lightning_structopt.shrinking import (
    ChannelRatio,
    FLOPs,
    Parameters,
    Target,
    channel_report,
    prune_channels,
)
from lightning_structopt.shrinking.costs import flop_count, parameter_count
from lightning_structopt.shrinking.plan import as_tuple
from lightning_structopt.shrinking.structure import structure_of

IMAGE = torch.randn(2, 3, 32, 32)


def flops(module: nn.Module, inputs: Any) -> int:
    plain = sdpa_kernel(SDPBackend.MATH)  # as the fused kernels for CPUs are not counted
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        module(*as_tuple(inputs))
    return counter.get_total_flops()


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10).eval()


@pytest.mark.parametrize(("keep", "scope"), [(0.8, "layer"), (0.5, "layer"), (0.2, "layer"), (0.5, "global")])
def test_flops_and_parameters_are_hit(resnet: nn.Module, keep: float, scope: Any) -> None:
    small = prune_channels(resnet, FLOPs(keep), IMAGE, scope=scope)
    assert flops(small, IMAGE) / flops(resnet, IMAGE) == pytest.approx(keep, abs=0.02)
    small = prune_channels(resnet, Parameters(keep), IMAGE, scope=scope)
    assert parameters(small) / parameters(resnet) == pytest.approx(keep, abs=0.02)
    assert small(IMAGE).shape == (2, 10)


def test_the_ratio_is_that_of_every_group(resnet: nn.Module) -> None:
    report = channel_report(resnet, ChannelRatio(0.25), IMAGE)
    assert all(now == size // 4 for size, now in report.removed.values())
    assert report.module.layer4[0].conv1.out_channels == 128
    assert (report.parameters[1], report.flops[1]) == (parameters(report.module), flops(report.module, IMAGE))


@pytest.mark.parametrize(
    "name",
    [
        "resnext",
        "mobilenet_v2",
        "efficientnet",
        "timm_vit",
        "transposed",
        "heads",
        "tied",
        "two_by_two",
    ],
)
def test_costs_are_those_of_the_module_that_is_made(name: str) -> None:
    module, inputs = make(name)
    structure = structure_of(module, inputs)
    every = torch.ones(structure.traced.space.size, dtype=torch.bool)
    assert flop_count(structure.traced)(every) == flops(module, inputs)
    assert parameter_count(module, structure.traced)(every) == parameters(module)
    report = channel_report(module, ChannelRatio(0.5), inputs)
    assert report.flops == (flops(module, inputs), flops(report.module, inputs))
    assert report.parameters == (parameters(module), parameters(report.module))


def test_recurrent_layers_are_counted() -> None:
    module, inputs = make("lstm")
    structure = structure_of(module, inputs)
    every = torch.ones(structure.traced.space.size, dtype=torch.bool)
    matrices = sum(each.numel() for each in module.cells.parameters() if each.ndim == 2)
    steps, samples = 5, 2
    rest = 2 * samples * steps * 4 * 6 + 2 * samples * 16 * 3
    assert flop_count(structure.traced)(every) == 2 * samples * steps * matrices + rest


def test_the_smallest_go() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([3.0, 1, 9, 2, 8, 0])[:, None].expand(6, 4))
        module[2].weight.copy_(
            torch.tensor([0.0, 30, 0, 0, 0, 0]).expand(2, 6)
        )  # the group's, not one layer's
    report = channel_report(module, ChannelRatio(0.5), torch.randn(3, 4))
    assert report.plan.kept["0.weight"][0] == [1, 2, 4]
    assert torch.equal(report.module[2].weight, module[2].weight[:, [1, 2, 4]])


def test_ties_go_by_index() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    assert channel_report(module, ChannelRatio(0.5), torch.randn(3, 4)).plan.kept["0.bias"][0] == [3, 4, 5]


@pytest.mark.parametrize("criterion", [Magnitude(2), LAMP(), Random(3)], ids=repr)
def test_any_criterion(criterion: Any) -> None:
    module, inputs = make("shufflenet")
    report = channel_report(module, ChannelRatio(0.5), inputs, criterion=criterion)
    again = channel_report(module, ChannelRatio(0.5), inputs, criterion=criterion)
    assert report.plan == again.plan
    expected = masked_by(report.plan, module)(inputs)
    torch.testing.assert_close(report.module(inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_criterion_says_what_it_lacks(resnet: nn.Module) -> None:
    with pytest.raises(ValueError, match="`BatchNormScale` needs a batch norm"):
        prune_channels(resnet, ChannelRatio(0.5), IMAGE, criterion=BatchNormScale())


@pytest.mark.parametrize(("keep", "round_to"), [(0.4, 8), (0.9, 16)])
def test_widths_are_rounded(resnet: nn.Module, keep: float, round_to: int) -> None:
    small = prune_channels(resnet, ChannelRatio(keep), IMAGE, round_to=round_to)
    for part in small.modules():
        if isinstance(part, nn.Conv2d):
            assert part.out_channels % round_to == 0


def test_a_target_below_what_rounding_leaves(resnet: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"`ChannelRatio\(keep=0.01\)` must be within reach. Found that 0.0"):
        prune_channels(resnet, ChannelRatio(0.01), IMAGE, round_to=16)


def test_a_width_that_is_no_multiple_stays_or_becomes_one() -> None:
    module = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))
    small = prune_channels(module, ChannelRatio(0.9), torch.randn(3, 4), round_to=8)
    assert small[0].out_features == 12
    small = prune_channels(module, ChannelRatio(0.66), torch.randn(3, 4), round_to=8)
    assert small[0].out_features == 8


def test_a_minimum_is_kept(resnet: nn.Module) -> None:
    report = channel_report(resnet, ChannelRatio(0.3), IMAGE, scope="global", minimum=20)
    assert min(now for _, now in report.removed.values()) >= 20
    assert channel_report(resnet, ChannelRatio(0.004), IMAGE).module(IMAGE).shape == (2, 10)  # one of each


def test_keeping_all_keeps_all(resnet: nn.Module) -> None:
    report = channel_report(resnet, FLOPs(1.0), IMAGE)
    assert report.plan.kept == {}
    assert torch.equal(report.module(IMAGE), resnet(IMAGE))


def test_excluded_layers_keep_their_shapes(resnet: nn.Module) -> None:
    before = copy.deepcopy(resnet.state_dict())
    small = prune_channels(resnet, ChannelRatio(0.5), IMAGE, exclude=["layer2.*", "conv1.weight"])
    for name, parameter in small.named_parameters():
        if name.startswith(("layer2.", "conv1.")):
            assert torch.equal(parameter, resnet.get_parameter(name))
    assert small.layer4[0].conv1.out_channels == 256
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())


def test_residual_streams_of_transformers_go_only_on_request() -> None:
    module, inputs = make("timm_vit")
    small = prune_channels(module, ChannelRatio(0.5), inputs)
    assert small.patch_embed.proj.out_channels == 24
    assert small.blocks[0].mlp.fc1.out_features == 48
    assert small.blocks[0].attn.num_heads == 2 or small.blocks[1].attn.num_heads == 2
    thin = prune_channels(module, ChannelRatio(0.5), inputs, include_normalized=True)
    assert thin.norm.normalized_shape == (12,)
    assert run(thin, inputs)[0].isfinite().all()


def test_what_is_hard_coded_can_be_left_alone() -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True), 2)
    inputs = torch.randn(2, 3, 8)
    small = prune_channels(module, ChannelRatio(0.5), inputs, same_class=True)
    assert type(small) is nn.TransformerEncoder
    assert [layer.linear1.out_features for layer in small.layers] == [8, 8]
    assert small.layers[0].self_attn.in_proj_weight.shape == (24, 8)
    with pytest.raises(ValueError, match="Found none.*sizes that are written into code"):
        prune_channels(HardCoded(), ChannelRatio(0.5), torch.randn(2, 5, 6), same_class=True)


def test_a_table_that_no_index_reads_to_the_end_stays_whole() -> None:
    torch.manual_seed(0)
    module = models.video.swin_transformer.SwinTransformer3d(
        [2, 4, 4], 16, [1, 1], [2, 4], [8, 7, 7], num_classes=5
    )
    report = channel_report(module, ChannelRatio(0.5), torch.randn(2, 3, 4, 32, 32))
    assert not any("table" in name or "index" in name for name in report.plan.kept)
    assert report.form == "module"
    assert report.difference < 1e-5


def test_training_goes_on(resnet: nn.Module) -> None:
    small = prune_channels(resnet, FLOPs(0.3), IMAGE).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.01, momentum=0.9)
    labels = torch.tensor([1, 2])
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(small(IMAGE), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_exports_and_copies(resnet: nn.Module) -> None:
    small = prune_channels(resnet, FLOPs(0.3), IMAGE)
    expected = small(IMAGE)
    assert torch.equal(copy.deepcopy(small)(IMAGE), expected)
    exported: Tensor = torch.export.export(small, (IMAGE,)).module()(IMAGE)
    torch.testing.assert_close(exported, expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(small, backend="eager")(IMAGE), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"target": 0.5}, TypeError, "`target` must be a `Target`"),
        ({"target": FLOPs}, TypeError, "`target` must be a `Target`"),
        ({"criterion": Magnitude}, TypeError, "Did you mean `Magnitude()`"),
        ({"scope": "all"}, ValueError, "`scope` must be 'layer' or 'global'"),
        ({"round_to": 0}, ValueError, "`round_to` must be at least 1"),
        ({"minimum": 1.5}, TypeError, "`minimum` must be a whole number"),
        ({"exclude": ["nothing.*"]}, ValueError, "No parameter matches `exclude = 'nothing"),
        ({"exclude": ["*"]}, ValueError, "needs some that can go. Found none"),
        (
            {"target": FLOPs(0.001)},
            ValueError,
            r"must be within reach. Found that 0\.\d+ is left at the least",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    given = {"target": ChannelRatio(0.5), **arguments}
    with pytest.raises(error, match=match.replace("()", r"\(\)")):
        prune_channels(module, given.pop("target"), torch.randn(3, 4), **given)


@pytest.mark.parametrize("kind", [FLOPs, Parameters, ChannelRatio])
@pytest.mark.parametrize("keep", [0, 1.1, -1, float("nan")])
def test_targets_are_fractions(kind: type[Target], keep: float) -> None:
    with pytest.raises(ValueError, match=r"`keep` must be in \(0, 1\]"):
        kind(keep)
