"""`shrink` removes exactly what has no effect."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_nets import make
from test_removal import run
from torch import Tensor, nn

from lightning_structopt.pruning import Neurons, prune
from lightning_structopt.shrinking.shrink import shrink, shrink_report


def assert_same(one: nn.Module, other: nn.Module, inputs: Any) -> None:
    for training in (False, True):
        for mine, theirs in zip(
            run(one.train(training), inputs), run(other.train(training), inputs), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def norm_net(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


IMAGE = torch.randn(4, 3, 6, 6)


@torch.no_grad()
def zero(module: nn.Module, names: str, rows: list[int]) -> None:
    for name in names.split():
        module.get_parameter(name)[rows] = 0


@pytest.mark.parametrize("name", ["resnet", "split", "lstm", "heads"])
def test_nothing_goes_where_nothing_is_zero(name: str) -> None:
    module, inputs = make(name)
    report = shrink_report(module, inputs)
    assert report.plan.kept == {}
    assert report.parameters[0] == report.parameters[1]
    assert_same(report.module, copy.deepcopy(module), inputs)


@pytest.mark.parametrize(
    ("names", "activation", "left"),
    [
        ("1.weight 1.bias", nn.ReLU, 5),  # the norm gives zero
        ("1.weight 1.bias", nn.GELU, 5),
        ("1.weight 1.bias", nn.Sigmoid, 8),  # of which the sigmoid makes a half
        ("0.weight 0.bias", nn.ReLU, 8),  # the norm's shift is left
        ("0.weight 0.bias 1.bias", nn.ReLU, 5),
        ("1.weight", nn.ReLU, 8),
    ],
)
def test_producers_that_give_zero(names: str, activation: Callable[[], nn.Module], left: int) -> None:
    module = norm_net(activation)
    nn.init.uniform_(module[1].bias, 0.1, 1)
    zero(module, names, [1, 4, 6])
    small = shrink(module, IMAGE)
    assert small[0].out_channels == small[1].num_features == small[5].in_features == left
    assert_same(small, module, IMAGE)


def test_a_mean_that_is_not_zero_counts_in_evaluation() -> None:
    module = norm_net(nn.ReLU)
    nn.init.constant_(module[1].running_mean, 0.5)
    zero(module, "0.weight 0.bias 1.bias", [1, 4])
    assert shrink(module, IMAGE)[0].out_channels == 8


def test_consumers_that_read_nothing() -> None:
    module = norm_net(nn.Sigmoid)
    with torch.no_grad():
        module[5].weight[:, [0, 7]] = 0
    small = shrink(module, IMAGE)
    assert small[0].out_channels == 6
    assert_same(small, module, IMAGE)


def test_a_channel_of_a_residual_stream_goes_only_if_all_its_readers_are_done() -> None:
    module, inputs = make("branches")
    with torch.no_grad():
        module.last.weight[:, [1, 2]] = 0
        module.both.weight[:, 1] = 0
    small = shrink(module, inputs)
    assert small.one.out_channels == 7
    assert small.take == 5
    assert_same(small, module, inputs)


def test_a_head_that_is_not_read_goes() -> None:
    module, inputs = make("heads")
    with torch.no_grad():
        module.out.weight[:, 3:6] = 0
    small = shrink(module, inputs)
    assert (small.heads, small.head_dim) == (3, 3)
    assert small.qkv.weight.shape == (27, 12)
    assert_same(small, module, inputs)


def test_all_zero_leaves_one() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.zeros_(module[2].weight)
    small = shrink(module, torch.randn(3, 4))
    assert small[0].out_features == 1
    assert_same(small, module, torch.randn(3, 4))


def test_after_pruning_neurons() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
    prune(module, 0.5, pattern=Neurons(), include=["0.weight", "2.weight"])
    small = shrink(module, torch.randn(5, 6))
    assert (small[0].out_features, small[2].out_features) == (16, 8)
    assert_same(small, module, torch.randn(5, 6))


def test_a_head_of_torch_attention_stays_where_the_class_shall() -> None:
    module = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True).eval()
    with torch.no_grad():
        module.self_attn.out_proj.weight[:, 2:4] = 0
        module.linear2.weight[:, 5] = 0
    inputs = torch.randn(2, 3, 8)
    small = shrink(module, inputs, same_class=True)
    assert (small.linear1.out_features, len(small.self_attn.in_proj_weight)) == (15, 24)
    with pytest.warns(UserWarning, match="exported graph"):
        graph = shrink(module, inputs)
    assert len(graph.self_attn.in_proj_weight) == 18
    torch.testing.assert_close(graph.eval()(inputs), module(inputs))


def test_a_plan_shrinks_as_it_says() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    zero(module, "0.weight 0.bias", [0])
    plan = shrink_report(module, torch.randn(3, 4)).plan
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    small = shrink(other, torch.randn(3, 4), plan)
    assert torch.equal(small[0].weight, other[0].weight[1:])
    assert torch.equal(small[2].weight, other[2].weight[:, 1:])
    with pytest.raises(ValueError, match="A `plan` says all that is removed. Found it with other options"):
        shrink(other, torch.randn(3, 4), plan, exclude=["0.weight"])


def test_plan_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match="`plan` must be a `ShrinkPlan`"):
        shrink(nn.Linear(2, 2), torch.randn(1, 2), plan={"kept": {}})  # type: ignore[arg-type]


def test_twice_is_once() -> None:
    module = norm_net(nn.ReLU)
    zero(module, "1.weight 1.bias", [1, 4, 6])
    once = shrink(module, IMAGE)
    assert shrink_report(once, IMAGE).plan.kept == {}


def test_in_bfloat16() -> None:
    module = norm_net(nn.ReLU).bfloat16()
    zero(module, "1.weight 1.bias", [1])
    small = shrink(module, IMAGE.bfloat16())
    assert small[0].weight.shape[0] == 7
    assert small[0].weight.dtype == torch.bfloat16


def test_a_batch_of_one_is_compared_in_evaluation() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    zero(module, "1.weight 1.bias", [3])
    assert shrink(module, torch.randn(1, 4))[0].out_features == 7


class _Checked(nn.Module):
    """Counts its features in training."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        if self.training and hidden.shape[-1] < 7:
            raise RuntimeError("too few features")
        return self.two(hidden)


