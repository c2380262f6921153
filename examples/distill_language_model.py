"""Distill a byte-level transformer into one a fifteenth its size, on text that is on this machine.

    python examples/distill_language_model.py                  # a few minutes
    python examples/distill_language_model.py --text book.txt  # a text of your own

By default the text is the source of Python's standard library. The small model is trained twice for the same number of
steps: alone, and with `TokenKL` from the large one. Prints perplexity per byte on text that neither has seen, and a
sample of each.
"""

import argparse
import logging
import math
import sysconfig
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_structopt as so
from lightning_structopt.distillation import DistillationModule, TokenKL

LENGTH, BYTES = 64, 256


class ByteModel(pl.LightningModule):
    """Predicts the next byte of a text; it knows nothing of teachers."""

    def __init__(self, width: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, BYTES))

    def forward(self, text: Tensor) -> Tensor:
        """Return logits (N, L, 256) of the byte that follows each byte of ``text`` (N, L)."""
        length = text.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        return self.head(self.layers(self.bytes(text) + self.places[:length], causal, is_causal=True))

    def loss(self, batch: list[Tensor]) -> Tensor:
        (text,) = batch
        return nn.functional.cross_entropy(self(text[:, :-1]).transpose(1, 2), text[:, 1:])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def read(path: str | None, limit: int) -> Tensor:
    """Return up to ``limit`` bytes of a file, or of the standard library's source."""
    files = [Path(path)] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)[:limit]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def windows(text: Tensor) -> TensorDataset:
    whole = len(text) // (LENGTH + 1) * (LENGTH + 1)
    return TensorDataset(text[:whole].view(-1, LENGTH + 1))


def train(
    module: pl.LightningModule, data: DataLoader, held_out: DataLoader, steps: int
) -> tuple[float, float]:
    """Train for ``steps``; return the loss on text held out, in nats per byte, and the seconds it took."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=[
            so.LRDecay(so.Warmup(steps // 20 + 1, then=so.Cosine(minimum=0.05))),
            RichProgressBar(leave=False),
        ],
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    scores = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return scores.validate(module, held_out, verbose=False)[0]["loss"], seconds


@torch.no_grad()
def write(module: ByteModel, start: str, length: int = 120) -> str:
    """Return ``start`` and what the model writes after it."""
    text = torch.tensor([list(start.encode())])
    generator = torch.Generator().manual_seed(0)
    for _ in range(length):
        logits = module.eval()(text[:, -LENGTH:])[:, -1] / 0.7
        text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return bytes(text[0].tolist()).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default=None, help="a file to learn from; by default Python's own source")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of each training")
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs")
    arguments = parser.parse_args()

    console = Console()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")  # they are validated at the end
    steps = 10 if arguments.fast else arguments.steps
    text = read(arguments.text, limit=100_000 if arguments.fast else 4_000_000)
    cut = len(text) * 9 // 10
    held_out = DataLoader(windows(text[cut:][:100_000]), 64)
    data = DataLoader(windows(text[:cut]), 32, shuffle=True)

    def small() -> ByteModel:
        pl.seed_everything(1, verbose=False)
        return ByteModel(width=32, layers=2)

    pl.seed_everything(0, verbose=False)
    teacher, alone, taught = ByteModel(width=128, layers=3), small(), small()
    distilling = DistillationModule(
        teacher, taught, TokenKL(temperature=1.0), alpha=0.7, teacher_input=lambda batch: batch[0][:, :-1]
    )
    table = Table(title=f"{steps} steps each, {len(text):,} bytes of text")
    for name in ("", "parameters", "nats per byte", "perplexity", "training time, s"):
        table.add_column(name, justify="right" if name else "left")
    for name, module in {"the teacher": teacher, "alone": alone, "with TokenKL": distilling}.items():
        console.print(f"Training {name}")
        loss, seconds = train(module, data, held_out, steps)
        count = sum(p.numel() for p in module.parameters())
        table.add_row(name, f"{count:,}", f"{loss:.3f}", f"{math.exp(loss):.2f}", f"{seconds:.0f}")
    console.print(table)
    for name, module in {"the teacher": teacher, "alone": alone, "with TokenKL": taught}.items():
        console.rule(name, align="left")
        console.print(write(module, "def "), markup=False, highlight=False)


if __name__ == "__main__":
    main()
