"""Schedules against torch's own schedulers and closed forms."""

import itertools
import math
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.optim import lr_scheduler

from lightning_structopt import schedules
from lightning_structopt.schedules import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    MultiStep,
    Polynomial,
    Schedule,
    Step,
    Warmup,
)

HORIZON = 12
DECAYS = [
    Constant(),
    Linear(),
    Linear(end=0.3),
    Polynomial(),
    Polynomial(power=0.5),
    Polynomial(power=2.5, end=0.1),
    Exponential(gamma=0.8),
    Exponential(gamma=1.0),
    Step(step_size=5),
    MultiStep(milestones=(2, 7), gamma=0.5),
    Cosine(),
    Cosine(minimum=0.1),
]
WARMUPS = [Warmup(steps=3, then=then, start=0.25) for then in DECAYS] + [Warmup(steps=1, then=Cosine())]


def rates(make_scheduler, steps: int = HORIZON + 1, rate: float = 0.5) -> list[float]:
    """Return the rates that a torch scheduler, stepped by hand, gives to an optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = make_scheduler(optimizer)
    history = []
    for _ in range(steps):
        history.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return history


@pytest.mark.parametrize(
    ("schedule", "make_scheduler"),
    [
        (Constant(), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        (Linear(), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=HORIZON)),
        (Linear(end=0.3), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.3, total_iters=HORIZON)),
        (Polynomial(), lambda o: lr_scheduler.PolynomialLR(o, total_iters=HORIZON)),
        (Polynomial(power=2.5), lambda o: lr_scheduler.PolynomialLR(o, total_iters=HORIZON, power=2.5)),
        (Exponential(gamma=0.8), lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8)),
        (Step(step_size=5), lambda o: lr_scheduler.StepLR(o, step_size=5)),
        (Step(step_size=1, gamma=0.7), lambda o: lr_scheduler.StepLR(o, step_size=1, gamma=0.7)),
        (MultiStep(milestones=(2, 7)), lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 7])),
        (Cosine(), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=HORIZON)),
        (Cosine(minimum=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=HORIZON, eta_min=0.05)),
        (
            Warmup(steps=4, then=Constant(), start=0.25),
            lambda o: lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=4),
        ),
        (
            Warmup(steps=4, then=Exponential(gamma=0.8), start=0.25),
            lambda o: lr_scheduler.SequentialLR(
                o,
                [
                    lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=4),
                    lr_scheduler.ExponentialLR(o, gamma=0.8),
                ],
                milestones=[4],
            ),
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, Schedule) else "",
)
def test_equals_torch(schedule, make_scheduler):
    mine = [0.5 * schedule(t, HORIZON) for t in range(HORIZON + 1)]
    assert mine == pytest.approx(rates(make_scheduler), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("t", [0, 1, 2.5, 6, 11, 12])
def test_closed_forms(t):
    left = (12 - t) / 12
    assert Linear()(t, 12) == pytest.approx(left)
    assert Linear(end=0.2)(t, 12) == pytest.approx(0.2 + 0.8 * left)
    assert Polynomial(power=3.0)(t, 12) == pytest.approx(left * left * left)
    assert Polynomial(power=0.5, end=0.2)(t, 12) == pytest.approx(0.2 + 0.8 * math.sqrt(left))
    assert Exponential(gamma=0.9)(t, 12) == pytest.approx(math.exp(t * math.log(0.9)))
    assert Step(step_size=5, gamma=0.3)(t, 12) == pytest.approx([1, 0.3, 0.09][math.floor(t / 5)])
    assert Cosine(minimum=0.2)(t, 12) == pytest.approx(0.2 + 0.8 * math.cos(math.pi * t / 24) ** 2)


def test_warmup_leaves_the_rest_of_the_horizon_to_what_follows():
    schedule = Warmup(steps=4, then=Linear())
    assert [schedule(t, 8) for t in range(9)] == [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]


def test_warmup_longer_than_the_horizon_never_divides_by_it():
    schedule = Warmup(steps=4, then=Linear(end=0.1))
    assert [schedule(t, 2) for t in range(6)] == [0, 0.25, 0.5, 0.75, 1, 0.1]


@pytest.mark.parametrize("schedule", DECAYS, ids=repr)
def test_starts_at_one(schedule):
    assert schedule(0, HORIZON) == 1


@pytest.mark.parametrize("schedule", DECAYS, ids=repr)
def test_never_rises(schedule):
    values = [schedule(t / 4, HORIZON) for t in range(4 * HORIZON + 20)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


@pytest.mark.parametrize("schedule", WARMUPS, ids=repr)
def test_warmup_starts_at_its_start_and_peaks_at_one(schedule):
    assert schedule(0, HORIZON) == schedule.start
    assert schedule(schedule.steps, HORIZON) == 1
    assert max(schedule(t / 4, HORIZON) for t in range(4 * HORIZON)) == 1


@pytest.mark.parametrize("schedule", DECAYS + WARMUPS, ids=repr)
@pytest.mark.parametrize("horizon", [1, 7, HORIZON, 2.5, 1e6, math.inf])
def test_stays_a_float_within_zero_and_one(schedule, horizon):
    for t in [*range(30), 0.5, 2.49, 1e6, 1e12]:
        value = schedule(t, horizon)
        assert type(value) is float
        assert 0 <= value <= 1


@pytest.mark.parametrize("schedule", [s for s in DECAYS + WARMUPS if s.needs_horizon], ids=repr)
def test_stays_after_the_horizon(schedule):
    final = schedule(HORIZON, HORIZON)
    assert final < 1
    assert all(schedule(t, HORIZON) == final for t in (HORIZON + 0.1, HORIZON + 1, 3 * HORIZON, 1e9))


@pytest.mark.parametrize("schedule", DECAYS + WARMUPS, ids=repr)
def test_start_does_not_depend_on_the_horizon(schedule):
    assert len({schedule(0, horizon) for horizon in (0, 1, 2.5, HORIZON, math.inf)}) == 1


@pytest.mark.parametrize("schedule", DECAYS + WARMUPS, ids=repr)
def test_needs_horizon_tells_whether_the_horizon_matters(schedule):
    differs = any(schedule(t, HORIZON) != schedule(t, 2 * HORIZON) for t in range(HORIZON))
    assert schedule.needs_horizon is differs


def test_a_schedule_of_your_own_needs_a_horizon_unless_it_says_otherwise():
    class Mine(Schedule):
        def __call__(self, t: float, horizon: float) -> float:
            return 1.0

    assert Mine().needs_horizon


@pytest.mark.parametrize("schedule", DECAYS + WARMUPS, ids=repr)
def test_is_a_value(schedule):
    copy = eval(repr(schedule), vars(schedules).copy())
    assert copy == schedule == pickle.loads(pickle.dumps(schedule))
    assert hash(copy) == hash(schedule)
    with pytest.raises(FrozenInstanceError):
        schedule.anything = 1


def test_milestones_may_come_as_a_list():
    given = [2, 7]
    schedule = MultiStep(milestones=given)
    given.append(9)
    assert schedule == MultiStep(milestones=(2, 7))


def test_schedule_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Schedule()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda bad: Linear(end=bad), r"`end` must be in \[0, 1\]"),
        (lambda bad: Polynomial(power=bad), r"`power` must be in \(0, inf\)"),
        (lambda bad: Polynomial(end=bad), r"`end` must be in \[0, 1\]"),
        (lambda bad: Exponential(gamma=bad), r"`gamma` must be in \(0, 1\]"),
        (lambda bad: Step(step_size=2, gamma=bad), r"`gamma` must be in \(0, 1\]"),
        (lambda bad: MultiStep(milestones=(2,), gamma=bad), r"`gamma` must be in \(0, 1\]"),
        (lambda bad: Cosine(minimum=bad), r"`minimum` must be in \[0, 1\]"),
        (lambda bad: Warmup(steps=2, then=Constant(), start=bad), r"`start` must be in \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_out_of_range(make, message, bad):
    with pytest.raises(ValueError, match=message):
        make(bad)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linear(end=1.1), ValueError, r"Found `end = 1\.1`"),
        (lambda: Polynomial(power=0), ValueError, "Found `power = 0`"),
        (lambda: Exponential(gamma=0), ValueError, "Found `gamma = 0`"),
        (lambda: Exponential(gamma="0.9"), TypeError, "`gamma` must be a number"),
        (lambda: Step(step_size=0), ValueError, "`step_size` must be at least 1"),
        (lambda: Step(step_size=2.0), TypeError, "`step_size` must be a whole number"),
        (lambda: Step(step_size=2, gamma=1.5), ValueError, r"Found `gamma = 1\.5`"),
        (
            lambda: MultiStep(milestones=()),
            ValueError,
            r"`milestones` must rise.* Found `milestones = \(\)`",
        ),
        (lambda: MultiStep(milestones=(0, 2)), ValueError, "`milestones` must be at least 1"),
        (lambda: MultiStep(milestones=(1.5,)), TypeError, "`milestones` must be a whole number"),
        (lambda: MultiStep(milestones=(7, 2)), ValueError, "`milestones` must rise"),
        (lambda: MultiStep(milestones=(2, 2)), ValueError, "`milestones` must rise"),
        (lambda: Warmup(steps=0, then=Constant()), ValueError, "`steps` must be at least 1"),
        (lambda: Warmup(steps=0.5, then=Constant()), TypeError, "`steps` must be a whole number"),
        (lambda: Warmup(steps=2, then=Constant), TypeError, r"Did you mean `Constant\(\)`"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
