import math

import pytest

from lightning_structopt.pruning import (
    CubicRamp,
    GeometricRamp,
    LinearRamp,
    OneCycleRamp,
    OneShotRamp,
    Ramp,
)

RAMPS = [OneShotRamp(), LinearRamp(), CubicRamp(), GeometricRamp(), OneCycleRamp()]
every_ramp = pytest.mark.parametrize("ramp", RAMPS, ids=repr)


@every_ramp
@pytest.mark.parametrize("target", [0.0, 0.3, 0.9, 0.999])
def test_ends_exactly_at_the_target(ramp: Ramp, target: float) -> None:
    assert ramp(1.0, target) == target


@every_ramp
def test_never_falls_and_never_passes_the_target(ramp: Ramp) -> None:
    curve = [ramp(step / 100, 0.9) for step in range(101)]
    assert curve == sorted(curve)
    assert all(0 <= sparsity <= 0.9 for sparsity in curve)


@pytest.mark.parametrize("ramp", [LinearRamp(), CubicRamp(), GeometricRamp()], ids=repr)
def test_starts_at_zero(ramp: Ramp) -> None:
    assert ramp(0.0, 0.9) == 0


def test_cubic_is_the_formula_of_zhu_and_gupta() -> None:
    final, initial = 0.9, 0.0
    for progress in (0.1, 0.25, 0.8):
        expected = final + (initial - final) * (1 - progress) ** 3
        assert CubicRamp()(progress, final) == pytest.approx(expected)


def test_geometric_removes_the_same_share_of_what_is_left() -> None:
    left = [1 - GeometricRamp()(step / 10, 1 - 0.8**10) for step in range(11)]
    assert [after / before for before, after in zip(left, left[1:], strict=False)] == pytest.approx(
        [0.8] * 10
    )


def test_one_cycle_rises_fastest_at_offset_over_steepness() -> None:
    curve = [OneCycleRamp(10, 6)(step / 1000, 0.9) for step in range(1001)]
    rises = [after - before for before, after in zip(curve, curve[1:], strict=False)]
    assert rises.index(max(rises)) == pytest.approx(600, abs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steepness": 0}, r"`steepness` must be in \(0, inf\)\. Found `steepness = 0`"),
        ({"steepness": math.nan}, "Found `steepness = nan`"),
        ({"offset": math.inf}, "Found `offset = inf`"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OneCycleRamp(**arguments)
