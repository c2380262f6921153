"""Routed blocks against a literal loop over rows: choices, weights, capacity, balance, and who runs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_structopt.blocks import RoutedBlock, auxiliary_loss, dense

FEATURES, EXPERTS = 6, 4


def routed(top_k: int = 1, same: bool = False, **options: Any) -> RoutedBlock:
    experts = [
        nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, FEATURES)) for _ in range(EXPERTS)
    ]
    experts = [experts[0]] * EXPERTS if same else experts
    router = nn.Linear(FEATURES, EXPERTS)
    return RoutedBlock(experts, router, top_k, **options)


def by_loop(block: RoutedBlock, rows: Tensor, limit: float = math.inf) -> tuple[Tensor, int]:
    """Return the outputs and how many choices found room, row by row."""
    probabilities = block.router(rows).softmax(-1).tolist()
    ranked = [sorted(range(EXPERTS), key=lambda e, p=p: (-p[e], e))[: block.top_k] for p in probabilities]
    outputs, load, done = list(rows), [0] * EXPERTS, 0
    for rank in range(block.top_k):
        for row, chosen in enumerate(ranked):
            expert = chosen[rank]
            if load[expert] >= limit:
                continue
            load[expert] += 1
            done += 1
            total = sum(probabilities[row][e] for e in chosen) if block.top_k > 1 else 1.0
            outputs[row] = outputs[row] + probabilities[row][expert] / total * block.experts[expert](
                rows[row]
            )
    return torch.stack(outputs), done


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("capacity", [0.3, 1.0, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [11, 1])
def test_equals_a_literal_loop(top_k: int, capacity: float | None, training: bool, count: int) -> None:
    block = routed(top_k, capacity=capacity).train(training)
    rows = torch.randn(count, FEATURES)
    bounded = training and capacity is not None
    limit = math.ceil(capacity * top_k * count / EXPERTS) if bounded else math.inf
    expected, done = by_loop(block, rows, limit)
    torch.testing.assert_close(block(rows), expected, rtol=1e-4, atol=1e-5)
    assert block.executed_fraction == pytest.approx(done / (count * EXPERTS))
    with dense(block):
        torch.testing.assert_close(block(rows), expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_rows() -> None:
    block = routed().eval()
    tokens = torch.randn(3, 5, FEATURES)
    torch.testing.assert_close(block(tokens).flatten(0, 1), block(tokens.flatten(0, 1)))


def test_images_are_rows_by_their_router() -> None:
    router = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    block = RoutedBlock([nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)], router).eval()
    images = torch.randn(4, 3, 5, 5)
    probabilities = router(images).softmax(-1)
    for image, p, found in zip(images, probabilities, block(images), strict=True):
        expected = image + p.max() * block.experts[int(p.argmax())](image[None])[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [2, 3, EXPERTS])
def test_equal_experts_are_one_expert(top_k: int) -> None:
    block = routed(top_k, same=True, capacity=None)
    rows = torch.randn(9, FEATURES)
    torch.testing.assert_close(block(rows), rows + block.experts[0](rows), rtol=1e-4, atol=1e-5)


def test_experts_see_their_rows_alone() -> None:
    block = routed().eval()
    seen: dict[int, int] = {}
    for index, expert in enumerate(block.experts):
        expert.register_forward_hook(lambda part, args, output, i=index: seen.update({i: len(args[0])}))
    rows = torch.randn(40, FEATURES)
    block(rows)
    chosen = block.router(rows).argmax(1)
    assert seen == {e: int((chosen == e).sum()) for e in chosen.unique().tolist()}


def test_dropped_rows_pass_by() -> None:
    block = routed(capacity=1e-6)
    nn.init.zeros_(block.router.weight)  # all rows choose the first expert, which has room for one
    nn.init.zeros_(block.router.bias)
    rows = torch.randn(5, FEATURES)
    changed = (block(rows) != rows).any(1)
    assert changed.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_is_the_formula_and_its_strength_at_best(top_k: int) -> None:
    block = routed(top_k, balance=0.5)
    rows = torch.randn(50, FEATURES)
    output = block(rows)
    probabilities = block.router(rows).softmax(-1)
    chosen = probabilities.topk(top_k).indices
    share = torch.tensor([(chosen == e).float().mean() for e in range(EXPERTS)])
    torch.testing.assert_close(auxiliary_loss(block), 0.5 * EXPERTS * (share * probabilities.mean(0)).sum())
    nn.init.zeros_(block.router.weight)
    output = output + block(rows)
    nn.init.zeros_(block.router.bias)
    output = block(rows)  # all alike: whatever the choices, the mean probability is 1 / E
    assert output.requires_grad


def test_balance_of_equal_probabilities_is_its_strength() -> None:
    block = routed(balance=0.5)
    nn.init.zeros_(block.router.weight)
    nn.init.zeros_(block.router.bias)
    output = block(torch.randn(50, FEATURES))
    assert auxiliary_loss(block).item() == pytest.approx(0.5)
    assert output.requires_grad


def test_experts_without_rows_have_gradients_of_zero() -> None:
    block = routed(capacity=None)
    nn.init.zeros_(block.router.weight)
    nn.init.zeros_(block.router.bias)
    block(torch.randn(5, FEATURES)).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    assert all(not parameter.grad.any() for parameter in block.experts[2].parameters())
    assert block.experts[0][0].weight.grad.any()


def test_weights_that_are_not_finite_do_not_spread_from_idle_experts() -> None:
    block = routed(capacity=None)
    nn.init.zeros_(block.router.weight)
    nn.init.zeros_(block.router.bias)
    nn.init.constant_(block.experts[3][0].weight, float("inf"))
    assert block(torch.randn(5, FEATURES)).isfinite().all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_are_exact(top_k: int) -> None:
    block = routed(top_k).double()
    for expert in block.experts:
        expert[1] = nn.GELU()
    rows = torch.randn(7, FEATURES, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, rows)


def test_expected_cost_is_that_of_the_chosen_experts() -> None:
    block = routed(2)
    block.experts[1] = nn.Linear(FEATURES, FEATURES)
    costs = [2 * 2 * 8 * FEATURES] * EXPERTS
    costs[1] = 2 * FEATURES * FEATURES
    tokens = torch.randn(2, 5, FEATURES)
    chosen = block.router(tokens).flatten(0, 1).topk(2).indices
    expected = torch.tensor([
        2.0 * FEATURES * EXPERTS + sum(costs[e] for e in row) for row in chosen.tolist()
    ])
    torch.testing.assert_close(block.expected_cost(tokens), expected)


def test_no_rows_at_all() -> None:
    block = routed()
    assert block(torch.zeros(0, FEATURES)).shape == (0, FEATURES)
    assert block.eval()(torch.zeros(0, FEATURES)).shape == (0, FEATURES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: routed(0), "`top_k` must be at least 1"),
        (lambda: routed(5), "`top_k = 5` and 4 experts"),
        (lambda: RoutedBlock([], nn.Linear(2, 2)), "`top_k = 1` and 0 experts"),
        (lambda: routed(capacity=0.0), "`capacity` must be in"),
        (lambda: routed(balance=-1.0), "`balance` must be in"),
        (
            lambda: RoutedBlock([nn.Linear(4, 4)], nn.Linear(4, 3))(torch.zeros(2, 4)),
            r"1 logits.*Found \(2, 3\)",
        ),
        (
            lambda: RoutedBlock([nn.Linear(4, 3)], nn.Linear(4, 1))(torch.zeros(2, 4)),
            r"Found \(2, 3\) from the body",
        ),
    ],
)
def test_bad_values(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="`experts` must be a `Module`"):
        RoutedBlock([3], nn.Linear(2, 1))
