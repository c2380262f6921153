"""Taps catch what modules put out, each exactly once, and say so where they can't."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_structopt.distillation.taps import Taps, tensor_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        self.layer1 = nn.Linear(3, 3)
        self.layer2 = nn.Linear(3, 2)
        self.idle = nn.Linear(1, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer1(self.layer1(self.body(inputs)))
        return self.layer2(hidden.relu_())


def caught(net: nn.Module, *names: str, owner: str = "student") -> dict[str, Tensor]:
    taps = Taps(net, names, owner)
    taps.attach()
    with taps:
        net(torch.ones(5, 4))
    return taps.take()


def test_outputs_are_those_of_the_pass() -> None:
    net = Net()
    found = caught(net, "body.0", "body", "logits")
    hidden = net.body[0](torch.ones(5, 4))
    assert torch.equal(found["body.0"], hidden)
    assert torch.equal(found["body"], hidden.tanh())
    assert torch.equal(found["logits"], net(torch.ones(5, 4)))
    found["body"].sum().backward()
    assert net.body[0].weight.grad is not None


def test_closed_taps_catch_and_keep_nothing() -> None:
    net = Net()
    taps = Taps(net, ["body"], "student")
    taps.attach()
    with taps:
        net(torch.ones(5, 4))
    net(torch.zeros(1, 4))  # as validation would
    assert taps.take()["body"].shape == (5, 3)
    assert taps._caught == {}


def test_attaching_twice_catches_once_and_removing_leaves_no_hook() -> None:
    net = Net()
    taps = Taps(net, ["body", "body"], "student")
    taps.attach()
    taps.attach()
    with taps:
        net(torch.ones(5, 4))
    assert taps.take().keys() == {"body"}
    taps.remove()
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda taps: pickle.loads(pickle.dumps(taps))], ids=["copy", "pickle"]
)
def test_a_copy_taps_its_own_model(twin: Any) -> None:
    net = Net()
    other = twin(Taps(net, ["body"], "student"))
    with other:
        net(torch.ones(5, 4))
    with pytest.raises(ValueError, match="Found 0 runs"):
        other.take()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer3", r"Found `layer3`, which the `Net` doesn't have. Near it: .*`layer[12]`"),
        ("body.7", r"Found `body.7`.*Near it: .*`body"),
        ("", r"must name a module of the student"),
    ],
)
def test_a_name_of_nothing(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Taps(Net(), [name], "student").attach()


@pytest.mark.parametrize(("name", "runs"), [("layer1", 2), ("idle", 0)])
@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_a_module_that_runs_never_or_twice(name: str, runs: int, owner: str) -> None:
    with pytest.raises(
        ValueError, match=f"`{name}` of the {owner} must run exactly once .* Found {runs} runs"
    ):
        caught(Net(), name, owner=owner)


def test_an_output_that_is_changed_in_place_afterwards() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match="the output of `0` of the student was changed in place"):
        caught(net, "0")
    assert (caught(net, "1")["1"] >= 0).all()


def test_outputs_under_inference_mode() -> None:
    with torch.inference_mode():
        assert caught(Net(), "body")["body"].shape == (5, 3)


class Answer:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


ONE = torch.ones(1)


@pytest.mark.parametrize(
    "output",
    [ONE, (ONE, None), [ONE], {"logits": ONE}, Answer(ONE)],
    ids=["tensor", "tuple", "list", "dict", "object"],
)
def test_the_tensor_in_an_output(output: Any) -> None:
    assert tensor_of(output, "logits", "teacher") is ONE


@pytest.mark.parametrize(
    "output", [None, (), {"states": ONE}, ("a", ONE)], ids=["none", "empty", "dict", "tuple"]
)
def test_no_tensor_in_an_output(output: Any) -> None:
    with pytest.raises(TypeError, match="`head` of the teacher must put out a tensor"):
        tensor_of(output, "head", "teacher")
