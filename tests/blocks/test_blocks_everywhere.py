"""Every block with what else there is: precision, resuming, averaging, compiling, exporting, pruning, shrinking."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from adaptive_nets import NETS, WIDTH, Adaptive, closed
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support import FEATURES, adamw, assert_same_state, loader, trainer
from torch import Tensor, nn

from lightning_structopt.blocks import Gate, GatedBlock, ResidualBlock, auxiliary_loss, projection
from lightning_structopt.pruning import IterativePruning, Neurons, prune
from lightning_structopt.shrinking import shrink

every_net = pytest.mark.parametrize("name", NETS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def fit(
    root: Path, module: pl.LightningModule, *callbacks: pl.Callback, ckpt: Any = None, **kwargs: Any
) -> Any:
    run = trainer(root, *callbacks, **kwargs)
    pl.seed_everything(7, verbose=False)
    run.fit(module, loader(), loader(), ckpt_path=ckpt)
    return run


class Seeded(pl.Callback):
    """The gates' noise comes from torch's generator, which checkpoints don't hold: each batch has a seed of its own."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)


@every_net
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}], ids=str
)
def test_resume_equals_straight(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")
    straight = fit(tmp_path, Adaptive(name), Seeded(), saved, **options)
    last = tmp_path / "saved" / "epoch=1.ckpt"
    resumed = fit(tmp_path, Adaptive(name, seed=2), Seeded(), ckpt=last, **options)
    assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
    assert_same_state(resumed.optimizers[0].state_dict(), straight.optimizers[0].state_dict())


@every_net
def test_learns_and_may_be_averaged(name: str, tmp_path: Path) -> None:
    module = Adaptive(name)
    run = fit(tmp_path, module, EMAWeightAveraging(decay=0.8), max_epochs=25)
    assert run.callback_metrics["val_acc"] > 0.6


@every_net
def test_evaluates_in_low_precision(name: str) -> None:
    net = NETS[name]().eval()
    inputs = torch.randn(16, FEATURES)
    expected = net(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(inputs).shape == expected.shape
    assert net.bfloat16()(inputs.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gated", "routed", "act", "exits"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at all attributes
def test_compiles_with_graph_breaks(name: str, training: bool) -> None:
    torch._dynamo.reset()
    net = NETS[name]().train(training)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend="eager")
    for size in (8, 5) if training else (8, 5, 1):
        inputs = torch.randn(size, FEATURES)
        results = []
        for run, module in ((net, net), (compiled, twin)):
            module.zero_grad()
            torch.manual_seed(3)
            output = run(inputs)
            outputs = output if isinstance(output, tuple) else (output,)
            loss = sum(each.square().sum() for each in outputs)
            if training and name not in {"exits", "capsules"}:
                loss = loss + auxiliary_loss(module)
            loss.backward()
            # Dynamo of torch 2.7 gives zeros to those that have no part in the output.
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
            results.append((loss, grads))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@every_net
def test_exports_in_the_dense_form(name: str) -> None:
    net = NETS[name]().eval()
    inputs = torch.randn(16, FEATURES)
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(net, (inputs,), dynamic_shapes=({0: batch},), strict=False)
    more = torch.randn(33, FEATURES)
    torch.testing.assert_close(program.module()(more), net(more), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="needs onnx"
)
@pytest.mark.parametrize("name", ["gated", "routed to two", "act"])
@pytest.mark.filterwarnings("ignore")  # of the exporter's own
def test_exports_to_onnx(name: str, tmp_path: Path) -> None:
    import onnxruntime

    net, inputs = NETS[name]().eval(), torch.randn(16, FEATURES)
    torch.onnx.export(net, (inputs,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(inputs), rtol=1e-4, atol=1e-5)


@every_net
def test_prunes(name: str, tmp_path: Path) -> None:
    pruning = IterativePruning(0.6, verbose=False)
    module = Adaptive(name)
    fit(tmp_path, module, pruning)
    weights = dict(module.named_parameters())
    assert pruning.sparsity == pytest.approx(0.6, abs=0.01)
    assert not any(weights[key][~mask].any() for key, mask in pruning.masks.items())


@pytest.mark.parametrize("name", ["gated", "annealed", "routed", "act", "exits"])
def test_shrinks(name: str) -> None:
    net = NETS[name]().eval()
    chosen = {"routed": "1.experts.*", "act": "1.cell.0.*", "exits": "stages.*.0.*"}.get(name, "1.body.*")
    prune(net, 0.5, pattern=Neurons("layer"), include=chosen)
    inputs = torch.randn(8, FEATURES)
    small = shrink(net, inputs)
    assert type(small) is type(net)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    torch.testing.assert_close(small(inputs), net(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_a_gated_body_of_convolutions_shrinks_like_any_other(gated: bool) -> None:
    inner = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.BatchNorm2d(6),
    )
    block: nn.Module = ResidualBlock(
        inner, projection(4, 6), activation="relu", survival=1.0 if gated else 0.5
    )
    block = GatedBlock.around(block, Gate(4)) if gated else block
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    ).eval()
    with torch.no_grad():
        inner[1].weight[5:] = 0
        inner[1].bias[5:] = 0
    images = torch.randn(4, 1, 8, 8)
    small = shrink(net, images)
    assert small[1].body[0].out_channels == 5
    torch.testing.assert_close(small(images), net(images), rtol=1e-4, atol=1e-5)
    small.train()(images).sum().backward()


@every_net
def test_runs_twice_and_with_nothing_to_do(name: str) -> None:
    net = closed(NETS[name]())
    inputs = torch.randn(8, FEATURES)
    for _ in range(2):
        output = net(inputs)
        sum(each.sum() for each in (output if isinstance(output, tuple) else (output,))).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


class Nested(nn.Module):
    """An adaptive block in an adaptive block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = GatedBlock(GatedBlock(nn.Linear(WIDTH, WIDTH), Gate(WIDTH)), Gate(WIDTH, opening=0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.block(inputs)


def test_blocks_in_blocks() -> None:
    net = Nested()
    optimizer = adamw(net.parameters())
    inputs = torch.randn(32, WIDTH)
    net(inputs).square().sum().backward()
    optimizer.step()
    net.eval()
    torch.testing.assert_close(
        net(inputs), torch.cat([net(row[None]) for row in inputs]), rtol=1e-4, atol=1e-5
    )
