"""Modules and data that nobody here wrote: Lightning's own demos and edge cases, transformers, timm."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel, RandomDataset
from lightning.pytorch.utilities import CombinedLoader
from support import Classifier, adamw, dataset, loader, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_structopt as so

EPOCHS = 4
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*nested tensors"),
    pytest.mark.filterwarnings("ignore:The current module has sizes"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


class Language(LightningTransformer):
    """Lightning's demo, which would download its data."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(vocab_size=30)

    def prepare_data(self) -> None:
        pass


class SeveralOptimizers(Classifier):
    """One optimizer by hand for each layer, in turn."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        chosen = optimizers[batch_idx % len(optimizers)]
        chosen.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        chosen.step()

    def configure_optimizers(self) -> Any:
        return [adamw(self.net[0].parameters()), adamw(self.net[3].parameters())]


class BuiltLate(Classifier):
    """Has no layers before ``configure_model``."""

    def __init__(self) -> None:
        super().__init__(adamw)
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = Classifier().net


class Combined(Classifier):
    """Learns from two loaders at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(super(Combined, self).training_step(part, batch_idx) for part in batch.values())


class Endless(IterableDataset):
    """A stream of samples, of which nobody knows how many there are."""

    def __iter__(self) -> Iterator[Any]:
        yield from dataset()


class Bert(pl.LightningModule):
    """A transformers model as its documentation puts it into a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        settings = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=4, **sizes)
        self.model = transformers.BertForSequenceClassification(settings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask).logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Timm(pl.LightningModule):
    """A timm model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        size = {"img_size": 32} if "vit" in name else {}
        self.model = timm.create_model(name, num_classes=4, **size)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def tokens() -> DataLoader:
    numbers = torch.randint(30, (8, 6), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(numbers, numbers), 4)


def sentences() -> DataLoader:
    numbers = next(iter(tokens()))[0]
    samples = [
        {"input_ids": each, "attention_mask": torch.ones(6).long(), "labels": each[0] % 4} for each in numbers
    ]
    return DataLoader(samples, 2)


def images() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)), 2)


@dataclass(frozen=True)
class Kind:
    """How to train a module.

    Args:
        make: Makes it.
        data: Makes its data.
        options: For the trainer.
        example: What its ``forward`` takes, where a batch does not say so.
        read: From a batch to what its ``forward`` takes, likewise.
        refused: What does not go with it, and what is said.
    """

    make: Callable[[], pl.LightningModule]
    data: Callable[[], Any] = loader
    options: dict[str, Any] = field(default_factory=dict)
    example: Any = None
    read: Callable[[Any], Any] | None = None
    refused: dict[str, str] = field(default_factory=dict)


