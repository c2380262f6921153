"""A sweep with real processes and real faults: one sweep, looked at from many sides."""

import csv
import functools
import io
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import optuna
import pytest
import torch
from candidates_for_sweeps import (
    Exits,
    FullDisk,
    Hangs,
    Hungry,
    Killed,
    LeavesAChild,
    LogsOthers,
    NaNFrom,
    Raises,
    gone,
    not_a_module,
    raising_factory,
)
from lightning.pytorch.loggers import CSVLogger
from support import Classifier, loader, sgd

from lightning_structopt.sweep import (
    AllFailedError,
    ArchitectureSweep,
    Candidate,
    FixedRounds,
    LocalProcesses,
    MaxBytes,
    MaxFLOPs,
    MaxLatency,
    MaxParameters,
    SweepResult,
)

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")
WIDTHS = (2, 4, 8, 16, 32)
REASONS = {
    "raises in its factory": "ValueError: no such architecture",
    "is no module": "TypeError: Candidate 'is no module' must return a LightningModule. Found a `str`.",
    "raises in a step": "RuntimeError: the loss exploded",
    "NaN at once": "`val_acc` is nan after epoch 1",
    "NaN later": "`val_acc` is nan after epoch 2",
    "hangs": "did not end within 8.0 s",
    "is killed": "killed by SIGKILL",
    "exits": "exited with status 3",
    "no memory": "DefaultCPUAllocator: can't allocate memory",
    "disk full": "",
    "logs others": "`monitor = 'val_acc'` must be logged in each rung. Found that 'accuracy', 'train_loss'",
    "too large": "1,828 parameters, more than 1,000",
    "not allowed": "100 is an unlucky width",
}


def small_or_reason(module: pl.LightningModule) -> str | None:
    return "100 is an unlucky width" if module.net[0].out_features == 50 else None


def candidates(folder: Path) -> dict[str, Any]:
    offset = 1  # in a closure
    learning: dict[str, Any] = {f"width {w}": lambda w=w: Classifier(hidden=w, seed=offset) for w in WIDTHS}
    faults: dict[str, Any] = {
        "raises in its factory": raising_factory,
        "is no module": not_a_module,
        "raises in a step": Raises,
        "NaN at once": functools.partial(NaNFrom, 1),
        "NaN later": functools.partial(NaNFrom, 2),
        "hangs": Hangs,
        "is killed": Killed,
        "exits": functools.partial(LeavesAChild, str(folder / "child"), crash=True),
        "no memory": Hungry,
        "disk full": FullDisk,
        "logs others": LogsOthers,
        "too large": functools.partial(Classifier, sgd, 96),
        "not allowed": functools.partial(Classifier, sgd, 50),
    }
    own = Candidate(
        lambda: Classifier(hidden=16),
        data=(loader(64, shuffle=True), loader()),
        trainer={"gradient_clip_val": 0.5},
    )
    return learning | faults | {"own data": own, "exits by itself": Exits}


