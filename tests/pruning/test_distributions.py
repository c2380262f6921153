import math

import pytest

from lightning_structopt.pruning import Distribution, ErdosRenyi, PerLayer, Uniform

SHAPES = {"first": (16, 3, 3, 3), "deep": (64, 64, 3, 3), "head": (10, 64)}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}


def overall(shares: dict[str, float]) -> float:
    return sum(shares[name] * SIZES[name] for name in SIZES) / sum(SIZES.values())


@pytest.mark.parametrize("distribution", [Uniform(), ErdosRenyi(), ErdosRenyi(kernel=False)], ids=repr)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99])
def test_layers_together_have_the_sparsity_asked_for(distribution: Distribution, sparsity: float) -> None:
    shares = distribution.share(SHAPES, sparsity)
    assert overall(shares) == pytest.approx(sparsity)
    assert all(0 <= share < 1 for share in shares.values())


@pytest.mark.parametrize("kernel", [True, False])
def test_erdos_renyi_is_its_formula_where_no_layer_is_full(kernel: bool) -> None:
    shares = ErdosRenyi(kernel).share(SHAPES, 0.995)
    counted = {name: shape if kernel else shape[:2] for name, shape in SHAPES.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in counted.items()}
    scale = 0.005 * sum(SIZES.values()) / sum(raw[name] * SIZES[name] for name in SIZES)
    for name, share in shares.items():
        assert 1 - share == pytest.approx(scale * raw[name])


def test_a_layer_that_would_be_more_than_full_is_dense() -> None:
    assert ErdosRenyi().share(SHAPES, 0.5)["first"] == 0


def test_per_layer_follows_the_ramp_in_step() -> None:
    final = {"first": 0.1, "deep": 0.9, "head": 0.5}
    target = overall(final)
    distribution = PerLayer(final)
    assert distribution.share(SHAPES, target) == pytest.approx(final)
    half = distribution.share(SHAPES, target / 2)
    assert half == pytest.approx({name: value / 2 for name, value in final.items()})


@pytest.mark.parametrize(
    ("sparsities", "message"),
    [
        ({"first": 0.1, "deep": 0.9}, "Found a difference at 'head'"),
        ({"first": 0.1, "deep": 0.5, "head": 0.1}, r"Found 0\.48\d+ for a target of 0.9. Set `sparsity=0.48"),
    ],
)
def test_per_layer_that_does_not_fit(sparsities: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerLayer(sparsities).share(SHAPES, 0.9)


def test_per_layer_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"`sparsities\['a'\]` must be in \[0, 1\)"):
        PerLayer({"a": 1.0})
