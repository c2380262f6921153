"""What can be converted for sparse tensor cores is, and what can't says why."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.sparse import SparseSemiStructuredTensor

from lightning_structopt.pruning import NByM, prune
from lightning_structopt.pruning import semi_structured as tested
from lightning_structopt.pruning.semi_structured import to_semi_structured


def pruned(*layers: nn.Module, dtype: torch.dtype = torch.float16, **kwargs: Any) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(*layers)
    prune(module, 0.5, pattern=NByM(2, 4), **kwargs)
    return module.to(dtype).eval()


def linear() -> nn.Sequential:
    return pruned(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32))


def tied() -> nn.Module:
    module = pruned(nn.Embedding(64, 64), nn.Linear(64, 64))
    module[0].weight = module[1].weight
    return module


def half_pruned() -> nn.Module:
    module = linear()
    with torch.no_grad():
        module[2].weight[3, :4] = 1
    return module


REASONS: dict[str, tuple[Any, str, str]] = {
    "dense": (lambda: nn.Linear(64, 64).half(), "weight", "not 2:4 sparse; train with `pattern=NByM"),
    "one dense group": (half_pruned, "2.weight", "not 2:4 sparse"),
    "inputs not of fours": (lambda: nn.Linear(6, 64), "weight", "not 2:4 sparse"),
    "single precision": (
        lambda: pruned(nn.Linear(64, 64), dtype=torch.float32),
        "0.weight",
        "its type is torch.float32; the kernel takes torch.bfloat16 and torch.float16 and",
    ),
    "rows": (
        lambda: pruned(nn.Linear(64, 40)),
        "0.weight",
        r"its shape \(40, 64\) is not a multiple of \(16, 16\)",
    ),
    "columns": (lambda: pruned(nn.Linear(40, 64)), "0.weight", r"its shape \(64, 40\) is not a multiple of"),
    "CPU": (linear, "0.weight", "on the device cpu; sparse tensor cores are on GPUs"),
    "convolution": (
        lambda: pruned(nn.Conv2d(16, 16, 3)),
        "0.weight",
        "belongs to a `Conv2d`, and only linear",
    ),
    "bias": (linear, "0.bias", "belongs to a `Linear`, and only"),
    "attention": (
        lambda: nn.MultiheadAttention(64, 2),
        "out_proj.weight",
        "reads it without calling the layer",
    ),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(64, 2, 64),
        "linear1.weight",
        r"the fast path of its `TransformerEncoderLayer` .*set_fastpath_enabled\(False\)",
    ),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64))),
        "0.weight",
        "computed from other parameters",
    ),
    "tied": (tied, "1.weight", "shared with `0.weight`"),
}


@pytest.mark.parametrize("name", REASONS)
def test_every_reason_is_given(name: str) -> None:
    make, weight, reason = REASONS[name]
    module = make()
    before = {key: (value, value.clone()) for key, value in module.state_dict().items()}
    report = to_semi_structured(module, [weight])
    assert report.converted == ()
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.left[weight])
    for key, value in module.state_dict().items():
        assert value.data_ptr() == before[key][0].data_ptr()
        assert torch.equal(value, before[key][1])


def test_an_encoder_without_its_fast_path_is_converted_as_any() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        module = nn.TransformerEncoderLayer(64, 2, 64)
        assert "not 2:4" in to_semi_structured(module, ["linear1.weight"]).left["linear1.weight"]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_by_default_all_linear_layers_are_tried() -> None:
    module = pruned(nn.Conv2d(16, 16, 3), nn.Linear(64, 32), nn.MultiheadAttention(32, 2), exclude="2.*")
    assert list(to_semi_structured(module).left) == ["1.weight", "2.out_proj.weight"]


def test_masks_of_a_callback_are_taken_by_name() -> None:
    module = nn.Sequential(nn.Linear(64, 32))
    assert list(to_semi_structured(module, prune(module, 0.5, pattern=NByM(2, 4))).left) == ["0.weight"]


def test_masks_of_another_module_are_refused() -> None:
    with pytest.raises(ValueError, match="Found `2.weight`, which is none of `Linear`"):
        to_semi_structured(nn.Linear(64, 32), ["2.weight"])


def test_the_report_reads_line_by_line() -> None:
    report = tested.SemiStructuredReport(("a.weight",), {"b.weight": "it is not 2:4 sparse"})
    assert str(report) == "a.weight: converted\nb.weight: left dense, it is not 2:4 sparse"


def test_what_torch_refuses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a build without the kernels: torch refuses a CPU tensor once our own checks let it through."""
    monkeypatch.setattr(tested, "_obstacle_of", lambda weight: None)
    module = linear()
    report = to_semi_structured(module)
    assert report.left.keys() == {"0.weight", "2.weight"}
    assert "torch refused: " in report.left["0.weight"]
    assert type(module[0].weight.data) is Tensor


def test_a_converted_weight_takes_the_place_of_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "_obstacle_of", lambda weight: None)
    monkeypatch.setattr(tested, "to_sparse_semi_structured", lambda weight: weight.clone())
    module = linear()
    before = module[0].weight
    report = to_semi_structured(module, {"0.weight": None})
    assert report.converted == ("0.weight",)
    assert module[0].weight is not before
    assert not module[0].weight.requires_grad
    assert isinstance(module[0].weight, nn.Parameter)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversion_on_a_gpu_keeps_outputs(dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no sparse tensor cores")
    module = pruned(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 40), dtype=dtype).cuda()
    inputs = torch.randn(64, 256, dtype=dtype, device="cuda")
    expected = module(inputs)
    report = to_semi_structured(module)
    assert report.converted == ("0.weight",)
    assert "not a multiple" in report.left["2.weight"]
    assert isinstance(module[0].weight, SparseSemiStructuredTensor)
    torch.testing.assert_close(module(inputs), expected, rtol=2e-2, atol=2e-2)
    again = to_semi_structured(module)
    assert again.left["0.weight"] == "it is semi-structured already"
