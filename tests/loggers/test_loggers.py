"""What arrives in the loggers of people's runs: the real packages, read back by their own means."""

import csv
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from support import Classifier, loader, trainer

import lightning_structopt as so

FIGURES = ("accuracy", "calibration_error", "latency_ms", "effective_FLOPs", "parameters")
pytestmark = pytest.mark.filterwarnings("ignore::Warning:(wandb|mlflow|tensorboard|google|pydantic)")


class Tracker(ABC):
    """Makes a logger, and reads what came of it without its help."""

    @abstractmethod
    def make(self, folder: Path) -> Logger: ...

    @abstractmethod
    def read(self, logger: Any) -> "Read":
        """Return what is there once ``logger`` has been closed."""


class Read:
    """The last value of each metric, tables as text by name, names of plots."""

    def __init__(self, metrics: dict[str, float], tables: dict[str, str], plots: set[str]) -> None:
        self.metrics, self.tables, self.plots = metrics, tables, plots


class CSV(Tracker):
    def make(self, folder: Path) -> Logger:
        return CSVLogger(folder)

    def read(self, logger: Any) -> Read:
        logger.save()
        return of_folder(logger.log_dir)


def of_folder(folder: str) -> Read:
    metrics: dict[str, float] = {}
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            metrics |= {name: float(value) for name, value in row.items() if value}
    tables = {path.stem: path.read_text() for path in Path(folder).glob("*.md")}
    return Read(metrics, tables, {path.stem for path in Path(folder).glob("*.png")})


