"""Architectures of torchvision and timm: wider and deeper, the same function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_widen import assert_same_function
from torch import nn
from torchvision import models

from lightning_structopt.growth import Deepen, Widen, widen


def of_timm(name: str, **kwargs: Any) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=7, **kwargs)


ZOO: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "resnet18": (lambda: models.resnet18(num_classes=7), "layer2.0.conv1", 64),
    "resnet18, residual stream": (lambda: models.resnet18(num_classes=7), "layer2.0.conv2", 64),
    "resnext50": (lambda: models.resnext50_32x4d(num_classes=7), "layer1.0.conv2", 64),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=7), "features.2.block.0.0", 64),
    "densenet121": (lambda: models.densenet121(num_classes=7), "features.denseblock1.denselayer2.conv2", 64),
    "shufflenet_v2": (lambda: models.shufflenet_v2_x0_5(num_classes=7), "stage2.1.branch2.0", 64),
    "convnext_tiny": (lambda: models.convnext_tiny(num_classes=7), "features.1.0.block.3", 64),
    "vit_tiny, heads": (
        lambda: of_timm("vit_tiny_patch16_224", img_size=64, depth=2),
        "blocks.0.attn.qkv",
        64,
    ),
    "vit_tiny, feed-forward": (
        lambda: of_timm("vit_tiny_patch16_224", img_size=64, depth=2),
        "blocks.1.mlp.fc1",
        64,
    ),
    "vit_tiny, residual stream": (
        lambda: of_timm("vit_tiny_patch16_224", img_size=64, depth=2),
        "patch_embed.proj",
        64,
    ),
    "mixer": (lambda: of_timm("mixer_s32_224", img_size=64), "blocks.0.mlp_channels.fc1", 64),
    "regnet": (lambda: of_timm("regnetx_002"), "s2.b1.conv1.conv", 64),
    "efficientnet_lite0": (lambda: of_timm("efficientnet_lite0"), "blocks.1.0.conv_pw", 64),
}
LARGE = {"resnext50", "densenet121", "convnext_tiny", "mixer"}
every_net = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.zoo) if name in LARGE else name for name in ZOO]
)


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    make, _, size = ZOO[name]
    torch.manual_seed(0)
    module = make().eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 2)
                part.weight.uniform_(0.5, 1.5)
    return module, torch.randn(2, 3, size, size)


def parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


@every_net
def test_a_layer_gets_wider(name: str) -> None:
    module, inputs = made(name)
    wide = widen(module, ZOO[name][1], 2.0, inputs, noise=0.1)
    assert type(wide) is type(module)
    assert parameters(wide) > parameters(module)
    assert_same_function(module, wide, torch.randn_like(inputs))


@pytest.mark.parametrize(
    "name", [pytest.param("efficientnet_lite0", marks=pytest.mark.zoo), "vit_tiny, heads", "shufflenet_v2"]
)
def test_the_whole_gets_wider(name: str) -> None:
    module, inputs = made(name)
    wide = Widen(1.5).apply(module, inputs)
    assert parameters(wide) > 1.2 * parameters(module)
    assert_same_function(module, wide, torch.randn_like(inputs))


@pytest.mark.parametrize("kind", ["identity", "residual"])
@pytest.mark.parametrize("name", ["resnet18", "regnet", "vit_tiny, heads"])
def test_gets_deeper(name: str, kind: Any) -> None:
    module, inputs = made(name)
    step = Deepen(kind=kind, norm=kind == "residual" and "vit" not in name)
    if (name, kind) == ("vit_tiny, heads", "identity"):
        with pytest.raises(ValueError, match='Found none in `VisionTransformer`. Give `kind="residual"`'):
            step.apply(module, inputs)
        return
    deep = step.apply(module, inputs)
    assert parameters(deep) > parameters(module)
    assert_same_function(module, deep, torch.randn_like(inputs))
