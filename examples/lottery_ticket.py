"""Find lottery tickets: sparse networks that train as well as the dense one, from where it started.

    python examples/lottery_ticket.py                        # handwritten digits
    python examples/lottery_ticket.py --seeds 3
    python examples/lottery_ticket.py --data fashion-mnist   # 60,000 images, where they are found

One `Trainer.fit` finds the tickets: each round trains, prunes a fifth of what is left and rewinds the weights.
Then, at the same sparsities, two controls train for one round: the ticket's mask on new random weights, and a
random mask. Prints a table and, where matplotlib is installed, draws `lottery_ticket.png`.

Frankle and Carbin, "The Lottery Ticket Hypothesis" (2019).
"""

import argparse
import logging
import statistics
import warnings
from collections import defaultdict

import lightning.pytorch as pl
import torch
from data import load
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_structopt as so

Masks = dict[str, Tensor]
LEVELS = [1 - 0.8**round_ for round_ in range(1, 21, 2)]  # 20%, 49%, 67%, ... 98.6%
TICKET, REINITIALIZED, RANDOM = "winning ticket", "same mask, new weights", "random mask"


class LeNet(pl.LightningModule):
    """LeNet-300-100, the paper's network."""

    def __init__(self, inputs: int, classes: int = 10) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, 300),
            nn.ReLU(),
            nn.Linear(300, 100),
            nn.ReLU(),
            nn.Linear(100, classes),
        )
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("accuracy", self.accuracy, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1.2e-3)


class Rounds(pl.Callback):
    """Keeps the masks and the accuracy at the end of each round."""

    def __init__(self, pruning: so.IterativePruning, epochs: int, progress: Progress) -> None:
        self.pruning, self.epochs, self.progress = pruning, epochs, progress
        self.masks: list[Masks] = []
        self.accuracy: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.epochs == 0:
            self.masks.append(self.pruning.masks)
            self.accuracy.append(100 * float(trainer.callback_metrics["accuracy"]))
            self.progress.advance(self.progress.task_ids[0])


class Study:
    """The runs of one seed."""

    def __init__(self, data: tuple[Tensor, ...], seed: int, epochs: int, progress: Progress) -> None:
        train_images, train_labels, test_images, test_labels = data
        batch_size = 32 if len(train_images) < 10_000 else 128
        self.seed, self.epochs, self.progress = seed, epochs, progress
        self.inputs = train_images[0].numel()
        self.train = DataLoader(TensorDataset(train_images, train_labels), batch_size, shuffle=True)
        self.test = DataLoader(TensorDataset(test_images, test_labels), 1000)

    def find_tickets(self, levels: list[float]) -> Rounds:
        """Return masks and accuracy of the dense network and of the tickets, all from one fit."""
        pl.seed_everything(self.seed, verbose=False)
        rounds = len(levels) + 1
        pruning = so.IterativePruning(
            levels[-1],
            ramp=Levels(tuple(levels)),
            begin=1 / rounds,
            end=1.0,
            every=self.epochs,
            rewind=so.RewindWeights(to=0.0),
            verbose=False,
        )
        found = Rounds(pruning, self.epochs, self.progress)
        self._trainer(rounds * self.epochs, [pruning, so.LRDecay(so.Cosine(minimum=0.1)), found]).fit(
            LeNet(self.inputs), self.train, self.test
        )
        return found

    def train_under(self, masks: Masks, seed: int) -> float:
        """Train new random weights under ``masks`` for one round and return the accuracy."""
        pl.seed_everything(seed, verbose=False)
        module = LeNet(self.inputs)
        parameters = dict(module.named_parameters())
        for name, mask in masks.items():
            parameters[name].data.mul_(mask)
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        # Weights that are zero go first, so the callback takes the masks over as they are and holds them.
        held = so.IterativePruning(
            zeros / sum(mask.numel() for mask in masks.values()),
            ramp=so.OneShotRamp(), begin=0.0, end=0.5, interval="step", verbose=False,
        )  # fmt: skip
        trainer = self._trainer(self.epochs, [held, so.LRDecay(so.Cosine(minimum=0.1))])
        trainer.fit(module, self.train, self.test)
        assert all(torch.equal(held.masks[name], mask) for name, mask in masks.items())
        self.progress.advance(self.progress.task_ids[0])
        return 100 * float(trainer.callback_metrics["accuracy"])

    def _trainer(self, epochs: int, callbacks: list[pl.Callback]) -> pl.Trainer:
        return pl.Trainer(
            max_epochs=epochs,
            callbacks=callbacks,
            check_val_every_n_epoch=self.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )


