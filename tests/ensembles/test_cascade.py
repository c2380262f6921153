"""Cascades: rows are really left out, answers are those of a loop, thresholds meet their targets."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Answers, Regressor, classifiers, fit, logits, rows
from support import CLASSES, Classifier, assert_same_state, dataset, loader, trainer
from torch import nn

from lightning_structopt.distillation import DistillationModule
from lightning_structopt.ensembles import ParallelEnsemble, SerialEnsemble, TemperatureScaling
from lightning_structopt.ensembles.serial.calibrate import Evidence, fit_thresholds

ROWS = torch.arange(200).float().unsqueeze(1)
TARGET = torch.tensor([0, 1, 2, 3] * 50)


def members(count: int = 3) -> list[Answers]:
    """Each one better, and surer, than the one before."""
    right = nn.functional.one_hot(TARGET, CLASSES).float()
    return [Answers((1 + index) * 1.5 * right + logits(200, index)) for index in range(count)]


def by_loop(tables: list[torch.Tensor], thresholds: list[float]) -> tuple[list[int], list[int]]:
    """Return each row's answer and how many rows each member sees."""
    answers, seen = [], [0] * len(tables)
    for row in range(len(tables[0])):
        for index, table in enumerate(tables):
            seen[index] += 1
            probabilities = table[row].softmax(0)
            if index == len(tables) - 1 or float(probabilities.max()) >= thresholds[index]:
                answers.append(int(probabilities.argmax()))
                break
    return answers, seen


@pytest.mark.parametrize("thresholds", [[0.7, 0.8], [0.95, 0.5], [0.0, 0.5], [1.0, 1.0]])
def test_answers_and_rows_are_those_of_a_loop(thresholds: list[float]) -> None:
    stages = members()
    ensemble = SerialEnsemble(stages, threshold=thresholds)
    output = ensemble(ROWS)
    answers, seen = by_loop([stage.table for stage in stages], thresholds)
    assert output.argmax(1).tolist() == answers
    assert [stage.seen for stage in stages] == seen
    assert ensemble.executed_fraction == pytest.approx([count / 200 for count in seen])
    torch.testing.assert_close(output.exp().sum(1), torch.ones(200))
    routed = ensemble.route(ROWS)
    tables = torch.stack([stage.table.log_softmax(1) for stage in stages])
    torch.testing.assert_close(output, tables[routed.answered_by, torch.arange(200)])


def test_inputs_of_every_form_are_cut() -> None:
    class Named(nn.Module):
        def __init__(self, table: torch.Tensor) -> None:
            super().__init__()
            self.answers = Answers(table)

        def forward(self, x: torch.Tensor, shift: torch.Tensor, scale: Any) -> Any:
            assert shift.shape == (1,)
            return {"logits": self.answers(x + shift * scale["rows"])}

    stages = members()
    expected = SerialEnsemble(stages, threshold=0.8)(ROWS)
    ensemble = SerialEnsemble([Named(stage.table) for stage in stages], threshold=0.8)
    shift, scale = torch.zeros(1), {"rows": torch.ones(200, 1)}
    assert torch.equal(ensemble(ROWS, shift, scale), expected)
    assert torch.equal(ensemble(x=ROWS, shift=shift, scale=scale), expected)


def test_validation_logs_what_ran(tmp_path: Path) -> None:
    ensemble = SerialEnsemble(members(), threshold=[0.7, 0.8])
    ensemble(ROWS)
    found = trainer(tmp_path).validate(ensemble, rows(200, 64, TARGET), verbose=False)[0]
    answers, seen = by_loop([stage.table for stage in members()], [0.7, 0.8])
    assert [found[f"{index}/val_executed_fraction"] for index in range(3)] == pytest.approx([
        count / 200 for count in seen
    ])
    assert ensemble.executed_fraction == pytest.approx([count / 200 for count in seen])
    assert found["val_accuracy"] == pytest.approx(float((torch.tensor(answers) == TARGET).float().mean()))
    probabilities = torch.cat(trainer(tmp_path).predict(ensemble, rows(200, 64, TARGET)))
    assert probabilities.argmax(1).tolist() == answers
    assert ensemble.executed_fraction[0] == 1


