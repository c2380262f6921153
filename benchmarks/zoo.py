"""Half of all channels of some 120 models: does it work, as the same class or as a graph, how small, how long.

    python benchmarks/zoo.py                                         # all of them: half an hour
    python benchmarks/zoo.py --resume                                # those without a result in the output file
    python benchmarks/zoo.py --models 'timm:vit_*' torchvision:resnet18

The smaller module was compared with the masked one in evaluation and in training; "difference" is the largest,
relative to the largest output. Where norms or means reduce over all channels there are, these go all the same and
outputs change ("include_normalized"). Then it took a training step. Weights are random. Seconds are those of the
processor, which on one thread (`OMP_NUM_THREADS=1`) are those of a machine that does nothing else.
"""

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, write_as_they_come
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_structopt.shrinking import ChannelRatio, ShrinkReport, channel_report

Inputs = tuple[Any, ...]

TORCHVISION = """
alexnet convnext_small convnext_tiny densenet121 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_v2_s
googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large
mobilenet_v3_small regnet_x_1_6gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_y_1_6gf regnet_y_3_2gf
regnet_y_400mf regnet_y_800mf resnet18 resnet34 resnet50 resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0
shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_t swin_v2_t vgg11_bn vgg16_bn vit_b_16 vit_b_32
wide_resnet50_2
"""
TIMM = """
resnet18 resnet50 resnext50_32x4d seresnet50 res2net50_26w_4s resnest14d densenet121 vgg11_bn mobilenetv3_small_100
mobilenetv4_conv_small efficientnet_b0 tf_efficientnetv2_b0 regnetx_002 regnety_002 convnext_atto convnextv2_atto
vit_tiny_patch16_224 deit_tiny_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 cait_xxs24_224 pvt_v2_b0 poolformer_s12 convformer_s18 caformer_s18
coat_tiny levit_128s efficientformer_l1 fastvit_t8 mixer_s32_224 resmlp_12_224 gmlp_ti16_224 maxvit_tiny_rw_224
coatnet_nano_rw_224 mvitv2_tiny xcit_nano_12_p16_224 edgenext_xx_small mobilevit_xxs ghostnet_100 repvgg_a0 dpn48b
inception_v3 xception41 hrnet_w18_small dla34 cspdarknet53 nfnet_l0 rexnet_100 tinynet_e hiera_tiny_224 davit_tiny
starnet_s1 repvit_m0_9 nextvit_small tiny_vit_5m_224 volo_d1_224 focalnet_tiny_srf visformer_tiny twins_svt_small
crossvit_tiny_240
"""
SEGMENTATION = "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large"
VIDEO = "r3d_18 mc3_18 r2plus1d_18 s3d swin3d_t mvit_v2_s"
TRANSFORMERS = "bert gpt2 llama t5 vit whisper"


def _torchvision(name: str) -> tuple[nn.Module, Inputs]:
    import torchvision

    size = 299 if name == "inception_v3" else 224
    return torchvision.models.get_model(name, weights=None), (torch.randn(2, 3, size, size),)


def _segmentation(name: str) -> tuple[nn.Module, Inputs]:
    import torchvision

    module = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    return module, (torch.randn(2, 3, 96, 96),)


def _video(name: str) -> tuple[nn.Module, Inputs]:
    import torchvision

    frames, size = (16, 224) if name in {"mvit_v2_s", "s3d"} else (16, 64)
    return torchvision.models.get_model(name, weights=None), (torch.randn(2, 3, frames, size, size),)


def _timm(name: str) -> tuple[nn.Module, Inputs]:
    import timm

    module = timm.create_model(name, pretrained=False)
    return module, (torch.randn(2, *module.default_cfg["input_size"]),)


def _transformers(name: str) -> tuple[nn.Module, Inputs]:
    """Return one of the library's own classes, with few and narrow layers."""
    import transformers as hf

    tokens = torch.randint(3, 97, (2, 12))
    encoder = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    small = {**encoder, "vocab_size": 97}
    match name:
        case "bert":
            return hf.BertForSequenceClassification(hf.BertConfig(**small)), (tokens, torch.ones_like(tokens))
        case "gpt2":
            config = hf.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, use_cache=False)
            return hf.GPT2LMHeadModel(config), (tokens,)
        case "llama":  # with two queries a key
            config = hf.LlamaConfig(**small, num_key_value_heads=2, use_cache=False)
            return hf.LlamaForCausalLM(config), (tokens,)
        case "t5":
            config = hf.T5Config(
                vocab_size=97, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, use_cache=False
            )
            return hf.T5ForConditionalGeneration(config), (tokens, torch.ones_like(tokens), tokens[:, :5])
        case "vit":
            config = hf.ViTConfig(**encoder, image_size=64)
            return hf.ViTForImageClassification(config), (torch.randn(2, 3, 64, 64),)
        case _:
            config = hf.WhisperConfig(d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128,
                                      num_mel_bins=20, max_source_positions=50)  # fmt: skip
            return hf.models.whisper.modeling_whisper.WhisperEncoder(config), (torch.randn(2, 20, 100),)


LIBRARIES: dict[str, tuple[Callable[[str], tuple[nn.Module, Inputs]], str]] = {
    "torchvision": (_torchvision, TORCHVISION),
    "timm": (_timm, TIMM),
    "segmentation": (_segmentation, SEGMENTATION),
    "video": (_video, VIDEO),
    "transformers": (_transformers, TRANSFORMERS),
}
MODELS = [f"{library}:{name}" for library, (_, names) in LIBRARIES.items() for name in names.split()]