class Levels(so.Ramp):
    """A ramp through given sparsities, one a round: an own ramp takes no more than this."""

    def __init__(self, levels: tuple[float, ...]) -> None:
        self.levels = levels

    def __call__(self, progress: float, target: float) -> float:
        return self.levels[max(round(progress * len(self.levels)) - 1, 0)]


def shuffled(masks: Masks, seed: int) -> Masks:
    """Return masks of the same sparsity in each layer, at random places."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)
        for name, mask in masks.items()
    }


Curves = dict[str, dict[float, list[float]]]


def show(curves: Curves, dense: list[float]) -> Table:
    table = Table(title=f"Accuracy on test data, % (dense: {_mean_and_spread(dense)})")
    table.add_column("sparsity", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for level in curves[TICKET]:
        table.add_row(f"{level:.1%}", *(_mean_and_spread(curve[level]) for curve in curves.values()))
    return table


def _mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def draw(curves: Curves, dense: list[float], path: str) -> bool:
    """Draw the curves into ``path``; return False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(statistics.mean(dense), color="tab:gray", linestyle=":", label="dense")
    for (name, curve), color in zip(curves.items(), ("tab:blue", "tab:orange", "tab:green"), strict=True):
        left = [100 * (1 - level) for level in curve]
        axes.plot(left, [statistics.mean(values) for values in curve.values()], "o-", color=color, label=name)
        axes.fill_between(
            left, *zip(*[(min(v), max(v)) for v in curve.values()], strict=True), color=color, alpha=0.15
        )
    axes.set(xscale="log", xlabel="weights left, %", ylabel="accuracy on test data, %")
    ticks = [80, 50, 30, 20, 10, 5, 3, 2, 1]
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.set_xticks([], minor=True)
    axes.set_xlim(max(left) * 1.1, min(left) / 1.1)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run")
    parser.add_argument(
        "--epochs", type=int, default=None, help="epochs a round: 8 on digits, 4 on Fashion-MNIST"
    )
    parser.add_argument("--fast", action="store_true", help="two short rounds, to see that it runs")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # a network this small is done before a second thread has woken up
    data = load(arguments.data)
    epochs = 1 if arguments.fast else arguments.epochs or (8 if arguments.data == "digits" else 4)
    levels = LEVELS[:2] if arguments.fast else LEVELS
    curves: Curves = {name: defaultdict(list) for name in (TICKET, REINITIALIZED, RANDOM)}
    dense: list[float] = []
    with Progress() as progress:
        progress.add_task("Rounds", total=arguments.seeds * (1 + 3 * len(levels)))
        for seed in range(arguments.seeds):
            study = Study(data, seed, epochs, progress)
            found = study.find_tickets(levels)
            dense.append(found.accuracy[0])
            for level, masks, accuracy in zip(levels, found.masks[1:], found.accuracy[1:], strict=True):
                curves[TICKET][level].append(accuracy)
                curves[REINITIALIZED][level].append(study.train_under(masks, seed + 1000))
                curves[RANDOM][level].append(study.train_under(shuffled(masks, seed), seed + 1000))
    console = Console()
    console.print(show(curves, dense))
    if draw(curves, dense, "lottery_ticket.png"):
        console.print("Drawn: lottery_ticket.png")


if __name__ == "__main__":
    main()