def test_a_module_that_then_can_not_be_trained_is_refused() -> None:
    module = _Checked()
    nn.init.zeros_(module.two.weight)
    with pytest.raises(ValueError, match="must run in training .* RuntimeError: too few features.*`exclude`"):
        shrink(module, torch.randn(3, 4))


def test_outputs_that_are_no_tensors_are_an_error() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> int:
            return len(x)

    with pytest.raises(
        TypeError, match="must be tensors, or lists, tuples and dictionaries of them. Found `int`"
    ):
        shrink(Silent(), torch.randn(3, 4))


class _Lopsided(nn.Module):
    """Reads the sum of its input's width, which no literal tells."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        return self.two(hidden * hidden.shape[-1])


def test_a_difference_that_nothing_mends_is_taken_to_the_graph() -> None:
    module = _Lopsided()
    with torch.no_grad():
        module.two.weight[:, 3] = 0
    inputs = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="exported graph"):
        small = shrink(module, inputs)
    torch.testing.assert_close(small.eval()(inputs), module(inputs))


class _Positioned(nn.Module):
    """Reads as much of its table as the input is long."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x + self.table[: x.shape[1]]).relu())


def test_what_longer_inputs_would_read_stays() -> None:
    module = _Positioned()
    with torch.no_grad():
        module.two.weight[:, 3] = 0
    small = shrink(module, torch.randn(2, 5, 4))
    assert (small.table.shape, small.one.out_features) == ((9, 4), 7)
    longer = torch.randn(2, 9, 4)
    torch.testing.assert_close(small(longer), module(longer))
