"""Children of survivors: they begin where their parents stopped, and are candidates like all others."""

import copy
import functools
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from optuna.distributions import IntDistribution
from support import Classifier, adamw, assert_same_state, dataset, loader
from test_sweep_interrupted import Announces, announced, columns, drive, fifo, wait_gone
from torch import Tensor, nn

from lightning_structopt import Deepen, Widen
from lightning_structopt.sweep import (
    ArchitectureSweep,
    AsynchronousHalving,
    Candidate,
    FixedRounds,
    Hyperband,
    InProcess,
    LocalProcesses,
    MaxParameters,
    RegularizedEvolution,
    SearchSpace,
    SuccessiveHalving,
    SweepResult,
)
from lightning_structopt.sweep.budget import Standing
from lightning_structopt.sweep.heirs import label

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*does not have many workers")
BOTH = (Deepen(), Widen(1.5))


class Tells(Classifier):
    """Writes what it is when its training starts and when its rung is over."""

    def __init__(self, folder: Path, hidden: int = 4) -> None:
        super().__init__(adamw, hidden)
        self.folder = folder

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim == 1]
        groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def on_train_start(self) -> None:
        self.tell("start")

    def on_train_end(self) -> None:
        self.tell("end")

    def tell(self, when: str) -> None:
        names = {id(p): name for name, p in self.named_parameters()}
        optimizer = self.optimizers().optimizer
        with torch.no_grad():
            outputs = copy.deepcopy(self.net).eval()(dataset().tensors[0])
        said = {
            "outputs": outputs,
            "memory": {names[id(p)]: dict(state) for p, state in optimizer.state.items()},
            "decay": {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]},
            "rate": optimizer.param_groups[0]["lr"],
            "steps": self.trainer.global_step,
        }
        torch.save(copy.deepcopy(said), self.folder / f"{self.size}-{self.current_epoch}-{when}")

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters())


def sweep(folder: Path, candidates: Any, **arguments: Any) -> ArchitectureSweep:
    defaults: dict[str, Any] = {
        "monitor": "val_acc",
        "budget": FixedRounds(2, 1, keep=1),
        "trainer": {"accelerator": "cpu"},
        "executor": InProcess(),
        "directory": folder / "sweep",
        "progress": False,
        "mutate": BOTH,
    }
    return ArchitectureSweep(candidates, **(defaults | arguments))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepResult]:
    folder = tmp_path_factory.mktemp("told")
    budget = FixedRounds(3, 2, keep=1)
    result = sweep(folder, {"only": functools.partial(Tells, folder)}, budget=budget).run(
        loader(shuffle=True), loader()
    )
    return folder, result


def test_children_are_in_the_table_with_their_parents(told: tuple[Path, SweepResult]) -> None:
    _, result = told
    born = {c.name: c.parent for c in result.candidates}
    assert born["only"] is None
    assert born["only + Deepen() @2"] == born["only + Widen(factor=1.5) @2"] == "only"
    second = {name: parent for name, parent in born.items() if name.endswith("@4")}
    assert len(second) == 2
    assert set(second) == {f"{parent} + {change} @4" for parent in second.values()
                           for change in ("Deepen()", "Widen(factor=1.5)")}  # fmt: skip
    assert len(born) == 5
    assert set(result["only + Deepen() @2"].scores) <= {4, 6}, "they have no scores from before their birth"
    assert all(
        c.costs["parameters"] > result["only"].costs["parameters"] for c in result.candidates if c.parent
    )
    assert "parent" in result.to_csv().splitlines()[0].split(",")
    assert '"parent": "only"' in result.to_json()


@pytest.mark.parametrize("change", ["Deepen()", "Widen(factor=1.5)"])
def test_children_begin_where_their_parents_stopped(change: str, told: tuple[Path, SweepResult]) -> None:
    folder, result = told
    size = int(result[f"only + {change} @2"].costs["parameters"])
    parent = torch.load(folder / f"{int(result['only'].costs['parameters'])}-2-end")
    child = torch.load(folder / f"{size}-2-start")
    torch.testing.assert_close(child["outputs"], parent["outputs"], rtol=1e-5, atol=1e-5)
    assert (child["rate"], child["steps"]) == (parent["rate"], parent["steps"]) == (0.01 * 0.5**2, 8)
    assert {value for name, value in child["decay"].items() if name.endswith("bias")} == {0.0}
    if change == "Deepen()":  # in which the other layers are the parent's own
        assert parent["memory"].keys() < child["decay"].keys()
        assert_same_state({name: child["memory"][name] for name in parent["memory"]}, parent["memory"])
        assert child["memory"].keys() == parent["memory"].keys()
    else:
        first, grown = (one["memory"]["net.3.weight"] for one in (parent, child))
        assert grown["exp_avg"].shape == (4, 6)
        assert set(grown["exp_avg"][0].tolist()) == set(first["exp_avg"][0].tolist())
        assert grown["step"] == first["step"]