def evidence(count: int, samples: int = 60) -> Evidence:
    generator = torch.Generator().manual_seed(4)
    confidence = torch.rand(count, samples, generator=generator)
    right = torch.rand(count, samples, generator=generator) < confidence.sqrt()
    right[-1] |= torch.rand(samples, generator=generator) < 0.8
    costs = [2.0**index for index in range(count)]
    return Evidence(confidence, right, tuple(cost / sum(costs) for cost in costs))


@pytest.mark.parametrize("target", [0.6, 0.8, 0.85])
def test_two_stages_are_calibrated_as_by_brute_force(target: float) -> None:
    found = fit_thresholds(evidence(2), target_accuracy=target)
    tried = [evidence(2).report([threshold]) for threshold in [0.0, 1.0, *evidence(2).confidence[0].tolist()]]
    assert found.accuracy >= target
    assert found.cost == pytest.approx(min(report.cost for report in tried if report.accuracy >= target))
    within = fit_thresholds(evidence(2), target_cost=0.5)
    assert within.cost <= 0.5
    assert within.accuracy == max(report.accuracy for report in tried if report.cost <= 0.5)


def test_three_stages_are_no_worse_than_any_shared_threshold() -> None:
    found = fit_thresholds(evidence(3), target_accuracy=0.75)
    grid = [0.0, *evidence(3).confidence.flatten().tolist()[:40]]
    tried = [evidence(3).report(pair) for pair in itertools.product(grid, repeat=2)]
    shared = [evidence(3).report([value, value]) for value in grid]
    best = min(report.cost for report in tried if report.accuracy >= 0.75)
    assert found.cost <= min(report.cost for report in shared if report.accuracy >= 0.75)
    assert found.cost <= 1.1 * best


@pytest.mark.parametrize("target", [{"target_accuracy": 0.85}, {"target_cost": 0.6}])
def test_the_report_is_what_the_cascade_does(target: dict[str, float], tmp_path: Path) -> None:
    ensemble = SerialEnsemble(members())
    report = ensemble.calibrate(rows(200, 64, TARGET), costs=[1, 3, 9], **target)
    found = trainer(tmp_path).validate(ensemble, rows(200, 50, TARGET), verbose=False)[0]
    assert ensemble.thresholds == report.thresholds
    assert found["val_accuracy"] == pytest.approx(report.accuracy)
    assert ensemble.executed_fraction == pytest.approx(report.executed_fraction)
    cost = sum(c * f for c, f in zip([1, 3, 9], ensemble.executed_fraction, strict=True)) / 13
    assert report.cost == pytest.approx(cost)
    assert report.accuracy >= 0.85 if "target_accuracy" in target else report.cost <= 0.6
    assert report.cost < 1


def test_costs_are_counted_operations() -> None:
    ensemble = SerialEnsemble([nn.Linear(12, CLASSES), Classifier(hidden=64)])
    report = ensemble.calibrate(loader(), target_cost=1.0)
    small, large = 12 * 4, 12 * 64 + 64 * 4
    expected = (small + report.executed_fraction[1] * large) / (small + large)
    assert report.cost == pytest.approx(expected)


def test_thresholds_are_saved_and_keep_their_digits() -> None:
    ensemble = SerialEnsemble(classifiers(2), threshold=0.999).bfloat16()
    assert ensemble.thresholds == (0.999,)
    other = SerialEnsemble(classifiers(2))
    other.load_state_dict(ensemble.state_dict())
    assert other.thresholds == (0.999,)
    assert_same_state(copy.deepcopy(other).state_dict(), other.state_dict())