def load(spec: str) -> tuple[nn.Module, Inputs]:
    """Return a model with random weights in all its layers, and what its ``forward`` takes, for two samples."""
    library, _, name = spec.partition(":")
    torch.manual_seed(0)
    module, inputs = LIBRARIES[library][0](name)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():  # heads that start at zero would hide differences
                parameter.normal_(0, 0.02)
    return module.eval(), inputs


def smaller(
    module: nn.Module, inputs: Inputs, keep: float, same_class: bool | None
) -> tuple[ShrinkReport, bool]:
    """Prune channels, and tell whether it took those under norms, as there are no others.

    Raises:
        ValueError: If it does not work.
    """
    try:
        return channel_report(module, ChannelRatio(keep), inputs, same_class=same_class), False
    except ValueError as error:
        if "needs some that can go" not in str(error):
            raise
    return (
        channel_report(module, ChannelRatio(keep), inputs, same_class=same_class, include_normalized=True),
        True,
    )


def row(spec: str, keep: float, same_class: bool | None) -> dict[str, Any]:
    """Prune the channels of a model, and return what came out."""
    module, inputs = load(spec)
    start = time.process_time()
    try:
        report, under_norms = smaller(module, inputs, keep, same_class)
        seconds = time.process_time() - start
        learns = _has_gradients(report.module, inputs)
    except Exception as error:  # whatever a model raises is what its row says
        return {"model": spec, "form": "failed", "error": f"{type(error).__name__}: {str(error)[:300]}"}
    return {
        "model": spec,
        "form": {"module": "class", "graph": "graph"}[report.form] if learns else "failed",
        "parameters": report.parameters[1] / report.parameters[0],
        "flops": report.flops[1] / report.flops[0],
        "flops_before": report.flops[0],
        "flops_after": report.flops[1],
        "difference": report.difference,
        "include_normalized": under_norms,
        "unknown": sorted(report.unknown),
        "seconds": seconds,
    }


def _has_gradients(module: nn.Module, inputs: Inputs) -> bool:
    """Tell whether a backward pass gives every parameter that has an effect numbers, one at least."""
    outputs = [each for each in tree_leaves(module.train()(*inputs)) if isinstance(each, Tensor)]
    torch.stack([each.square().mean() for each in outputs if each.requires_grad]).sum().backward()
    gradients = [each.grad for each in module.parameters() if each.grad is not None]
    return bool(gradients) and all(bool(each.isfinite().all()) for each in gradients)


def rows(
    specs: list[str], known: list[dict[str, Any]], keep: float, same_class: bool | None
) -> Iterator[Any]:
    """Yield the rows that are known already, then those of the other models."""
    yield from known
    for spec in specs:
        if spec not in {each["model"] for each in known}:
            found = row(spec, keep, same_class)
            print(*found.values(), flush=True)
            yield found
            gc.collect()


def show(rows: list[dict[str, Any]], keep: float) -> None:
    table = Table("model", "form", "parameters kept", "FLOPs kept", "difference", "seconds")
    table.title = f"{keep:.0%} of all channels kept"
    for found in rows:
        numbers = [
            f"{found[key]:.2g}" for key in ("parameters", "flops", "difference", "seconds") if key in found
        ]
        table.add_row(found["model"], found["form"], *numbers)
    Console(width=110).print(table)
    print(summary(rows))


def summary(rows: list[dict[str, Any]]) -> str:
    """Return what README says: a row for each library, in Markdown.

    The largest difference is that of models of which only what no norm reduces over went.
    """
    lines = [
        "| Models | Same class | Graph | Failed | Largest difference | FLOPs left | Seconds, median and most |",
        "|---|---|---|---|---|---|---|",
    ]
    for library in LIBRARIES:
        own = [found for found in rows if found["model"].startswith(f"{library}:")]
        passed = [found for found in own if found["form"] != "failed"]
        if not passed:
            continue
        count = {form: sum(found["form"] == form for found in own) for form in ("class", "graph", "failed")}
        exact = [found["difference"] for found in passed if not found["include_normalized"]]
        seconds = [found["seconds"] for found in passed]
        lines.append(
            f"| {library}: {len(own)} | {count['class']} | {count['graph']} | {count['failed']} "
            f"| {max(exact, default=0.0):.0e} | {median(found['flops'] for found in passed):.0%} "
            f"| {median(seconds):.1f}, {max(seconds):.0f} |"
        )
    return "\n".join(lines)


def _chosen(patterns: list[str]) -> list[str]:
    """Return the models that the patterns name; one that is not listed is taken as it is."""
    found = [[spec for spec in MODELS if fnmatchcase(spec, each)] or [each] for each in patterns]
    return list(dict.fromkeys(spec for each in found for spec in each))


def _known(path: Path | None) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text())["rows"] if path is not None and path.exists() else []
    return [each for each in rows if each["form"] != "failed"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["*"], help="globs on LIBRARY:NAME")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of channels to keep")
    parser.add_argument(
        "--same-class", action="store_true", help="leave alone what only a graph could do without"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows of the output file that passed")
    parser.add_argument("--fast", action="store_true", help="one model, to see that it runs")
    parser.add_argument("--output", type=Path, help="JSON file; by default benchmarks/results/zoo.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    output = arguments.output or (None if arguments.fast else RESULTS / "zoo.json")
    known = _known(output) if arguments.resume else []
    specs = ["torchvision:resnet18"] if arguments.fast else _chosen(arguments.models)
    same_class = True if arguments.same_class else None
    show(
        write_as_they_come(output, "zoo", rows(specs, known, arguments.keep, same_class)),
        arguments.keep,
    )


if __name__ == "__main__":
    main()
