"""From a library of networks to one small, fast one: sweep, ensemble, distil, remove channels, prune, export, compare.

    python examples/compress.py                        # handwritten digits, two or three minutes
    python examples/compress.py --seeds 3              # mean and spread over three seeds
    python examples/compress.py --data fashion-mnist   # 60,000 images, where they are found

Stop it at any point and start it again: what is done is not done again. Everything is written to the folder
`compress-digits`: checkpoints, `small.onnx` where onnx is installed, and the report as CSV, HTML and PNG.

1. `ArchitectureSweep` trains a library of networks, two at a time. Its best is what the result is measured against.
2. Its best three, as a `ParallelEnsemble`, teach a smaller network: `DistillationModule`. While that learns,
   `ChannelPruning` takes most of its operations away, for real.
3. `IterativePruning` zeroes two of each four weights of what is left, `LRDecay` lets the learning rate fall.
"""

import argparse
import copy
import logging
import statistics
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from data import load
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset, random_split

import lightning_structopt as so
from lightning_structopt.profiling import ComparisonReport
from lightning_structopt.sweep import SweepResult

LIBRARY = {
    "two layers": ((64, 128), 3),
    "three layers": ((32, 64, 128), 3),
    "three wide layers": ((64, 128, 256), 3),
    "large kernel": ((48, 96), 5),
    "narrow": ((16, 32), 3),
}
STUDENT = ((16, 32, 64), 3)


class Classifier(pl.LightningModule):
    """A LightningModule like yours: it knows nothing of what will be done to it."""

    def __init__(self, widths: tuple[int, ...], kernel_size: int = 3, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = so.ConvNet(1, widths, 10, kernel_size=kernel_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class Reshuffled(Sampler[int]):
    """An order of its own for each epoch, which is the same when training was broken off and goes on."""

    def __init__(self, samples: int) -> None:
        self.samples, self.epoch = samples, 0

    def set_epoch(self, epoch: int) -> None:  # the trainer calls it
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.epoch)).tolist()


