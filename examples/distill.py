"""Train a teacher, then one small student without it and with it, by several losses, and compare.

    python examples/distill.py                        # handwritten digits, about a minute
    python examples/distill.py --seeds 3              # mean and spread over three seeds
    python examples/distill.py --data fashion-mnist   # 60,000 images, where they are found

Prints a table and, where matplotlib is installed, draws `distill.png`. The best student is written to
`student.ckpt`, which loads into its own class.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import lightning.pytorch as pl
import torch
from data import load
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_structopt as so
from lightning_structopt.distillation import DIST, DKD, DistillationModule, Hint, LogitMSE, SoftTarget


class ConvClassifier(pl.LightningModule):
    """A LightningModule like yours: it knows nothing of teachers."""

    def __init__(self, image_size: int, width: int = 8, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(2 * width * (image_size // 4) ** 2, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


Wrap = Callable[[pl.LightningModule, pl.LightningModule], pl.LightningModule]

KINDS: dict[str, Wrap] = {
    "alone": lambda teacher, student: student,
    "SoftTarget": lambda t, s: DistillationModule(t, s, SoftTarget(4.0), alpha=0.9),
    "DKD": lambda t, s: DistillationModule(t, s, DKD(beta=4.0), weight=1.0),
    "DIST": lambda t, s: DistillationModule(t, s, DIST(), weight=1.0),
    "LogitMSE": lambda t, s: DistillationModule(t, s, LogitMSE(), weight=0.1),
    "SoftTarget + Hint": lambda t, s: DistillationModule(
        t, s, {"logits": SoftTarget(4.0), "features": (0.5, Hint())}, alpha=0.9
    ),
}


@dataclass
class Runs:
    """What the runs of one kind measured, one value a seed, and the curve of the last one."""

    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    trained: pl.LightningModule | None = None


class Curve(pl.Callback):
    """Remembers accuracy after each epoch."""

    def __init__(self) -> None:
        self.accuracy: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.accuracy.append(100 * float(trainer.callback_metrics["test_accuracy"]))


@torch.no_grad()
def agreement(one: pl.LightningModule, other: pl.LightningModule, images: Tensor) -> float:
    """Return the share of images, in percent, on which both models choose the same class."""
    one.eval(), other.eval()
    same = [one(part).argmax(1) == other(part).argmax(1) for part in images.split(512)]
    return 100 * torch.cat(same).float().mean().item()


def train(seed: int, module: pl.LightningModule, data: tuple[Tensor, ...], epochs: int) -> Curve:
    pl.seed_everything(seed, verbose=False)
    train_images, train_labels, test_images, test_labels = data
    batch_size = 32 if len(train_images) < 10_000 else 128
    curve = Curve()
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[curve, so.LRDecay(so.Cosine(minimum=0.01)), RichProgressBar(leave=False)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(
        module,
        DataLoader(TensorDataset(train_images, train_labels), batch_size, shuffle=True),
        DataLoader(TensorDataset(test_images, test_labels), 512),
    )
    return curve


def compare(
    seeds: int, data: tuple[Tensor, ...], epochs: int, console: Console
) -> tuple[Runs, dict[str, Runs]]:
    size, teachers, kinds = data[0].shape[-1], Runs(), {name: Runs() for name in KINDS}
    for seed in range(seeds):
        console.print(f"Seed {seed}: a teacher and {len(KINDS)} students, {epochs} epochs each")
        pl.seed_everything(seed, verbose=False)
        teacher = ConvClassifier(size, width=48)
        record(teachers, train(seed, teacher, data, epochs), teacher, teacher, data, 0.0)
        for name, wrap in KINDS.items():
            pl.seed_everything(seed, verbose=False)
            student = ConvClassifier(size, width=4)  # the same start for every kind
            start = time.perf_counter()
            curve = train(seed, wrap(teacher, student), data, epochs)
            record(kinds[name], curve, student, teacher, data, time.perf_counter() - start)
    return teachers, kinds


def record(
    runs: Runs,
    curve: Curve,
    module: ConvClassifier,
    teacher: ConvClassifier,
    data: tuple[Tensor, ...],
    seconds: float,
) -> None:
    runs.accuracy.append(curve.accuracy[-1])
    runs.seconds.append(seconds)
    runs.agreement.append(agreement(module, teacher, data[2]))
    runs.curve, runs.trained = curve.accuracy, module


def parameters(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def show(teachers: Runs, kinds: dict[str, Runs]) -> Table:
    table = Table(title="One student, several ways to learn")
    for name in ("", "parameters", "accuracy on test data, %", "agrees with teacher, %", "training time, s"):
        table.add_column(name, justify="right" if name else "left")
    for name, runs in {"the teacher": teachers, **kinds}.items():
        seconds = spread(runs.seconds, ".1f") if any(runs.seconds) else ""
        row = (f"{parameters(runs.trained):,}", spread(runs.accuracy), spread(runs.agreement), seconds)
        table.add_row(name, *row)
    return table


def spread(values: list[float], form: str = ".2f") -> str:
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def draw(teachers: Runs, kinds: dict[str, Runs], path: str) -> bool:
    """Draw the last seed's curves into ``path``; return False where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(range(1, len(teachers.curve) + 1), teachers.curve, "k--", label="the teacher")
    for name, runs in kinds.items():
        style = {"color": "tab:gray", "linewidth": 3} if name == "alone" else {}
        axes.plot(range(1, len(runs.curve) + 1), runs.curve, label=name, **style)
    low = min(min(runs.curve[len(runs.curve) // 3 :]) for runs in kinds.values())
    axes.set(xlabel="epoch", ylabel="accuracy on test data, %", ylim=(low - 1, 100), title="While training")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run")
    parser.add_argument("--epochs", type=int, default=None, help="20 on digits, 8 on Fashion-MNIST")
    parser.add_argument("--fast", action="store_true", help="two epochs, to see that it runs")
    arguments = parser.parse_args()

    console = Console()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data = load(arguments.data)
    if arguments.data == "digits":
        torch.set_num_threads(1)  # images this small are done before a second thread has woken up
    epochs = 2 if arguments.fast else arguments.epochs or (20 if arguments.data == "digits" else 8)
    teachers, kinds = compare(arguments.seeds, data, epochs, console)
    console.print(show(teachers, kinds))
    best = max(kinds, key=lambda name: statistics.mean(kinds[name].accuracy))
    DistillationModule(teachers.trained, kinds[best].trained).export_student("student.ckpt")
    again = ConvClassifier.load_from_checkpoint("student.ckpt", weights_only=True)
    console.print(f"Written: student.ckpt ({best}, {parameters(again):,} parameters)")
    if draw(teachers, kinds, "distill.png"):
        console.print("Drawn: distill.png")


if __name__ == "__main__":
    main()
