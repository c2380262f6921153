"""`profile` against counts by hand, brute force and closed forms."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Classifier, assert_same_state, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_structopt.profiling import Profile, latency, profile
from lightning_structopt.profiling.inputs import as_call
from lightning_structopt.profiling.memory import forward_bytes, training_bytes
from lightning_structopt.pruning import prune


def quick(module: nn.Module, example: Any, **options: Any) -> Profile:
    return profile(module, example, **{"seconds": 0.001, **options})


class Shared(nn.Module):
    """A tied embedding, a block that runs twice, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.block = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, tokens: Tensor, *, twice: bool = True) -> Tensor:
        hidden = self.block(self.embedding(tokens)) * self.scale
        return self.head(self.block(hidden) if twice else hidden)


CASES: dict[str, tuple[nn.Module, Any, int]] = {
    "linear": (nn.Linear(30, 20), torch.ones(4, 30), 2 * 4 * 30 * 20),
    "convolution": (nn.Conv2d(3, 8, 3, padding=1), torch.ones(2, 3, 10, 10), 2 * 2 * 100 * 3 * 9 * 8),
    "grouped": (nn.Conv2d(4, 8, 3, groups=4), torch.ones(1, 4, 5, 5), 2 * 9 * 9 * 8),
    "shared": (Shared(), torch.arange(5)[None], 2 * 5 * (8 * 8 * 2 + 8 * 20)),
    "keywords": (Shared(), {"tokens": torch.arange(5)[None], "twice": False}, 2 * 5 * (8 * 8 + 8 * 20)),
    "LSTM": (nn.LSTM(6, 5, batch_first=True), torch.ones(2, 3, 6), 2 * 2 * 3 * (6 + 5) * 20),
    "attention": (
        nn.MultiheadAttention(8, 2, batch_first=True),
        (torch.ones(3, 5, 8), torch.ones(3, 5, 8), torch.ones(3, 5, 8)),
        2 * 3 * (5 * 8 * 8 * 4 + 2 * 5 * 5 * 8),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_counted_by_hand(name: str) -> None:
    module, example, flops = CASES[name]
    found = quick(module, example)
    assert found.flops == flops == found.effective_flops


def test_operations_belong_to_the_layer_that_does_them() -> None:
    layers = {layer.name: layer for layer in quick(Shared(), torch.arange(5)[None]).layers}
    assert layers["block"].flops == 2 * 2 * 5 * 8 * 8
    assert layers["head"].flops == 2 * 5 * 8 * 20
    assert layers["embedding"].flops == 0
    assert {name: layer.parameters for name, layer in layers.items()} == {
        "": 8, "embedding": 160, "block": 64, "head": 0,
    }  # fmt: skip


def test_shared_weights_count_once_and_buffers_take_bytes() -> None:
    module = Shared()
    found = quick(module, torch.arange(5)[None])
    assert found.parameters == found.nonzero == found.trainable == sum(p.numel() for p in module.parameters())
    assert found.size_bytes == 4 * (found.parameters + 3)


def test_pruning_lowers_what_is_nonzero_and_effective_alone() -> None:
    module, example = Classifier(), torch.ones(8, 12)
    dense = quick(module, example)
    masks = prune(module, 0.75)
    pruned = quick(module, example)
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    by_hand = sum(2 * 8 * int(mask.sum()) for mask in masks.values())
    assert (pruned.parameters, pruned.flops) == (dense.parameters, dense.flops)
    assert pruned.effective_flops == pytest.approx(by_hand)
    assert dense.effective_flops == dense.flops
    # Fresh biases of batch norm are zeros too.
    assert pruned.nonzero == sum(int((p != 0).sum()) for p in module.parameters()) == dense.nonzero - zeros


def test_saved_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    module = nn.Linear(300, 300)
    torch.save(module.state_dict(), tmp_path / "file.pt")
    found = quick(module, torch.ones(1, 300))
    assert found.saved_bytes == pytest.approx((tmp_path / "file.pt").stat().st_size, abs=200)
    assert 0.8 * found.saved_bytes < found.compressed_bytes < found.saved_bytes
    prune(module, 0.9)
    assert quick(module, torch.ones(1, 300)).compressed_bytes < 0.3 * found.saved_bytes


def test_memory_of_a_chain_is_its_two_largest_neighbours() -> None:
    chain = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((10, 100), (100, 400), (400, 20))))
    call = as_call(chain, torch.ones(8, 10))
    assert forward_bytes(chain, call)[0] == 4 * 8 * (100 + 400)
    # To train, activations stay until they have served, and the gradients of the weights come.
    weights = sum(p.numel() for p in chain.parameters())
    kept = 4 * 8 * (100 + 400 + 20)
    assert 4 * weights + 4 * 8 * 100 <= training_bytes(chain, call) < 4 * weights + 2 * kept


def test_memory_is_given_back() -> None:
    class Loop(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            for _ in range(20):
                inputs = super().forward(inputs)
            return inputs

    loop = Loop(50, 50)
    assert forward_bytes(loop, as_call(loop, torch.ones(6, 50)))[0] == 2 * 4 * 6 * 50


def test_layers_add_up_what_they_bring_about() -> None:
    chain = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 20), nn.Flatten())
    found = quick(chain, torch.ones(8, 10))
    assert {layer.name: layer.activation_bytes for layer in found.layers} == {
        "0": 4 * 8 * 100, "1": 4 * 8 * 100, "2": 4 * 8 * 20,
    }  # fmt: skip  # the last one gives a view
    assert found.activation_bytes == 4 * 8 * 220
    assert quick(Shared(), torch.arange(5)[None]).activation_bytes == 4 * 5 * (8 + 8 + 8 + 8 + 20)


