"""What a sweep can be asked for: seeds, patience, search spaces, asynchronous promotion; and wrong arguments."""

import functools
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import optuna
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from support import Classifier, dataset, loader, sgd
from torch.utils.data import DataLoader

from lightning_structopt.sweep import (
    ArchitectureSweep,
    AsynchronousHalving,
    Candidate,
    CandidateResult,
    FixedRounds,
    Hyperband,
    InProcess,
    LocalProcesses,
    MaxBytes,
    MaxFLOPs,
    MaxLatency,
    MaxParameters,
    RegularizedEvolution,
    SearchSpace,
    SuccessiveHalving,
)

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")
WIDTHS = {f"width {w}": functools.partial(Classifier, sgd, w) for w in (2, 4, 8)}


def sweep(folder: Path, candidates: Any = WIDTHS, **arguments: Any) -> ArchitectureSweep:
    defaults: dict[str, Any] = {
        "monitor": "val_acc",
        "budget": FixedRounds(2, 1, keep=2),
        "trainer": {"accelerator": "cpu"},
        "executor": InProcess(),
        "directory": folder / "sweep",
        "progress": False,
    }
    return ArchitectureSweep(candidates, **(defaults | arguments))


class Scripted(Classifier):
    """Its metric follows a script."""

    def __init__(self, values: tuple[float, ...], by_seed: bool = False) -> None:
        super().__init__()
        self.values, self.by_seed = values, by_seed

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        index = int(os.environ["PL_GLOBAL_SEED"]) if self.by_seed else self.current_epoch
        self.log("val_acc", self.values[min(index, len(self.values) - 1)])


def scripted(**values: tuple[float, ...]) -> dict[str, Any]:
    return {name: functools.partial(Scripted, v) for name, v in values.items()}


def test_repeats_rank_finalists_by_their_mean(tmp_path: Path) -> None:
    lucky, steady = (functools.partial(Scripted, v, True) for v in ((0.9, 0.1, 0.2), (0.6, 0.7, 0.5)))
    result = sweep(tmp_path, {"lucky": lucky, "steady": steady}, repeats=3).run(loader(), loader())
    assert [c.name for c in result.candidates] == ["steady", "lucky"]
    assert result.best.score == pytest.approx(0.6)
    assert result.best.spread == pytest.approx(np.std([0.6, 0.7, 0.5], ddof=1))
    assert result.best.checkpoint.parent.name == "seed-1", "the seed with the best score"
    assert "± 0.1000" in result.to_markdown()
    assert sweep(tmp_path, {"lucky": lucky, "steady": steady}, repeats=3).run(loader(), loader()) == result


def test_patience(tmp_path: Path) -> None:
    candidates = scripted(a=(0.5, 0.4, 0.4, 0.9), b=(0.1, 0.2, 0.3, 0.4))
    budget = FixedRounds(4, 1, keep=2)
    result = sweep(tmp_path, candidates, budget=budget, patience=2).run(loader(), loader())
    assert result.best.epochs == 3
    assert {c.state for c in result.candidates} == {"finished"}


def test_less_may_be_better(tmp_path: Path) -> None:
    candidates = scripted(high=(0.5, 0.9), low=(0.4, 0.1), middle=(0.45, 0.5))
    result = sweep(tmp_path, candidates, mode="min").run(loader(), loader())
    assert [(c.name, c.state) for c in result.candidates] == [
        ("low", "finished"), ("middle", "finished"), ("high", "stopped"),
    ]  # fmt: skip
    assert [c.name for c in result.pareto("val_acc", "parameters")] == ["low"]