def test_what_children_are_told_is_the_best_loaded(told: tuple[Path, SweepResult]) -> None:
    folder, result = told
    finalists = [c for c in result.candidates if c.checkpoint is not None]
    assert len(finalists) == 3
    for candidate in finalists:
        module = candidate.load()
        said = torch.load(folder / f"{module.size}-6-end")
        assert torch.equal(module.net(dataset().tensors[0]), said["outputs"])
    assert result.best.name == result.top(3)[0].name


def test_running_again_only_reads(told: tuple[Path, SweepResult]) -> None:
    folder, result = told
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    again = sweep(folder, {"only": functools.partial(Tells, folder)}, budget=FixedRounds(3, 2, keep=1)).run(
        loader(shuffle=True), loader()
    )
    assert again == result
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()} == before
    with pytest.raises(ValueError, match=r"`mutate` was \[.Deepen\(after=None, .*now None"):
        sweep(
            folder, {"only": functools.partial(Tells, folder)}, budget=FixedRounds(3, 2, keep=1), mutate=()
        ).run(loader(shuffle=True), loader())


def test_a_childs_rungs_equal_straight_training(tmp_path: Path) -> None:
    """A child that is trained in two rungs ends with the bits of one that is trained in one."""

    def finals(folder: Path, budget: Any) -> dict[str, Any]:
        result = sweep(folder, {"only": functools.partial(Tells, folder)}, budget=budget).run(
            loader(shuffle=True), loader()
        )
        return {c.name: c.load().state_dict() for c in result.candidates if c.name.endswith("@2")}

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    in_rungs = finals(tmp_path / "a", FixedRounds(3, 2, keep=99))
    straight = finals(tmp_path / "b", SuccessiveHalving(2, 6, 3))
    assert len(straight) == 2
    assert_same_state(in_rungs, straight)


@pytest.mark.parametrize("children", [1, 2])
def test_rounds_with_children(children: int) -> None:
    """As many go on as without children; the children of those who do are in the next round too."""

    def sizes(budget: Any, founders: int) -> list[int]:
        standings = [Standing() for _ in range(founders)]
        sizes: list[int] = []
        for epochs in budget.rungs if hasattr(budget, "rungs") else [1, 2, 3]:
            decision = budget.decide(standings, None, children)
            assert {e for _, e in decision.start} == {epochs}
            sizes.append(len(decision.start))
            for index, _ in decision.start:
                scores = {**standings[index].scores, epochs: float(index)}
                standings[index] = Standing(
                    scores, parent=standings[index].parent, born=standings[index].born
                )
            over = budget.decide(standings, None, children).survivors
            for parent in over[len(sizes) - 1][1] if len(over) == len(sizes) else ():
                standings += [Standing(parent=parent, born=epochs) for _ in range(children)]
        done = budget.decide(standings, None, children)
        assert done.start == ()
        assert len(standings) - len(done.stopped) == sizes[-1], "all that are in the last round finish"
        return sizes

    each = 1 + children
    assert sizes(SuccessiveHalving(1, 9, 3), 9) == [9, 3 * each, 1 * each]
    assert sizes(SuccessiveHalving(1, 9, 3), 1) == [1, each, each]
    assert sizes(FixedRounds(3, 1, keep=2), 5) == [5, 2 * each, 2 * each]
    assert sizes(FixedRounds(3, 1, keep=0.5), 4) == [4, 2 * each, each * each]