class Taking(nn.Module):
    """Takes some time, by a clock that stands still otherwise, before each part that it calls."""

    now = 0.0

    def __init__(self, ms: float, *within: nn.Module) -> None:
        super().__init__()
        self.ms, self.within = ms, nn.ModuleList(within)

    def forward(self, inputs: Tensor) -> Tensor:
        for part in [*self.within, nn.Identity()]:
            Taking.now += self.ms / 1000
            inputs = part(inputs)
        return inputs * 1


def test_layers_take_the_time_that_is_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_structopt.profiling.layer_times.perf_counter", lambda: Taking.now)
    twice = Taking(40)
    module = Taking(5, twice, Taking(20), twice)
    layers = {layer.name: layer.latency_ms for layer in quick(module, torch.ones(1), seconds=0.2).layers}
    assert layers == pytest.approx({"": 4 * 5, "within.0": 2 * 40, "within.1": 20})


def test_the_module_is_left_as_it_was() -> None:
    module = Classifier()
    module.net[1].eval()
    module.net[3].weight.grad = torch.ones(4, 16)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    generator = torch.get_rng_state()
    quick(module, torch.randn(8, 12, generator=torch.Generator().manual_seed(0)))
    assert_same_state(dict(module.state_dict()), before)
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(module.net[3].weight.grad, torch.ones(4, 16))
    assert module.net[0].weight.grad is None
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_latency_by_batch_size_and_threads() -> None:
    found = quick(nn.Linear(200, 200), torch.ones(4, 200), batch_sizes=[1, 9], threads=[1, 2])
    assert [(t.batch_size, t.threads) for t in found.latencies] == [(1, 1), (1, 2), (9, 1), (9, 2)]
    for timing in found.latencies:
        lower, upper = timing.quartiles_ms
        assert 0 < lower <= timing.median_ms <= upper
    assert found.latency_ms == found.latencies[0].median_ms


def test_latency_grows_with_the_work() -> None:
    small = latency(nn.Linear(1000, 1000), torch.ones(1, 1000), threads=1, seconds=0.02)
    large = latency(nn.Linear(1000, 1000), torch.ones(1, 1000), threads=1, batch_size=500, seconds=0.02)
    assert large.median_ms > 3 * small.median_ms
    assert large.samples_per_second == pytest.approx(500_000 / large.median_ms)


def test_a_batch_size_repeats_the_samples_and_leaves_shared_tensors() -> None:
    call = as_call(nn.MultiheadAttention(4, 2), (torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4)))
    assert [len(t) for t in call.with_batch_size(7).args] == [7, 7, 7]
    mixed = as_call(nn.Bilinear(2, 2, 2), (torch.arange(6.0).view(3, 2), torch.ones(1, 2))).with_batch_size(4)
    assert mixed.args[0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert mixed.args[1].shape == (1, 2)


def test_json_csv_and_table(tmp_path: Path) -> None:
    found = quick(Classifier(), torch.ones(8, 12))
    data = json.loads(found.to_json(tmp_path / "profile.json"))
    assert json.loads((tmp_path / "profile.json").read_text()) == data
    assert data["parameters"] == found.parameters
    assert data["latencies"][0]["median_ms"] == found.latency_ms
    found.to_csv(tmp_path / "profile.csv")
    with (tmp_path / "profile.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["net.0", "net.1", "net.2", "net.3"]  # ReLU has activations
    assert sum(int(row["flops"]) for row in rows) == found.flops
    assert f"{found.parameters:,}" in str(found)
    assert "net.1" in str(found)


@pytest.mark.parametrize(
    ("module", "example", "error", "message"),
    [
        (
            nn.Linear(2, 2),
            None,
            TypeError,
            "`example_input` must be what the module is called with. Found None",
        ),
        (nn.Bilinear(2, 2, 2), torch.ones(1, 2), TypeError, r"must fit `Bilinear.forward\(input1"),
        (nn.Linear(2, 2), {"x": torch.ones(1, 2)}, TypeError, "Found x: .* Give a tuple"),
        (
            nn.Linear(2, 2, device="meta"),
            torch.ones(1, 2),
            ValueError,
            "must be on the module's device. Found cpu",
        ),
    ],
)
def test_inputs_that_do_not_fit(module: nn.Module, example: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        profile(module, example)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_sizes": 0}, ValueError, "`batch_sizes` must be"),
        ({"threads": 1.5}, TypeError, "`threads` must be"),
        ({"batch_sizes": []}, ValueError, "`batch_sizes` must have at least one number"),
        ({"seconds": 0}, ValueError, "`seconds` must be in"),
        ({"seconds": float("nan")}, ValueError, "`seconds` must be in"),
    ],
)
def test_numbers_out_of_range(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quick(nn.Linear(2, 2), torch.ones(1, 2), **options)


def test_of_a_module_in_shards_the_whole_counts() -> None:
    run_ranks(_profile_shards)


def _profile_shards(rank: int) -> None:
    module, example = Classifier(), torch.ones(8, 12)
    prune(module, 0.5)
    whole = quick(module, example)
    fully_shard(module.net[0], mesh=init_device_mesh("cpu", (2,)))
    found = quick(module, example)
    for name in ("parameters", "trainable", "nonzero", "size_bytes", "flops"):
        assert getattr(found, name) == getattr(whole, name), name
    assert found.effective_flops == pytest.approx(whole.effective_flops)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    found = quick(nn.Linear(100, 100).cuda(), torch.ones(8, 100, device="cuda"))
    assert found.layers[0].latency_ms > 0
    assert found.layers[0].activation_bytes >= 4 * 8 * 100
    assert found.flops == 2 * 8 * 100 * 100
    assert found.forward_bytes >= 4 * 8 * 100
    assert found.latency_ms > 0
