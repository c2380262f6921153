"""Criteria that look at weights alone, or at the modules that hold them."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from lightning_structopt.pruning import Magnitude, Neurons, Unstructured, prune
from lightning_structopt.pruning.criteria import Criterion, Evidence
from lightning_structopt.pruning.filter_criteria import BatchNormScale, GeometricMedian
from lightning_structopt.pruning.lowest import drop_lowest
from lightning_structopt.pruning.weight_criteria import LAMP, Random

WEIGHTS = {
    "normal": torch.randn(5, 7, generator=torch.Generator().manual_seed(1)),
    "kernels": torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(2)),
    "ties": torch.tensor([[1.0, -1.0, 2.0], [2.0, 0.0, 0.0]]),
    "zeros": torch.zeros(2, 3),
    "one": torch.ones(1, 1),
    "small": torch.full((3, 3), 1e-25),
    "bfloat16": torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).bfloat16(),
    "channels last": torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(4)).to(
        memory_format=torch.channels_last
    ),
}


def score(criterion: Criterion, weight: Tensor) -> Tensor:
    return criterion.score({"weight": weight}).values["weight"]


def lamp_by_sorting(weight: Tensor) -> list[float]:
    values = weight.flatten().double().tolist()
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), i))
    scores = [0.0] * len(values)
    for place, index in enumerate(order):
        rest = math.fsum(values[i] ** 2 for i in order[place:])
        scores[index] = values[index] ** 2 / rest if values[index] else 0.0
    return scores


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_lamp_is_its_formula(weight: Tensor) -> None:
    scores = score(LAMP(), weight)
    assert scores.shape == weight.shape
    assert scores.dtype == torch.float32
    assert scores.flatten().tolist() == pytest.approx(lamp_by_sorting(weight), rel=1e-6)


def test_lamp_ranks_a_layer_as_magnitude_does_and_layers_by_their_own_size() -> None:
    small, large = torch.randn(6, 6) / 100, torch.randn(6, 6) * 100
    masks = {
        c: Unstructured().choose(
            c.score({"s": small, "l": large}), {n: torch.ones(6, 6).bool() for n in "sl"}, 0.5
        )
        for c in (LAMP(), Magnitude())
    }
    assert not masks[Magnitude()]["s"].any()
    assert masks[LAMP()]["s"].sum() > 9
    for name, weight in (("s", small), ("l", large)):
        kept = masks[LAMP()][name]
        assert weight[kept].abs().min() > weight[~kept].abs().max()


def test_nan_weights_are_an_error_for_lamp_too() -> None:
    module = nn.Linear(3, 3)
    module.weight.data[1, 1] = torch.nan
    with pytest.raises(ValueError, match="Scores must not be NaN"):
        prune(module, 0.5, criterion=LAMP())


def test_random_depends_on_seed_name_and_index_only() -> None:
    def draw(seed: int, name: str, weight: Tensor) -> Tensor:
        return Random(seed).score({name: weight}).values[name]

    drawn = draw(0, "a", torch.zeros(50, 40))
    before = torch.get_rng_state()
    assert torch.equal(draw(0, "a", torch.ones(50, 40, dtype=torch.float64)), drawn)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draw(0, "a", torch.zeros(2000)), drawn.flatten())
    for other in (draw(1, "a", drawn), draw(0, "b", drawn)):
        assert abs(torch.corrcoef(torch.stack([other.flatten(), drawn.flatten()]))[0, 1]) < 0.08


def test_random_is_uniform_across_chunks() -> None:
    drawn = score(Random(3), torch.empty(2**21 + 5))  # two full chunks and a bit
    assert 0 <= drawn.min() < 1e-5
    assert 1 - 1e-5 < drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=2e-3)
    counts = torch.histc(drawn, 64, 0, 1)
    expected = len(drawn) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120  # chi-squared of 63 degrees: 103 is 1 in 1000
    neighbours = torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1]
    assert abs(neighbours) < 3e-3
    assert len(torch.unique(drawn[: 2**10])) == 2**10


def test_random_is_pinned_down() -> None:
    """Resuming with a newer version must not draw other masks."""
    assert score(Random(0), torch.ones(3)).tolist() == [
        0.850427508354187,
        0.16933178901672363,
        0.1667296290397644,
    ]


def outputs_of(weight: Tensor, layer: nn.Module) -> list[list[tuple[int, ...]]]:
    """For each output of ``layer``, the places in ``weight`` that make it: those whose gradient it reaches."""
    spatial = [] if isinstance(layer, (nn.Linear, nn.Bilinear)) else [4] * (weight.ndim - 2)
    sizes = (
        [layer.in1_features, layer.in2_features]
        if isinstance(layer, nn.Bilinear)
        else [getattr(layer, "in_channels", None) or layer.in_features]
    )
    outputs = layer(*(torch.rand(1, size, *spatial) + 1 for size in sizes))[0]
    found = []
    for output in outputs:
        (gradient,) = torch.autograd.grad(output.sum(), layer.weight, retain_graph=True)
        found.append([tuple(place) for place in gradient.nonzero().tolist()])
    return found


LAYERS = {
    "linear": nn.Linear(4, 6),
    "bilinear": nn.Bilinear(3, 2, 5),
    "conv": nn.Conv2d(3, 5, 3, padding=1),
    "conv1d": nn.Conv1d(3, 5, 3, padding=1),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "transposed": nn.ConvTranspose2d(3, 5, 3),
    "grouped transposed": nn.ConvTranspose2d(4, 6, 3, groups=2),
    "transposed 1d": nn.ConvTranspose1d(4, 4, 2, groups=4),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_geometric_median_is_the_sum_of_distances_between_filters(layer: nn.Module) -> None:
    places = outputs_of(layer.weight, layer)
    values = [torch.stack([layer.weight.detach()[p] for p in filter_]).double() for filter_ in places]
    expected = torch.full(layer.weight.shape, torch.nan)
    for one, filter_ in enumerate(places):
        distance = sum(math.dist(values[one].tolist(), other.tolist()) for other in values)
        for place in filter_:
            expected[place] = distance
    module = nn.Sequential(layer)
    weights = {"0.weight": layer.weight.detach()}
    scores = GeometricMedian().score(weights, Evidence(module)).values["0.weight"]
    torch.testing.assert_close(scores, expected)


def test_geometric_median_tells_near_twins_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As differences of large numbers, these distances would be noise. In chunks of rows, too."""
    monkeypatch.setattr("lightning_structopt.pruning.filter_criteria._DISTANCES", 6)
    weight = torch.full((3, 4), 1e3)
    weight[1, 0] += 0.01
    weight[2, 0] += 0.03
    gaps = weight[:, :1] - weight[:, 0]
    torch.testing.assert_close(score(GeometricMedian(), weight)[:, 0], gaps.abs().sum(1), rtol=1e-4, atol=0)


