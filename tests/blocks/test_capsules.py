"""Routing by agreement against loops over capsules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_structopt.blocks import CapsuleRouting
from lightning_structopt.blocks.capsules import squash


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@torch.no_grad()
def test_equals_loops(iterations: int) -> None:
    module = CapsuleRouting(6, 4, 3, 5, iterations).double()
    capsules = torch.randn(2, 6, 4, dtype=torch.float64)
    for sample, found in zip(capsules, module(capsules), strict=True):
        predictions = [[module.weight[i, j] @ sample[i] for j in range(3)] for i in range(6)]
        agreement = torch.zeros(6, 3, dtype=torch.float64)
        for _ in range(iterations):
            coupling = agreement.softmax(1)
            outputs = []
            for j in range(3):
                s = sum(coupling[i, j] * predictions[i][j] for i in range(6))
                square = s @ s
                outputs.append(square / (1 + square) * s / square.sqrt())
            agreement = agreement + torch.tensor([
                [predictions[i][j] @ outputs[j] for j in range(3)] for i in range(6)
            ])
        torch.testing.assert_close(found, torch.stack(outputs))


def test_gradients_are_exact_and_finite_at_zero() -> None:
    module = CapsuleRouting(3, 2, 2, 3).double()
    assert torch.autograd.gradcheck(module, torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True))
    zero = torch.zeros(2, 3, requires_grad=True)
    squash(zero).sum().backward()
    assert not zero.grad.any()


def test_vectors_agree_more_with_more_iterations() -> None:
    module = CapsuleRouting(8, 4, 2, 4)
    nn.init.normal_(module.weight, std=0.1)
    with torch.no_grad():
        module.weight[:, 0] = torch.eye(4)  # all predict the same of the first output
    capsules = torch.ones(1, 8, 4)
    lengths = []
    for iterations in (1, 2, 3):
        module.iterations = iterations
        lengths.append(module(capsules)[0, 0].norm().item())
    assert lengths == sorted(lengths)
    assert lengths[-1] < 1


def test_keeps_low_precision() -> None:
    module = CapsuleRouting(3, 2, 2, 3).bfloat16()
    assert module(torch.randn(2, 3, 2).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CapsuleRouting(3, 2, 2, 3, 0), "`iterations` must be at least 1"),
        (lambda: CapsuleRouting(0, 2, 2, 3), "`in_capsules` must be at least 1"),
        (lambda: CapsuleRouting(3, 2, 2, 3)(torch.zeros(2, 6)), r"\(batch, 3, 2\). Found \(2, 6\)"),
    ],
)
def test_bad_values(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
