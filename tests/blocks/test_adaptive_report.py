"""`AdaptiveReport`: means over samples by hand, for the logger, the table at the end, and modules without blocks."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from adaptive_nets import Adaptive
from lightning.pytorch.callbacks import ModelCheckpoint
from support import Classifier, dataset, loader, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_structopt.blocks import AdaptiveComputationUnit, AdaptiveReport, Gate, GatedBlock
from lightning_structopt.blocks.execution import Execution


def open_by_hand(module: Adaptive, data: DataLoader) -> float:
    """Return the share of all samples whose gate is open in evaluation."""
    stem, block = module.net[0], module.net[1]
    logits = torch.cat([block.gate(stem(inputs)) for inputs, _ in data])
    return (logits >= 0).float().mean().item()


@pytest.mark.parametrize("batch_size", [8, 1])
def test_validation_is_the_mean_over_samples(batch_size: int, tmp_path: Path) -> None:
    module, report = Adaptive("gated"), AdaptiveReport(verbose=False)
    data = DataLoader(dataset(21), batch_size)  # of 8, the last has 5
    nn.init.normal_(module.net[1].gate.net[2].weight, std=2.0)
    run = trainer(tmp_path, report)
    run.fit(module, loader(), data)
    expected = open_by_hand(module.eval(), data)
    assert 0 < expected < 1
    assert float(run.callback_metrics["executed/val/net.1"]) == pytest.approx(expected)
    assert float(run.callback_metrics["executed/val"]) == pytest.approx(expected)
    assert 0 <= run.progress_bar_metrics["executed/train"] <= 1
    assert report.execution.fractions["val"] == pytest.approx({"net.1": expected})
    run.test(module, data, verbose=False)
    assert float(run.callback_metrics["executed/test/net.1"]) == pytest.approx(expected)


def test_checkpoints_may_monitor_it(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", monitor="executed/val", mode="min")
    trainer(tmp_path, AdaptiveReport(verbose=False), saved).fit(Adaptive("exits"), loader(), loader())
    assert saved.best_model_score is not None


class Sometimes(Adaptive):
    """Runs its block in every other batch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        hidden = self.net[0](inputs)
        hidden = self.net[1](hidden) if batch_idx % 2 else hidden
        return nn.functional.cross_entropy(self.net[2](hidden), labels)


def test_batches_without_the_block_do_not_count(tmp_path: Path) -> None:
    module, report = Sometimes("gated"), AdaptiveReport(verbose=False)
    nn.init.constant_(module.net[1].gate.net[2].bias, 100.0)
    run = trainer(tmp_path, report, max_epochs=1)
    run.fit(module, loader())
    assert float(run.callback_metrics["executed/train/net.1"]) == 1


def test_the_table_names_blocks_and_says_whether_skipping_is_faster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, report = Adaptive("routed"), AdaptiveReport()
    module.example_input_array = torch.randn(64, 12)
    trainer(tmp_path, report, max_epochs=1).fit(module, loader(), loader())
    printed = capsys.readouterr().out
    assert "net.1" in printed
    assert "RoutedBlock" in printed
    assert "for 64 samples" in printed.replace("\n", " ")
    router, expert = 2 * 16 * 4, 2 * 2 * 16 * 8
    assert report.execution.costs == {"net.1": router + expert}


class Recurrent(Adaptive):
    """Calls its block by keyword, and is called by keyword itself."""

    def __init__(self) -> None:
        super().__init__("act")
        self.net = AdaptiveComputationUnit(nn.GRUCell(12, 4), Gate(4), 3)
        self.example_input_array = {"inputs": torch.randn(8, 12)}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs, state=inputs[:, :4])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def test_blocks_may_be_called_by_keyword(tmp_path: Path) -> None:
    report = AdaptiveReport(verbose=False)
    trainer(tmp_path, report, max_epochs=1).fit(Recurrent(), loader(), loader())
    assert report.execution.costs["net"] > 2 * 12 * 12
    assert report.execution.latencies_ms


@pytest.mark.parametrize(
    ("latencies", "sentence"),
    [((2.0, 1.0), "2.00x as fast"), ((1.0, 2.0), "adaptive is slower here"), (None, "`example_input_array`")],
)
def test_verdict(latencies: tuple[float, float] | None, sentence: str) -> None:
    assert sentence in Execution({}, {}, latencies_ms=latencies).verdict


def test_without_blocks_it_says_so_and_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, AdaptiveReport()).fit(Classifier(), loader(), loader())
    assert "`Classifier` has no adaptive blocks" in caplog.text


def test_leaves_training_as_it_is(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [AdaptiveReport(verbose=False)]):
        module = Adaptive("gated")
        pl.seed_everything(1, verbose=False)
        trainer(tmp_path, *callbacks).fit(module, loader(), loader())
        states.append(module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_barebones_and_fast_dev_run(tmp_path: Path) -> None:
    trainer(tmp_path, AdaptiveReport(), fast_dev_run=True).fit(Adaptive("gated"), loader(), loader())


def test_a_block_as_the_whole_module_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    from rich import print as show

    show(Execution({"": GatedBlock.__name__}, {"val": {"": 0.5}}).table())
    assert "(itself)" in capsys.readouterr().out


def test_refuses_the_other_package() -> None:
    with pytest.raises(TypeError, match="`AdaptiveReport` is built on the package `lightning`"):
        AdaptiveReport().setup(
            pytorch_lightning.Trainer(logger=False, accelerator="cpu"), Classifier(), "fit"
        )


def test_verbose_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="`verbose` must be a `bool`"):
        AdaptiveReport("yes")
