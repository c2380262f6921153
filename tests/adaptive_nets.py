"""Nets with each adaptive block, as users would write them, on the data of `support`."""

from collections.abc import Callable
from typing import Any

import torch
from support import CLASSES, FEATURES, Classifier, adamw
from torch import Tensor, nn

from lightning_structopt.blocks import (
    AdaptiveComputationUnit,
    Annealed,
    CapsuleRouting,
    EarlyExit,
    Gate,
    GateBudget,
    GatedBlock,
    RoutedBlock,
    StraightThrough,
    auxiliary_loss,
)

WIDTH = 16


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, WIDTH))


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, WIDTH))


class Capsules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.routing = CapsuleRouting(4, 4, CLASSES, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return 5 * self.routing(inputs.unflatten(1, (4, 4))).norm(dim=-1)


def head() -> nn.Module:
    return nn.Linear(WIDTH, CLASSES)


def stem() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU())


NETS: dict[str, Callable[[], nn.Module]] = {
    "gated": lambda: nn.Sequential(
        stem(), GatedBlock(body(), Gate(WIDTH, opening=0.5), budget=GateBudget(0.5)), head()
    ),
    "annealed": lambda: nn.Sequential(
        stem(), GatedBlock(body(), Gate(WIDTH), relaxation=Annealed(steps=8), budget=GateBudget(0.5)), head()
    ),
    "routed": lambda: nn.Sequential(
        stem(), RoutedBlock([expert() for _ in range(4)], nn.Linear(WIDTH, 4), capacity=1.0), head()
    ),
    "routed to two": lambda: nn.Sequential(
        stem(), RoutedBlock([expert() for _ in range(4)], nn.Linear(WIDTH, 4), 2), head()
    ),
    "act": lambda: nn.Sequential(
        stem(), AdaptiveComputationUnit(expert(), Gate(WIDTH, opening=0.4), 4), head()
    ),
    "exits": lambda: EarlyExit([stem(), body()], [head(), head()], threshold=0.4),
    "capsules": lambda: nn.Sequential(stem(), Capsules()),
}


def closed(net: nn.Module) -> nn.Module:
    """Let gates close for all, and all rows choose the first expert: blocks get nothing to do."""
    for part in net.modules():
        if isinstance(part, GatedBlock) and isinstance(part.relaxation, StraightThrough):
            nn.init.constant_(part.gate.net[2].bias, -100.0)
        if isinstance(part, RoutedBlock):
            nn.init.zeros_(part.router.weight)
            nn.init.zeros_(part.router.bias)
            part.capacity = None
    return net


class Adaptive(Classifier):
    def __init__(self, name: str, optimizer: Any = adamw, seed: int = 1) -> None:
        super().__init__(optimizer, seed=seed)
        torch.manual_seed(seed)
        self.net = NETS[name]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        outputs = self(inputs)
        if isinstance(self.net, EarlyExit):
            return self.net.loss(outputs, labels)
        loss = nn.functional.cross_entropy(outputs.float(), labels)
        has_blocks = not isinstance(self.net[-1], Capsules)
        return loss + auxiliary_loss(self) if has_blocks else loss
