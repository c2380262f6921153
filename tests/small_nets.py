"""Small networks with everything that makes channels depend on each other, and the inputs they take."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.resnet import BasicBlock, Bottleneck


def image(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)


class Branches(nn.Module):
    """Concatenation, a sum across it, and a slice of it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.both, self.last = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(6, 2, 1)
        self.take = 6

    def forward(self, x: Tensor) -> Tensor:
        together = torch.cat([self.one(x).relu(), self.other(x).sigmoid()], 1)
        together = together + self.both(together)
        return self.last(together[:, : self.take])


class Split(nn.Module):
    """Unequal and equal parts, a gate, and sizes kept as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [4, 8]
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(8, 4)
        self.up = nn.Linear(4, 8)
        self.gate = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        small, large = self.stem(x).split(self.sizes, -1)
        value, gate = self.gate(self.up(small).relu() * large).chunk(2, -1)
        return self.head(value * gate.sigmoid())


class Heads(nn.Module):
    """Attention over heads as attributes tell it."""

    def __init__(self, dim: int = 12, heads: int = 4, head_dim: int = 3) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv, self.out = nn.Linear(dim, 3 * heads * head_dim), nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = (query @ key.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
        return x + self.out((weights @ value).transpose(1, 2).reshape(batch, length, -1))


class GroupedQueries(nn.Module):
    """More query heads than key heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = 4, 2, 3
        self.q, self.kv, self.out = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.q(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        key, value = self.kv(x).view(batch, length, 2, self.kv_heads, self.size).permute(2, 0, 3, 1, 4)
        result = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return self.out(result.transpose(1, 2).flatten(2))


class Rotary(Heads):
    """Attention whose features are turned by a table of angles."""

    def __init__(self) -> None:
        super().__init__(head_dim=4)
        self.register_buffer("rates", torch.tensor([0.3, 0.7]))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        angles = torch.arange(length)[:, None] * self.rates.repeat(2)
        query, key = (each * angles.cos() + self.turned(each) * angles.sin() for each in qkv[:2])
        result = nn.functional.scaled_dot_product_attention(query, key, qkv[2])
        return x + self.out(result.transpose(1, 2).flatten(2))

    def turned(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return torch.cat([-other, one], -1)


class Affine(nn.Module):
    """A linear layer as GPT-2 has it, whose attributes are the sizes it views its input and output as."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, self.inputs), self.weight)
        return flat.view(*x.shape[:-1], self.outputs)


class Gates(nn.Module):
    """Gates of one channel each, picked by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [6, 2]
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        values, gates = self.stem(x).split(self.sizes, -1)
        return self.head(values * gates[:, :1] + values.relu() * gates[:, 1:])


class Shuffle(nn.Module):
    """Grouped convolutions with their channels shuffled in between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, groups=2)
        self.last = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        batch, channels, *places = x.shape
        x = x.view(batch, 2, channels // 2, *places).transpose(1, 2).reshape(batch, channels, *places)
        return self.last(self.other(x).relu())


class Recurrent(nn.Module):
    """Two layers in two directions between linear ones."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.cells = kind(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(self.stem(x).tanh())[0][:, -1])


class Cells(nn.Module):
    """One step after the other, from zeros or from what another layer says."""

    def __init__(self, kind: type[nn.RNNCellBase], start: str) -> None:
        super().__init__()
        self.start = start
        self.stem, self.first = nn.Linear(4, 6), nn.Linear(4, 8)
        self.cell, self.head = kind(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None  # of which the cell makes zeros
        if self.start != "none":
            zeros = torch.zeros(len(x), self.cell.hidden_size)
            hidden = self.first(x[:, 0]).tanh() if self.start == "layer" else zeros
            state = (hidden, zeros) if isinstance(self.cell, nn.LSTMCell) else hidden
        for step in self.stem(x).unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Encoded(nn.Module):
    """A recurrent layer that starts from what another one ended with."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer = nn.GRU(4, 8, batch_first=True), nn.GRU(4, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.writer(x[:, :2], self.reader(x)[1])[0])


class Picked(nn.Module):
    """Elements picked by their order, by a permutation, and from a table that no index reads to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.table = nn.Parameter(torch.randn(9, 8))
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x.gather(1, x.argsort(1))[:, self.order] + self.table[self.order]
        return self.head(x.relu()).index_select(1, self.order[:2])


class Vectors(nn.Module):
    """Matrices times vectors, and an einsum with an ellipsis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.one, self.other = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.weight = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        mixed = torch.einsum("...c, co -> ...o", x, self.weight)
        return mixed + (x @ self.one + x[:, 0].mv(self.other)[:, None])[..., None] + self.one.dot(self.other)


class Resized(nn.Module):
    """Volumes of another size, and an image read where a grid says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv3d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(self.stem(x), scale_factor=2, mode="trilinear")[:, :, 0]
        grid = nn.functional.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), [len(x), 1, 4, 4], False)
        return self.head(nn.functional.grid_sample(x, grid, align_corners=False))


class CastNorms(nn.Module):
    """Norms with running statistics in a region of another precision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(4, 8), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.inner(x)
        return self.head(x.float())


class Tied(nn.Module):
    """A language model whose head is its embedding, so that the features are under no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 16)
        self.back, self.head = nn.Linear(16, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.back(self.hidden(x).relu()))


