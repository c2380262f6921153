"""Token losses against loops and against the loss of whole vocabularies."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from lightning_structopt.distillation.losses.logits import SoftTarget
from lightning_structopt.distillation.losses.tokens import TokenKL
from lightning_structopt.schedules import Linear

V = 6
every_k = pytest.mark.parametrize("top_k", [1, 3, V - 1, V, None])


def pair(samples: int = 3, length: int = 5) -> tuple[Tensor, Tensor]:
    shape = (samples, length, V)
    return 2 * torch.randn(shape, dtype=torch.float64), 2 * torch.randn(shape, dtype=torch.float64)


def kl_of_a_token(student: Tensor, teacher: Tensor, temperature: float, top_k: int) -> float:
    s, t = (student / temperature).softmax(0).tolist(), (teacher / temperature).softmax(0).tolist()
    top = sorted(range(V), key=lambda v: -t[v])[:top_k]
    divergence = sum(t[v] * math.log(t[v] / s[v]) for v in top)
    rest_s, rest_t = (sum(p for v, p in enumerate(row) if v not in top) for row in (s, t))
    return divergence + (rest_t * math.log(rest_t / rest_s) if top_k < V else 0.0)


@every_k
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_is_that_of_a_loop(top_k: int | None, temperature: float) -> None:
    student, teacher = pair()
    mask = torch.rand(3, 5) < 0.6
    loss = TokenKL(temperature, top_k)
    tokens = [
        kl_of_a_token(student[n, i], teacher[n, i], temperature, top_k or V)
        for n in range(3)
        for i in range(5)
    ]
    expected = temperature**2 * torch.tensor(tokens, dtype=torch.float64)
    assert loss(student, teacher).item() == pytest.approx(expected.mean().item())
    masked = loss(student, teacher, mask=mask.long())
    assert masked.item() == pytest.approx(expected[mask.flatten()].mean().item())


@every_k
def test_gradient_is_the_slope(top_k: int | None) -> None:
    student, teacher = pair(2, 2)
    student.requires_grad_()
    assert gradcheck(lambda s: TokenKL(1.5, top_k)(s, teacher), student)
    assert TokenKL(1.5, top_k)(teacher, teacher).item() == pytest.approx(0, abs=1e-12)


def test_is_the_soft_target_of_each_token() -> None:
    student, teacher = pair()
    expected = SoftTarget(2.0)(student.flatten(0, 1), teacher.flatten(0, 1))
    assert torch.equal(TokenKL(2.0)(student, teacher), expected)


def test_more_tokens_see_more_of_the_divergence() -> None:
    student, teacher = pair()
    values = [TokenKL(1.0, k)(student, teacher).item() for k in (1, 2, 3, 4, 5, None)]
    assert values == sorted(values)


def test_rest_keeps_its_digits_where_the_top_has_nearly_all() -> None:
    """In single precision 1 minus the top's probability would be zero, and the divergence infinite or nothing."""
    student, teacher = torch.zeros(1, 1, V), torch.zeros(1, 1, V)
    student[..., 0], teacher[..., 0] = 60.0, 30.0
    single = TokenKL(1.0, top_k=1)(student, teacher)
    assert single.item() == pytest.approx(
        TokenKL(1.0, top_k=1)(student.double(), teacher.double()).item(), rel=1e-3
    )


def test_padding_has_no_gradient_and_nothing_but_padding_no_loss() -> None:
    student, teacher = pair()
    student.requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 3)
    TokenKL()(student, teacher, mask=mask).backward()
    assert student.grad[:, 2:].abs().max() == 0
    assert student.grad[:, :2].abs().min() > 0
    assert TokenKL()(student, teacher, mask=torch.zeros(3, 5)) == 0


@every_k
def test_half_precision_is_computed_in_single(top_k: int | None) -> None:
    student, teacher = (logits.bfloat16() for logits in pair())
    with torch.autocast("cpu", torch.bfloat16):
        value = TokenKL(1.0, top_k)(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(
        TokenKL(1.0, top_k)(student.double(), teacher.double()).item(), rel=1e-5
    )


@pytest.mark.parametrize("method", ["adapt", "forward"])
def test_vocabularies_must_be_the_same(method: str) -> None:
    message = r"`TokenKL` needs one vocabulary\. Found 32 tokens of the teacher's and 30 of the student's\..*padding"
    with pytest.raises(ValueError, match=message):
        getattr(TokenKL(), method)(torch.zeros(2, 5, 30), torch.zeros(2, 5, 32))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, V), (2, V), r"needs logits of shape \(N, L, V\)\. Found the student's output of shape \(2, 6\)"),
        ((2, 4, V), (2, 5, V), r"same shape\. Found the student's of shape \(2, 4, 6\)"),
        ((2, 4, 1), (2, 4, 1), "two or more classes"),
    ],
    ids=["no tokens", "length", "one token"],
)
def test_shapes_are_checked(student: Any, teacher: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenKL().adapt(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize("method", ["adapt", "forward"])
def test_top_k_is_checked(method: str) -> None:
    with pytest.raises(ValueError, match="`top_k` must be at least 1"):
        TokenKL(top_k=0)
    with pytest.raises(TypeError, match="`top_k` must be a whole number"):
        TokenKL(top_k=0.5)
    with pytest.raises(ValueError, match=r"larger than the vocabulary\. Found `top_k = 7` and 6 tokens"):
        getattr(TokenKL(top_k=7), method)(torch.zeros(2, 5, V), torch.zeros(2, 5, V))


def test_mask_must_fit_and_temperature_be_positive() -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"one of shape \(3, 5\) here\. Found shape \(3, 4\)"):
        TokenKL()(student, teacher, mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="`temperature` must be in"):
        TokenKL(temperature=0)


def test_says_how_it_was_made_and_follows_its_schedule() -> None:
    loss = TokenKL(temperature=2.0, top_k=3, schedule=Linear(end=0.5))
    assert repr(eval(repr(loss))) == repr(loss)
    student, teacher = pair()
    loss.advance(10, 10)
    assert torch.equal(loss(student, teacher), TokenKL(1.0, 3)(student, teacher))