def test_who_stops_early_keeps_its_score(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_acc", mode="max", patience=1)
    candidates = {
        "early": Candidate(functools.partial(Scripted, (0.8, 0.7, 0.6)), trainer={"callbacks": [stopping]}),
        **scripted(late=(0.1, 0.2, 0.3, 0.9, 0.95, 0.99)),
    }
    result = sweep(tmp_path, candidates, budget=FixedRounds(2, 3, keep=2)).run(loader(), loader())
    assert result["early"].scores == {2: pytest.approx(0.7)}
    assert result["early"].state == "finished"
    assert result.best.name == "late"
    assert stopping.wait_count == 0, "arguments are left as they were"


def test_the_callers_randomness_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # of other tests in this process
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    result = sweep(tmp_path).run(loader(), loader())
    result.best.load()
    assert torch.rand(1) == expected
    assert "PL_GLOBAL_SEED" not in os.environ


def test_at_most_survivors_and_workers_have_checkpoints(tmp_path: Path) -> None:
    seen = tmp_path / "seen"  # a class that is local to a test travels by value, and what it closes over too

    class Writes(Classifier):
        def on_train_end(self) -> None:
            with seen.open("a") as file:
                file.write(f"{len(list((tmp_path / 'sweep').rglob('*.ckpt')))}\n")

    candidates = {str(w): functools.partial(Writes, sgd, w) for w in range(2, 11)}
    result = sweep(tmp_path, candidates, budget=SuccessiveHalving(1, 4, 3)).run(loader(), loader())
    counts = [int(line) for line in seen.read_text().split()]
    assert max(counts) <= 3 + 1
    assert (
        sum(c.checkpoint is not None for c in result.candidates) == len(list(tmp_path.rglob("*.ckpt"))) == 1
    )


@pytest.mark.parametrize(
    "budget", [Hyperband(1, 4, 2), AsynchronousHalving(1, 4, 2)], ids=["hyperband", "asha"]
)
def test_other_budgets_in_real_sweeps(budget: Any, tmp_path: Path) -> None:
    values = {f"c{i}": tuple(0.1 * i + 0.01 * e for e in range(4)) for i in range(6)}
    result = sweep(tmp_path, scripted(**values), budget=budget).run(loader(), loader())
    assert result.best.name == "c5"
    assert result.best.epochs == 4
    assert sum(c.epochs for c in result.candidates) < 24


def make_drawn(width: int, kind: str, slope: float | None = None) -> Classifier:
    assert (slope is not None) == (kind == "leaky")
    return Classifier(hidden=width)


SPACE = {
    "width": IntDistribution(2, 16, log=True),
    "kind": CategoricalDistribution(["plain", "leaky"]),
    "slope": lambda drawn: FloatDistribution(0.0, 0.3) if drawn["kind"] == "leaky" else None,
}
SAMPLERS = {
    "random": lambda: optuna.samplers.RandomSampler(seed=1),
    "TPE": lambda: optuna.samplers.TPESampler(seed=1, n_startup_trials=2),
    "evolution": lambda: RegularizedEvolution(population=2, tournament=2),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_search_spaces(name: str, tmp_path: Path) -> None:
    space = SearchSpace(make_drawn, SPACE, samples=6, sampler=SAMPLERS[name]())
    result = sweep(tmp_path, space, budget=FixedRounds(1, 1)).run(loader(), loader())
    assert len(result.candidates) == 6
    for candidate in result.candidates:
        assert candidate.state == "finished"
        assert ("slope" in candidate.parameters) == (candidate.parameters["kind"] == "leaky")
        assert candidate.load().net[0].out_features == candidate.parameters["width"]
    assert len({c.parameters["width"] for c in result.candidates}) > 1
    assert "width" in result.to_csv().splitlines()[0]


def test_grids(tmp_path: Path) -> None:
    space = SearchSpace(
        functools.partial(Classifier, sgd),
        {"hidden": IntDistribution(2, 4)},
        samples=3,
        sampler=optuna.samplers.GridSampler({"hidden": [2, 3, 4]}, seed=0),
    )
    result = sweep(tmp_path, space, budget=FixedRounds(1, 1)).run(loader(), loader())
    assert {c.parameters["hidden"] for c in result.candidates} == {2, 3, 4}


class Interrupts(Classifier):
    def __init__(self, hidden: int, marker: str) -> None:
        super().__init__(hidden=hidden)
        self.marker = Path(marker)

    def on_train_start(self) -> None:
        if self.marker.exists() and int(self.marker.read_text()) == self.net[0].out_features:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_interrupted_search_goes_on_with_the_same_draws(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def search(folder: Path) -> ArchitectureSweep:
        build = functools.partial(Interrupts, marker=str(marker))
        space = SearchSpace(build, {"hidden": IntDistribution(2, 4000)}, samples=5, sampler=SAMPLERS[name]())
        return sweep(folder, space, budget=FixedRounds(1, 1))

    def rows(result: Any) -> list[tuple]:
        return [(c.name, c.parameters, c.curve) for c in result.candidates]

    straight = search(tmp_path / "straight").run(loader(), loader())
    marker.write_text(str(straight["sample 3"].parameters["hidden"]))
    interrupted = search(tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(loader(), loader())
    marker.unlink()
    assert rows(interrupted.run(loader(), loader())) == rows(straight)
    assert rows(search(tmp_path / "interrupted").run(loader(), loader())) == rows(straight)


class Digits(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


def test_a_datamodule_and_workers_that_load(tmp_path: Path) -> None:
    loading = DataLoader(dataset(), batch_size=8, num_workers=1, multiprocessing_context="fork")
    own = Candidate(Classifier, data=(loading, loader()))
    one = {"module": Classifier, "workers": own}
    result = sweep(tmp_path, one, executor=LocalProcesses()).run(Digits())
    assert {c.state for c in result.candidates} == {"finished"}, str(result)
    assert result["module"].scores == result["workers"].scores


def test_a_list_is_named_by_its_functions(tmp_path: Path) -> None:
    def first() -> Any:
        return Classifier()

    assert repr(sweep(tmp_path, [first, Classifier])).startswith("ArchitectureSweep(['first', 'Classifier']")
    with pytest.raises(ValueError, match="Candidates need names of their own. Found 'Classifier' twice"):
        sweep(tmp_path, [Classifier, functools.partial(Classifier, sgd)])


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mode": ({"mode": "best"}, ValueError, "`mode` must be 'min' or 'max'. Found `mode = 'best'`"),
    "monitor": ({"monitor": 3}, TypeError, "`monitor` must be a `str`"),
    "built module": ({"candidates": {"a": "x"}}, TypeError, "A candidate must be a callable .* Found 'x'"),
    "no candidates": ({"candidates": {}}, ValueError, "must have at least one candidate. Found none"),
    "no mapping": ({"candidates": "abc"}, TypeError, "`candidates` must be a dict .* Found 'abc'"),
    "names": (
        {"candidates": {1: Classifier}},
        TypeError,
        r"Names of `candidates` must be strings. Found \[1\]",
    ),
    "budget": ({"budget": 9}, TypeError, "`budget` must be a `Budget`"),
    "budget class": ({"budget": FixedRounds}, TypeError, r"Did you mean `FixedRounds\(\)`"),
    "executor": ({"executor": "gpu"}, TypeError, "`executor` must be a `Executor`"),
    "max_epochs": (
        {"trainer": {"max_epochs": 3}},
        ValueError,
        "`trainer` must leave 'max_epochs' to the sweep",
    ),
    "constraint class": (
        {"constraints": [MaxParameters]},
        TypeError,
        "`constraints` must be `Constraint` objects",
    ),
    "seed": ({"seed": -1}, ValueError, "`seed` must be at least 0"),
    "repeats": ({"repeats": 0}, ValueError, "`repeats` must be at least 1"),
    "patience": ({"patience": 0}, ValueError, "`patience` must be at least 1"),
    "timeout": ({"timeout": 0}, ValueError, "`timeout` must be in"),
    "asha": (
        {"patience": 1, "budget": AsynchronousHalving()},
        ValueError,
        "`patience` counts rounds, of which",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, tmp_path: Path) -> None:
    arguments, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        sweep(tmp_path, **arguments)
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("kind", [MaxParameters, MaxBytes, MaxFLOPs, MaxLatency])
def test_constraints_out_of_range(kind: type) -> None:
    with pytest.raises(ValueError, match="must be"):
        kind(0)
    with pytest.raises(TypeError, match="must be a"):
        kind("many")


def test_search_spaces_out_of_range() -> None:
    with pytest.raises(ValueError, match="must have at least one distribution"):
        SearchSpace(Classifier, {}, samples=3)
    with pytest.raises(TypeError, match=r"must be Optuna's distributions.* Found `width = \[1, 2\]`"):
        SearchSpace(Classifier, {"width": [1, 2]}, samples=3)
    with pytest.raises(ValueError, match="`samples` must be at least 1"):
        SearchSpace(Classifier, {"width": IntDistribution(1, 2)}, samples=0)


def test_what_cannot_be_pickled_is_named(tmp_path: Path) -> None:
    lock = __import__("threading").Lock()
    with pytest.raises(TypeError, match="Found that candidate 'a' isn't: .*lock"):
        sweep(tmp_path, {"a": lambda: lock}).run(loader(), loader())


def test_the_other_package_is_refused(tmp_path: Path) -> None:
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    with pytest.raises(
        RuntimeError, match="built on the package `lightning`. Found a `Other` of the package"
    ):
        sweep(tmp_path, {"a": Other}).run(loader(), loader())


def test_loading_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="Found that 'a' is stopped"):
        CandidateResult("a", "stopped").load()