def test_filter_scores_prune_whole_filters_without_a_copy_of_the_weights() -> None:
    weight = torch.randn(8, 3, 3, 3)
    scores = GeometricMedian().score({"weight": weight})
    assert scores.values["weight"].untyped_storage().nbytes() == 8 * 4
    keep = {"weight": torch.ones_like(weight, dtype=torch.bool)}
    for pattern in (Unstructured("layer"), Unstructured(), Neurons()):
        mask = pattern.choose(scores, keep, 0.5)["weight"].flatten(1)
        assert sorted(mask.sum(1).tolist()) == [0] * 4 + [27] * 4
    mask = drop_lowest(scores, keep, lambda total: 30)["weight"]
    assert mask.logical_not().sum() == 30


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.bn2 = nn.SyncBatchNorm(6)
        self.pair = nn.Sequential(
            OrderedDict(up=nn.Linear(6, 5), norm=nn.BatchNorm1d(5), down=nn.Linear(5, 2))
        )


def test_batch_norm_scale_takes_the_norm_behind_each_layer() -> None:
    block = Block()
    for norm in (block.bn1, block.bn2, block.pair.norm):
        norm.weight.data = torch.randn(norm.num_features)
    names = ["conv1.weight", "conv2.weight", "pair.up.weight"]
    weights = {name: block.get_parameter(name).detach() for name in names}
    scores = BatchNormScale().score(weights, Evidence(block)).values
    for layer, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2), (block.pair.up, block.pair.norm)):
        (name,) = (n for n in names if block.get_parameter(n) is layer.weight)
        for filter_, scale in zip(outputs_of(layer.weight, layer), norm.weight.tolist(), strict=True):
            assert all(scores[name][place].item() == pytest.approx(abs(scale)) for place in filter_)


def wrong_size() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4)), "0.weight"),
        (nn.Sequential(nn.Linear(3, 4)), "0.weight"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)), "0.weight"),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "0.weight"),
        (nn.Sequential(nn.LSTM(3, 1), nn.BatchNorm1d(4)), "0.weight_ih_l0"),
        (nn.Linear(3, 4), "weight"),
        (wrong_size(), "0.weight"),
    ],
)
def test_batch_norm_scale_refuses_layers_without_one(module: nn.Module, name: str) -> None:
    parameter = module.get_parameter(name)
    for check in (
        lambda: BatchNormScale().require(module, {name: parameter}),
        lambda: BatchNormScale().score({name: parameter.detach()}, Evidence(module)),
    ):
        with pytest.raises(ValueError, match=rf"Found none behind `{name}`. Give `exclude = \['{name}'\]`"):
            check()


def test_batch_norm_scale_in_prune() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    module[1].weight.data = torch.tensor([0.1, -2.0, 0.0, 1.0])
    masks = prune(module, 0.5, criterion=BatchNormScale(), pattern=Neurons(), exclude="3.*")
    assert masks["0.weight"].flatten(1).all(1).tolist() == [False, True, False, True]


def test_a_criterion_that_needs_the_module_says_so() -> None:
    with pytest.raises(ValueError, match=r"Found none. Give `score` an `Evidence\(module=module\)`"):
        score(BatchNormScale(), torch.ones(2, 2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Random(-1), ValueError, "`seed` must be at least 0. Found `seed = -1`"),
        (lambda: Random(0.5), TypeError, "`seed` must be a whole number. Found `seed = 0.5`"),
    ],
)
def test_bad_arguments(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
