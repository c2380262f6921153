"""Half of all channels of models of torchvision and timm: does it work, how small, how long.

    python benchmarks/zoo.py torchvision:resnet18 timm:vit_tiny_patch16_224

Prints one row of a table a model. The smaller module was compared with the masked one in evaluation and in
training; "difference" is the largest, relative to the largest output.
"""

import argparse
import time
import warnings

import torch
from torch import Tensor, nn

from lightning_structopt.shrinking import ChannelRatio, channel_report


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


def row(spec: str, keep: float, same_class: bool) -> str:
    """Prune the channels of a model, and return what came out as a row of a table."""
    module, images = load(spec)
    start = time.perf_counter()
    try:
        report = channel_report(module, ChannelRatio(keep), images, same_class=same_class)
    except ValueError as error:
        return f"| {spec} | refused: {str(error)[:80]} | | | | |"
    seconds = time.perf_counter() - start
    parameters, flops = (after / before for before, after in (report.parameters, report.flops))
    return f"| {spec} | {report.form} | {parameters:.3f} | {flops:.3f} | {report.difference:.0e} | {seconds:.1f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="torchvision:NAME or timm:NAME")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of channels to keep")
    parser.add_argument(
        "--same-class", action="store_true", help="leave alone what only a graph could do without"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| model | form | parameters kept | FLOPs kept | difference | seconds |")
    print("|---|---|---|---|---|---|")
    for spec in arguments.models:
        print(row(spec, arguments.keep, arguments.same_class), flush=True)


if __name__ == "__main__":
    main()
