"""Floating-point operations by `profile`, fvcore and Torch-Pruning, on ten models (random weights).

The others are counted where they are installed (`pip install fvcore torch-pruning`). They count a multiplication with
its addition as one; here each counts, so theirs are doubled. fvcore also counts norms and some elementwise operators,
Torch-Pruning also biases, norms, pooling and activations; neither of the two sees a matrix product in attention that
is called as a function, unless it knows the module.
"""

import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from common import parse_arguments, write_json
from rich.console import Console
from rich.table import Table
from torch import nn

import lightning_structopt as so

MODELS = (
    "alexnet",
    "vgg11",
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "densenet121",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "vit_b_16",
    "swin_t",
)


def ours(module: nn.Module, inputs: torch.Tensor) -> float:
    return so.profile(module, inputs, seconds=0.01, training=False).flops


def fvcore(module: nn.Module, inputs: torch.Tensor) -> float:
    from fvcore.nn import FlopCountAnalysis

    return (
        2
        * FlopCountAnalysis(module, inputs)
        .unsupported_ops_warnings(False)
        .uncalled_modules_warnings(False)
        .total()
    )


def torch_pruning(module: nn.Module, inputs: torch.Tensor) -> float:
    from torch_pruning.utils import count_ops_and_params

    return 2 * count_ops_and_params(module, inputs)[0]


COUNTERS: dict[str, Callable[[nn.Module, torch.Tensor], float]] = {
    "profile": ours,
    "fvcore": fvcore,
    "Torch-Pruning": torch_pruning,
}


def row(name: str) -> dict[str, Any]:
    import torchvision

    module, inputs = torchvision.models.get_model(name).eval(), torch.randn(1, 3, 224, 224)
    found: dict[str, Any] = {"model": name}
    for counter, count in COUNTERS.items():
        start = perf_counter()
        try:
            found[counter] = count(module, inputs) / 1e9
        except ImportError:
            found[counter] = None
        found[f"{counter}, seconds"] = perf_counter() - start
    return found


def main() -> None:
    arguments = parse_arguments("flops", __doc__)
    warnings.filterwarnings("ignore")
    rows = [row(name) for name in (MODELS[2:3] if arguments.fast else MODELS)]
    table = Table(
        "model", *COUNTERS, "profile (s)", title="GFLOPs of a forward pass over one image of 224x224"
    )
    for found in rows:
        counts = ["not installed" if found[c] is None else f"{found[c]:.3f}" for c in COUNTERS]
        table.add_row(found["model"], *counts, f"{found['profile, seconds']:.1f}")
    Console().print(table)
    write_json(arguments.output, "flops", rows)


if __name__ == "__main__":
    main()
