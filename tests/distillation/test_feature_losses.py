"""Losses on features against loops, invariances and the implementations of others."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from lightning_structopt.distillation.losses.contrastive import ContrastiveRepresentation
from lightning_structopt.distillation.losses.features import (
    AttentionTransfer,
    CosineFeature,
    FeatureMSE,
    Hint,
)
from lightning_structopt.distillation.losses.logits import DistillationLoss
from lightning_structopt.distillation.losses.relations import RKD

double = {"dtype": torch.float64}
LOSSES: list[DistillationLoss] = [
    FeatureMSE(),
    Hint(),
    CosineFeature(),
    AttentionTransfer(power=2),
    AttentionTransfer(power=1.5),
    RKD(distance=2.0, angle=3.0),
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)
SHAPES = {"vectors": (5, 6), "tokens": (5, 4, 3), "maps": (5, 3, 2, 4), "volumes": (5, 3, 2, 2, 2)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_map = pytest.mark.parametrize("shape", [SHAPES["tokens"], SHAPES["maps"]], ids=["tokens", "maps"])


def takes(loss: DistillationLoss, shape: tuple[int, ...]) -> bool:
    return not isinstance(loss, AttentionTransfer) or len(shape) > 2


def by_hand(loss: Any, student: Tensor, teacher: Tensor) -> float:
    """Return what ``loss`` must be, one number at a time."""
    if isinstance(loss, RKD):
        return relations_by_hand(loss, student.flatten(1).tolist(), teacher.flatten(1).tolist())
    if isinstance(loss, (FeatureMSE, Hint)):
        gaps = [
            (a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
        ]
        return sum(gaps) / len(gaps)
    last = [(x.movedim(1, -1) if x.ndim > 3 else x) for x in (student, teacher)]
    vectors = [x.reshape(len(x), -1, x.shape[-1]).tolist() for x in last]
    if isinstance(loss, CosineFeature):
        return sum(
            1 - cosine(a, b) for s, t in zip(*vectors, strict=True) for a, b in zip(s, t, strict=True)
        ) / (len(vectors[0]) * len(vectors[0][0]))
    total = 0.0
    for s, t in zip(*vectors, strict=True):
        maps = [[sum(abs(f) ** loss.power for f in position) for position in sample] for sample in (s, t)]
        a, b = ([m / math.hypot(*row) for m in row] for row in maps)
        total += sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
    return total / len(vectors[0])


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def relations_by_hand(loss: RKD, s: list[list[float]], t: list[list[float]]) -> float:
    n = len(s)

    def huber(a: float, b: float) -> float:
        gap = abs(a - b)
        return gap**2 / 2 if gap < 1 else gap - 0.5

    def scaled(x: list[list[float]]) -> list[float]:
        distances = [math.dist(x[i], x[j]) for i, j in itertools.product(range(n), repeat=2)]
        mean = sum(distances) / (n * (n - 1))
        return [d / mean for d in distances]

    def cosines(x: list[list[float]]) -> list[float]:
        def towards(i: int, j: int) -> list[float]:
            return [a - b for a, b in zip(x[j], x[i], strict=True)]

        return [cosine(towards(i, j), towards(i, k)) for i, j, k in itertools.product(range(n), repeat=3)]

    distance = sum(map(huber, scaled(s), scaled(t))) / n**2
    return loss.distance * distance + loss.angle * sum(map(huber, cosines(s), cosines(t))) / n**3


@every_loss
@every_shape
def test_value_is_that_of_a_loop(loss: DistillationLoss, shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape, **double), torch.randn(shape, **double)
    if not takes(loss, shape):
        with pytest.raises(ValueError, match="compares positions"):
            loss.adapt(student, teacher)
        return
    loss.adapt(student, teacher)
    value = loss(student, teacher)
    assert value.shape == ()
    assert value.item() == pytest.approx(by_hand(loss, student, teacher), rel=1e-9)
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)


@every_loss
@every_shape
def test_gradient_is_the_slope(loss: DistillationLoss, shape: tuple[int, ...]) -> None:
    if takes(loss, shape):
        teacher, student = torch.randn(shape, **double), torch.randn(shape, **double, requires_grad=True)
        assert gradcheck(lambda s: loss(s, teacher), student)


@every_loss
def test_gradient_is_finite_where_samples_are_the_same(loss: DistillationLoss) -> None:
    student = torch.zeros(4, 3, 2, 2, requires_grad=True)
    value = loss(student, torch.randn(4, 3, 2, 2))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert loss(torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)).isfinite()


@every_loss
@every_map
def test_mask_of_samples(loss: DistillationLoss, shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape, **double), torch.randn(shape, **double)
    mask = torch.tensor([1, 0, 1, 1, 0])
    expected = loss(student[mask == 1], teacher[mask == 1])
    student[mask == 0] = 1e4
    assert loss(student, teacher, mask=mask).item() == pytest.approx(expected.item())
    student.requires_grad_()
    nothing = loss(student, teacher, mask=torch.zeros(5))
    nothing.backward()
    assert nothing == 0
    assert not student.grad.any()


@pytest.mark.parametrize("loss", LOSSES[:5], ids=repr)
def test_mask_of_tokens(loss: DistillationLoss) -> None:
    """Padding counts for nothing: it may as well be cut off."""
    student, teacher = torch.randn(5, 4, 3, **double), torch.randn(5, 4, 3, **double)
    mask = torch.tensor([[1, 1, 0, 0]] * 5)
    expected = loss(student[:, :2], teacher[:, :2])
    student[:, 2:] = 1e4
    assert loss(student, teacher, mask=mask).item() == pytest.approx(expected.item())


@every_loss
def test_mask_must_fit(loss: DistillationLoss) -> None:
    features = torch.randn(SHAPES["maps"])
    with pytest.raises(ValueError, match=r"`mask` says for each position.*Found shape \(4,\)"):
        loss(features, features, mask=torch.ones(4))


@every_loss
def test_half_precision_is_computed_in_single(loss: DistillationLoss) -> None:
    student, teacher = torch.randn(SHAPES["maps"]).bfloat16(), torch.randn(SHAPES["maps"]).half()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(student.double(), teacher.double()).item(), rel=1e-5)


@pytest.mark.parametrize("loss", [*LOSSES, ContrastiveRepresentation(dim=8, queue=4)], ids=repr)
def test_is_picklable_and_says_how_it_was_made(loss: DistillationLoss) -> None:
    student, teacher = torch.randn(SHAPES["maps"]), torch.randn(SHAPES["maps"])
    assert repr(eval(repr(loss))) == repr(loss)
    loss.adapt(student, teacher)
    twins = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    expected = loss(student, teacher)
    for twin in twins:
        assert repr(twin) == repr(loss)
        assert torch.equal(twin(student, teacher), expected)


# Hints

WIDTHS = {"vectors": ((5, 6), (5, 9)), "tokens": ((5, 4, 3), (5, 4, 7)), "maps": ((5, 3, 2, 4), (5, 8, 2, 4))}
every_width = pytest.mark.parametrize(("narrow", "wide"), WIDTHS.values(), ids=WIDTHS)


@every_width
def test_hint_maps_channels_at_each_position(narrow: Any, wide: Any) -> None:
    student, teacher = torch.randn(narrow), torch.randn(wide)
    hint = Hint(seed=3)
    hint.adapt(student, teacher)
    weight, bias = hint.adapter.weight.flatten(1), hint.adapter.bias
    last = [(x.movedim(1, -1) if x.ndim > 3 else x) for x in (student, teacher)]
    expected = nn.functional.mse_loss(last[0] @ weight.T + bias, last[1])
    assert hint(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    hint(student, teacher).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in hint.parameters())


@every_width
def test_adapter_is_seeded_and_leaves_randomness_alone(narrow: Any, wide: Any) -> None:
    student, teacher = torch.randn(narrow), torch.randn(wide)
    before = torch.get_rng_state()
    one, twin, other = Hint(), Hint(), Hint(seed=1)
    for hint in (one, twin, other):
        hint.adapt(student, teacher)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.adapter.weight, twin.adapter.weight)
    assert not torch.equal(one.adapter.weight, other.adapter.weight)


def test_adapting_again_keeps_what_was_learnt() -> None:
    for loss in (Hint(), ContrastiveRepresentation(dim=4, queue=6)):
        loss.adapt(torch.zeros(2, 3), torch.zeros(2, 5))
        kept = list(loss.parameters())
        loss.adapt(torch.zeros(7, 3), torch.zeros(7, 5))
        assert all(a is b for a, b in zip(loss.parameters(), kept, strict=True))
        loss.adapt(torch.zeros(2, 3), torch.zeros(2, 6))
        assert not any(a is b for a, b in zip(loss.parameters(), kept, strict=True))
    hint = Hint()
    hint.adapt(torch.zeros(2, 3), torch.zeros(2, 3))
    assert not list(hint.parameters())


def test_hint_can_be_learnt() -> None:
    torch.manual_seed(0)
    student = torch.randn(64, 3)
    teacher = student @ torch.randn(3, 5)
    hint = Hint()
    hint.adapt(student, teacher)
    optimizer = torch.optim.Adam(hint.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = hint(student, teacher)
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


@pytest.mark.parametrize("loss", [Hint(resize=True), AttentionTransfer(resize=True)], ids=repr)
@pytest.mark.parametrize("size", [(8, 8), (2, 2), (4, 4), (6, 2)], ids=str)
def test_maps_of_another_size_are_resampled(loss: DistillationLoss, size: tuple[int, int]) -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.full((2, 3, *size), 2.0)
    student.requires_grad_()
    loss.adapt(student, teacher)
    loss(student, teacher).backward()
    assert student.grad.any()
    flat = loss(torch.full((2, 3, 4, 4), 2.0), teacher)  # what is constant stays so
    assert flat.item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("loss", [Hint(), AttentionTransfer()], ids=repr)
@pytest.mark.parametrize("method", ["adapt", "forward"])
def test_sizes_must_be_the_same_unless_resampled(loss: DistillationLoss, method: str) -> None:
    message = r"student's features of shape \(2, 3, 4, 4\) and the teacher's of shape \(2, 3, 8, 8\)\. .*`resize=True`"
    with pytest.raises(ValueError, match=message):
        getattr(loss, method)(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("loss", [FeatureMSE(), CosineFeature()], ids=repr)
@pytest.mark.parametrize("method", ["adapt", "forward"])
def test_features_must_be_of_one_shape(loss: DistillationLoss, method: str) -> None:
    message = (
        r"same shape\. Found the student's of shape \(2, 3\) and the teacher's of shape \(2, 5\)\. .*`Hint`"
    )
    with pytest.raises(ValueError, match=message):
        getattr(loss, method)(torch.zeros(2, 3), torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Hint(), r"`Hint` needs an adapter from 3 to 5 channels\. Found none\. Call `adapt"),
        (ContrastiveRepresentation(), r"needs heads for 3 and 5 channels\. Found no heads\. Call `adapt"),
    ],
    ids=["Hint", "CRD"],
)
def test_adapters_must_be_made_first(loss: DistillationLoss, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        loss(torch.zeros(2, 3), torch.zeros(2, 5))


def test_hint_in_mixed_and_in_half_precision() -> None:
    student, teacher = torch.randn(4, 3, 2, 2), torch.randn(4, 5, 2, 2)
    hint = Hint()
    hint.adapt(student.bfloat16(), teacher.bfloat16())
    assert hint.adapter.weight.dtype == torch.float32
    exact = hint(student, teacher).item()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = hint(student.bfloat16(), teacher.bfloat16())
    half = hint.bfloat16()(student.bfloat16(), teacher.half())
    assert hint(student, teacher).item() == pytest.approx(
        half.item(), rel=2e-2
    )  # features in single precision
    assert mixed.dtype == half.dtype == torch.float32
    assert mixed.item() == pytest.approx(exact, rel=2e-2)
    assert half.item() == pytest.approx(exact, rel=2e-2)


# Attention


def test_attention_sees_neither_channels_nor_signs_nor_scale() -> None:
    student, teacher = torch.randn(2, 6, 4, 4, **double), torch.randn(2, 9, 4, 4, **double)
    value = AttentionTransfer()(student, teacher).item()
    changed = -3 * student[:, torch.randperm(6)]
    assert AttentionTransfer()(changed, teacher).item() == pytest.approx(value)
    assert AttentionTransfer()(torch.cat([student, student], 1), teacher).item() == pytest.approx(value)


@pytest.mark.parametrize("power", [0.5, -1.0, math.nan, math.inf])
def test_attention_power_is_checked(power: float) -> None:
    with pytest.raises(ValueError, match=r"`power` must be in \[1, inf\)"):
        AttentionTransfer(power=power)


# Relations


def test_relations_do_not_change_under_rotation_scale_and_shift() -> None:
    teacher = torch.randn(6, 4, **double)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, **double))
    student = 7 * teacher @ rotation + torch.randn(4, **double)
    assert RKD()(student, teacher).item() == pytest.approx(0, abs=1e-9)
    assert RKD()(student * torch.arange(1, 5), teacher) > 0.1


def test_relations_take_features_of_any_width() -> None:
    student, teacher = torch.randn(5, 3, 2, 2), torch.randn(5, 4)
    assert RKD()(student, teacher) > 0
    assert RKD()(nn.functional.pad(teacher, (0, 3)), teacher).item() == pytest.approx(0, abs=1e-6)


def test_either_part_of_the_relations() -> None:
    student, teacher = torch.randn(5, 3, **double), torch.randn(5, 4, **double)
    parts = [RKD(distance=2.0, angle=0.0), RKD(distance=0.0, angle=3.0)]
    total = sum(part(student, teacher).item() for part in parts)
    assert RKD(2.0, 3.0)(student, teacher).item() == pytest.approx(total)
    assert RKD()(student[:1], teacher[:1]) == 0
    assert RKD(angle=0.0)(student[:2], teacher[:2]).item() == pytest.approx(0)  # two have but one distance


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"distance": -1.0}, r"`distance` must be in \[0, inf\)"),
        ({"angle": math.nan}, r"`angle` must be in \[0, inf\)"),
        ({"distance": 0.0, "angle": 0.0}, "Found zero for both"),
    ],
    ids=["negative", "nan", "nothing"],
)
def test_relation_weights_are_checked(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RKD(**kwargs)


@pytest.mark.parametrize("loss", [RKD(), ContrastiveRepresentation()], ids=["RKD", "CRD"])
def test_samples_must_be_the_same(loss: DistillationLoss) -> None:
    with pytest.raises(
        ValueError, match=r"of the same samples.*\(4, 3\) and the teacher's of shape \(5, 3\)"
    ):
        loss(torch.zeros(4, 3), torch.zeros(5, 3))


# Contrast


def crd(queue: int = 0, **kwargs: Any) -> ContrastiveRepresentation:
    loss = ContrastiveRepresentation(dim=4, temperature=0.5, queue=queue, **kwargs)
    loss.adapt(torch.zeros(1, 3), torch.zeros(1, 5))
    return loss.double()


def contrast_by_hand(
    loss: ContrastiveRepresentation, s: Tensor, t: Tensor, negatives: list[list[int]]
) -> float:
    """``negatives[i]`` are rows of ``t`` that sample ``i`` is compared with; ``t[i]`` is its own."""
    u = nn.functional.normalize(loss.student_head(s)).tolist()
    v = nn.functional.normalize(loss.teacher_head(t)).tolist()
    total = 0.0
    for i, others in enumerate(negatives):
        powers = [math.exp(cosine(u[i], v[j]) / loss.temperature) for j in (i, *others)]
        total -= math.log(powers[0] / sum(powers))
    return total / len(negatives)


def test_contrast_with_the_batch() -> None:
    loss, s, t = crd(), torch.randn(4, 3, **double), torch.randn(4, 5, **double)
    others = [[j for j in range(4) if j != i] for i in range(4)]
    assert loss(s, t).item() == pytest.approx(contrast_by_hand(loss, s, t, others))
    labels = torch.tensor([0, 1, 0, 2])
    of_other_classes = [[1, 3], [0, 2, 3], [1, 3], [0, 1, 2]]
    assert loss(s, t, labels).item() == pytest.approx(contrast_by_hand(loss, s, t, of_other_classes))
    mask = torch.tensor([True, False, True, True])
    masked = [[1, 2], [0, 2], [0, 1]]
    assert loss(s, t, mask=mask).item() == pytest.approx(contrast_by_hand(loss, s[mask], t[mask], masked))
    assert loss(s[:1], t[:1]) == 0
    assert loss(s, t, mask=torch.zeros(4)) == 0
    assert not list(loss.queue_features)


def test_contrast_gradients_are_the_slopes() -> None:
    loss, t = crd(queue=3).eval(), torch.randn(4, 5, **double)
    assert gradcheck(lambda s: loss(s, t), torch.randn(4, 3, **double, requires_grad=True))
    loss(torch.randn(4, 3, **double), t).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())


@pytest.mark.parametrize("labelled", [False, True])
def test_contrast_with_earlier_batches(labelled: bool) -> None:
    """Batches of 2 through a queue of 3: the queue holds the last three samples, whatever came before."""
    loss = crd(queue=3)
    seen: list[tuple[Tensor, int]] = []
    for step in range(5):
        s, t = torch.randn(2, 3, **double), torch.randn(2, 5, **double)
        labels = torch.tensor([step % 2, 1])
        kept = seen[-3:]
        candidates = torch.cat([t, *(feature[None] for feature, _ in kept)])
        classes = [*labels.tolist(), *(label for _, label in kept)]
        others = [
            [j for j in range(len(candidates)) if j != i and not (labelled and classes[j] == classes[i])]
            for i in range(2)
        ]
        value = loss(s, t, labels if labelled else None)
        assert value.item() == pytest.approx(contrast_by_hand(loss, s, candidates, others))
        value.backward()  # the queue has changed since
        seen += list(zip(t, labels.tolist(), strict=True))
    frozen = copy.deepcopy(loss.state_dict())
    loss.eval()(torch.randn(2, 3, **double), torch.randn(2, 5, **double))
    assert all(torch.equal(value, frozen[name]) for name, value in loss.state_dict().items())


def test_contrast_resumes_with_its_queue() -> None:
    batches = [(torch.randn(2, 3, **double), torch.randn(2, 5, **double)) for _ in range(6)]
    straight = crd(queue=5)
    for batch in batches[:4]:
        straight(*batch)
    resumed = crd(queue=5)
    resumed.load_state_dict(straight.state_dict())
    for batch in batches[4:]:
        assert torch.equal(straight(*batch), resumed(*batch))


@pytest.mark.parametrize("queue", [0, 32])
def test_contrast_can_be_learnt(queue: int) -> None:
    """A student that could say all the teacher does learns to tell samples apart."""
    inputs = torch.randn(64, 3)
    teacher, student = nn.Linear(3, 5)(inputs).detach(), nn.Linear(3, 3)
    loss = ContrastiveRepresentation(dim=4, queue=queue)
    loss.adapt(student(inputs), teacher)
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr=0.02)
    history = []
    for step in range(150):
        batch = slice(16 * (step % 4), 16 * (step % 4) + 16)
        value = loss(student(inputs[batch]), teacher[batch])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(value.item())
    assert sum(history[-4:]) < 0.2 * sum(history[1:5])


def test_a_batch_larger_than_the_queue() -> None:
    loss, t = crd(queue=3), torch.randn(7, 5, **double)
    loss(torch.randn(7, 3, **double), t)
    assert {tuple(row) for row in loss.queue_features.tolist()} == {tuple(row) for row in t[-3:].tolist()}


def test_contrast_takes_the_mean_over_positions() -> None:
    loss = crd()
    maps, tokens = torch.randn(4, 3, 2, 2, **double), torch.randn(4, 6, 5, **double)
    assert torch.equal(loss(maps, tokens), loss(maps.mean((2, 3)), tokens.mean(1)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 0}, "`dim` must be at least 1"),
        ({"temperature": 0.0}, r"`temperature` must be in \(0, inf\)"),
        ({"temperature": math.nan}, r"`temperature` must be in \(0, inf\)"),
        ({"queue": -1}, "`queue` must be at least 0"),
        ({"seed": -1}, "`seed` must be at least 0"),
    ],
    ids=str,
)
def test_contrast_checks_its_arguments(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContrastiveRepresentation(**kwargs)


@pytest.mark.parametrize("target", [torch.zeros(4), torch.zeros(3, dtype=torch.long)], ids=["type", "shape"])
def test_contrast_checks_labels_and_features(target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"one class index a sample as `target`, of shape \(4,\)"):
        crd()(torch.zeros(4, 3, **double), torch.zeros(4, 5, **double), target)
    with pytest.raises(ValueError, match=r"Found shape \(4,\)\. Tap another layer"):
        crd().adapt(torch.zeros(4), torch.zeros(4, 5))


PAIRS = {"maps": {"student": {"path": "m", "io": "output"}, "teacher": {"path": "m", "io": "output"}}}


@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        (AttentionTransfer(), lambda td: td.ATLoss(PAIRS, mode="code")),
        (RKD(distance=25.0, angle=50.0), lambda td: td.RKDLoss("m", "m", 25.0, 50.0, "mean")),
    ],
    ids=["AttentionTransfer", "RKD"],
)
def test_same_as_torchdistill(loss: DistillationLoss, theirs: Callable[[Any], nn.Module]) -> None:
    torchdistill = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = torch.randn(16, 8, 4, 4), torch.randn(16, 8, 4, 4)
    other = theirs(torchdistill)({"m": {"output": student}}, {"m": {"output": teacher}})
    assert loss(student, teacher).item() == pytest.approx(other.item(), rel=1e-5)