class Fixed(Classifier):
    """Its sizes are in its code."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net[3](self.net[:3](inputs).reshape(-1, 2, 8).flatten(1))


class Late(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 4))


class Data(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        assert self.trainer is not None, "there is a Trainer"

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "too large": (
        Classifier,
        loader(),
        {"constraints": [MaxParameters(400)]},
        "460 parameters, more than 400",
    ),
    "fixed sizes": (Fixed, loader(), {}, "its parent can't change so: "),
    "late layers": (Late, loader(), {}, "children need layers that are made in `__init__`"),
    "no example": (Classifier, Data(), {}, "Found none in the data: AssertionError('there is a Trainer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_child_that_cannot_be_is_a_row_with_its_reason(name: str, tmp_path: Path) -> None:
    kind, data, arguments, reason = REFUSED[name]
    result = sweep(tmp_path, {"a": kind}, mutate=[Widen(1.5)], **arguments).run(
        data, None if isinstance(data, Data) else loader()
    )
    child = result["a + Widen(factor=1.5) @1"]
    assert child.state == "refused"
    assert reason in child.reason
    assert child.checkpoint is None
    assert result.best.name == "a"
    assert result.best.epochs == 2


def test_an_example_of_the_module_serves_where_data_give_none(tmp_path: Path) -> None:
    class WithExample(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = torch.zeros(2, 12)

    result = sweep(tmp_path, {"a": WithExample}).run(Data())
    assert {c.state for c in result.candidates} == {"finished"}, str(result)


class Counts(Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.count += 1
        pl_module.log("counted", float(self.count))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def test_callbacks_begin_anew(tmp_path: Path) -> None:
    candidates = {"a": Candidate(Classifier, trainer={"callbacks": [Counts()]})}
    result = sweep(
        tmp_path, candidates, monitor="counted", budget=FixedRounds(3, 1, keep=9), mutate=[Deepen()]
    ).run(loader(), loader())
    assert result["a"].scores == {1: 1.0, 2: 2.0, 3: 3.0}
    assert result["a + Deepen() @1"].scores == {2: 1.0, 3: 2.0}


def test_a_parent_that_stopped_by_itself_has_children_that_train(tmp_path: Path) -> None:
    stopping = EarlyStopping("train_loss", patience=1, stopping_threshold=100.0)  # at once
    candidates = {"a": Candidate(Classifier, trainer={"callbacks": [stopping]})}
    result = sweep(tmp_path, candidates, budget=FixedRounds(2, 2, keep=1)).run(loader(), loader())
    assert result["a"].epochs == 1
    assert {c.epochs for c in result.candidates if c.parent} == {2}


@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")
def test_averages_begin_anew(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    candidates = {"a": Candidate(Classifier, trainer={"callbacks": [EMAWeightAveraging()]})}
    result = sweep(tmp_path, candidates, budget=FixedRounds(3, 1, keep=9)).run(loader(), loader())
    assert {c.state for c in result.candidates} == {"finished"}, str(result)
    assert len(result.candidates) == 9


def test_drawn_parents(tmp_path: Path) -> None:
    """Children have the parameters of their parents, and the sampler knows nothing of them."""

    def search(folder: Path, **arguments: Any) -> SweepResult:
        space = SearchSpace(
            functools.partial(Classifier, adamw), {"hidden": IntDistribution(2, 400)}, samples=4,
            sampler=RegularizedEvolution(population=2, tournament=1),
        )  # fmt: skip
        return sweep(folder, space, **arguments).run(loader(), loader())

    result = search(tmp_path / "a", mutate=[Deepen()])
    child = next(c for c in result.candidates if c.parent)
    assert child.parameters == result[child.parent].parameters
    assert child.load().net[0].out_features == child.parameters["hidden"]
    drawn = {c.name: c.parameters for c in search(tmp_path / "b", mutate=()).candidates}
    assert {c.name: c.parameters for c in result.candidates if not c.parent} == drawn


def test_at_most_those_in_the_round_and_workers_have_checkpoints(tmp_path: Path) -> None:
    seen = tmp_path / "seen"

    class Writes(Classifier):
        def on_train_end(self) -> None:
            with seen.open("a") as file:
                file.write(f"{len(list((tmp_path / 'sweep').rglob('*.ckpt')))}\n")

    candidates = {str(w): functools.partial(Writes, adamw, w) for w in (2, 3, 4)}
    result = sweep(tmp_path, candidates, budget=FixedRounds(3, 1, keep=2)).run(loader(), loader())
    counts = [int(line) for line in seen.read_text().split()]
    assert len(counts) == 3 + 6 + 6
    assert max(counts) <= 6 + 1
    assert (
        sum(c.checkpoint is not None for c in result.candidates) == len(list(tmp_path.rglob("*.ckpt"))) == 6
    )
    assert not list(tmp_path.rglob("*.part"))


def make_sweep(directory: Path, pipe: Path, epoch: int) -> ArchitectureSweep:
    return sweep(
        directory,
        {f"width {w}": functools.partial(Announces, w, pipe, epoch) for w in (2, 4)},
        budget=FixedRounds(rounds=3, epochs=1, keep=1),
        executor=LocalProcesses(2),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    folder = tmp_path_factory.mktemp("undisturbed")
    return make_sweep(folder, folder / "pipe", 0).run(loader(shuffle=True), loader())


@pytest.mark.parametrize("epoch", [1, 2], ids=["as children are born", "as grandchildren are"])
def test_a_driver_that_is_killed_loses_no_child(epoch: int, undisturbed: SweepResult, tmp_path: Path) -> None:
    pipe = fifo(tmp_path / "run")
    arguments = f"Path({str(tmp_path / 'run')!r}), Path({str(pipe)!r}), {epoch}"
    driver = drive(
        tmp_path / "drive.py", "test_mutate", "make_sweep", arguments, "loader(shuffle=True), loader()"
    )
    trial = announced(pipe)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait(timeout=60)
    wait_gone(trial)
    pipe.unlink()
    # With as many workers, so that each has as many threads, whose number decides how sums round.
    result = make_sweep(tmp_path / "run", pipe, epoch).run(loader(shuffle=True), loader())
    assert columns(result) == columns(undisturbed)
    for one, other in zip(result.top(3), undisturbed.top(3), strict=True):
        assert_same_state(one.load().state_dict(), other.load().state_dict())


def test_children_on_two_ranks(tmp_path: Path) -> None:
    trainer = {"accelerator": "cpu", "strategy": "ddp", "devices": 2}
    result = sweep(
        tmp_path, {"a": Classifier}, trainer=trainer, executor=LocalProcesses(), mutate=[Deepen()]
    ).run(loader(), loader())
    assert {c.state for c in result.candidates} == {"finished"}, str(result)
    child = result["a + Deepen() @1"]
    assert set(child.scores) == {2}
    assert len(list(child.load().parameters())) == len(list(Classifier().parameters())) + 2


class NoChange:
    """What a user may write."""

    def plan(self, module: nn.Module, example_input: Any) -> "NoChange":
        assert example_input.shape == (8, 12)
        return self

    def saved_plan(self, path: str | Path) -> "NoChange":
        assert Path(path).read_text() == "nothing"
        return self

    def apply_in_place(self, module: nn.Module, optimizers: Any = ()) -> None: ...

    def save(self, path: str | Path) -> None:
        Path(path).write_text("nothing")

    def __repr__(self) -> str:
        return "nothing"


def test_a_child_of_no_change_is_its_parent_again(tmp_path: Path) -> None:
    result = sweep(tmp_path, {"a": Classifier}, mutate=[NoChange()], budget=FixedRounds(3, 1, keep=9)).run(
        loader(shuffle=True), loader()
    )
    parent, child = result["a"], result["a + nothing @1"]
    assert child.scores == {2: parent.scores[2], 3: parent.scores[3]}
    assert_same_state(child.load().state_dict(), parent.load().state_dict())


def test_labels() -> None:
    assert label(Widen(1.5, "net.0", seed=3)) == "Widen(factor=1.5, name='net.0', seed=3)"
    assert label(Deepen()) == "Deepen()"


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "class": ({"mutate": [Deepen]}, TypeError, "`mutate` must be steps of growth, .* Found Deepen"),
    "no step": ({"mutate": [1.5]}, TypeError, "`mutate` must be steps of growth, .* Found 1.5"),
    "twice": ({"mutate": [Widen(2), Widen(2.0)]}, ValueError, r"Found `Widen\(factor=2(.0)?\)` twice"),
    "asynchronous": ({"budget": AsynchronousHalving()}, ValueError, "between the rounds of all candidates. Found"),
    "hyperband": ({"budget": Hyperband()}, ValueError, r"Found `budget = Hyperband\("),
    "one round": ({"budget": FixedRounds(1, 3)}, ValueError, "or `FixedRounds` of at least 2 rounds"),
    "repeats": ({"repeats": 3}, ValueError, "Found `mutate` and `repeats = 3`"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, tmp_path: Path) -> None:
    arguments, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        sweep(tmp_path, {"a": Classifier}, **arguments)
    assert not list(tmp_path.iterdir()), "nothing is written"
