import pickle

import pytest
import torch
from support import assert_same_state
from torch import nn

from lightning_structopt.pruning.masks import MaskSet


def half(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(p.shape, generator=generator) > 0.5 for name, p in parameters.items()}


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, MaskSet]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(3, 7)).to(dtype)
    return module, MaskSet({n: p for n, p in module.named_parameters() if p.ndim > 1})


def test_update_zeroes_in_place_and_counts() -> None:
    module, masks = make()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    pointer = module[0].weight.data_ptr()
    chosen = half(masks.parameters)
    masks.update(chosen)
    assert module[0].weight.data_ptr() == pointer
    for name, mask in chosen.items():
        assert torch.equal(masks.parameters[name], before[name] * mask)
        assert torch.equal(masks.masks()[name], mask)
    assert torch.equal(module[1].bias, before["1.bias"])
    assert masks.pruned == sum(int((~mask).sum()) for mask in chosen.values())
    assert masks.sparsity == masks.pruned / (54 + 21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pack_round_trips_in_one_bit_a_weight_and_is_safe_to_load(dtype: torch.dtype, tmp_path) -> None:
    _, masks = make(dtype)
    masks.update(half(masks.parameters))
    torch.save(masks.pack(), tmp_path / "masks.pt")
    packed = torch.load(tmp_path / "masks.pt", weights_only=True)
    assert sum(entry["bits"].numel() for entry in packed.values()) == 7 + 3  # 54 and 21 bits
    _, other = make(dtype)
    other.unpack(packed)
    assert_same_state(other.masks(), masks.masks())
    assert other.pruned == masks.pruned


def test_nothing_is_packed_before_the_first_pruning() -> None:
    _, masks = make()
    assert masks.pack() == {}
    masks.unpack({})
    assert masks.sparsity == 0
    assert all(mask.all() for mask in masks.masks().values())


def test_masks_that_do_not_fit_name_both_sides() -> None:
    _, masks = make()
    masks.update(half(masks.parameters))
    packed = masks.pack()
    with pytest.raises(
        ValueError, match=r"`1.weight` with shape \(7, 3\) in the checkpoint and shape \(2, 2\)"
    ):
        MaskSet({
            "0.weight": masks.parameters["0.weight"],
            "1.weight": nn.Parameter(torch.ones(2, 2)),
        }).unpack(packed)
    with pytest.raises(
        ValueError, match=r"`1.weight` with shape \(7, 3\) in the checkpoint and no mask in the"
    ):
        MaskSet({"0.weight": masks.parameters["0.weight"]}).unpack(packed)
    with pytest.raises(ValueError, match=r"`new` with no mask in the checkpoint and shape \(2, 2\) in the"):
        MaskSet({**masks.parameters, "new": nn.Parameter(torch.ones(2, 2))}).unpack(packed)


def test_gradients_and_optimizer_state_are_forgotten_where_the_mask_is() -> None:
    module, masks = make()
    optimizer = torch.optim.Adam(module.parameters())
    module[1](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    chosen = half(masks.parameters)
    masks.update(chosen)
    assert masks.apply_to_gradients(module.parameters())
    masks.apply_to_state(optimizer)
    pruned = ~chosen["1.weight"]
    state = optimizer.state[module[1].weight]
    for tensor, forgotten in ((module[1].weight.grad, 0), (state["exp_avg"], 0), (state["exp_avg_sq"], 1)):
        assert (tensor[pruned] == forgotten).all()
        assert (tensor[~pruned] != forgotten).all()
    assert module[1].bias.grad.all()


def test_sparse_gradients_are_left_to_the_step() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    masks = MaskSet({"weight": embedding.weight})
    masks.update(half(masks.parameters))
    embedding(torch.tensor([1])).sum().backward()
    assert not masks.apply_to_gradients([embedding.weight])


def test_digest_tells_masks_apart() -> None:
    (_, one), (_, other) = make(), make()
    chosen = half(one.parameters)
    one.update(chosen)
    other.update(chosen)
    assert one.digest() == other.digest()
    chosen["1.weight"].view(-1)[20] ^= True
    other.update(chosen)
    assert one.digest() != other.digest()


def test_channels_last_factors_are_laid_out_like_the_weight() -> None:
    module = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    masks = MaskSet({"weight": module.weight})
    chosen = half(masks.parameters)
    masks.update(chosen)
    assert masks._factors["weight"].stride() == module.weight.stride()
    assert torch.equal(module.weight != 0, chosen["weight"])


def test_pickles() -> None:
    _, masks = make()
    masks.update(half(masks.parameters))
    assert_same_state(pickle.loads(pickle.dumps(masks)).masks(), masks.masks())
