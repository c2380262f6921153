"""What blocks cost and what they gain, on Fashion-MNIST (`--fast`: scikit-learn's digits).

    python benchmarks/blocks.py [--part nets|depth|gates|exits|routed|experts] [--epochs 4] [--rounds 15] [--fast]

nets: a dense net against convolutional ones. depth: residual and plain nets from 8 to 56 layers, with the gradient of
the first layer against that of the last before training, on 10,000 images of half the size. gates: blocks that run
for half of the images, exits: stages that run until a head is sure, and routed: one of four experts, each against the
same net that runs all of it. Times are of passes in evaluation, the entrants in turn; those of single images go over 64
different ones. gates also has untrained nets of three sizes in which the gates' biases let exactly every other block
run: they show how large a block must be for its gate to be worth its time on a single image. experts: untrained blocks
alone, one of four experts against a dense block of four times the width: perceptrons, which read all their weights for
64 rows, and convolutions, which compute.
"""

import random
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from common import Batches, images, parse_arguments, quiet_trainer, top1, write_as_they_come
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_structopt.blocks import (
    MLP,
    ConvNet,
    EarlyExit,
    Gate,
    GateBudget,
    GatedBlock,
    ResidualBlock,
    ResidualNet,
    RoutedBlock,
    auxiliary_loss,
)
from lightning_structopt.blocks.adaptive import adaptive_blocks
from lightning_structopt.blocks.signals import gradient_sizes

BATCH_SIZE, SINGLES = 128, 64
Data = tuple[Tensor, ...]
Rows = Iterator[dict[str, Any]]
BUDGETS = (0.4, 0.5, 0.6, 0.8, 1.0)


class Classifier(pl.LightningModule):
    """Trains any net; with a budget, one that has gates."""

    def __init__(self, net: nn.Module, budget: GateBudget | None = None) -> None:
        super().__init__()
        self.net, self.budget = net, budget

    def forward(self, pictures: Tensor) -> Tensor:
        return self.net(pictures)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pictures, labels = batch
        outputs = self(pictures)
        joint = self.net.loss if isinstance(self.net, EarlyExit) else nn.functional.cross_entropy
        loss = joint(outputs, labels)
        return loss + auxiliary_loss(self, self.budget) if adaptive_blocks(self.net) else loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained(
    make: Callable[[], nn.Module], data: Data, epochs: int, budget: GateBudget | None = None
) -> nn.Module:
    torch.manual_seed(0)
    module = Classifier(make(), budget)
    quiet_trainer(max_epochs=epochs).fit(module, Batches(data[0], data[1], BATCH_SIZE, seed=0))
    return module.net.eval()


