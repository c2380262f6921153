"""Combining by each way, against loops and NumPy."""

import math

import numpy as np
import pytest
import torch
from nets import logits

from lightning_structopt.ensembles.combine import combined, variance

WEIGHTS = [torch.full((5,), 0.2), torch.tensor([0.1, 0.4, 0.25, 0.25, 0.0])]
every_weights = pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "others"])


def outputs() -> torch.Tensor:
    return torch.stack([3 * logits(40, seed) for seed in range(5)])


@every_weights
def test_probabilities_are_averaged(weights: torch.Tensor) -> None:
    expected = sum(w * o.double().softmax(1) for w, o in zip(weights, outputs(), strict=True))
    found = combined("probabilities", outputs(), weights)
    torch.testing.assert_close(found.exp().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, found.log_softmax(1))


@every_weights
def test_logits_are_averaged(weights: torch.Tensor) -> None:
    expected = sum(w * o.double() for w, o in zip(weights, outputs(), strict=True)).softmax(1)
    found = combined("logits", outputs(), weights).exp().double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@every_weights
def test_votes_are_counted(weights: torch.Tensor) -> None:
    found = combined("vote", outputs(), weights).exp()
    for sample in range(40):
        shares = [0.0] * 4
        for member in range(5):
            shares[int(outputs()[member, sample].argmax())] += float(weights[member])
        torch.testing.assert_close(found[sample], torch.tensor(shares), rtol=0, atol=1e-5)
        assert int(found[sample].argmax()) == int(np.argmax(np.float32(shares)))


@pytest.mark.parametrize("members", [1, 2, 3, 4, 5])
def test_median_is_that_of_numpy(members: int) -> None:
    values = outputs()[:members]
    found = combined("median", values, torch.full((members,), 1 / members))
    np.testing.assert_allclose(found.numpy(), np.median(values.numpy(), axis=0), rtol=1e-6)


def test_weighted_median_is_that_of_repeated_values() -> None:
    counts = [1, 4, 3, 2]
    values = outputs()[:4]
    repeated = torch.cat([v.unsqueeze(0).repeat(c, 1, 1) for v, c in zip(values, counts, strict=True)])
    found = combined("median", values, torch.tensor(counts) / 10)
    np.testing.assert_allclose(found.numpy(), np.median(repeated.numpy(), axis=0), rtol=1e-6)


@every_weights
def test_mean_and_variance_are_those_of_numpy(weights: torch.Tensor) -> None:
    values = outputs().double().numpy()
    mean = np.average(values, axis=0, weights=weights.numpy())
    np.testing.assert_allclose(combined("mean", outputs(), weights).numpy(), mean, rtol=1e-4, atol=1e-6)
    expected = np.average((values - mean) ** 2, axis=0, weights=weights.numpy())
    np.testing.assert_allclose(variance(outputs(), weights).numpy(), expected, rtol=1e-4, atol=1e-6)


@every_weights
def test_a_mixture_has_the_moments_of_draws_from_it(weights: torch.Tensor) -> None:
    means, variances = torch.randn(5, 7, dtype=torch.double), torch.rand(5, 7, dtype=torch.double) + 0.1
    found = combined("gaussian", torch.stack([means, variances], -1), weights.double())
    first = (weights.double()[:, None] * means).sum(0)
    second = (weights.double()[:, None] * (variances + means**2)).sum(0)
    torch.testing.assert_close(found, torch.stack([first, second - first**2], -1), rtol=1e-6, atol=1e-6)
    # As many draws from each member as its weight says.
    generator = np.random.default_rng(0)
    draws = [
        generator.normal(float(m), float(v) ** 0.5, int(round(100_000 * float(w))))
        for w, m, v in zip(weights, means[:, 0], variances[:, 0], strict=True)
    ]
    together = np.concatenate(draws)
    assert float(found[0, 0]) == pytest.approx(together.mean(), abs=0.03)
    assert float(found[0, 1]) == pytest.approx(together.var(), rel=0.03)


@pytest.mark.parametrize("how", ["probabilities", "logits", "vote"])
@pytest.mark.parametrize("class_dim", [1, 2, -1])
def test_classes_in_any_dimension(how: str, class_dim: int) -> None:
    pixels = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))  # 4 classes first
    moved = pixels if class_dim == 1 else pixels.movedim(2, class_dim + 1 if class_dim > 0 else class_dim)
    found = combined(how, moved, torch.full((3,), 1 / 3), class_dim)
    expected = combined(how, pixels.movedim(3, 2).reshape(3, 12, 4), torch.full((3,), 1 / 3))
    back = found.movedim(class_dim, 2) if class_dim == 1 else found
    torch.testing.assert_close(back.reshape(12, 4), expected)


def test_weights_by_sample() -> None:
    weights = logits(5, classes=40).softmax(0)
    found = combined("probabilities", outputs(), weights).exp()
    expected = (weights.unsqueeze(2) * outputs().softmax(2)).sum(0)
    torch.testing.assert_close(found, expected)


def test_half_precision_weights_sum_to_one() -> None:
    found = combined("probabilities", outputs().bfloat16(), torch.full((5,), 0.2).bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(1), torch.ones(40))


def test_a_class_that_nobody_votes_for_has_a_finite_loss() -> None:
    found = combined("vote", torch.tensor([[[9.0, 0.0]]]), torch.ones(1))
    assert math.isfinite(float(torch.nn.functional.nll_loss(found, torch.tensor([1]))))


@pytest.mark.parametrize("shape", [(3, 8, 1), (3, 8)])
def test_one_column_is_no_classification(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"needs a score for each of two classes or more. Found outputs of shape"
    ):
        combined("probabilities", torch.zeros(shape), torch.full((3,), 1 / 3))
