"""Greedy selection, soups, diversity and calibration, against brute force and closed forms."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from nets import Answers, Regressor, classifiers, logits, numbers, rows
from support import CLASSES, Classifier, dataset, loader
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError

from lightning_structopt.ensembles import (
    ParallelEnsemble,
    TemperatureScaling,
    disagreement,
    error_correlation,
    expected_calibration_error,
    predictions,
    select_greedily,
    soup,
)

TARGET = torch.tensor([0, 1, 2, 3] * 10)


def candidates(count: int = 6, strength: float = 1.0) -> list[nn.Module]:
    right = nn.functional.one_hot(TARGET, CLASSES).float()
    return [Answers(strength * right + logits(40, seed)) for seed in range(count)]


def log_likelihood(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return outputs[range(len(target)), target].log().mean()


def test_each_step_is_the_best_one() -> None:
    members = candidates()
    found = select_greedily(members, rows(40, 7, TARGET), log_likelihood, size=12)
    probabilities = [member.table.softmax(1) for member in members]
    chosen: list[int] = []
    for index, value in zip(found.order, found.scores, strict=True):
        tried = [
            float(log_likelihood(sum(probabilities[i] for i in [*chosen, c]) / (len(chosen) + 1), TARGET))
            for c in range(6)
        ]
        assert index == int(np.argmax(tried))
        assert value == pytest.approx(max(tried), rel=1e-5)
        chosen.append(index)
    assert found.weights == pytest.approx([chosen.count(i) / len(chosen) for i in range(6)])
    assert found.scores[-1] == max(found.scores)
    ensemble = ParallelEnsemble([members[i] for i in found.indices], found.chosen_weights)
    inputs = rows(40, 40, TARGET).dataset.tensors[0]
    assert -float(ensemble.loss(ensemble(inputs), TARGET)) == pytest.approx(found.scores[-1], rel=1e-4)


def test_selection_by_metrics_of_torchmetrics() -> None:
    members, data = [Regressor(seed=seed) for seed in range(4)], numbers()
    found = select_greedily(members, data, MeanSquaredError(), size=10)
    gathered = predictions(members, data)
    alone = [(outputs - gathered.target).square().mean() for outputs in gathered.outputs]
    mixed = sum(w * outputs for w, outputs in zip(found.weights, gathered.outputs, strict=True))
    assert float((mixed - gathered.target).square().mean()) == pytest.approx(-found.scores[-1], rel=1e-4)
    assert -found.scores[-1] <= float(min(alone))
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    exact = [Answers(logits(40, 1)), Answers(nn.functional.one_hot(TARGET, CLASSES))]
    assert select_greedily(exact, rows(40, 9, TARGET), accuracy).order[0] == 1
    assert select_greedily([exact[1]] * 3, rows(40, 9, TARGET), accuracy, size=5).order == (0, 1, 2, 0, 1)


def test_bags_draw_and_average() -> None:
    members, data = candidates(8), rows(40, 40, TARGET)
    one = select_greedily(members, data, log_likelihood, size=5, bags=6, share=0.25, seed=1)
    again = select_greedily(members, data, log_likelihood, size=5, bags=6, share=0.25, seed=1)
    assert one == again
    assert one != select_greedily(members, data, log_likelihood, size=5, bags=6, share=0.25, seed=2)
    assert sum(one.weights) == pytest.approx(1)
    assert 2 < len(one.indices) <= 8


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"size": 0}, ValueError, "`size` must be at least 1"),
        ({"bags": 1.5}, TypeError, "`bags` must be a whole number"),
        ({"share": 0.0}, ValueError, r"`share` must be in \(0, 1\]"),
        ({"metric": MulticlassAccuracy}, TypeError, "Did you mean `MulticlassAccuracy"),
        ({"metric": lambda *_: float("nan")}, ValueError, "Found NaN for candidate 0 in step 1"),
        ({"loader": []}, ValueError, "at least one batch"),
        ({"members": []}, ValueError, "at least one member"),
    ],
    ids=["size", "bags", "share", "class", "nan", "no data", "no members"],
)
def test_wrong_selections(options: Any, kind: type[Exception], message: str) -> None:
    usual = {"members": candidates(2), "loader": rows(40, 9, TARGET), "metric": log_likelihood}
    with pytest.raises(kind, match=message):
        select_greedily(**{**usual, **options})


def related(count: int = 3, spread: float = 0.1) -> list[nn.Module]:
    start, found = Classifier(), []
    for seed in range(count):
        member = copy.deepcopy(start)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in member.parameters():
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        found.append(member)
    return found


def accuracy_of(module: nn.Module) -> float:
    inputs, labels = dataset().tensors
    return float((module.eval()(inputs).argmax(1) == labels).float().mean())


def test_a_uniform_soup_is_the_mean() -> None:
    members = related()
    before = copy.deepcopy([member.state_dict() for member in members])
    mixed = soup(members)
    assert type(mixed) is Classifier
    assert not mixed.training
    for name, value in mixed.state_dict().items():
        if value.is_floating_point():
            expected = np.mean([member.state_dict()[name].double().numpy() for member in members], axis=0)
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-7)
    for member, state in zip(members, before, strict=True):
        torch.testing.assert_close(member.state_dict(), state)
    same = [copy.deepcopy(members[0]) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(soup(same).parameters(), same[0].parameters(), strict=True))


@pytest.mark.parametrize("spread", [0.05, 0.15])
def test_a_greedy_soup_is_as_by_hand(spread: float) -> None:
    members = related(5, spread)
    alone = [accuracy_of(member) for member in members]
    found = soup(members, "greedy", loader=loader(), metric=MulticlassAccuracy(CLASSES, average="micro"))
    order = sorted(range(5), key=lambda index: -alone[index])
    kept, best = [members[order[0]]], max(alone)
    for index in order[1:]:
        if (value := accuracy_of(soup([*kept, members[index]]))) >= best:
            kept, best = [*kept, members[index]], value
    torch.testing.assert_close(found.state_dict(), soup(kept).state_dict())
    assert accuracy_of(found) >= max(alone)


def test_statistics_are_computed_anew() -> None:
    mixed = soup(related(), statistics=loader())
    expected = soup(related())
    inputs = dataset().tensors[0]
    before = expected.net[0](inputs)
    torch.testing.assert_close(mixed.net[1].running_mean, before.mean(0), rtol=1e-5, atol=1e-6)
    assert not mixed.training


def test_a_soup_needs_one_start() -> None:
    apart = [Classifier(seed=seed, hidden=64) for seed in range(2)]
    with pytest.raises(ValueError, match=r"that member 1 and member 0 have a cosine of -?0\.\d+, below"):
        soup(apart)
    assert isinstance(soup(apart, similarity=-1.0), Classifier)
    members = related()
    soup(members, start=Classifier())
    with pytest.raises(ValueError, match="that member 0 and `start` have a cosine"):
        soup(members, start=Classifier(seed=9).state_dict())
    with pytest.raises(ValueError, match="Found none called `net.0.weight`"):
        soup(members, start={})


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([Classifier(), nn.Linear(12, 4)], {}, "Found `Linear` in member 1 and `Classifier` in member 0"),
        ([Classifier(), Classifier(hidden=3)], {}, "another `net.0.weight` in member 1"),
        ([], {}, "at least one member"),
        ([Classifier()], {"kind": "best"}, "`kind` must be 'uniform' or 'greedy'"),
        ([Classifier()], {"kind": "greedy"}, "Found no `loader`"),
        ([Classifier()], {"kind": "greedy", "loader": loader()}, "Found no `metric`"),
        ([Classifier()], {"similarity": 2.0}, r"`similarity` must be in \[-1, 1\]"),
    ],
    ids=["class", "shape", "none", "kind", "no data", "no metric", "similarity"],
)
def test_wrong_soups(members: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soup(members, **options)


def test_diversity_is_that_of_loops() -> None:
    outputs = torch.stack([member.table for member in candidates()])
    differing, correlation = disagreement(outputs), error_correlation(outputs, TARGET)
    wrong = (outputs.argmax(2) != TARGET).numpy()
    np.testing.assert_allclose(correlation.numpy(), np.corrcoef(wrong), atol=1e-6)
    for i, j in itertools.product(range(6), repeat=2):
        apart = sum(int(outputs[i, n].argmax()) != int(outputs[j, n].argmax()) for n in range(40))
        assert float(differing[i, j]) == pytest.approx(apart / 40)
    values = torch.stack([logits(40, seed, 2) for seed in range(4)])
    residuals = (values - values[0] * 0.1).flatten(1).numpy()
    found = error_correlation(values, values[0] * 0.1)
    np.testing.assert_allclose(found.numpy(), np.corrcoef(residuals), atol=1e-5)


def test_wrong_diversity() -> None:
    with pytest.raises(ValueError, match=r"must be of shape \(members, samples, classes\)"):
        disagreement(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"Found \(3, 4, 2\) and \(5,\)"):
        error_correlation(torch.zeros(3, 4, 2), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="a number for each of `target`"):
        error_correlation(torch.zeros(3, 4), torch.zeros(5))


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_again(true: float) -> None:
    generator = torch.Generator().manual_seed(0)
    honest = 2 * logits(20_000, 1)
    target = torch.multinomial(honest.softmax(1), 1, generator=generator).squeeze(1)
    member = Answers(true * honest)
    data = rows(20_000, 5000, target)
    scaled = TemperatureScaling(member).fit(data)
    assert scaled.temperature == pytest.approx(true, rel=0.05)
    outputs = predictions([member, scaled], data)
    before, after = (expected_calibration_error(o, target) for o in outputs.outputs)
    assert float(after) < 0.02
    assert float(after) <= float(before) + 0.005
    assert torch.equal(outputs.outputs[0].argmax(1), outputs.outputs[1].argmax(1))


def test_the_calibration_error_is_that_of_a_loop() -> None:
    outputs, target = 2 * logits(500, 2), torch.arange(500) % 4
    confidence, chosen = outputs.softmax(1).max(1)
    expected = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1)
        if inside.any():
            right = (chosen == target)[inside].double().mean()
            expected += float(inside.double().mean() * (right - confidence[inside].double().mean()).abs())
    assert float(expected_calibration_error(outputs, target, bins=10)) == pytest.approx(expected, abs=1e-5)


def test_temperatures_are_saved_and_refused() -> None:
    scaled = TemperatureScaling(classifiers(1)[0], temperature=2.5)
    again = TemperatureScaling(classifiers(1)[0])
    again.load_state_dict(scaled.state_dict())
    assert again.temperature == pytest.approx(2.5)
    with torch.inference_mode():
        scaled.fit(loader())
    assert ParallelEnsemble([scaled, again])(dataset().tensors[0]).shape == (32, CLASSES)
    with pytest.raises(ValueError, match=r"`temperature` must be in \(0, inf\)"):
        TemperatureScaling(nn.Linear(1, 2), 0.0)
    with pytest.raises(TypeError, match="`module` must be a `Module`"):
        TemperatureScaling(torch.sigmoid)
    with pytest.raises(ValueError, match="Found that all answers are right"):
        TemperatureScaling(Answers(torch.eye(4)[TARGET])).fit(rows(40, 8, TARGET))
    with pytest.raises(ValueError, match="Found that answers are no better than chance"):
        TemperatureScaling(Answers(-torch.eye(4)[TARGET])).fit(rows(40, 8, TARGET))
    with pytest.raises(ValueError, match="`bins` must be at least 1"):
        expected_calibration_error(torch.zeros(3, 2), torch.zeros(3), bins=0)
    with pytest.raises(ValueError, match=r"`outputs` must be of shape \(samples, classes\)"):
        expected_calibration_error(torch.zeros(3), torch.zeros(3))
