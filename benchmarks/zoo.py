"""Half of all channels of models of torchvision and timm: does it work, how small, how long.

    python benchmarks/zoo.py --models torchvision:resnet18 timm:vit_tiny_patch16_224

The smaller module was compared with the masked one in evaluation and in training; "difference" is the largest,
relative to the largest output. Weights are random.
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_structopt.shrinking import ChannelRatio, channel_report

MODELS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:densenet121",
    "torchvision:efficientnet_b0",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:swin_t",
    "timm:vit_tiny_patch16_224",
)


def load(spec: str) -> tuple[nn.Module, Tensor]:
    """Return a model with random weights in all its layers, and two images for it."""
    library, _, name = spec.partition(":")
    torch.manual_seed(0)
    size = 224
    if library == "torchvision":
        import torchvision

        module = torchvision.models.get_model(name, weights=None)
        size = 299 if name == "inception_v3" else size
    else:
        import timm

        module = timm.create_model(name, pretrained=False)
        size = module.default_cfg["input_size"][-1]
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():  # heads that start at zero would hide differences
                parameter.normal_(0, 0.02)
    return module.eval(), torch.randn(2, 3, size, size)


def row(spec: str, keep: float, same_class: bool) -> dict[str, Any]:
    """Prune the channels of a model, and return what came out."""
    module, images = load(spec)
    start = time.perf_counter()
    try:
        report = channel_report(module, ChannelRatio(keep), images, same_class=same_class)
    except ValueError as error:
        return {"model": spec, "form": f"refused: {str(error)[:80]}"}
    seconds = time.perf_counter() - start
    parameters, flops = (after / before for before, after in (report.parameters, report.flops))
    return {
        "model": spec,
        "form": report.form,
        "parameters": parameters,
        "flops": flops,
        "difference": report.difference,
        "seconds": seconds,
    }


def show(rows: list[dict[str, Any]], keep: float) -> None:
    table = Table("model", "form", "parameters kept", "FLOPs kept", "difference", "seconds")
    table.title = f"{keep:.0%} of all channels kept"
    for found in rows:
        numbers = [
            f"{found[key]:.2g}" for key in ("parameters", "flops", "difference", "seconds") if key in found
        ]
        table.add_row(found["model"], found["form"], *numbers)
    Console(width=110).print(table)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="torchvision:NAME or timm:NAME")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of channels to keep")
    parser.add_argument(
        "--same-class", action="store_true", help="leave alone what only a graph could do without"
    )
    parser.add_argument("--fast", action="store_true", help="one model, to see that it runs")
    parser.add_argument("--output", type=Path, help="JSON file; by default benchmarks/results/zoo.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    models = MODELS[:1] if arguments.fast else arguments.models
    rows = [row(spec, arguments.keep, arguments.same_class) for spec in models]
    show(rows, arguments.keep)
    write_json(arguments.output or (None if arguments.fast else RESULTS / "zoo.json"), "zoo", rows)


if __name__ == "__main__":
    main()
