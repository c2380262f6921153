"""How long it takes to find the best of eight MLPs: a plain loop, this sweep, Optuna's halving, Ray Tune's ASHA.

Eight widths on 10,000 training images of Fashion-MNIST, validated on 10,000 others, 8 epochs at most. The plain loop
calls `Trainer.fit` for each in one process, one after another. All of them have the same seeds and batches. Seconds
are those of the whole call, with checkpoints; the first start of the process that forks trials is a row of its own, as
it is paid once for all sweeps of a program. Ray Tune takes part where it is installed (`pip install "ray[tune]"`), with
two workers and the start of its cluster.
"""

import functools
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import optuna
import torch
from common import Batches, images, parse_arguments, quiet_trainer, write_json
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_structopt.sweep import ArchitectureSweep, FixedRounds, LocalProcesses, SuccessiveHalving

WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
Found = tuple[str, dict[str, float], int]  # winner, last scores, epochs trained
Data = tuple[Batches, Batches]


class MLP(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def batches(fast: bool) -> Data:
    train_x, train_y, test_x, test_y = images(fast)
    size = 500 if fast else 10_000
    return Batches(train_x[:size], train_y[:size], 64, seed=0), Batches(test_x[:size], test_y[:size], 1000)


def plain(data: Data, epochs: int) -> Found:
    scores = {}
    for width in WIDTHS:
        train, val = Batches(data[0].inputs, data[0].labels, 64, seed=0), data[1]
        pl.seed_everything(0, verbose=False)
        trainer = quiet_trainer(max_epochs=epochs)
        trainer.fit(MLP(width), train, val)
        scores[str(width)] = float(trainer.callback_metrics["val_acc"])
    return max(scores, key=scores.__getitem__), scores, epochs * len(WIDTHS)


def swept(data: Data, epochs: int, workers: int, halving: bool, widths: tuple[int, ...] = WIDTHS) -> Found:
    folder = Path(tempfile.mkdtemp())
    budget = SuccessiveHalving(1, epochs, 2) if halving else FixedRounds(rounds=1, epochs=epochs)
    sweep = ArchitectureSweep(
        {str(width): functools.partial(MLP, width) for width in widths},
        "val_acc",
        budget=budget,
        trainer={"accelerator": "cpu"},
        executor=LocalProcesses(workers),
        directory=folder / "sweep",
        progress=False,
    )
    result = sweep.run(*data)
    shutil.rmtree(folder, ignore_errors=True)
    scores = {candidate.name: candidate.score for candidate in result.candidates}
    return result.best.name, scores, sum(candidate.epochs for candidate in result.candidates)


class Report(Callback):
    """Optuna's side of Lightning, as its integration has it."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial, self.epochs = trial, 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.epochs += 1
        self.trial.report(float(trainer.callback_metrics["val_acc"]), self.epochs)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def optuna_halving(data: Data, epochs: int) -> Found:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spent = 0

    def objective(trial: optuna.Trial) -> float:
        nonlocal spent
        width = trial.suggest_categorical("width", WIDTHS)
        train, val = Batches(data[0].inputs, data[0].labels, 64, seed=0), data[1]
        pl.seed_everything(0, verbose=False)
        report = Report(trial)
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[report])
        try:
            trainer.fit(MLP(width), train, val)
        finally:
            spent += report.epochs
        return float(trainer.callback_metrics["val_acc"])

    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.GridSampler({"width": list(WIDTHS)}, seed=0),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    )
    study.optimize(objective, n_trials=len(WIDTHS))
    scores = {str(t.params["width"]): max(t.intermediate_values.items())[1] for t in study.trials}
    return str(study.best_params["width"]), scores, spent


def ray_tune(data: Data, epochs: int) -> Found:
    import ray
    from ray import tune

    def train(config: dict[str, int], data: Data) -> None:
        class Tell(Callback):
            def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                if not trainer.sanity_checking:
                    tune.report({"val_acc": float(trainer.callback_metrics["val_acc"])})

        torch.set_num_threads(1)
        train, val = Batches(data[0].inputs, data[0].labels, 64, seed=0), data[1]
        pl.seed_everything(0, verbose=False)
        quiet_trainer(max_epochs=epochs, callbacks=[Tell()]).fit(MLP(config["width"]), train, val)

    folder = tempfile.mkdtemp()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    scheduler = tune.schedulers.ASHAScheduler(max_t=epochs, grace_period=1, reduction_factor=2)
    tuner = tune.Tuner(
        tune.with_parameters(train, data=data),
        param_space={"width": tune.grid_search(list(WIDTHS))},
        tune_config=tune.TuneConfig(metric="val_acc", mode="max", scheduler=scheduler),
        run_config=tune.RunConfig(storage_path=folder, verbose=0),
    )
    results = list(tuner.fit())
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    scores = {str(result.config["width"]): result.metrics["val_acc"] for result in results}
    spent = sum(result.metrics["training_iteration"] for result in results)
    return max(scores, key=scores.__getitem__), scores, spent


ENTRANTS: dict[str, Callable[[Data, int], Found]] = {
    "plain loop": plain,
    "sweep in full, 1 worker": functools.partial(swept, workers=1, halving=False),
    "sweep in full, 2 workers": functools.partial(swept, workers=2, halving=False),
    "sweep halving, 1 worker": functools.partial(swept, workers=1, halving=True),
    "sweep halving, 2 workers": functools.partial(swept, workers=2, halving=True),
    "Optuna's SuccessiveHalvingPruner": optuna_halving,
    **({"Ray Tune's ASHA, 2 workers": ray_tune} if find_spec("ray") else {}),
}


def first_start() -> dict[str, Any]:
    start = perf_counter()
    swept(batches(fast=True), 1, workers=1, halving=False, widths=(8,))
    return {"entrant": "first start, and one tiny trial", "seconds": perf_counter() - start}


def main() -> None:
    arguments = parse_arguments("sweep", __doc__, epochs=8)
    epochs = 2 if arguments.fast else arguments.epochs
    rows, data, truth = [first_start()], batches(arguments.fast), dict[str, float]()
    for name, run in ENTRANTS.items():
        if arguments.fast and name in {"sweep in full, 1 worker", "sweep halving, 1 worker"}:
            continue
        start = perf_counter()
        winner, scores, spent = run(data, epochs)
        seconds = perf_counter() - start
        truth = truth or scores
        error = (max(truth.values()) * (1 - max(truth.values())) / len(data[1].labels)) ** 0.5
        base = rows[1]["seconds"] if len(rows) > 1 else seconds
        rows.append({
            "entrant": name, "seconds": seconds, "ratio": seconds / base,
            "epochs": spent, "winner": winner, "accuracy_in_full": truth[winner],
            "standard_errors_below_best": (max(truth.values()) - truth[winner]) / error,
        })  # fmt: skip
    table = Table(
        "", "seconds", "x plain", "epochs", "winner", "its accuracy in full", "standard errors below best"
    )
    for row in rows:
        numbers = (
            [f"{row['ratio']:.2f}", str(row["epochs"]), row["winner"], f"{row['accuracy_in_full']:.4f}",
             f"{row['standard_errors_below_best']:.1f}"] if "winner" in row else [""] * 5
        )  # fmt: skip
        table.add_row(row["entrant"], f"{row['seconds']:.1f}", *numbers)
    Console(width=120).print(table)
    write_json(arguments.output, "sweep", rows)


if __name__ == "__main__":
    main()
