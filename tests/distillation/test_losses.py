"""Losses on logits against loops, closed forms and the implementations of others."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CLASSES
from torch import Tensor, nn
from torch.autograd import gradcheck

from lightning_structopt.distillation.losses.classes import DIST, DKD
from lightning_structopt.distillation.losses.logits import (
    DistillationLoss,
    JensenShannon,
    LogitMSE,
    ReverseKL,
    SoftTarget,
)
from lightning_structopt.schedules import Constant, Exponential, Linear, MultiStep, Warmup

double = {"dtype": torch.float64}
LOSSES = [
    SoftTarget(temperature=2.5),
    SoftTarget(temperature=4, schedule=Linear(end=0.25)),
    ReverseKL(temperature=0.7),
    JensenShannon(beta=0.3, temperature=2.0),
    LogitMSE(),
    DKD(alpha=0.5, beta=3.0, temperature=2.0),
    DIST(beta=2.0, gamma=0.5, temperature=1.5),
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)
every_tempered = pytest.mark.parametrize("kind", [SoftTarget, ReverseKL, JensenShannon, DKD, DIST])
SHAPES = [(6, CLASSES), (3, CLASSES, 2), (2, CLASSES, 3, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = 3 * torch.randn(shape, **double), 3 * torch.randn(shape, **double)
    return student, teacher, torch.randint(shape[1], shape[:1] + shape[2:])


def rows(logits: Tensor) -> list[list[float]]:
    return logits.movedim(1, -1).flatten(0, -2).tolist()


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp((z - max(row)) / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    spread = sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)
    return covariance / math.sqrt(spread)


def by_hand(loss: Any, student: Tensor, teacher: Tensor, target: Tensor) -> float:
    """Return what ``loss`` must be, one position and one class at a time."""
    pairs = list(zip(rows(student), rows(teacher), target.flatten().tolist(), strict=True))
    if isinstance(loss, LogitMSE):
        return sum(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) for s, t, _ in pairs) / len(pairs)
    soft = [(softmax(s, loss.temperature), softmax(t, loss.temperature), y) for s, t, y in pairs]
    if isinstance(loss, DIST):
        students, teachers = [s for s, _, _ in soft], [t for _, t, _ in soft]
        inter = sum(1 - pearson(s, t) for s, t in zip(students, teachers, strict=True)) / len(soft)
        columns = list(zip(zip(*students, strict=True), zip(*teachers, strict=True), strict=True))
        intra = sum(1 - pearson(list(s), list(t)) for s, t in columns) / len(columns)
        return loss.temperature**2 * (loss.beta * inter + loss.gamma * intra)
    return loss.temperature**2 * sum(term(loss, s, t, y) for s, t, y in soft) / len(soft)


def term(loss: Any, s: list[float], t: list[float], y: int) -> float:
    if isinstance(loss, SoftTarget):
        return kl(t, s)
    if isinstance(loss, ReverseKL):
        return kl(s, t)
    if isinstance(loss, JensenShannon):
        mixture = [loss.beta * b + (1 - loss.beta) * a for a, b in zip(s, t, strict=True)]
        return loss.beta * kl(t, mixture) + (1 - loss.beta) * kl(s, mixture)
    others = [[p / (1 - row[y]) for c, p in enumerate(row) if c != y] for row in (t, s)]
    return loss.alpha * kl([t[y], 1 - t[y]], [s[y], 1 - s[y]]) + loss.beta * kl(*others)


@every_loss
@every_shape
def test_value_is_that_of_a_loop(loss: DistillationLoss, shape: tuple[int, ...]) -> None:
    student, teacher, target = pair(shape)
    value = loss(student, teacher, target)
    assert value.shape == ()
    assert value.item() == pytest.approx(by_hand(loss, student, teacher, target), rel=1e-9)


@every_loss
@every_shape
def test_gradient_is_the_slope(loss: DistillationLoss, shape: tuple[int, ...]) -> None:
    student, teacher, target = pair(shape)
    student.requires_grad_()
    assert gradcheck(lambda s: loss(s, teacher, target), student)


@every_loss
def test_zero_and_flat_where_the_student_equals_the_teacher(loss: DistillationLoss) -> None:
    student, _, target = pair((8, CLASSES))
    student.requires_grad_()
    value = loss(student, student.detach().clone(), target)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert student.grad == pytest.approx(torch.zeros_like(student), abs=1e-7)


@every_loss
def test_positive_elsewhere_and_the_same_for_any_order_of_samples(loss: DistillationLoss) -> None:
    student, teacher, target = pair((8, CLASSES))
    order = torch.randperm(8)
    value = loss(student, teacher, target)
    assert value > 1e-3
    assert loss(student[order], teacher[order], target[order]).item() == pytest.approx(value.item())


@every_loss
def test_mask_leaves_only_what_it_chooses(loss: DistillationLoss) -> None:
    student, teacher, target = pair((8, CLASSES))
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])
    expected = loss(student[mask == 1], teacher[mask == 1], target[mask == 1])
    broken = student.clone()
    broken[mask == 0] = 1e4  # whatever is there
    assert loss(broken, teacher, target, mask).item() == pytest.approx(expected.item())
    student.requires_grad_()
    nothing = loss(student, teacher, target, torch.zeros(8, dtype=torch.bool))
    nothing.backward()
    assert nothing == 0
    assert not student.grad.any()


@every_loss
def test_mask_of_pixels(loss: DistillationLoss) -> None:
    student, teacher, target = pair((2, CLASSES, 3, 2))
    mask = torch.rand(2, 3, 2) < 0.6
    flat = [x.movedim(1, -1)[mask] for x in (student, teacher)]
    assert loss(student, teacher, target, mask).item() == pytest.approx(loss(*flat, target[mask]).item())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(loss: DistillationLoss, dtype: torch.dtype) -> None:
    student, teacher, target = pair((64, CLASSES))
    student, teacher = student.to(dtype), teacher.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher, target)
    assert value.dtype == torch.float32
    exact = loss(student.double(), teacher.double(), target)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


@every_loss
def test_precision_of_teacher_and_student_may_differ(loss: DistillationLoss) -> None:
    student, teacher, target = pair((8, CLASSES))
    value = loss(student.float(), teacher, target)
    assert value.item() == pytest.approx(loss(student, teacher, target).item(), rel=1e-5)


@every_loss
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_extreme_logits_give_finite_gradients(loss: DistillationLoss, scale: float) -> None:
    if isinstance(loss, LogitMSE) and scale > 1e10:
        pytest.skip("its value is out of range")
    student, teacher, target = pair((8, CLASSES))
    student = (scale * student.float()).requires_grad_()
    value = loss(student, scale * teacher.float(), target)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[2], LOSSES[3], LOSSES[5], LOSSES[6]], ids=repr)
def test_classes_that_both_rule_out_are_as_if_not_there(loss: DistillationLoss) -> None:
    student, teacher, target = pair((8, CLASSES))
    wider = [torch.cat([x, torch.full((8, 1), -math.inf, **double)], 1) for x in (student, teacher)]
    wider[0].requires_grad_()
    value = loss(*wider, target)
    value.backward()
    assert wider[0].grad.isfinite().all()
    if not isinstance(loss, DIST):  # whose columns that class is one of
        assert value.item() == pytest.approx(loss(student, teacher, target).item())


@every_tempered
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive(kind: Any, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"`temperature` must be in \(0, inf\)\. Found `temperature = "):
        kind(temperature=temperature)


@every_tempered
def test_temperature_follows_its_schedule(kind: Any) -> None:
    scheduled = kind(temperature=4.0, schedule=Linear(end=0.25))
    student, teacher, target = pair((8, CLASSES))
    for t, temperature in ((0, 4.0), (5, 2.5), (10, 1.0), (12, 1.0)):
        scheduled.advance(t, 10)
        assert scheduled.current_temperature == temperature
        expected = kind(temperature=temperature)(student, teacher, target)
        assert torch.equal(scheduled(student, teacher, target), expected)
    fixed = kind(temperature=4.0)
    fixed.advance(5, 10)
    assert fixed.current_temperature == 4.0


@pytest.mark.parametrize(
    "schedule", [Linear(), Warmup(2, then=Constant()), Warmup(5, then=Linear(), start=0.5)], ids=repr
)
def test_schedule_must_stay_positive(schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"temperature must stay positive\. Found .* multiplies it by 0\.0"):
        SoftTarget(schedule=schedule)


@pytest.mark.parametrize("schedule", [Exponential(gamma=0.9), MultiStep(milestones=(2,)), Linear(end=0.1)])
def test_schedule_that_never_gets_to_zero_is_taken(schedule: Any) -> None:
    assert SoftTarget(schedule=schedule).current_temperature == 4.0


def test_schedule_must_be_a_schedule() -> None:
    with pytest.raises(TypeError, match=r"`schedule` must be a `Schedule`.*Did you mean `Linear\(\)`"):
        SoftTarget(schedule=Linear)


@every_loss
def test_is_picklable_and_says_how_it_was_made(loss: DistillationLoss) -> None:
    student, teacher, target = pair((8, CLASSES))
    expected = loss(student, teacher, target)
    for twin in (eval(repr(loss)), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(twin) == repr(loss)
        assert torch.equal(twin(student, teacher, target), expected)
    assert not list(loss.parameters())
    assert not loss.state_dict()


@every_loss
@pytest.mark.parametrize("method", ["adapt", "forward"])
def test_class_counts_must_be_the_same(loss: DistillationLoss, method: str) -> None:
    target = [torch.zeros(2, dtype=torch.long)] if method == "forward" else []
    with pytest.raises(ValueError, match=r"The teacher returned 10 classes and the student 100\. .*`Hint`"):
        getattr(loss, method)(torch.zeros(2, 100), torch.zeros(2, 10), *target)


@every_loss
def test_shapes_must_be_the_same(loss: DistillationLoss) -> None:
    with pytest.raises(
        ValueError, match=r"same shape\. Found the student's of shape \(2, 3, 4, 4\) and the teacher's"
    ):
        loss.adapt(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))


@every_tempered
@pytest.mark.parametrize("shape", [(5, 1), (5, 1, 4)], ids=str)
def test_a_single_class_is_refused(kind: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"two or more classes.*Use `LogitMSE`"):
        kind().adapt(torch.zeros(shape), torch.zeros(shape))


@every_tempered
def test_outputs_without_classes_are_refused(kind: Any) -> None:
    with pytest.raises(
        ValueError, match=r"needs logits of shape \(N, C\) .*student's output of shape \(5,\)"
    ):
        kind().adapt(torch.zeros(5), torch.zeros(5, 2))


@every_loss
def test_mask_must_fit(loss: DistillationLoss) -> None:
    student, teacher, target = pair((8, CLASSES))
    with pytest.raises(ValueError, match=r"needs one of shape \(8,\) here\. Found shape \(8, 4\)"):
        loss(student, teacher, target, torch.ones(8, CLASSES))


def test_regression_of_one_number_a_sample() -> None:
    student, teacher = torch.randn(5), torch.randn(5)
    assert LogitMSE()(student, teacher).item() == pytest.approx(float((student - teacher).square().mean()))
    assert LogitMSE()(student[:, None], teacher[:, None]) == LogitMSE()(student, teacher)
    mask = torch.tensor([True, False, False, True, False])
    expected = (student - teacher).square()[mask].mean()
    assert LogitMSE()(student, teacher, mask=mask).item() == pytest.approx(expected.item())


def test_a_batch_of_one() -> None:
    student, teacher, target = pair((1, CLASSES))
    for loss in LOSSES:
        assert loss(student, teacher, target).isfinite()
    alone = DIST(beta=0.0)(student.requires_grad_(), teacher)
    assert alone == 0
    alone.backward()


@pytest.mark.parametrize("temperature", [1.0, 50.0])
def test_temperature_keeps_the_scale_of_gradients(temperature: float) -> None:
    """For a high temperature the gradient tends to that of half the squared distance of centred logits, over C."""
    student, teacher, _ = pair((8, CLASSES))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(SoftTarget(temperature=1e5)(student, teacher), student)
    gap = student - teacher
    expected = (gap - gap.mean(1, keepdim=True)) / CLASSES / len(gap)
    assert gradient == pytest.approx(expected.detach(), abs=1e-4)


def test_jensen_shannon_is_symmetric_bounded_and_tends_to_either_divergence() -> None:
    student, teacher, _ = pair((8, CLASSES))
    even = JensenShannon(temperature=1.0)
    assert even(student, teacher).item() == pytest.approx(even(teacher, student).item())
    assert even(100 * student, 100 * teacher) <= math.log(2)
    forward, reverse = SoftTarget(temperature=1.0), ReverseKL(temperature=1.0)
    student, teacher = student / 5, teacher / 5  # so that no probability is as small as what comes next
    small = JensenShannon(beta=1e-7, temperature=1.0)(student, teacher) / 1e-7
    large = JensenShannon(beta=1 - 1e-7, temperature=1.0)(student, teacher) / 1e-7
    assert small.item() == pytest.approx(forward(student, teacher).item(), rel=1e-5)
    assert large.item() == pytest.approx(reverse(student, teacher).item(), rel=1e-5)
    assert reverse(student, teacher).item() == pytest.approx(forward(teacher, student).item())


@pytest.mark.parametrize("beta", [0.0, 1.0, -1.0, math.nan])
def test_jensen_shannon_needs_a_mixture(beta: float) -> None:
    with pytest.raises(ValueError, match=r"`beta` must be in \(0, 1\)"):
        JensenShannon(beta=beta)


def test_dkd_adds_up_to_soft_targets() -> None:
    """KL is its target part plus (1 - p_y) times its other part, sample by sample."""
    student, teacher, target = pair((8, CLASSES))
    for sample in range(8):
        s, t, y = student[sample : sample + 1], teacher[sample : sample + 1], target[sample : sample + 1]
        rest = 1 - (t / 2).softmax(1)[0, y].item()
        decoupled = DKD(alpha=1.0, beta=rest, temperature=2.0)(s, t, y)
        assert decoupled.item() == pytest.approx(SoftTarget(temperature=2.0)(s, t).item())


def test_dkd_learns_of_other_classes_from_a_teacher_that_is_certain() -> None:
    teacher = torch.tensor([[200.0, 3.0, 1.0]])
    student = torch.tensor([[200.0, 1.0, 3.0]], requires_grad=True)
    loss = DKD(temperature=1.0)(student, teacher, torch.tensor([0]))
    loss.backward()
    assert loss > 1
    assert student.grad.abs()[0, 1:].min() > 1


def test_dkd_ignores_positions_without_a_label() -> None:
    student, teacher, target = pair((2, CLASSES, 3, 2))
    ignored = torch.rand(2, 3, 2) < 0.4
    expected = DKD()(student, teacher, target, mask=~ignored)
    for ignore_index, loss in ((-100, DKD()), (255, DKD(ignore_index=255))):
        marked = target.masked_fill(ignored, ignore_index)
        assert torch.equal(loss(student, teacher, marked), expected)
        assert torch.equal(loss(student, teacher, marked.int()), expected)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (None, ValueError, r"`DKD` needs the labels\. Found no `target`"),
        (torch.zeros(8, CLASSES), TypeError, r"class indices\. Found labels of type torch\.float32"),
        (torch.zeros(8, CLASSES, dtype=torch.long), ValueError, r"Found labels of shape \(8, 4\)"),
    ],
    ids=["none", "mixed", "one-hot"],
)
def test_dkd_needs_labels(target: Any, error: Any, message: str) -> None:
    student, teacher, _ = pair((8, CLASSES))
    assert DKD.needs_target
    assert not SoftTarget.needs_target
    with pytest.raises(error, match=message):
        DKD()(student, teacher, target)


@pytest.mark.parametrize("kind", [DKD, DIST])
@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_weights_are_checked(kind: Any, weight: float) -> None:
    with pytest.raises(ValueError, match=r"`beta` must be in \[0, inf\)"):
        kind(beta=weight)


def test_dist_sees_probabilities_up_to_scale_and_shift() -> None:
    """A student whose probabilities are an affine map of the teacher's ranks as the teacher does."""
    teacher = torch.randn(8, CLASSES, **double)
    shares = teacher.softmax(1)
    flatter = (0.3 * shares + 0.7 / CLASSES).log()
    assert DIST()(flatter, teacher).item() == pytest.approx(0, abs=1e-9)
    assert SoftTarget(temperature=1.0)(flatter, teacher) > 1e-2