def make_sweep(folder: Path) -> ArchitectureSweep:
    logs = folder / "logs"
    return ArchitectureSweep(
        candidates(folder),
        "val_acc",
        budget=FixedRounds(rounds=3, epochs=1, keep=3),
        trainer={"accelerator": "cpu", "logger": lambda name: CSVLogger(logs, name)},
        executor=LocalProcesses(workers=2),
        constraints=[MaxParameters(1000), MaxBytes(1 << 20), MaxFLOPs(1e6), MaxLatency(1e4), small_or_reason],
        directory=folder / "sweep",
        timeout=8.0,
        progress=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def result(folder: Path) -> SweepResult:
    torch.manual_seed(0)
    return make_sweep(folder).run(loader(shuffle=True), loader())


@pytest.mark.parametrize("name", REASONS)
def test_a_fault_is_a_row_with_its_reason(name: str, result: SweepResult) -> None:
    if name == "exits":
        return
    refused = name in {"too large", "not allowed"}
    assert result[name].state == ("refused" if refused else "failed")
    assert REASONS[name] in result[name].reason
    assert result[name].checkpoint is None


def test_exits_and_what_they_leave_behind(result: SweepResult, folder: Path) -> None:
    assert result["exits by itself"].reason == "exited with status 3"
    assert result["exits"].reason == "exited with status 1"
    assert gone(int((folder / "child").read_text())), "what a trial started ends with it"


def test_a_full_disk_leaves_no_torn_checkpoint(result: SweepResult, folder: Path) -> None:
    assert "Error" in result["disk full"].reason
    kept = [path for path in (folder / "sweep").rglob("*") if path.suffix in {".ckpt", ".part"}]
    finalists = [c for c in result.candidates if c.checkpoint is not None]
    assert set(kept) == {c.checkpoint for c in finalists}


def test_the_others_are_halved(result: SweepResult) -> None:
    sound = [c for c in result.candidates if c.state in {"finished", "stopped"}]
    assert len(sound) == len(WIDTHS) + 1, str(result)
    assert len([c for c in sound if c.state == "finished"]) == 3 - 1  # one failed in the second round
    for rung in (1, 2):
        scores = sorted((c.scores[rung] for c in sound if rung in c.scores), reverse=True)
        onward = [c.scores[rung] for c in sound if max(c.scores) > rung]
        assert sorted(onward, reverse=True) == scores[: len(onward)]
        assert len(onward) == 2
    assert result.best.score == max(c.score for c in sound if c.epochs == 3)


def test_the_best_is_loaded_with_what_it_had_learned(result: SweepResult) -> None:
    for candidate in result.top(2):
        module = candidate.load()
        quiet = pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        (found,) = quiet.validate(module, loader(), verbose=False)
        assert found["val_acc"] == pytest.approx(candidate.score)
    stopped = next(c for c in result.candidates if c.state == "stopped")
    with pytest.raises(ValueError, match="Only candidates that came to the last rung can be loaded"):
        stopped.load()
    with pytest.raises(ValueError, match=r"Found 99, and \d of them"):
        result.top(99)


def test_costs_are_measured(result: SweepResult) -> None:
    costs = result["width 4"].costs
    module = Classifier(hidden=4)
    assert costs["parameters"] == sum(p.numel() for p in module.parameters())
    assert costs["flops"] == 2 * (12 * 4 + 4 * 4)
    assert costs["latency_ms"] > 0


def test_running_again_only_reads(result: SweepResult, folder: Path) -> None:
    journal = folder / "sweep" / "journal.log"
    before = [path.stat().st_mtime_ns for path in (folder / "sweep").rglob("*.ckpt")]
    torch.manual_seed(0)
    again = make_sweep(folder).run(loader(shuffle=True), loader())
    assert again == result
    assert [path.stat().st_mtime_ns for path in (folder / "sweep").rglob("*.ckpt")] == before
    assert journal.exists()


def test_optuna_owns_the_state(result: SweepResult, folder: Path) -> None:
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "sweep" / "journal.log"))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
    by_name = {t.user_attrs["candidate"]: t for t in study.trials}
    assert len(by_name) == len(study.trials) == len(result.candidates)
    states = {"finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL", "refused": "FAIL"}
    assert all(by_name[c.name].state.name == states[c.state] for c in result.candidates)
    assert by_name[result.best.name].intermediate_values == result.best.curve
    assert study.best_value == max(c.score for c in result.candidates if c.state == "finished")


def test_tables(result: SweepResult, tmp_path: Path) -> None:
    text = str(result)
    assert "width 16" in text
    rows = list(csv.DictReader(io.StringIO(result.to_csv(tmp_path / "t.csv"))))
    assert [row["name"] for row in rows] == [c.name for c in result.candidates]
    assert float(rows[0]["epoch 3"]) == result.best.scores[3]
    assert json.loads(result.to_json(tmp_path / "t.json"))["candidates"][0]["name"] == result.best.name
    lines = result.to_markdown(tmp_path / "t.md").splitlines()
    assert len(lines) == len(result.candidates) + 2
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv", "t.json", "t.md"}


def test_pareto_by_brute_force(result: SweepResult) -> None:
    points = {c.name: (-c.score, c.costs["parameters"]) for c in result.candidates if c.score is not None}

    def beaten(mine: tuple[float, float]) -> bool:
        return any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in points.values())

    expected = {name for name, mine in points.items() if not beaten(mine)}
    assert {c.name for c in result.pareto("val_acc", "parameters")} == expected
    with pytest.raises(ValueError, match="A figure must be one of .*'flops'.* Found 'beauty'"):
        result.pareto("beauty", "val_acc")


def test_plot(result: SweepResult, tmp_path: Path) -> None:
    figure = result.plot(tmp_path / "sweep.png", cost="flops")
    curves, costs = figure.axes
    assert len(costs.texts) == len([
        c for c in result.candidates if c.score is not None and "flops" in c.costs
    ])
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_each_candidate_has_its_own_run_of_the_logger(result: SweepResult, folder: Path) -> None:
    assert {f"width {w}" for w in WIDTHS} <= {path.name for path in (folder / "logs").iterdir()}


def test_all_bad_is_an_error_with_each_reason(tmp_path: Path) -> None:
    sweep = ArchitectureSweep(
        {"a": raising_factory, "b": Raises},
        "val_acc",
        budget=FixedRounds(1, 1),
        trainer={"accelerator": "cpu"},
        directory=tmp_path / "sweep",
        progress=False,
    )
    with pytest.raises(
        AllFailedError, match="a: failed: ValueError: no such .*; b: failed: RuntimeError: the loss"
    ):
        sweep.run(loader(), loader())
    assert (
        "raise RuntimeError" in (tmp_path / "sweep" / "trials" / "001-b" / "seed-0" / "log.txt").read_text()
    )
