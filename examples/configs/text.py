"""What the configurations of language models name: Python's own source as bytes, and the network of the example."""

import sys
from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the examples are

import distill_language_model as example  # noqa: E402


class Text(pl.LightningDataModule):
    """Python's own source, or a file, with the byte that follows each; the last tenth is for validation."""

    def __init__(self, path: str | None = None, limit: int = 1_000_000, batch_size: int = 32) -> None:
        super().__init__()
        text = example.read(path, limit)
        cut = len(text) * 9 // 10
        self.batch_size = batch_size
        self.train, self.validation = pairs(text[:cut]), pairs(text[cut:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, 64)


def pairs(text: Tensor) -> TensorDataset:
    (windows,) = example.windows(text).tensors
    return TensorDataset(windows[:, :-1], windows[:, 1:])


class ByteModel(example.ByteModel):
    """The example's network, whose sizes its checkpoints know."""

    def __init__(self, width: int, layers: int, heads: int = 4) -> None:
        super().__init__(width, layers, heads)
        self.save_hyperparameters()

    def loss(self, batch: list[Tensor]) -> Tensor:
        text, following = batch
        return nn.functional.cross_entropy(self(text).transpose(1, 2), following)
