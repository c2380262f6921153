"""Train several small networks, let them answer together, then cheaply, then teach one what all of them know.

    python examples/ensemble.py                        # handwritten digits, about a minute
    python examples/ensemble.py --members 8
    python examples/ensemble.py --data fashion-mnist   # 60,000 images, where they are found

Members -> the ensemble -> a cascade that asks it only about hard images -> one network distilled from it. Prints a
table of accuracy, parameters, operations and latency, and writes `ensemble.html`.
"""

import argparse
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from data import load
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_structopt as so


class Classifier(pl.LightningModule):
    """A LightningModule like yours: it knows nothing of ensembles."""

    def __init__(self, image_size: int, width: int = 6, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2 * width * (image_size // 4) ** 2, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def fit(module: pl.LightningModule, loader: DataLoader, epochs: int) -> None:
    pl.Trainer(
        max_epochs=epochs,
        callbacks=[so.LRDecay(so.Cosine(minimum=0.02))],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(module, loader)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--fast", action="store_true", help="two members, one epoch, to see that it runs")
    arguments = parser.parse_args()
    count, epochs = (2, 1) if arguments.fast else (arguments.members, arguments.epochs)

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    console = Console()
    train_x, train_y, test_x, test_y = load(arguments.data)
    # What members are chosen and thresholds are fitted by, they must not have been trained on.
    training, held_out = random_split(
        TensorDataset(train_x, train_y), [0.8, 0.2], generator=torch.Generator().manual_seed(0)
    )
    train = DataLoader(training, 32 if len(train_x) < 10_000 else 128, shuffle=True)
    held, test = DataLoader(held_out, 256), DataLoader(TensorDataset(test_x, test_y), 256)
    size = train_x.shape[-1]

    console.print(f"Training {count} members, and a tiny one to go before them")
    members = []
    for seed in range(count):
        pl.seed_everything(seed, verbose=False)
        members.append(Classifier(size))
        fit(members[-1], train, epochs)
    tiny = Classifier(size, width=3)
    fit(tiny, train, epochs)

    gathered = so.predictions(members, held)
    apart = so.disagreement(gathered.outputs)
    console.print(
        f"Two members disagree about {100 * float(apart.sum()) / (count * (count - 1)):.1f}% of images"
    )
    everyone = so.ParallelEnsemble(members)
    choice = so.select_greedily(members, held, log_likelihood)
    chosen = so.ParallelEnsemble([members[index] for index in choice.indices], choice.chosen_weights)

    # A threshold means what it says once the tiny network knows how sure it may be.
    cascade = so.SerialEnsemble([so.TemperatureScaling(tiny).fit(held), everyone])
    accuracy = (everyone(images_of(held)).argmax(1) == gathered.target).float().mean()
    report = cascade.calibrate(held, target_accuracy=float(accuracy))
    console.print(f"The cascade asks all members about {100 * report.executed_fraction[1]:.0f}% of images")

    console.print("Teaching one network what all of them know")
    pl.seed_everything(count, verbose=False)
    student = Classifier(size)
    fit(
        so.DistillationModule(everyone.as_teacher(), student, so.SoftTarget(1.0), alpha=0.9),
        train,
        2 * epochs,
    )

    alone = [(member(test_x).argmax(1) == test_y).float().mean() for member in members]
    console.print(f"Members by themselves are right about {100 * float(sum(alone)) / count:.2f}% on average")
    models = {
        "one member": members[0],
        f"all {count}": everyone,
        "chosen": chosen,
        "cascade": cascade,
        "distilled": student,
    }
    seconds = 0.05 if arguments.fast else 0.5
    comparison = so.compare(models, test, seconds=seconds, progress=False)
    console.print(comparison)
    comparison.to_html("ensemble.html")
    console.print("Written: ensemble.html")


def log_likelihood(probabilities: Tensor, labels: Tensor) -> Tensor:
    return -nn.functional.nll_loss(probabilities.clamp_min(1e-9).log(), labels)


def images_of(loader: DataLoader) -> Tensor:
    return torch.cat([images for images, _ in loader])


if __name__ == "__main__":
    main()
