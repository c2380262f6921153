import math

import pytest

from lightning_structopt.pruning.window import RampSteps, Window


def moments(steps: RampSteps, total: int) -> list[int]:
    reached = [steps.reached(now) for now in range(total)]
    return [now for now in range(total) if reached[now] == now]


@pytest.mark.parametrize(
    ("window", "total", "expected"),
    [
        (Window(0.1, 0.75, 1), 10, [1, 2, 3, 4, 5, 6, 7]),
        (Window(0.1, 0.75, 3), 10, [1, 4, 7]),
        (Window(0.1, 0.75, 4), 10, [1, 5]),
        (Window(0.0, 1.0, 1), 4, [0, 1, 2, 3]),
        (Window(0.1, 0.75, 1), 3, [1, 2]),
        (Window(0.1, 0.2, 1), 30, [3, 4, 5, 6]),  # 0.1 * 30 is a little more than 3
        (Window(0.0, 0.7, 1), 10, [0, 1, 2, 3, 4, 5, 6, 7]),  # 0.7 * 10 is a little less than 7
        (Window(0.5, 1.0, 1), 3.5, [2, 3]),  # max_steps ends the fourth epoch half-way
        (Window(0.5, 1.0, 100), 4, [2]),
    ],
)
def test_moments(window: Window, total: float, expected: list[int]) -> None:
    assert moments(window.steps(total, "epoch"), math.ceil(total)) == expected


def test_progress_is_one_at_the_last_moment_and_measured_from_the_opening() -> None:
    steps = Window(0.05, 0.75, 1).steps(10, "epoch")  # opens at 0.5, moments 1 to 7
    assert steps.progress(1) == pytest.approx(0.5 / 6.5)
    assert steps.progress(7) == 1


def test_rounds_share_the_ramp_equally() -> None:
    steps = Window(0.25, 1.0, 2).steps(8, "epoch").as_rounds()
    assert [steps.progress(moment) for moment in (2, 4, 6)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_moment_that_is_jumped_over_counts_as_reached() -> None:
    steps = Window(0.0, 1.0, 10).steps(100, "step")
    assert [steps.reached(now) for now in (0, 9, 11, 19, 95, 1000)] == [0, 0, 10, 10, 90, 90]
    assert Window(0.5, 1.0, 10).steps(100, "step").reached(49) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 0.5, 1), "`begin` must be less than `end`. Found `begin = 0.5` and `end = 0.5`"),
        ((0.9, 0.1, 1), "`begin` must be less than `end`"),
        ((-0.1, 0.5, 1), r"`begin` must be in \[0, 1\]. Found `begin = -0.1`"),
        ((0.1, 1.5, 1), r"`end` must be in \[0, 1\]. Found `end = 1.5`"),
        ((math.nan, 0.5, 1), "Found `begin = nan`"),
        ((0.1, 0.5, 0), "`every` must be at least 1. Found `every = 0`"),
    ],
)
def test_bad_values(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Window(*arguments)


def test_every_must_be_whole() -> None:
    with pytest.raises(TypeError, match=r"`every` must be a whole number. Found `every = 1.5`"):
        Window(0.1, 0.5, 1.5)


def test_a_window_without_a_moment_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"over 1 epochs: no epoch starts in it. Give `interval=\"step\"`"):
        Window(0.1, 0.75, 1).steps(1, "epoch")
    with pytest.raises(ValueError, match="Train for longer, or widen the window"):
        Window(0.1, 0.2, 1).steps(3, "step")