OWNER = "must have one owner. Found `LRDecay` and a `StepLR`"
NO_CHANNELS = "Pruning channels needs some that can go. Found none"
BY_ITSELF = "must leave its optimization to Lightning"
UNTRACED = "Shrinking needs a module that .* `torch.export` can trace.*Found `Language`"
BY_HAND = "needs to know how many steps each optimizer takes. Found manual optimization"
KINDS: dict[str, Kind] = {
    "BoringModel": Kind(
        BoringModel,
        lambda: DataLoader(RandomDataset(32, 16)),
        refused={"LRDecay": OWNER, "ChannelPruning": NO_CHANNELS},
    ),
    "ManualOptimBoringModel": Kind(
        ManualOptimBoringModel,
        lambda: DataLoader(RandomDataset(32, 16)),
        refused={
            "LRDecay": OWNER,
            "ChannelPruning": NO_CHANNELS,
            "DistillationModule": BY_ITSELF,
        },
    ),
    "demo transformer": Kind(
        Language,
        tokens,
        example=(torch.ones(2, 6).long(), torch.ones(2, 6).long()),
        read=tuple,
        refused={"ChannelPruning": UNTRACED},  # as torch's decoder looks at the values of its mask
    ),
    "several optimizers": Kind(
        SeveralOptimizers, refused={"LRDecay": BY_HAND, "DistillationModule": BY_ITSELF}
    ),
    "configure_model": Kind(BuiltLate),
    "IterableDataset": Kind(
        lambda: Classifier(adamw), lambda: DataLoader(Endless(), 8), {"max_steps": 16, "max_epochs": -1}
    ),
    "CombinedLoader": Kind(
        lambda: Combined(adamw),
        lambda: CombinedLoader({"a": loader(), "b": loader(16)}, "max_size_cycle"),
        example=torch.ones(2, 12),
        read=lambda batch: batch["a"][0],
        refused={"DistillationModule": "`logits` of the student must run exactly once in a training step"},
    ),
    "transformers": Kind(
        Bert,
        sentences,
        example=(torch.ones(2, 6).long(), torch.ones(2, 6).long()),
        read=lambda batch: (batch["input_ids"], batch["attention_mask"]),
    ),
    "timm": Kind(lambda: Timm("test_resnet"), images),
    "timm, attention": Kind(lambda: Timm("test_vit"), images),
}
FEATURES: dict[str, Callable[[Kind], list[pl.Callback]]] = {
    "IterativePruning": lambda kind: [so.IterativePruning(0.7, interval="step", end=0.6, verbose=False)],
    "SparsityPenalty": lambda kind: [so.SparsityPenalty(so.L1(1.0))],
    "LRDecay": lambda kind: [so.LRDecay(so.Linear())],
    "ChannelPruning": lambda kind: [
        so.ChannelPruning(
            so.ChannelRatio(0.5),
            interval="step",
            end=0.6,
            remove="now",
            verbose=False,
            example_input=kind.example,
        )
    ],
    "DistillationModule": lambda kind: [],
}


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(root: Path, kind: Kind, feature: str) -> tuple[Any, Any, Rates]:
    callbacks, rates = FEATURES[feature](kind), Rates()
    module = kind.make()
    if feature == "DistillationModule":
        teacher = kind.make()
        teacher.configure_model()
        module = so.DistillationModule(teacher, module, teacher_input=kind.read)
    run = trainer(root, *callbacks, rates, **{"max_epochs": EPOCHS, **kind.options})
    run.fit(module, kind.data())
    return module, callbacks, rates


CELLS = [(name, feature) for name in KINDS for feature in FEATURES]


@pytest.mark.parametrize(("name", "feature"), [c for c in CELLS if c[1] not in KINDS[c[0]].refused])
def test_works(name: str, feature: str, tmp_path: Path) -> None:
    module, callbacks, rates = fit(tmp_path, KINDS[name], feature)
    assert rates.seen
    weights = dict(module.named_parameters())
    assert all(weight.isfinite().all() for weight in weights.values())
    if feature == "IterativePruning":
        masks = callbacks[0].masks
        gone = sum(int((~mask).sum()) for mask in masks.values())
        assert gone == round(0.7 * sum(mask.numel() for mask in masks.values()))
        assert not any(weights[key][~mask].any() for key, mask in masks.items())
    elif feature == "SparsityPenalty":
        assert any((weight == 0).any() for weight in weights.values() if weight.ndim > 1)
    elif feature == "LRDecay":
        length = len(rates.seen)
        assert rates.seen == pytest.approx([rates.seen[0] * (1 - t / length) for t in range(length)])
    elif feature == "ChannelPruning":
        assert callbacks[0].left <= 0.5
        assert callbacks[0].plan.is_done(module)
    else:
        assert module.state_dict().keys() == module.student.state_dict().keys()


@pytest.mark.parametrize(("name", "feature"), [c for c in CELLS if c[1] in KINDS[c[0]].refused])
def test_is_refused_before_the_first_step(name: str, feature: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=KINDS[name].refused[feature]):
        fit(tmp_path, KINDS[name], feature)


@pytest.mark.parametrize(
    "name", ["BoringModel", "demo transformer", "several optimizers", "configure_model", "timm"]
)
def test_is_swept(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]

    def make() -> pl.LightningModule:
        module = kind.make()
        step = module.training_step

        def logs(batch: Any, batch_idx: int) -> Any:
            module.log("seen", float(batch_idx))
            return step(batch, batch_idx)

        module.training_step = logs
        return module

    result = so.ArchitectureSweep(
        {"one": make, "two": make},
        "seen",
        budget=so.FixedRounds(rounds=2, epochs=1, keep=1),
        trainer={"accelerator": "cpu", "enable_model_summary": False},
        executor=so.InProcess(),
        directory=tmp_path / "sweep",
        progress=False,
    ).run(kind.data())
    assert result.best.epochs == 2
    assert isinstance(result.best.load(), pl.LightningModule)