def test_trees(tmp_path: Path) -> None:
    committee = ParallelEnsemble(classifiers())
    ensemble = SerialEnsemble([TemperatureScaling(Classifier(hidden=4), 0.1), committee], threshold=0.9)
    inputs = dataset().tensors[0]
    routed = ensemble.route(inputs)
    late = routed.answered_by == 1
    assert 0 < int(late.sum()) < 32
    torch.testing.assert_close(routed.output[late], committee(inputs)[late])
    outer = ParallelEnsemble([ensemble, committee])
    torch.testing.assert_close(outer(inputs).exp(), (routed.output.exp() + committee(inputs).exp()) / 2)
    assert trainer(tmp_path).validate(outer, loader(), verbose=False)[0]["val_loss"] > 0


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (lambda: SerialEnsemble([]), ValueError, "at least one member"),
    "threshold": (
        lambda: SerialEnsemble(members(), threshold=1.2),
        ValueError,
        r"`threshold` must be in \[0, 1\]",
    ),
    "one": (
        lambda: SerialEnsemble(members(), threshold=[0.5, -0.1]),
        ValueError,
        r"`threshold` must be in \[0, 1\]",
    ),
    "count": (
        lambda: SerialEnsemble(members(), threshold=[0.5]),
        ValueError,
        "Found 1 for 3 members. Give 2",
    ),
    "mode": (lambda: SerialEnsemble(members(), "loop"), ValueError, "`mode` must be 'cascade' or 'chain'"),
    "shrinkage": (
        lambda: SerialEnsemble(members(), shrinkage=0.5),
        ValueError,
        "`shrinkage`. Leave that out",
    ),
    "task": (lambda: SerialEnsemble(members(), task="regression"), ValueError, "task=.regression"),
    "chain": (
        lambda: SerialEnsemble(members(), "chain", 0.5),
        ValueError,
        "Found `mode=.chain.` and `threshold`",
    ),
    "classes": (
        lambda: SerialEnsemble([nn.Linear(12, 4), nn.Linear(12, 5)], threshold=1.0)(dataset().tensors[0]),
        ValueError,
        r"of shape \(32, 4\). Found \(32, 5\) of member 1",
    ),
    "numbers": (
        lambda: SerialEnsemble([Regressor()])(dataset().tensors[0]),
        ValueError,
        r"two classes or more. Found \(32,\) of member 0",
    ),
    "both": (
        lambda: SerialEnsemble(members()).calibrate([], target_accuracy=0.5, target_cost=0.5),
        ValueError,
        "Found both. Give one",
    ),
    "neither": (lambda: SerialEnsemble(members()).calibrate([]), ValueError, "Found neither"),
    "too good": (
        lambda: SerialEnsemble([Answers(logits(200, 1)), Answers(logits(200, 2))]).calibrate(
            rows(200, 50, TARGET), target_accuracy=0.9, costs=[1, 2]
        ),
        ValueError,
        r"Found an accuracy of 0.\d+ at best, below",
    ),
    "too cheap": (
        lambda: SerialEnsemble(members()).calibrate(rows(200, 50, TARGET), target_cost=0.1, costs=[1, 2, 3]),
        ValueError,
        "Found a cost of 0.1667 at least",
    ),
    "no costs": (
        lambda: SerialEnsemble(members()).calibrate(rows(200, 50, TARGET), target_cost=0.1),
        ValueError,
        r"`costs` must be in \(0, inf\)",
    ),
    "a chain": (
        lambda: SerialEnsemble(classifiers(), "chain").calibrate([], target_cost=0.1),
        ValueError,
        "`calibrate` is for cascades",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_a_cascade_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the frozen members of a cascade. Call `calibrate`"):
        fit(tmp_path, SerialEnsemble(classifiers()))


def test_is_a_teacher(tmp_path: Path) -> None:
    ensemble = SerialEnsemble(classifiers(2), threshold=0.35)
    student = Classifier(hidden=8)
    run = fit(tmp_path, DistillationModule(ensemble.as_teacher(), student), max_epochs=2)
    assert float(run.callback_metrics["kd/SoftTarget"]) > 0
    assert 0 < ensemble.executed_fraction[1] < 1
