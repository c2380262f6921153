import pytest
import torch
from torch import Tensor

from lightning_structopt.pruning import (
    Block,
    ErdosRenyi,
    Magnitude,
    NByM,
    Neurons,
    Pattern,
    Scores,
    Unstructured,
)
from lightning_structopt.pruning.lowest import drop_lowest

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


def test_distribution_sets_each_layers_sparsity() -> None:
    tensors = weights("normal")
    pattern = Unstructured("layer", ErdosRenyi())
    masks = pattern.choose(Magnitude().score(tensors), all_kept(tensors), 0.6)
    shares = ErdosRenyi().share({name: tensor.shape for name, tensor in tensors.items()}, 0.6)
    for name, mask in masks.items():
        assert int((~mask).sum()) == round(shares[name] * mask.numel())


def grid(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"linear": (6, 16), "conv": (4, 8, 3, 3), "signal": (2, 8, 5)}
    return {n: KINDS[kind](torch.Size(s).numel(), generator).view(s) for n, s in shapes.items()}


def groups_of(tensor: Tensor, m: int) -> list[list[tuple[int, ...]]]:
    """The oracle's groups: indices of m consecutive inputs, one output and one place of the kernel."""
    places = [tuple(place) for place in torch.ones(tensor.shape[2:]).nonzero().tolist()] or [()]
    return [
        [(row, start + offset, *place) for offset in range(m)]
        for row in range(tensor.shape[0])
        for place in places
        for start in range(0, tensor.shape[1], m)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_by_m_keeps_the_n_largest_of_every_m_inputs(kind: str, n: int, m: int) -> None:
    tensors = grid(kind)
    masks = NByM(n, m).choose(Magnitude().score(tensors), all_kept(tensors), 1 - n / m)
    for name, tensor in tensors.items():
        for group in groups_of(tensor, m):
            magnitudes = [float(tensor[index].abs()) for index in group]
            expected = by_sorting(magnitudes, [True] * m, m - n)
            assert [bool(masks[name][index]) for index in group] == expected


def test_n_by_m_turns_whole_groups_on_the_way_those_that_lose_least_first() -> None:
    tensors = grid("normal")
    pattern, keep = NByM(2, 4), all_kept(tensors)
    losses, turned = {}, set()
    for name, tensor in tensors.items():
        for group in groups_of(tensor, 4):
            losses[name, tuple(group)] = sum(sorted(float(tensor[index].abs()) for index in group)[:2])
    for sparsity in (0.1, 0.25, 0.4):
        keep = pattern.choose(Magnitude().score(tensors), keep, sparsity)
        turned = {key for key in losses if sum(bool(keep[key[0]][index]) for index in key[1]) == 2}
        untouched = {key for key in losses if all(bool(keep[key[0]][index]) for index in key[1])}
        assert turned | untouched == set(losses)
        assert len(turned) == round(sparsity / 0.5 * len(losses))
        assert max(losses[key] for key in turned) <= min(losses[key] for key in untouched)


@pytest.mark.parametrize("shape", [(2, 4), (1, 8), (2, 1)])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_blocks_of_the_lowest_sum_go(shape: tuple[int, int], scope: str) -> None:
    tensors = grid("normal")
    masks = Block(shape, scope).choose(Magnitude(p=2).score(tensors), all_kept(tensors), 0.5)
    found = []
    for name, tensor in tensors.items():
        scores, kept = tensor.flatten(1) ** 2, masks[name].flatten(1)
        found.append([])
        for row in range(0, len(scores), shape[0]):
            for column in range(0, scores.shape[1], shape[1]):
                block = (slice(row, row + shape[0]), slice(column, column + shape[1]))
                assert kept[block].all() or not kept[block].any()
                found[-1].append((float(scores[block].sum()), bool(kept[block].all())))
    for blocks in found if scope == "layer" else [sum(found, [])]:
        expected = by_sorting([score for score, _ in blocks], [True] * len(blocks), round(0.5 * len(blocks)))
        assert [kept for _, kept in blocks] == expected


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_neurons_go_by_their_mean_score_and_one_stays(scope: str) -> None:
    tensors = grid("normal")
    tensors["linear"] /= 100
    for sparsity in (0.5, 0.99):
        masks = Neurons(scope).choose(Magnitude().score(tensors), all_kept(tensors), sparsity)
        rows = {name: mask.flatten(1) for name, mask in masks.items()}
        assert all((row.all() or not row.any()) for mask in rows.values() for row in mask)
        alive = {name: mask.any(1) for name, mask in rows.items()}
        assert all(row.any() for row in alive.values())
        means = {name: tensor.flatten(1).abs().mean(1) for name, tensor in tensors.items()}
        for name in tensors:
            if (~alive[name]).sum() > 0:
                assert means[name][~alive[name]].max() <= means[name][alive[name]].min()
        if scope == "layer" and sparsity == 0.5:
            assert {name: int(row.sum()) for name, row in alive.items()} == {
                "linear": 3,
                "conv": 2,
                "signal": 1,
            }
        if scope == "global":
            assert int(alive["linear"].sum()) == 1


@pytest.mark.parametrize("pattern", [Block((2, 4)), Neurons(), NByM(2, 4)], ids=repr)
def test_groups_that_are_pruned_stay_pruned(pattern: Pattern) -> None:
    tensors = grid("normal")
    first = pattern.choose(Magnitude().score(tensors), all_kept(tensors), 0.25)
    again = {n: -t.flip(0) * first[n] for n, t in tensors.items()}
    second = pattern.choose(Magnitude().score(again), first, 0.5)
    assert all(not (second[name] & ~first[name]).any() for name in tensors)
    assert sum(int(m.sum()) for m in second.values()) < sum(int(m.sum()) for m in first.values())


@pytest.mark.parametrize(
    ("pattern", "sparsity", "message"),
    [
        (
            NByM(2, 4),
            0.5,
            r"`NByM\(n=2, m=4\)` needs an input size divisible by 4. Found `proj` of shape \(64, 30\).",
        ),
        (NByM(1, 4), 0.5, "ends at a sparsity of 0.75. Found `sparsity = 0.5`"),
        (Block((3, 2)), 0.5, r"must divide every weight. Found `proj`, a matrix of shape \(64, 30\)"),
    ],
)
def test_weights_that_do_not_fit_the_pattern(pattern: Pattern, sparsity: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pattern.require(sparsity, {"proj": torch.zeros(64, 30)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Unstructured("model"), "`scope` must be 'global' or 'layer'. Found `scope = 'model'`"),
        (lambda: Magnitude(3), "`p` must be 1 or 2. Found `p = 3`"),
        (lambda: Unstructured("global", ErdosRenyi()), "needs `scope=\"layer\"`. Found `scope = 'global'`"),
        (lambda: NByM(4, 4), "`m` must be at least 5. Found `m = 4`"),
        (lambda: NByM(0, 4), "`n` must be at least 1"),
        (lambda: Block((2,)), "`shape` must be rows and columns"),
        (lambda: Block((2, 0)), "`shape` must be at least 1. Found `shape = 0`"),
        (lambda: Neurons("model"), "`scope` must be 'global' or 'layer'"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