@pytest.mark.parametrize(("loss", "theirs"), [
    (SoftTarget(temperature=4.0), lambda td: td.KDLoss("m", "output", "m", "output", 4.0, alpha=1e-9, beta=1.0)),
    (DIST(beta=2.0, gamma=1.5, temperature=4.0), lambda td: td.DISTLoss("m", "output", "m", "output", 2.0, 1.5, 4.0)),
], ids=["SoftTarget", "DIST"])  # fmt: skip
def test_same_as_torchdistill(loss: DistillationLoss, theirs: Callable[[Any], nn.Module]) -> None:
    torchdistill = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher, target = pair((16, 10))
    student, teacher = student.float(), teacher.float()
    other = theirs(torchdistill)({"m": {"output": student}}, {"m": {"output": teacher}}, targets=target)
    assert loss(student, teacher).item() == pytest.approx(other.item(), rel=1e-5)


def test_own_loss_in_a_few_lines() -> None:
    class Gap(DistillationLoss):
        def __init__(self, power: float = 1.0) -> None:
            super().__init__()
            self.power = power

        def forward(self, student: Tensor, teacher: Tensor, target: Any = None, mask: Any = None) -> Tensor:
            return (student - teacher).abs().pow(self.power).mean()

    loss = Gap(power=2.0)
    loss.adapt(torch.zeros(2, 3), torch.zeros(2, 3))
    loss.advance(3, 10)
    assert repr(loss) == "Gap(power=2.0)"
    assert loss(torch.zeros(2, 3), torch.full((2, 3), 2.0)) == 4