class TensorBoard(Tracker):
    def make(self, folder: Path) -> Logger:
        pytest.importorskip("tensorboard")
        return TensorBoardLogger(folder)

    def read(self, logger: Any) -> Read:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logger.finalize("success")
        found = EventAccumulator(logger.log_dir).Reload()
        tags = found.Tags()
        metrics = {tag: found.Scalars(tag)[-1].value for tag in tags["scalars"]}
        texts = {tag: found.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
        tables = {tag.removesuffix("/text_summary"): text for tag, text in texts.items()}
        return Read(metrics, tables, {tag.removesuffix("/plot") for tag in tags["images"]})


class MLflow(Tracker):
    def make(self, folder: Path) -> Logger:
        pytest.importorskip("mlflow")
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # a database would take ten seconds to be made
        return MLFlowLogger(save_dir=str(folder))

    def read(self, logger: Any) -> Read:
        run = logger.experiment.get_run(logger.run_id)
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        tables = {path.stem: path.read_text() for path in folder.glob("*.md")}
        return Read(dict(run.data.metrics), tables, {path.stem for path in folder.glob("*.png")})


class WandB(Tracker):
    def make(self, folder: Path) -> Logger:
        pytest.importorskip("wandb")
        os.environ["WANDB_SILENT"] = "true"
        return WandbLogger(save_dir=folder, offline=True)

    def read(self, logger: Any) -> Read:
        import json

        summary = dict(logger.experiment.summary)
        media = Path(logger.experiment.dir) / "media"
        tables = {}
        for path in media.glob("table/*.table.json"):
            table = json.loads(path.read_text())
            lines = [" | ".join(map(str, line)) for line in [table["columns"], *table["data"]]]
            tables[path.name.split("_")[0]] = "\n".join(lines)
        metrics = {name: value for name, value in summary.items() if isinstance(value, (int, float))}
        return Read(metrics, tables, {path.name for path in (media / "images").iterdir()})


TRACKERS = {"csv": CSV(), "tensorboard": TensorBoard(), "mlflow": MLflow(), "wandb": WandB()}


def run_of_everything(folder: Path, logger: Logger) -> tuple[float, Any, Any, Any]:
    """Prune and distil a student, compare, profile and sweep, all with ``logger``."""
    pruning = so.IterativePruning(0.5, end=0.9)
    module = so.DistillationModule(Classifier(seed=2), Classifier())
    fit = trainer(folder, pruning, logger=logger, log_every_n_steps=1)
    fit.fit(module, loader(), loader())
    plain = Classifier()
    failing = torch.nn.Linear(3, 4)
    models = {"dense": plain, "half pruned (50%)": module.student, "bad": failing}
    report = so.compare(models, loader(), progress=False, seconds=0.001)
    report.log_to(logger, step=16)
    profile = so.profile(plain, torch.ones(8, 12), seconds=0.001)
    profile.log_to(logger)
    candidates = {"good": Classifier, "failing": lambda: 1 / 0}
    directory = {"directory": folder / "sweep", "executor": so.InProcess(), "progress": False}
    budget = so.SuccessiveHalving(1, 3, 3)
    sweep = so.ArchitectureSweep(
        candidates, "val_acc", budget=budget, trainer={"accelerator": "cpu"}, **directory
    )
    result = sweep.run(loader(), loader())
    result.log_to(logger)
    return pruning.sparsity, report, profile, result


@pytest.fixture(scope="module", params=TRACKERS)
def everything(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Read, float, Any, Any, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    tracker = TRACKERS[request.param]
    logger = tracker.make(folder)
    made = run_of_everything(folder, logger)
    yield tracker.read(logger), *made
    if "wandb" in sys.modules:
        import wandb

        wandb.finish()
        wandb.teardown()


def test_what_training_does_arrives(everything: Any) -> None:
    read, sparsity, *_ = everything
    assert sparsity == pytest.approx(0.5, abs=0.01)
    assert read.metrics["pruning/sparsity"] == pytest.approx(sparsity)
    terms = {name for name in read.metrics if name.startswith("kd/")}
    assert {"kd/agreement", "kd/task"} <= terms
    assert all(math.isfinite(read.metrics[term]) for term in terms)


def test_a_comparison_arrives(everything: Any) -> None:
    read, _, report, *_ = everything
    for figure in FIGURES:
        assert f"comparison/dense/{figure}" in read.metrics
        assert f"comparison/half_pruned_50_/{figure}" in read.metrics
    assert read.metrics["comparison/dense/accuracy"] == pytest.approx(report["dense"].metrics["accuracy"])
    assert not any(name.startswith("comparison/bad") for name in read.metrics)
    table = read.tables["comparison"]
    assert all(name in table for name in ("dense", "half pruned (50%)", "calibration error"))
    assert "RuntimeError" in table  # why one of them has no figures
    assert any("comparison" in plot or "plot" in plot for plot in read.plots)


def test_a_profile_arrives(everything: Any) -> None:
    read, _, _, profile, _ = everything
    assert read.metrics["profile/parameters"] == profile.parameters
    assert "BatchNorm1d" in read.tables["profile"]


def test_a_sweep_arrives(everything: Any) -> None:
    read, *_, result = everything
    assert read.metrics["sweep/good/val_acc"] == pytest.approx(result["good"].curve[3])
    assert read.metrics["sweep/good/epochs"] == 3
    assert "ZeroDivisionError" in read.tables["sweep"]


def test_curves_of_a_sweep_have_epochs_as_steps(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    *_, result = run_of_everything(tmp_path, logger)
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("sweep/good/val_acc")]
    found = {int(row["step"]): float(row["sweep/good/val_acc"]) for row in rows}
    assert found == pytest.approx(dict(result["good"].curve))
    assert set(found) == {1, 2, 3}


class Minimal(Logger):
    """A logger of somebody else's, which has no place for tables."""

    name = version = "minimal"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics |= metrics

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_a_logger_without_a_place_for_tables_gets_the_figures() -> None:
    logger = Minimal()
    so.profile(torch.nn.Linear(3, 2), torch.ones(1, 3), seconds=0.001).log_to(logger, "linear")
    assert logger.metrics["linear/parameters"] == 8


@pytest.mark.parametrize("wrong", [None, True, "csv", pl.Trainer])
def test_what_is_no_logger_is_refused(wrong: Any) -> None:
    profile = so.profile(torch.nn.Linear(3, 2), torch.ones(1, 3), seconds=0.001)
    with pytest.raises(
        TypeError, match=r"must be one of Lightning's loggers. Found `logger = .*`trainer.logger`"
    ):
        profile.log_to(wrong)


def test_the_first_rank_alone_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = so.profile(torch.nn.Linear(3, 2), torch.ones(1, 3), seconds=0.001)
    for rank in (1, 0):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        profile.log_to(CSVLogger(tmp_path, version=f"{rank}"))
    assert [path.parent.name for path in tmp_path.rglob("profile.md")] == ["0"]
