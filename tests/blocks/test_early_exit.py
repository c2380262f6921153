"""Early exits: the first sure head by brute force, rows that stages see, thresholds within their budget."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_structopt.blocks import EarlyExit, dense


def net(classes: int = 3, **options: Any) -> EarlyExit:
    stages = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)]
    heads = [nn.Linear(5, classes) for _ in range(3)]
    for head in heads:
        nn.init.normal_(head.weight, std=2.0)
    return EarlyExit(stages, heads, **options)


def confidence(logits: Tensor, kind: str) -> Tensor:
    probabilities = logits.softmax(-1)
    if kind == "probability":
        return probabilities.max(-1).values
    entropy = torch.distributions.Categorical(probs=probabilities).entropy()
    return 1 - entropy / torch.tensor(float(logits.shape[-1])).log()


def by_hand(module: EarlyExit, inputs: Tensor) -> tuple[Tensor, list[int]]:
    outputs, exits = [], []
    for sample in inputs:
        state = sample[None]
        for index, (stage, head) in enumerate(zip(module.stages, module.heads, strict=True)):
            state = stage(state)
            logits = head(state)
            if index == 2 or confidence(logits, module.confidence) >= module.threshold:
                break
        outputs.append(logits[0])
        exits.append(index)
    return torch.stack(outputs), exits


@pytest.mark.parametrize("kind", ["probability", "entropy"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("batch", [1, 20])
def test_a_sample_leaves_at_the_first_sure_head(kind: str, threshold: float, batch: int) -> None:
    module = net(confidence=kind, threshold=threshold).eval()
    inputs = torch.randn(batch, 5)
    expected, exits = by_hand(module, inputs)
    seen: list[int] = []
    for stage in module.stages:
        stage.register_forward_hook(lambda part, args, output: seen.append(len(args[0])))
    torch.testing.assert_close(module(inputs), expected, rtol=1e-4, atol=1e-5)
    entering = [sum(e >= index for e in exits) for index in range(3)]
    assert seen == [rows for rows in entering if rows]
    assert module.executed_fraction == pytest.approx(sum(entering) / (3 * batch))
    with dense(module):
        torch.testing.assert_close(module(inputs), expected, rtol=1e-4, atol=1e-5)


def test_joint_loss_is_the_weighted_mean() -> None:
    module = net(weights=(0.5, 1.0, 2.0))
    inputs, labels = torch.randn(8, 5), torch.randint(3, (8,))
    outputs = module(inputs)
    losses = [nn.functional.cross_entropy(each, labels) for each in outputs]
    expected = (0.5 * losses[0] + losses[1] + 2 * losses[2]) / 3.5
    torch.testing.assert_close(module.loss(outputs, labels), expected)
    module.loss(outputs, labels).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    final = module.eval()(inputs)
    torch.testing.assert_close(module.loss(final, labels), nn.functional.cross_entropy(final, labels))


def mean_cost(module: EarlyExit, inputs: Tensor) -> float:
    with torch.no_grad():
        module.eval()(inputs)
    return module.executed_fraction


@pytest.mark.parametrize("kind", ["probability", "entropy"])
@pytest.mark.parametrize("budget", [0.34, 0.5, 0.75, 1.0])
def test_threshold_is_the_most_cautious_within_the_budget(kind: str, budget: float) -> None:
    module = net(confidence=kind)
    inputs = torch.randn(200, 5)
    loader = DataLoader(TensorDataset(inputs, torch.zeros(200)), batch_size=64)
    threshold = module.fit_threshold(loader, budget)
    assert module.training
    assert mean_cost(module, inputs) <= budget + 1e-6
    values = torch.cat([confidence(head, kind) for head in module.train()(inputs)[:-1]]).detach()
    higher = values[values > threshold + 1e-6]
    if budget < 1:
        module.threshold.fill_(float(higher.min()))
        assert mean_cost(module, inputs) > budget
    else:
        assert threshold == 1


def test_threshold_is_saved_with_the_weights() -> None:
    module = net()
    module.fit_threshold([torch.randn(50, 5)], 0.5)
    twin = net()
    twin.load_state_dict(module.state_dict())
    inputs = torch.randn(20, 5)
    torch.testing.assert_close(twin.eval()(inputs), module.eval()(inputs))


def test_costs_are_counted_operations() -> None:
    module = EarlyExit([nn.Linear(4, 8), nn.Linear(8, 2)], [nn.Linear(8, 3), nn.Linear(2, 3)])
    module.fit_threshold([torch.randn(10, 4)], 1.0)
    first, second = 4 * 8 + 8 * 3, 8 * 2 + 2 * 3
    torch.testing.assert_close(module.costs, torch.tensor([first, second]) / (first + second))
    module.threshold.fill_(0.6)
    inputs = torch.randn(10, 4)
    sure = confidence(module.eval().heads[0](module.stages[0](inputs)), "probability") >= 0.6
    expected = torch.where(sure, 2.0 * first, 2.0 * (first + second))
    torch.testing.assert_close(module.expected_cost(inputs), expected)


def test_no_samples_at_all() -> None:
    assert net().eval()(torch.zeros(0, 5)).shape == (0, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EarlyExit([nn.Linear(2, 2)], [nn.Linear(2, 2)]), "Found 1 stages and 1 heads"),
        (lambda: EarlyExit([nn.Linear(2, 2)] * 3, [nn.Linear(2, 2)] * 2), "Found 3 stages and 2 heads"),
        (lambda: net(threshold=1.5), r"`threshold` must be in \[0, 1\]"),
        (lambda: net(confidence="margin"), "`confidence` must be 'probability' or 'entropy'"),
        (lambda: net(weights=(1.0, 2.0)), "one a head"),
        (lambda: net(weights=(0, 0, 0)), "not all zero"),
        (lambda: net(weights=(1, 1, -1)), "`weights` must be in"),
        (lambda: net().fit_threshold([torch.zeros(2, 5)], 0.0), "`budget` must be in"),
        (lambda: net().fit_threshold([torch.zeros(2, 5)], 0.1), "a first exit that takes 0.333"),
        (lambda: net().fit_threshold([], 0.5), "`loader` must have batches"),
    ],
)
def test_bad_values(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="`heads` must be a `Module`"):
        EarlyExit([nn.Linear(2, 2)] * 2, [1, 2])
