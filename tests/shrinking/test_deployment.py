"""What comes out goes where any module goes: ONNX, `torch.export`, `torch.compile`, copies."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import HardCoded, make
from test_removal import run
from torch import nn

from lightning_structopt.shrinking import ChannelRatio, Latency, channel_report, prune_channels
from lightning_structopt.shrinking.plan import as_tuple
from lightning_structopt.shrinking.timing import warn_if_missed


@pytest.mark.parametrize("name", ["branches", "timm_vit"])
@pytest.mark.filterwarnings("ignore")  # of the exporter's own parts
def test_onnx_computes_the_same(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, inputs = make(name)
    small = prune_channels(module, ChannelRatio(0.5), inputs).eval()
    torch.onnx.export(small, as_tuple(inputs), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    given = {
        each.name: value.numpy() for each, value in zip(session.get_inputs(), as_tuple(inputs), strict=True)
    }
    found = torch.from_numpy(session.run(None, given)[0])
    torch.testing.assert_close(found, small(inputs).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the exporter's own parts, and that this is a graph
def test_onnx_of_a_graph_computes_the_same(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    module, inputs = HardCoded().eval(), torch.randn(2, 5, 6)
    report = channel_report(module, ChannelRatio(0.5), inputs, same_class=False)
    assert report.form == "graph"
    torch.onnx.export(report.module, (inputs,), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
    torch.testing.assert_close(found, report.module(inputs).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["split", "heads", "lstm", "tied", "patches"])
@pytest.mark.filterwarnings("ignore:.*were assigned during export")  # recurrent layers' lists of weights
def test_exports_compiles_and_copies(name: str) -> None:
    module, inputs = make(name)
    small = prune_channels(module, ChannelRatio(0.5), inputs).eval()
    expected = run(small, inputs)
    twin = copy.deepcopy(small)
    with torch.no_grad():
        exported: Any = torch.export.export(small, as_tuple(inputs), strict=False).module()
        compiled: Any = torch.compile(small, backend="eager")
        for other in (twin, exported, compiled):
            torch.testing.assert_close(run(other, inputs), expected)


def test_latency_goes_by_what_smaller_modules_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_width(module: nn.Module, inputs: Any) -> float:  # a clock that nothing disturbs
        return 1.0 + sum(weight.numel() for weight in module.parameters()) / 1000

    for place in ("timing", "channels"):
        monkeypatch.setattr(f"lightning_structopt.shrinking.{place}.time_of", by_width)
    module = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    report = channel_report(module, Latency(0.5), torch.randn(2, 16))
    assert by_width(report.module, None) == pytest.approx(0.5 * by_width(module, None), rel=0.05)


def test_latency_that_was_missed_is_told() -> None:
    warn_if_missed(0.5, 10.0, 5.5)
    with pytest.warns(
        UserWarning, match=r"`Latency\(0.5\)` was missed: a pass took 10 ms and now takes 7 ms, 0.70"
    ):
        warn_if_missed(0.5, 10.0, 7.0)