class TwoByTwo(nn.Module):
    """Two inputs, two outputs as a dictionary, a parameter that is not used, an output of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 8), nn.Linear(5, 8)
        self.mean, self.extra = nn.Linear(8, 1), nn.Linear(8, 3)
        self.spare = nn.Parameter(torch.ones(7))

    def forward(self, one: Tensor, other: Tensor) -> dict[str, Any]:
        both = self.left(one).tanh() * self.right(other)
        return {"mean": self.mean(both), "parts": (self.extra(both), both.shape[0])}


class Cast(nn.Module):
    """A region that runs in another precision, or in full where the rest does not."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled
        self.stem, self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            x = self.inner(x).relu()
        return self.head(x.float())


class Patches(nn.Module):
    """Images taken apart and put together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        patches = nn.functional.unfold(x, 3, padding=1)
        return self.head(self.inner(nn.functional.fold(patches, x.shape[2:], 3, padding=1)))


class Ordered(nn.Module):
    """The elements of each channel by size, and the two largest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x.sort(1).values).sum(1) + self.head(x.topk(2, 1).values).sum(1)


class Auxiliary(nn.Module):
    """A head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.aux = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class HardCoded(nn.Module):
    """Sizes as plain numbers in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("shift", torch.arange(24) / 24, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.qkv(x) + self.shift).view(x.shape[0], -1, 3, 4, 2).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(self.drop(attended.transpose(1, 2).reshape(x.shape[0], -1, 8)))


def normalized_mlp(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), norm(8), nn.GELU(), nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 2)
    )


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def lengths_apart(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(
        norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), norm(nn.Conv1d(8, 8, 1)), nn.ReLU(), norm(nn.Conv1d(8, 3, 1))
    )