@torch.inference_mode()
def race(nets: dict[str, nn.Module], data: Data, rounds: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each net for 64 images at once and for one, by name."""
    samples = {64: [data[2][:64]], 1: list(data[2][:SINGLES].split(1))}
    order, found = random.Random(0), {name: {} for name in nets}
    for size, batches in samples.items():
        times: dict[str, list[float]] = {name: [] for name in nets}
        for turn in range(rounds + 1):
            for name in order.sample(list(nets), len(nets)):
                start = perf_counter()
                for batch in batches:
                    nets[name](batch)
                if turn:  # the first is to warm up
                    times[name].append(1000 * (perf_counter() - start) / len(batches))
        for name, seconds in times.items():
            found[name][f"ms_{size}"] = median(seconds)
    return found


def executed(net: nn.Module, pictures: Tensor) -> float:
    """Return the mean fraction of its blocks that a net executes."""
    with torch.inference_mode():
        net(pictures)
    fractions = [block.executed_fraction for block in adaptive_blocks(net).values()]
    return sum(fractions) / len(fractions) if fractions else 1.0


def described(nets: dict[str, nn.Module], data: Data, rounds: int) -> Rows:
    """Yield a row for each net: what it is worth, and its times against the first one's."""
    for row in timed(nets, data, rounds):
        yield row | {"top1": top1(nets[row["entrant"]], data)}


def timed(nets: dict[str, nn.Module], data: Data, rounds: int) -> Rows:
    """Yield a row for each net, with its times against the first one's."""
    times = race(nets, data, rounds)
    base = next(iter(times.values()))
    for name, net in nets.items():
        yield {
            "entrant": name,
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "executed": executed(net, data[2][:1000]),
            **times[name],
            "ratio_64": times[name]["ms_64"] / base["ms_64"],
            "ratio_1": times[name]["ms_1"] / base["ms_1"],
        }


def part_nets(data: Data, epochs: int, rounds: int, fast: bool) -> Rows:
    makers: dict[str, Callable[[], nn.Module]] = {
        "MLP (512, 256)": lambda: MLP(784, (512, 256), 10, norm="batch", dropout=0.1),
        "ConvNet, plain": lambda: ConvNet(1, (16, 32, 64), 10),
        "ConvNet, separable": lambda: ConvNet(1, (32, 64, 128), 10, layer="separable"),
        "ConvNet, bottleneck": lambda: ConvNet(1, (32, 64, 128), 10, layer="bottleneck"),
    }
    chosen = list(makers)[:2] if fast else list(makers)
    yield from described({name: trained(makers[name], data, epochs) for name in chosen}, data, rounds)


def part_depth(data: Data, epochs: int, rounds: int, fast: bool) -> Rows:
    # Small pictures and few of them: it is depth that is to be seen, and nets of 56 layers are slow.
    train_x, test_x = (nn.functional.avg_pool2d(pictures, 2) for pictures in (data[0][:10_000], data[2]))
    data = (train_x, data[1][:10_000], test_x, data[3])
    for depth in (8,) if fast else (8, 20, 32, 44, 56):
        for shortcuts in (True, False):

            def make(depth: int = depth, shortcuts: bool = shortcuts) -> nn.Module:
                return ResidualNet(depth, 1, widths=(8, 16, 32), shortcuts=shortcuts)

            torch.manual_seed(0)
            fresh = make()
            nn.functional.cross_entropy(fresh(data[0][:256]), data[1][:256]).backward()
            sizes = [size for name, size in gradient_sizes(fresh).items() if "stages" in name]
            net = trained(make, data, epochs)
            yield {
                "entrant": f"depth {depth}, {'residual' if shortcuts else 'plain'}",
                "top1": top1(net, data),
                "first_gradient": sizes[0],
                "last_gradient": sizes[-1],
                "first_to_last": sizes[0] / sizes[-1],
            }


def block(width: int) -> ResidualBlock:
    layers = [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)]
    return ResidualBlock(nn.Sequential(*layers), activation="relu")


def entry(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def head(width: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def residual_net(gated: bool, widths: tuple[int, int]) -> nn.Module:
    """Return a net of eight blocks, each with a gate or without."""
    parts, last = [], 1
    for width in widths:
        parts.append(entry(last, width))
        blocks = [block(width) for _ in range(4)]
        parts += [GatedBlock.around(each, Gate(width, opening=0.7)) if gated else each for each in blocks]
        last = width
    return nn.Sequential(*parts, head(last))


def every_other(widths: tuple[int, int]) -> nn.Module:
    """Return a net whose gates let every other block run, whatever comes: untrained, for latency alone."""
    net = residual_net(True, widths).eval()
    for index, each in enumerate(adaptive_blocks(net).values()):
        assert isinstance(each, GatedBlock)
        assert isinstance(each.gate, Gate)
        nn.init.constant_(each.gate.net[2].bias, 1e3 * (-1) ** index)
    return net


def part_gates(data: Data, epochs: int, rounds: int, fast: bool) -> Rows:
    yield from gates_trained(data, epochs, rounds, fast)
    # What a gate takes for one image does not depend on what it skips: small blocks gain little by being skipped.
    for widths in ((8, 16),) if fast else ((24, 48), (48, 96), (96, 192)):
        size = f"widths {widths[0]} and {widths[1]}, untrained"
        nets = {
            f"all, {size}": residual_net(False, widths).eval(),
            f"every other, {size}": every_other(widths),
        }
        yield from timed(nets, data, rounds)


def gates_trained(data: Data, epochs: int, rounds: int, fast: bool) -> Rows:
    widths = (8, 16) if fast else (24, 48)
    nets = {"all blocks": trained(lambda: residual_net(False, widths), data, epochs)}
    for target in (0.5,) if fast else (0.5, 0.4, 0.3):
        budget = GateBudget(target, strength=2.0)
        nets[f"budget {target}"] = trained(lambda: residual_net(True, widths), data, epochs, budget)
    yield from described(nets, data, rounds)


def part_exits(data: Data, epochs: int, rounds: int, fast: bool) -> Rows:
    widths = (8, 16, 32) if fast else (24, 48, 96)

    def stages() -> list[nn.Module]:
        pairs = zip((1, *widths), widths, strict=False)
        return [nn.Sequential(entry(inputs, width), block(width), block(width)) for inputs, width in pairs]

    split = len(data[0]) * 9 // 10  # thresholds are fitted on images that training has not seen
    held_out = Batches(data[0][split:], data[1][split:], 1000)
    data = (data[0][:split], data[1][:split], *data[2:])
    full = trained(lambda: nn.Sequential(*stages(), head(widths[-1])), data, epochs)
    exits = trained(lambda: EarlyExit(stages(), [head(width) for width in widths]), data, epochs)
    assert isinstance(exits, EarlyExit)
    for budget in BUDGETS[:2] if fast else BUDGETS:
        exits.fit_threshold(held_out, budget)
        rows = list(described({"all stages, one head": full, f"budget {budget}": exits}, data, rounds))
        yield from rows if budget == BUDGETS[0] else rows[1:]


def part_routed(data: Data, epochs: int, rounds: int, fast: bool) -> Rows:
    features = 64 if fast else 512

    def mlp(hidden: int) -> nn.Module:
        return nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, features)
        )

    def around(middle: nn.Module) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, features), nn.ReLU(), middle, nn.Linear(features, 10)
        )

    def routed() -> nn.Module:
        router = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, 4))
        return around(RoutedBlock([mlp(features) for _ in range(4)], router))

    wide = trained(lambda: around(ResidualBlock(mlp(4 * features))), data, epochs)
    chosen = trained(routed, data, epochs)
    yield from described({"dense, 4x width": wide, "one of 4 experts": chosen}, data, rounds)
    signal = wide[:3](data[2]).detach()  # the blocks alone, without the layers around them
    alone = (*data[:2], signal, data[3])
    for name, found in race({"dense block": wide[3], "routed block": chosen[3]}, alone, rounds).items():
        yield {"entrant": f"{name}, alone", **found}


