"""What the tests share: tiny modules, tiny data and quiet trainers."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES = 12, 4


def dataset(samples: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, FEATURES, generator=generator)
    return TensorDataset(inputs, inputs[:, :CLASSES].argmax(1))


def loader(samples: int = 32, batch_size: int = 8, **kwargs: Any) -> DataLoader:
    return DataLoader(dataset(samples), batch_size=batch_size, **kwargs)


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-1)


class Classifier(pl.LightningModule):
    """A perceptron, written as any user would."""

    def __init__(self, optimizer: Callable[..., Optimizer] = sgd, hidden: int = 16, seed: int = 1) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(FEATURES, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self(inputs).float(), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_acc", (self(inputs).argmax(1) == labels).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Sharded(Classifier):
    """Under FSDP2, its net as a whole."""

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class ManualClassifier(Classifier):
    """Two optimizers, stepped by hand; the second one, on the head, at every second batch."""

    def __init__(self, raw: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.raw = raw

    def training_step(self, batch: Any, batch_idx: int) -> None:
        body, head = self.optimizers(use_pl_optimizer=not self.raw)
        loss = super().training_step(batch, batch_idx)
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(loss)
        body.step()
        if batch_idx % 2 == 1:
            head.step()

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(self.net[:2].parameters()), self.make_optimizer(self.net[3].parameters())]


def trainer(root: Path, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    """A quiet trainer on one CPU device; ``kwargs`` override."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 4,
        "logger": False,
        "enable_checkpointing": any(hasattr(c, "best_model_path") for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def zeros(module: nn.Module, names: Any = None) -> int:
    """Count zeros among the named parameters, by default those of two or more dimensions."""
    chosen = {n: p for n, p in module.named_parameters() if (n in names if names else p.ndim > 1)}
    return sum(int((p == 0).sum()) for p in chosen.values())


def assert_same_state(one: Any, other: Any, where: str = "state") -> None:
    """Assert that two nested structures are equal, tensors bit for bit."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other), f"{where} differs by {(one.double() - other.double()).abs().max()}"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_state(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same_state(left, right, f"{where}[{index}]")
    else:
        assert one == other, f"{where}: {one} != {other}"


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_ranks(function: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """Call ``function(rank, *arguments)`` in ``ranks`` new processes that Lightning takes for torchrun's.

    One start of the processes (about 10 s) serves as many fits as ``function`` likes.
    """
    torch.multiprocessing.spawn(_as_rank, (function, arguments, ranks, free_port()), nprocs=ranks)


def files_of_ranks(function: Callable[..., None]) -> Any:
    """Return a fixture: the folder, made once for a test file, that two ranks left after ``function(rank, folder)``."""

    @pytest.fixture(scope="module")
    def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        run_ranks(function, folder)
        return folder

    return root


def _as_rank(rank: int, function: Callable[..., None], arguments: tuple, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    function(rank, *arguments)
    # Lightning leaves the group of the last fit open. An interpreter that ends with it sometimes aborts
    # ("terminate called without an active exception"), as a thread of the other rank's may still be talking.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
