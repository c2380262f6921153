"""What every part promises, once more where the module lives on a GPU.

pytest -m gpu                                             # on a machine that has one
GPU_TESTS_ON=cpu pytest tests/contract/test_gpu.py       # elsewhere, to see that the tests themselves run
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from adaptive_nets import NETS as ADAPTIVE
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from small_nets import make
from support import FEATURES, Classifier, adamw, assert_same_state, dataset, loader, sgd, trainer, zeros
from test_callbacks import CALLBACKS
from test_modules import MODULES
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import lightning_structopt as so

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
ACCELERATOR = "gpu" if DEVICE == "cuda" else DEVICE
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def fit(root: Path, module: pl.LightningModule, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    ckpt = kwargs.pop("ckpt", None)
    run = trainer(root, *callbacks, accelerator=ACCELERATOR, **kwargs)
    run.fit(module, loader(), loader(), ckpt_path=ckpt)
    return run


def on_device(module: nn.Module) -> bool:
    return all(tensor.device.type == DEVICE for tensor in module.state_dict().values())


def resumes(root: Path, module: Callable[[], pl.LightningModule], callback: Callable[[], list[Any]]) -> None:
    saved = ModelCheckpoint(root / "saved", save_top_k=-1, filename="{epoch}")
    straight = fit(root, module(), *callback(), saved).lightning_module
    for epoch in range(3):
        resumed = fit(root, module(), *callback(), ckpt=root / "saved" / f"epoch={epoch}.ckpt")
        assert_same_state(resumed.lightning_module.state_dict(), straight.state_dict())


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_resume(name: str, tmp_path: Path) -> None:
    resumes(tmp_path, lambda: Classifier(adamw), lambda: [CALLBACKS[name]()])


@pytest.mark.parametrize("name", MODULES)
def test_modules_resume(name: str, tmp_path: Path) -> None:
    resumes(tmp_path, MODULES[name], list)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_in_half_precision(name: str, precision: Any, tmp_path: Path) -> None:
    if precision == "16-mixed" and DEVICE == "cpu":
        pytest.skip("Lightning has no scaler on CPUs")
    fit(tmp_path, Classifier(adamw), CALLBACKS[name](), precision=precision, max_epochs=2)


OPTIMIZERS = {
    "sgd": sgd,
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, fused=True),
    "adamw": adamw,
    "fused adam": lambda parameters: torch.optim.Adam(parameters, 1e-2, fused=True),
    "foreach adam": lambda parameters: torch.optim.Adam(parameters, 1e-2, foreach=True),
}


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_hold(optimizer: str, precision: Any, tmp_path: Path) -> None:
    if precision == "16-mixed" and DEVICE == "cpu":
        pytest.skip("Lightning has no scaler on CPUs")
    options = {"precision": precision, "accumulate_grad_batches": 2}
    if "fused" not in optimizer:  # Lightning refuses to clip what a fused optimizer unscales
        options["gradient_clip_val"] = 0.5
    callback = so.IterativePruning(0.75, interval="step", every=2, verbose=False)
    average = EMAWeightAveraging()
    module = Classifier(OPTIMIZERS[optimizer])
    fit(tmp_path, module, callback, average, **options)
    count = sum(p.numel() for p in module.parameters() if p.ndim > 1)
    assert zeros(module) >= round(0.75 * count)
    weights = dict(module.named_parameters())
    assert all(not weights[name].cpu()[~mask.cpu()].any() for name, mask in callback.masks.items())


CRITERIA = [
    so.Magnitude(),
    so.Random(),
    so.LAMP(),
    so.GeometricMedian(),
    so.Taylor(),
    so.GradientSquared(),
    so.Movement(),
    so.Wanda(),
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("pattern", [so.Unstructured(), so.NByM(2, 4)], ids=["unstructured", "2:4"])
def test_masks_are_those_of_a_cpu(criterion: Any, pattern: Any, tmp_path: Path) -> None:
    """After one batch, so that both have the same weights to look at."""
    masks = []
    for accelerator in (ACCELERATOR, "cpu"):
        callback = so.IterativePruning(
            0.5,
            criterion=criterion,
            pattern=pattern,
            ramp=so.OneShotRamp(),
            begin=0.0,
            interval="step",
            verbose=False,
        )
        run = trainer(tmp_path, callback, accelerator=accelerator, max_steps=1, max_epochs=-1)
        run.fit(Classifier(sgd), loader())
        masks.append({name: mask.cpu() for name, mask in callback.masks.items()})
    for name in masks[0]:
        agreement = (masks[0][name] == masks[1][name]).float().mean()
        assert agreement > 0.97  # a gradient may round to the other side of the threshold


def test_importance_of_neurons_and_calibrated_criteria(tmp_path: Path) -> None:
    module = Classifier().to(DEVICE).eval()
    inputs = torch.randn(32, FEATURES, device=DEVICE)
    found = so.neuron_importance(module, "net.0", inputs)
    elsewhere = so.neuron_importance(copy.deepcopy(module).cpu(), "net.0", inputs.cpu())
    torch.testing.assert_close(found.cpu(), elsewhere, rtol=1e-3, atol=1e-5)
    table = so.sensitivity(
        module, loader(), MulticlassAccuracy(4).to(DEVICE), sparsities=(0.5, 0.9), progress=False
    )
    assert table.budget(0.7)


@pytest.mark.parametrize("name", ["resnet", "shufflenet", "heads", "lstm", "two_by_two", "timm_vit"])
def test_shrinks_and_grows(name: str) -> None:
    module, example = make(name)
    module = module.to(DEVICE)
    example = tuple(each.to(DEVICE) for each in (example if isinstance(example, tuple) else (example,)))
    example = example if len(example) > 1 else example[0]
    small = so.prune_channels(module, so.Parameters(0.6), example)
    assert on_device(small)
    small(*example) if isinstance(example, tuple) else small(example)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in module.parameters())


def test_widens_and_deepens() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).to(DEVICE).eval()
    inputs = torch.randn(5, 6, device=DEVICE)
    wide = so.widen(module, "0", 2.0, inputs, noise=0.1)
    deep = so.deepen(wide, "1", inputs)
    assert on_device(deep)
    torch.testing.assert_close(deep.eval()(inputs), module(inputs), rtol=1e-4, atol=1e-4)


def test_distills_from_a_cache(tmp_path: Path) -> None:
    cache = so.TeacherCache(tmp_path / "cache")
    teacher = Classifier(hidden=24, seed=7)
    data = DataLoader(so.WithIds(dataset()), batch_size=8, shuffle=True)
    module = so.DistillationModule(teacher, Classifier(adamw), so.SoftTarget(2.0), cache=cache)
    trainer(tmp_path, accelerator=ACCELERATOR).fit(module, data)
    assert on_device(module)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_blocks_answer_as_on_a_cpu(name: str) -> None:
    torch.manual_seed(0)
    net = ADAPTIVE[name]().eval()
    inputs = torch.randn(16, FEATURES)
    expected = net(inputs)
    found = net.to(DEVICE)(inputs.to(DEVICE))
    assert found.device.type == DEVICE
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
    net(inputs[:1].to(DEVICE))


def test_exits_are_fitted() -> None:
    net = ADAPTIVE["exits"]().to(DEVICE)
    assert 0 <= net.fit_threshold(loader(), 0.9) <= 1
    assert net.expected_cost(torch.randn(3, FEATURES, device=DEVICE)).shape == (3,)


def test_ensembles(tmp_path: Path) -> None:
    members = [Classifier(adamw, seed=seed) for seed in range(3)]
    parallel = so.ParallelEnsemble(members, "learned")
    run = trainer(tmp_path, accelerator=ACCELERATOR)
    run.fit(parallel, loader())
    run.test(parallel, loader(), verbose=False)
    cascade = so.SerialEnsemble(members, threshold=0.6).to(DEVICE)
    cascade.calibrate(loader(), target_cost=0.9)
    run.predict(cascade, loader())
    so.select_greedily(members, loader(), MulticlassAccuracy(4))


def test_profiles_and_compares() -> None:
    module = Classifier().to(DEVICE).eval()
    assert so.profile(module, torch.randn(4, FEATURES, device=DEVICE)).latency_ms > 0
    report = so.compare({"one": module, "other": Classifier(seed=2).to(DEVICE)}, loader())
    assert "accuracy" in report.to_markdown().lower()


def test_sweeps(tmp_path: Path) -> None:
    result = so.ArchitectureSweep(
        {"small": lambda: Classifier(adamw, hidden=8), "wide": lambda: Classifier(adamw, hidden=16)},
        "val_acc",
        budget=so.SuccessiveHalving(1, 2, 2),
        trainer={"accelerator": ACCELERATOR, "devices": 1},
        executor=so.LocalProcesses(workers=1),
        directory=tmp_path / "sweep",
    ).run(loader(), loader())
    assert result.best.load().training is False


def test_compiled_modules_stay_sparse(tmp_path: Path) -> None:
    module = Classifier(adamw)
    module.net = torch.compile(module.net)
    callback = so.IterativePruning(0.5, verbose=False)
    fit(tmp_path, module, callback)
    weights: dict[str, Tensor] = dict(module.named_parameters())
    assert all(not weights[name].cpu()[~mask.cpu()].any() for name, mask in callback.masks.items())