def part_experts(data: Data, epochs: int, rounds: int, fast: bool) -> Rows:
    def perceptron(width: int, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def convolutions(width: int, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, hidden, 3, 1, 1), nn.ReLU(), nn.Conv2d(hidden, width, 3, 1, 1))

    kinds = {
        "perceptrons": (perceptron, 64 if fast else 512, (), nn.Identity()),
        "convolutions": (convolutions, 8 if fast else 32, (14, 14), nn.AdaptiveAvgPool2d(1)),
    }
    for name, (make, width, size, pool) in kinds.items():
        torch.manual_seed(0)
        router = nn.Sequential(pool, nn.Flatten(), nn.LayerNorm(width), nn.Linear(width, 4))
        nets = {
            f"{name}, dense, 4x width": ResidualBlock(make(width, 4 * width)).eval(),
            f"{name}, one of 4": RoutedBlock([make(width, width) for _ in range(4)], router).eval(),
        }
        signal = torch.randn(256, width, *size)
        yield from timed(nets, (*data[:2], signal, data[3]), rounds)


PARTS = {
    "nets": part_nets,
    "depth": part_depth,
    "gates": part_gates,
    "exits": part_exits,
    "routed": part_routed,
    "experts": part_experts,
}


def show(part: str, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in {"part", "entrant"}))
    table = Table("entrant", *columns, title=f"Blocks: {part}")
    for row in rows:
        table.add_row(row["entrant"], *(f"{row[column]:,.4g}" if column in row else "" for column in columns))
    Console(width=120).print(table)


def main() -> None:
    arguments = parse_arguments("blocks", __doc__, choices={"part": list(PARTS)}, epochs=4, rounds=15)
    data = images(arguments.fast)
    if arguments.fast:
        data = (data[0][:512], data[1][:512], data[2][:128], data[3][:128])
    epochs, rounds = (1, 1) if arguments.fast else (arguments.epochs, arguments.rounds)
    parts = list(PARTS) if arguments.fast else [arguments.part]

    def rows() -> Rows:
        for part in parts:
            yield from ({"part": part} | row for row in PARTS[part](data, epochs, rounds, arguments.fast))

    found = write_as_they_come(arguments.output, "blocks", rows())
    for part in parts:
        show(part, [row for row in found if row["part"] == part])


if __name__ == "__main__":
    main()