def efficient_net() -> nn.Module:
    settings = [MBConvConfig(1, 3, 1, 8, 8, 1, 1, 1), MBConvConfig(4, 3, 2, 8, 16, 2, 1, 1)]
    return EfficientNet(settings, dropout=0.2, num_classes=5, last_channel=32)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "resnet": (lambda: models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5), image),
    "resnext": (lambda: models.ResNet(Bottleneck, [1, 1, 1, 1], 5, groups=4, width_per_group=8), image),
    "mobilenet_v2": (
        lambda: models.MobileNetV2(5, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]),
        image,
    ),
    "densenet": (lambda: models.DenseNet(8, (2, 2, 2), 16, num_classes=5), image),
    "shufflenet": (lambda: models.ShuffleNetV2([1, 2, 1], [16, 32, 48, 64, 96], num_classes=5), image),
    "efficientnet": (efficient_net, image),
    "squeezenet": (lambda: models.SqueezeNet("1_1", num_classes=5), lambda: image(48)),
    "timm_vit": (
        lambda: pytest.importorskip("timm").models.VisionTransformer(
            32, 8, embed_dim=24, depth=2, num_heads=3, num_classes=5
        ),
        image,
    ),
    "timm_swin": (
        lambda: pytest.importorskip("timm").models.SwinTransformer(
            32, 2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5
        ),
        image,
    ),
    "branches": (Branches, image),
    "split": (Split, lambda: torch.randn(3, 6)),
    "heads": (Heads, lambda: torch.randn(2, 5, 12)),
    "heads_of_equal_numbers": (partial(Heads, heads=3), lambda: torch.randn(2, 5, 12)),
    "rotary": (Rotary, lambda: torch.randn(2, 5, 12)),
    "affine": (
        lambda: nn.Sequential(Affine(6, 12), nn.GELU(), Affine(12, 12), nn.GELU(), Affine(12, 6)),
        lambda: torch.randn(2, 3, 6),
    ),
    "gates": (Gates, lambda: torch.randn(5, 4)),
    "grouped_queries": (GroupedQueries, lambda: torch.randn(2, 5, 8)),
    "shuffle": (Shuffle, lambda: image(8)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(2, 5, 4)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(2, 5, 4)),
    **{
        f"{kind.__name__.lower()}_from_{start}": (partial(Cells, kind, start), lambda: torch.randn(2, 3, 4))
        for kind, start in [
            *((nn.LSTMCell, start) for start in ("none", "zeros", "layer")),
            *((nn.GRUCell, "zeros"), (nn.RNNCell, "none")),
        ]
    },
    "encoded": (Encoded, lambda: torch.randn(2, 5, 4)),
    "picked": (Picked, lambda: torch.randn(2, 5, 6)),
    "vectors": (Vectors, lambda: torch.randn(2, 5, 6)),
    "resized": (Resized, lambda: torch.randn(2, 3, 4, 4, 4)),
    "cast_norms": (CastNorms, lambda: image(8)),
    "channel_shuffle": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.AlphaDropout(), nn.Conv2d(8, 2, 1)
        ),
        lambda: image(6),
    ),
    "tied": (Tied, lambda: torch.randint(11, (2, 5))),
    "two_by_two": (TwoByTwo, lambda: (torch.randn(3, 4), torch.randn(3, 5))),
    "auxiliary": (Auxiliary, lambda: torch.randn(3, 4)),
    "full_precision": (partial(Cast, False), lambda: torch.randn(3, 6)),
    "half_precision": (partial(Cast, True), lambda: torch.randn(3, 6)),
    "patches": (Patches, lambda: image(6)),
    "ordered": (Ordered, lambda: torch.randn(2, 5, 6)),
    "bags": (
        lambda: nn.Sequential(nn.EmbeddingBag(11, 8), nn.Linear(8, 2)),
        lambda: torch.randint(11, (2, 5)),
    ),
    "layer_norm": (lambda: normalized_mlp(nn.LayerNorm), lambda: torch.randn(3, 5)),
    "rms_norm": (lambda: normalized_mlp(nn.RMSNorm), lambda: torch.randn(3, 5)),
    "group_norm": (lambda: normalized_mlp(partial(nn.GroupNorm, 4)), lambda: torch.randn(3, 5)),
    "batch_norm": (lambda: normalized_mlp(nn.BatchNorm1d), lambda: torch.randn(3, 5)),
    "prelu": (lambda: normalized_mlp(nn.PReLU), lambda: torch.randn(3, 5)),
    "weight_norm": (
        partial(lengths_apart, nn.utils.parametrizations.weight_norm),
        lambda: torch.randn(3, 4, 9),
    ),
    "old_weight_norm": (partial(lengths_apart, old_weight_norm), lambda: torch.randn(3, 4, 9)),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 12, 2, 2, groups=4),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 6, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 6, 3, groups=6),
            nn.Conv2d(6, 2, 1),
        ),
        lambda: image(8),
    ),
    "pixel_shuffle": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.ReLU()),
            *(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.PixelShuffle(2)),
        ),
        lambda: image(8),
    ),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 4)),
        lambda: image(8),
    ),
    "padded": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ZeroPad2d(1), nn.Conv2d(6, 4, 3, padding_mode="reflect", padding=1)
        ),
        lambda: image(8),
    ),
}


def make(name: str) -> tuple[nn.Module, Any]:
    """Return a network with random weights, zeros among them replaced, and its input."""
    torch.manual_seed(0)
    network, example = NETS[name]
    module = network().eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 2)
        for parameter in module.parameters():
            if parameter.numel() and not parameter.any():
                parameter.normal_(0, 0.1)
    return module, example()
