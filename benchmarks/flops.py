"""Floating-point operations by `profile`, fvcore and Torch-Pruning, on ten models (random weights).

The others are counted where they are installed (`pip install fvcore torch-pruning`). They count a multiplication with
its addition as one; here each counts, so theirs are doubled. Convolutions and linear layers come to the same in all
three. fvcore also counts norms and pooling, and doesn't know `scaled_dot_product_attention`; Torch-Pruning also counts
biases, norms, pooling and activations, and sees modules that it knows, not what others compute by functions. Each row
says how much comes of what.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
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


Parts = dict[str, float]  # operations by what does them: an operator, or a kind of module


def ours(module: nn.Module, inputs: torch.Tensor) -> Parts:
    found: Counter[str] = Counter()
    for layer in so.profile(module, inputs, seconds=0.01, training=False).layers:
        found[layer.kind] += layer.flops
    return {kind: flops for kind, flops in found.items() if flops}


def fvcore(module: nn.Module, inputs: torch.Tensor) -> Parts:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(module, inputs).uncalled_modules_warnings(False)
    counts = analysis.unsupported_ops_warnings(False).by_operator()
    unknown = {name.removeprefix("aten::"): 0 for name in analysis.unsupported_ops()}
    return unknown | {operator: 2 * count for operator, count in counts.items()}


def torch_pruning(module: nn.Module, inputs: torch.Tensor) -> Parts:
    from torch_pruning.utils.op_counter import add_flops_counting_methods

    counting = add_flops_counting_methods(deepcopy(module)).eval()
    counting.start_flops_count(ost=sys.stdout, verbose=False, ignore_list=[])
    counting(inputs)
    found: Counter[str] = Counter()
    for part in counting.modules():
        found[type(part).__name__] += 2 * getattr(part, "__flops__", 0)
    return {kind: count for kind, count in found.items() if count}


COUNTERS: dict[str, Callable[[nn.Module, torch.Tensor], Parts]] = {
    "profile": ours,
    "fvcore": fvcore,
    "Torch-Pruning": torch_pruning,
}
PRODUCTS = ("conv", "linear", "matmul", "Conv2d", "Linear", "MultiheadAttention")  # by operator, by module
ATTENTION = "scaled_dot_product_attention"


def why(parts: Parts, mine: Parts) -> str:
    """Say how another counter's total differs from ours: what it counts besides products, and which it misses."""
    besides = {name: count for name, count in parts.items() if name not in PRODUCTS and count > 1e6}
    gap = sum(parts.get(name, 0) for name in PRODUCTS) - sum(mine.values())
    said = [f"counts {name}, {count / 1e9:.3f}" for name, count in besides.items()]
    if gap > 1e6:
        said.append(f"counts biases, {gap / 1e9:.3f}")
    elif gap < -1e6:
        # Torch-Pruning hooks modules that it knows; what another module computes by functions it doesn't see.
        unseen = [ATTENTION] if ATTENTION in parts else [kind for kind in mine if kind not in parts]
        said.append(f"misses products within {', '.join(unseen)}, {-gap / 1e9:.3f}")
    total = sum(parts.values()) - sum(mine.values())
    return "; ".join(said) or f"differs by {abs(total) / 1e9:.4f} in all"


def row(name: str) -> dict[str, Any]:
    import torchvision

    module, inputs = torchvision.models.get_model(name).eval(), torch.randn(1, 3, 224, 224)
    found: dict[str, Any] = {"model": name}
    parts: dict[str, Parts] = {}
    for counter, count in COUNTERS.items():
        start = perf_counter()
        try:
            parts[counter] = count(module, inputs)
        except ImportError:
            continue
        found[counter] = sum(parts[counter].values()) / 1e9
        found[f"{counter}, seconds"] = perf_counter() - start
    others = {counter: why(parts[counter], parts["profile"]) for counter in parts if counter != "profile"}
    return found | {f"{counter} against profile": reason for counter, reason in others.items()}


def main() -> None:
    arguments = parse_arguments("flops", __doc__)
    warnings.filterwarnings("ignore")
    rows = [row(name) for name in (MODELS[2:3] if arguments.fast else MODELS)]
    table = Table(
        "model", *COUNTERS, "profile (s)", title="GFLOPs of a forward pass over one image of 224x224"
    )
    for found in rows:
        counts = [f"{found[c]:.3f}" if c in found else "not installed" for c in COUNTERS]
        table.add_row(found["model"], *counts, f"{found['profile, seconds']:.1f}")
    Console().print(table)
    write_json(arguments.output, "flops", rows)


if __name__ == "__main__":
    main()