class Pipeline:
    """One seed's way from the library to the small network; each step is on disk before the next begins."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, seed: int, console: Console) -> None:
        self.folder, self.seed, self.console = folder, seed, console
        self.fast, self.keep = arguments.fast, arguments.keep
        self.epochs = 1 if self.fast else arguments.epochs
        train_x, train_y, test_x, test_y = load(arguments.data)
        self.example, size = train_x[:2], 64 if len(train_x) < 10_000 else 128
        everything = TensorDataset(train_x, train_y)
        parts = random_split(everything, [0.9, 0.1], torch.Generator().manual_seed(0))
        self.train = DataLoader(parts[0], size, sampler=Reshuffled(len(parts[0])))
        self.val = DataLoader(parts[1], 512)
        self.test = DataLoader(TensorDataset(test_x, test_y), 64)

    def run(self) -> ComparisonReport:
        """Take all steps and compare what they led to."""
        self.console.print("[bold]1[/] A library of networks")
        result = self.swept()
        ensemble = so.ParallelEnsemble(result.top(3)).eval()
        self.console.print("[bold]2[/] The best three teach a small one, which gets smaller meanwhile")
        small = self.distilled(ensemble)
        self.console.print("[bold]3[/] Two of each four of its weights become zero")
        sparse = self.pruned(ensemble, small)
        self.export(sparse)
        models = {
            f"best: {result.best.name}": result.best.load(),
            "ensemble of 3": ensemble,
            "distilled and shrunk": small,
            "and pruned": sparse,
        }
        report = so.compare(models, self.test, seconds=0.05 if self.fast else 0.5, progress=False)
        report.to_csv(self.folder / "report.csv")
        report.to_html(self.folder / "report.html")
        report.plot(self.folder / "report.png")
        return report

    def swept(self) -> SweepResult:
        library = dict(list(LIBRARY.items())[-3:]) if self.fast else LIBRARY
        return so.ArchitectureSweep(
            candidates={name: partial(Classifier, *given) for name, given in library.items()},
            monitor="val_acc",
            budget=so.FixedRounds(rounds=2, epochs=max(1, self.epochs // 2), keep=3),
            trainer={"accelerator": "cpu"},
            executor=so.LocalProcesses(workers=2),
            directory=self.folder / "sweep",
            seed=self.seed,
        ).run(self.train, self.val)

    def distilled(self, ensemble: so.ParallelEnsemble) -> Classifier:
        """Return the student, most of whose operations went while it learned, whole fours of channels at a time."""
        pruning = so.ChannelPruning(
            so.FLOPs(self.keep), interval="step", every=10, end=0.6, remove="now",
            round_to=4, example_input=self.example, verbose=False,
        )  # fmt: skip
        pl.seed_everything(self.seed, verbose=False)  # the student is drawn now, whatever was done before
        path = self.taught("small", Classifier(*STUDENT), ensemble, 2 * self.epochs, pruning)
        return so.load_shrunk(Classifier, path)

    def pruned(self, ensemble: so.ParallelEnsemble, small: Classifier) -> Classifier:
        """Return the student with two of each four weights at zero, where there are four inputs to choose from."""
        odd = [name for name, weight in small.named_parameters() if weight.ndim > 1 and weight.shape[1] % 4]
        pruning = so.IterativePruning(
            0.5, pattern=so.NByM(2, 4), interval="step", every=10, end=0.5, exclude=odd or None, verbose=False
        )
        sparse = copy.deepcopy(small)
        path = self.taught("sparse", sparse, ensemble, max(1, self.epochs // 2), pruning)
        sparse.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        return sparse

    def taught(
        self,
        name: str,
        student: Classifier,
        ensemble: so.ParallelEnsemble,
        epochs: int,
        *callbacks: pl.Callback,
    ) -> Path:
        """Distil the ensemble into ``student``, or go on with it; return the checkpoint, also if it was done before."""
        done, last = self.folder / f"{name}.ckpt", self.folder / name / "last.ckpt"
        if not done.exists():
            trainer = pl.Trainer(
                max_epochs=epochs,
                callbacks=[
                    *callbacks,
                    so.LRDecay(so.Cosine(minimum=0.02)),
                    ModelCheckpoint(last.parent, save_last=True),
                    RichProgressBar(leave=False),
                ],
                accelerator="cpu",
                logger=False,
                enable_model_summary=False,
            )
            module = so.DistillationModule(ensemble.as_teacher(), student, so.SoftTarget(2.0), alpha=0.9)
            trainer.fit(module, self.train, ckpt_path=last if last.exists() else None)
            trainer.save_checkpoint(last.with_name("done"))
            last.with_name("done").rename(done)  # there as a whole, or not at all
        return done

    def export(self, module: Classifier) -> None:
        if find_spec("onnx") and find_spec("onnxscript"):
            path = self.folder / "small.onnx"
            torch.onnx.export(module.eval(), (self.example,), path, dynamo=True, verbose=False)


def gains(report: ComparisonReport) -> dict[str, float]:
    """Return what the last network is against the first."""
    first, last = report.entries[0], report.entries[-1]
    return {
        "accuracy of the best (%)": 100 * first.metrics["accuracy"],
        "accuracy of the small one (%)": 100 * last.metrics["accuracy"],
        "fewer parameters": first.costs["parameters"] / last.costs["parameters"],
        "fewer operations": first.costs["FLOPs"] / last.costs["FLOPs"],
        "lower latency": first.costs["latency (ms)"] / last.costs["latency (ms)"],
    }


def table(found: list[dict[str, float]]) -> Table:
    shown = Table("", "mean", "by seed", title="The small network against the best of the sweep")
    for name in found[0]:
        values, unit = [each[name] for each in found], "" if "%" in name else "x"
        shown.add_row(
            name, f"{statistics.mean(values):.2f}{unit}", "  ".join(f"{value:.2f}" for value in values)
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--epochs", type=int, default=10, help="of each network of the library")
    parser.add_argument(
        "--keep", type=float, default=0.35, help="fraction of the student's operations to keep"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--fast", action="store_true", help="an epoch of each, to see that it runs")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore", ".*(does not have many workers|number of training batches).*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    console = Console(width=120)
    root = Path(f"compress-{arguments.data}{'-fast' if arguments.fast else ''}")
    found = []
    for seed in range(arguments.seeds):
        report = Pipeline(arguments, root / f"seed-{seed}", seed, console).run()
        console.print(report)
        found.append(gains(report))
    console.print(table(found))
    console.print(f"Written: {root}")


if __name__ == "__main__":
    main()
