"""Transposed convolutions have their outputs in the second dimension, and in groups: patterns find them there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import Classifier, adamw, loader, trainer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_structopt.pruning import (
    Block,
    GeometricMedian,
    IterativePruning,
    Magnitude,
    NByM,
    Neurons,
    Pattern,
    Unstructured,
    prune,
)
from lightning_structopt.pruning.outputs import Outputs

LAYERS = {
    "1d": lambda: nn.ConvTranspose1d(8, 4, 3),
    "2d": lambda: nn.ConvTranspose2d(8, 4, (2, 3)),
    "3d": lambda: nn.ConvTranspose3d(4, 6, 2),
    "square": lambda: nn.ConvTranspose2d(8, 8, 3),
    "groups": lambda: nn.ConvTranspose2d(8, 12, 3, groups=2),
    "depthwise": lambda: nn.ConvTranspose2d(6, 6, 3, groups=6),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def inputs_for(layer: Any) -> Tensor:
    return torch.randn(2, layer.in_channels, *[5] * (layer.weight.ndim - 2))


def of_output(layer: Any, output: int) -> Tensor:
    """Return which weights reach one output, by differentiating it."""
    reach = torch.zeros_like(layer.weight)
    for seed in range(3):  # a derivative may be zero by chance
        torch.manual_seed(seed)
        layer.weight.grad = None
        layer(inputs_for(layer))[:, output].sum().backward()
        reach += layer.weight.grad.abs()
    layer.weight.grad = None
    return reach > 0


@every_layer
def test_rows_are_the_weights_of_one_output(kind: str) -> None:
    layer = LAYERS[kind]()
    outputs = Outputs.of(layer, {"weight": layer.weight})
    assert outputs.count("weight", layer.weight) == layer.out_channels
    for output in range(layer.out_channels):
        rows = outputs.first("weight", torch.zeros_like(layer.weight))
        rows[output] = 1
        assert torch.equal(outputs.back("weight", rows) > 0, of_output(layer, output))


@every_layer
def test_there_and_back(kind: str) -> None:
    layer = LAYERS[kind]()
    outputs = Outputs.of(layer, {"weight": layer.weight})
    assert torch.equal(outputs.back("weight", outputs.first("weight", layer.weight)), layer.weight)


def test_other_layers_are_left_as_they_are() -> None:
    layer = nn.Conv2d(4, 8, 3, groups=2)
    outputs = Outputs.of(layer, {"weight": layer.weight})
    assert outputs.first("weight", layer.weight) is layer.weight
    assert outputs.back("weight", layer.weight) is layer.weight


@every_layer
@pytest.mark.parametrize("criterion", [Magnitude(), GeometricMedian()], ids=repr)
def test_dead_neurons_say_nothing(kind: str, criterion: Any) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    prune(layer, 0.5, criterion=criterion, pattern=Neurons())
    silent = (layer(inputs_for(layer)).transpose(0, 1).flatten(1) == 0).all(1)
    assert int(silent.sum()) == layer.out_channels // 2
    assert torch.equal(layer.bias == 0, silent)
    dead = torch.stack([of_output(layer, output) for output in silent.nonzero().flatten().tolist()]).any(0)
    assert torch.equal(layer.weight == 0, dead)


@every_layer
def test_the_smallest_outputs_go(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    sizes = torch.stack([
        layer.weight[of_output(layer, output)].abs().mean() for output in range(layer.out_channels)
    ])
    prune(layer, 0.5, pattern=Neurons())
    expected = sizes.argsort()[: layer.out_channels // 2]
    assert set((layer.bias == 0).nonzero().flatten().tolist()) == set(expected.tolist())


@pytest.mark.parametrize("kind", ["1d", "2d", "3d", "square", "groups"])
def test_groups_of_four_inputs_keep_two(kind: str) -> None:
    layer = LAYERS[kind]()
    masks = prune(layer, 0.5, pattern=NByM(2, 4))
    inputs = layer.in_channels // layer.groups
    for output in range(layer.out_channels):
        kept = masks["weight"][of_output(LAYERS[kind](), output)].view(inputs, -1)
        assert (kept.view(inputs // 4, 4, -1).sum(1) == 2).all()


def test_blocks_are_of_outputs_by_inputs() -> None:
    layer = nn.ConvTranspose2d(6, 8, 1)
    kept = prune(layer, 0.5, pattern=Block((4, 3)))["weight"][:, :, 0, 0].T.reshape(2, 4, 2, 3).sum((1, 3))
    assert set(kept.flatten().tolist()) == {0, 12}


def test_shapes_are_checked_by_output() -> None:
    with pytest.raises(
        ValueError, match=r"input size divisible by 4. Found `weight` of shape \(8, 6, 3, 3\)"
    ):
        prune(nn.ConvTranspose2d(6, 8, 3), 0.5, pattern=NByM(2, 4))


@pytest.mark.parametrize("pattern", [Neurons(), NByM(2, 4)], ids=repr)
def test_training_holds_them_at_zero(tmp_path: Path, pattern: Pattern) -> None:
    class Decoder(Classifier):
        def __init__(self) -> None:
            super().__init__(adamw)
            self.net[1] = nn.Sequential(nn.Unflatten(1, (8, 2)), nn.ConvTranspose1d(8, 8, 1), nn.Flatten())

    module = Decoder()
    pruning = IterativePruning(0.5, pattern=pattern, include="net.1.*", interval="step", verbose=False)
    trainer(tmp_path, pruning).fit(module, loader())
    layer, mask = module.net[1][1], pruning.masks["net.1.1.weight"]
    assert torch.equal(layer.weight == 0, ~mask)
    assert int(mask.sum()) == 32
    if pattern.takes_bias:
        assert torch.equal(layer.bias == 0, ~mask.flatten(2).any(2).any(0))
    else:
        assert layer.bias.all()


@pytest.fixture
def mesh() -> Any:
    """Two ranks, of which this process is one and the other is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield torch.distributed.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def test_outputs_that_are_on_all_ranks_are_refused(mesh: Any) -> None:
    module = nn.Sequential(nn.ConvTranspose2d(8, 8, 3))
    fully_shard(module, mesh=mesh)
    with pytest.raises(
        ValueError, match=r"whole on one rank. Found that FSDP2 shards the inputs of `0.weight`"
    ):
        prune(module, 0.5, pattern=Neurons())
    assert prune(module, 0.0, pattern=Unstructured()).keys() == {"0.weight"}
