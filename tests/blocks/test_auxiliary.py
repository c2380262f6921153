"""`auxiliary_loss`: what it adds, and that nothing stale, doubled or forgotten is in it."""

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_structopt.blocks import (
    AdaptiveComputationUnit,
    Gate,
    GateBudget,
    GatedBlock,
    RoutedBlock,
    auxiliary_loss,
)


def gated(**options: object) -> GatedBlock:
    return GatedBlock(nn.Linear(4, 4), Gate(4), **options)


def routed(balance: float = 1.0) -> RoutedBlock:
    return RoutedBlock([nn.Linear(4, 4), nn.Linear(4, 4)], nn.Linear(4, 2), balance=balance)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = gated(budget=GateBudget(0.2)), routed()
        self.third = AdaptiveComputationUnit(nn.Linear(4, 4), Gate(4), 3)

    def forward(self, inputs: Tensor, skip: bool = False) -> Tensor:
        inputs = self.first(inputs)
        return self.third(inputs if skip else self.second(inputs))


def test_is_the_sum_over_blocks() -> None:
    net = Net()
    _ = net(torch.randn(8, 4))
    parts = [auxiliary_loss(part) for part in (net.first, net.second, net.third)]
    torch.testing.assert_close(auxiliary_loss(net), sum(parts))
    assert auxiliary_loss(net.first).item() == pytest.approx((net.first.executed_fraction - 0.2) ** 2)


def test_asked_twice_answers_the_same() -> None:
    net = Net()
    _ = net(torch.randn(8, 4))
    assert auxiliary_loss(net) == auxiliary_loss(net) > 0


def test_the_next_pass_takes_the_place_of_what_was_collected() -> None:
    net = routed()
    _ = net(torch.randn(8, 4))
    first = auxiliary_loss(net)
    _ = net(torch.randn(8, 4))
    second = auxiliary_loss(net)
    assert first != second
    assert second < 3  # not the sum of both


def test_several_passes_in_one_step_all_count() -> None:
    net, inputs = routed(), torch.randn(8, 4)
    loss = net(inputs).sum()
    once = auxiliary_loss(net)
    loss.backward()
    two = net(inputs) + net(inputs)
    torch.testing.assert_close(auxiliary_loss(net), 2 * once)
    (two.sum() + auxiliary_loss(net)).backward()


def test_a_block_that_did_not_run_counts_nothing() -> None:
    net, inputs = Net(), torch.randn(8, 4)
    first = net(inputs)
    assert auxiliary_loss(net) > 0  # and no backward: it may still lie there
    output = net(inputs, skip=True)
    loss = auxiliary_loss(net)
    torch.testing.assert_close(loss, auxiliary_loss(net.first) + auxiliary_loss(net.third))
    (output.sum() + loss).backward()
    assert net.second.router.weight.grad is None
    assert first.requires_grad


def test_nothing_is_left_after_backward() -> None:
    net = Net()
    output = net(torch.randn(8, 4))
    (output.sum() + auxiliary_loss(net)).backward()
    assert not any(block._passes.waiting for block in (net.first, net.second, net.third))


@pytest.mark.parametrize("make", [routed, gated, Net])
def test_graphs_that_are_thrown_away_take_their_losses_along(make: object) -> None:
    net = make()
    for _ in range(3):
        net(net(torch.randn(8, 4)))  # tied, so that one loss hangs on the other's graph
    gc.collect()
    assert not any(block._passes.waiting for block in net.modules() if hasattr(block, "_passes"))
    with pytest.raises(ValueError, match="while what it computed is still in use"):
        auxiliary_loss(net)


def test_gradients_reach_gate_router_and_halting() -> None:
    net = Net()
    _ = net(torch.randn(64, 4))
    auxiliary_loss(net).backward()
    for part in (net.first.gate, net.second.router, net.third.gate):
        assert all(parameter.grad is not None for parameter in part.parameters())


def test_a_common_budget_weighs_blocks_by_cost() -> None:
    net = nn.Sequential(gated(cost=1.0), gated(cost=3.0), gated(budget=GateBudget(0.5)))
    _ = net(torch.randn(64, 4))
    shares = [block.executed_fraction for block in net]
    own = (shares[2] - 0.5) ** 2
    common = 2 * ((shares[0] + 3 * shares[1]) / 4 - 0.4) ** 2
    found = auxiliary_loss(net, GateBudget(0.4, strength=2.0))
    assert found.item() == pytest.approx(own + common, abs=1e-6)


@pytest.mark.parametrize("mode", ["evaluation", "no gradients in evaluation"])
def test_zero_where_nothing_is_trained(mode: str) -> None:
    net = Net().eval()
    with torch.set_grad_enabled(mode == "evaluation"):
        _ = net(torch.randn(8, 4))
        assert auxiliary_loss(net) == 0


def test_zero_when_no_block_was_part_of_the_step() -> None:
    net = Net()
    assert auxiliary_loss(net) == 0
    (net(torch.randn(8, 4)).sum() + auxiliary_loss(net)).backward()
    assert auxiliary_loss(net) == 0  # another optimizer's step, without these blocks


@pytest.mark.parametrize("case", ["after backward", "without gradients"])
def test_too_late_is_an_error(case: str) -> None:
    net = Net()
    with torch.set_grad_enabled(case == "after backward"):
        output = net(torch.randn(8, 4))
    if case == "after backward":
        output.sum().backward()
    with pytest.raises(ValueError, match="after a forward pass with gradients and before its backward pass"):
        auxiliary_loss(net)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    net, inputs = Net(), torch.randn(16, 4)
    gradients = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        net.zero_grad()
        torch.manual_seed(0)
        loss = run(inputs).square().sum() + auxiliary_loss(net)
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
        assert not net.first._passes.waiting
        assert auxiliary_loss(net) == 0  # the repeated pass has left nothing, not even a complaint
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_annealing_counts_a_checkpointed_pass_once() -> None:
    from lightning_structopt.blocks import Annealed

    block, inputs = gated(relaxation=Annealed(steps=3)), torch.randn(16, 4)
    twin = copy.deepcopy(block)
    for _ in range(3):
        checkpoint(block, inputs, use_reentrant=False).sum().backward()
        twin(inputs).sum().backward()
    assert block.passes == twin.passes == 3
    for one, other in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_copies_and_pickles_in_the_middle_of_a_step() -> None:
    net = Net()
    _ = net(torch.randn(8, 4))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.first._passes.waiting == []
        found = twin(torch.randn(8, 4))
        assert found.requires_grad
        assert auxiliary_loss(twin) > 0
    assert auxiliary_loss(net) > 0


@pytest.mark.parametrize(
    ("module", "budget", "message"),
    [
        (nn.Linear(2, 2), None, "needs a module with adaptive blocks. Found none in `Linear`"),
        (routed(), GateBudget(0.5), "gated blocks without a budget of their own. Found none"),
    ],
    ids=["no blocks", "no gates"],
)
def test_bad_modules(module: nn.Module, budget: GateBudget | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auxiliary_loss(module, budget)


def test_budget_must_be_one() -> None:
    net = gated()
    _ = net(torch.randn(8, 4))
    with pytest.raises(TypeError, match="`budget` must be a `GateBudget`"):
        auxiliary_loss(net, 0.5)
