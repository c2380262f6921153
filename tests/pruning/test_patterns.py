import pytest
import torch
from torch import Tensor

from lightning_structopt.pruning import Magnitude, Scores, Unstructured
from lightning_structopt.pruning.patterns import drop_lowest

KINDS = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "constant": lambda n, g: torch.full((n,), 0.5),
    "zeros": lambda n, g: torch.zeros(n),
    "two values": lambda n, g: torch.randint(0, 2, (n,), generator=g) * 2.0 - 1,
    "many ties": lambda n, g: torch.randint(-3, 4, (n,), generator=g).float(),
}


def weights(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (7, 5), "b": (3, 2, 3, 3), "c": (1, 11)}
    return {n: KINDS[kind](torch.Size(s).numel(), generator).view(s).to(dtype) for n, s in shapes.items()}


def all_kept(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in tensors.items()}


def by_sorting(scores: list[float], kept: list[bool], count: int) -> list[bool]:
    """The oracle: pruned ones first, then by score, then by index."""
    order = sorted(range(len(scores)), key=lambda i: (kept[i], scores[i] if kept[i] else 0, i))
    gone = set(order[:count])
    return [i not in gone for i in range(len(scores))]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.35, 0.5, 0.9, 0.999])
def test_global_is_exact_and_breaks_ties_by_index(kind: str, dtype: torch.dtype, sparsity: float) -> None:
    tensors = weights(kind, dtype)
    masks = Unstructured("global").choose(Magnitude().score(tensors), all_kept(tensors), sparsity)
    magnitudes = flat(tensors).abs().tolist()
    expected = by_sorting(magnitudes, [True] * len(magnitudes), round(sparsity * len(magnitudes)))
    assert flat(masks).tolist() == expected
    assert all(mask.dtype == torch.bool and mask.shape == tensors[name].shape for name, mask in masks.items())


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_exact_in_each_layer(kind: str) -> None:
    tensors = weights(kind)
    masks = Unstructured("layer").choose(Magnitude().score(tensors), all_kept(tensors), 0.6)
    for name, tensor in tensors.items():
        values = tensor.abs().flatten().tolist()
        expected = by_sorting(values, [True] * len(values), round(0.6 * len(values)))
        assert masks[name].flatten().tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_pruned_stays_pruned_and_counts(kind: str) -> None:
    tensors = weights(kind)
    keep = {
        n: torch.rand(t.shape, generator=torch.Generator().manual_seed(1)) > 0.4 for n, t in tensors.items()
    }
    tensors = {name: tensor * keep[name] for name, tensor in tensors.items()}
    masks = drop_lowest(Magnitude().score(tensors), keep, lambda total: 50)
    assert flat(masks).tolist() == by_sorting(flat(tensors).abs().tolist(), flat(keep).tolist(), 50)


def test_negative_scores_rank_below_zero_but_never_below_what_is_pruned() -> None:
    values = {"a": torch.tensor([[-5.0, 3.0, -1.0, 0.0, 2.0]])}
    keep = {"a": torch.tensor([[True, True, True, False, True]])}
    masks = drop_lowest(Scores(values), keep, lambda total: 2)
    assert masks["a"].tolist() == [[False, True, True, False, True]]
    assert values["a"].tolist() == [[-5.0, 3.0, -1.0, 0.0, 2.0]]


def test_enough_is_enough() -> None:
    keep = {"a": torch.tensor([[True, False, False]])}
    masks = drop_lowest(Magnitude().score({"a": torch.ones(1, 3)}), keep, lambda total: 1)
    assert masks["a"].tolist() == [[True, False, False]]


def test_mixed_precisions_are_compared_without_rounding() -> None:
    tensors = {
        "a": torch.tensor([1.0, 1.001, 1.002]),
        "b": torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16),
    }
    masks = drop_lowest(Magnitude().score(tensors), all_kept(tensors), lambda total: 3)
    assert flat(masks).tolist() == [False, False, True, False, True]


def test_channels_last_weights_follow_logical_order() -> None:
    tensor = torch.full((2, 3, 2, 2), 0.5).to(memory_format=torch.channels_last)
    masks = drop_lowest(Magnitude().score({"a": tensor}), all_kept({"a": tensor}), lambda total: 5)
    assert masks["a"].flatten().tolist() == [False] * 5 + [True] * 19


def test_magnitude_of_either_power_ranks_alike_without_copying() -> None:
    tensors = weights("normal")
    one, two = Magnitude(1).score(tensors), Magnitude(2).score(tensors)
    assert one.values["a"].data_ptr() == tensors["a"].data_ptr()
    assert torch.equal(one.ranked("a"), two.ranked("a"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Unstructured("model"), "`scope` must be 'global' or 'layer'. Found `scope = 'model'`"),
        (lambda: Magnitude(3), "`p` must be 1 or 2. Found `p = 3`"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
