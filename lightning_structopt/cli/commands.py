"""The commands: each a function whose arguments are its flags, and whose docstring is its help."""

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from packaging.requirements import Requirement
from rich import print as rich_print
from rich.table import Table
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

import lightning_structopt as so
from lightning_structopt._checkpoints import read_checkpoint
from lightning_structopt.cli.checkpoints import (
    add_plan,
    fitted,
    loaded,
    small_checkpoint,
    training_cost,
)
from lightning_structopt.shrinking import channel_report, shrink_report

_EXTRAS = ("cli", "plot", "onnx", "ray", "examples")


def profile(
    model: nn.Module,
    input: list[int] | None = None,
    checkpoint: Path | None = None,
    batch_sizes: list[int] | None = None,
    threads: list[int] | None = None,
    seconds: float = 0.5,
    output: Path | None = None,
) -> None:
    """Print what a module costs: parameters, operations, bytes, memory and time, by layer.

    Args:
        model: The module, by `class_path` and `init_args`.
        input: Shape of an example input, such as [1,3,224,224]; the module's `example_input_array` if not given.
        checkpoint: Weights to load; of a module made smaller by `ChannelPruning` the plan, too.
        batch_sizes: Batch sizes to time, such as [1,32]; that of the input if not given.
        threads: Numbers of CPU threads to time; as many as PyTorch uses if not given.
        seconds: How long to time each setting.
        output: Folder for profile.json and profile.csv.
    """
    module = loaded(model, checkpoint)
    example = example_for(module, input)
    found = so.profile(module, example, batch_sizes=batch_sizes, threads=threads, seconds=seconds)
    rich_print(found)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        found.to_json(output / "profile.json")
        found.to_csv(output / "profile.csv")


def compare(
    models: dict[str, nn.Module],
    data: pl.LightningDataModule,
    checkpoints: dict[str, Path] | None = None,
    metrics: dict[str, Metric] | None = None,
    seconds: float = 0.5,
    output: Path | None = None,
) -> None:
    """Print the quality and the cost of modules side by side, against the first.

    Args:
        models: Modules by name, each by `class_path` and `init_args`.
        data: The LightningDataModule whose test data count (validation data if there are none).
        checkpoints: Weights to load, by name. What training took is read from those of runs with a `CostMonitor`.
        metrics: Metrics by name, each by `class_path` and `init_args`; chosen by the outputs if not given.
        seconds: How long to time each.
        output: Folder for report.md, .csv, .json, .html and, where matplotlib is installed, report.png.

    Raises:
        ValueError: If there is a checkpoint for a model that isn't there.
    """
    paths = checkpoints or {}
    if unknown := [name for name in paths if name not in models]:
        raise ValueError(
            f"`checkpoints` must be of the models. Found {unknown[0]!r}. Models are: {', '.join(models)}."
        )
    contents = {name: read_checkpoint(path) for name, path in paths.items()}
    modules = {
        name: fitted(module, contents[name], paths[name]) if name in paths else module
        for name, module in models.items()
    }
    training = {name: cost for name, content in contents.items() if (cost := training_cost(content))}
    chosen = None if metrics is None else MetricCollection(dict(metrics))
    report = so.compare(modules, data, chosen, training=training, seconds=seconds)
    rich_print(report)
    if output is not None:
        write_tables(report, output, "report")
        report.to_html(output / "report.html")


def shrink(
    model: nn.Module,
    output: Path,
    target: so.Target | None = None,
    input: list[int] | None = None,
    checkpoint: Path | None = None,
    same_class: bool = False,
    include_normalized: bool = False,
    onnx: bool = False,
) -> None:
    """Remove channels, neurons and heads; write small.ckpt, plan.json and, if asked, small.onnx.

    Args:
        model: The module, by `class_path` and `init_args`.
        output: Folder to write to.
        target: How much to keep, such as `FLOPs` with `keep: 0.5`; only what is zero goes if not given.
        input: Shape of an example input, such as [1,3,224,224]; the module's `example_input_array` if not given.
        checkpoint: Weights to load.
        same_class: Leave alone what can only go by exporting the graph.
        include_normalized: Take also from what a layer, group or RMS norm reduces over; outputs change.
        onnx: Whether to write small.onnx, which needs onnx and onnxscript.
    """
    source = {} if checkpoint is None else read_checkpoint(checkpoint)
    module = model if checkpoint is None else fitted(model, source, checkpoint)
    example = example_for(module, input)
    options: dict[str, Any] = {"same_class": same_class, "include_normalized": include_normalized}
    if target is None:
        report = shrink_report(module, example, **options)
    else:
        report = channel_report(module, target, example, **options)
    print(report.explain())
    output.mkdir(parents=True, exist_ok=True)
    report.plan.save(output / "plan.json")
    torch.save(small_checkpoint(report, source), output / "small.ckpt")
    if onnx:
        torch.onnx.export(
            report.module.eval(), (example,), str(output / "small.onnx"), dynamo=True, verbose=False
        )


def distill(
    teacher: pl.LightningModule,
    student: pl.LightningModule,
    data: pl.LightningDataModule,
    output: Path,
    teacher_checkpoint: Path | None = None,
    loss: so.DistillationLoss | dict[str, so.DistillationLoss] | None = None,
    alpha: float | None = None,
    trainer: dict[str, Any] | None = None,
    callbacks: list[pl.Callback] | None = None,
    seed: int = 0,
) -> None:
    """Train a student by its own steps plus what a teacher knows; write the student alone.

    Args:
        teacher: By `class_path` and `init_args`.
        student: Likewise.
        data: The LightningDataModule.
        output: The student's checkpoint, which its own class loads (`so.load_shrunk`, where `ChannelPruning` was at
            work).
        teacher_checkpoint: The teacher's weights.
        loss: A loss on logits, or losses by the names of modules; `SoftTarget` if not given.
        alpha: The share of distillation in the loss, in [0, 1].
        trainer: Plain arguments of the Trainer, such as `max_epochs: 10`.
        callbacks: Callbacks by `class_path` and `init_args`.
        seed: Seeds everything.
    """
    pl.seed_everything(seed, verbose=False)
    losses: Any = loss  # by name only: YAML has no pairs for keys
    module = so.DistillationModule(loaded(teacher, teacher_checkpoint), student, losses, alpha)
    pl.Trainer(**(trainer or {}), callbacks=callbacks).fit(module, data)
    output.parent.mkdir(parents=True, exist_ok=True)
    module.export_student(output)
    add_plan(output, callbacks or ())
    print(f"The student is in {output}.")


def sweep(
    candidates: dict[str, Callable[[], pl.LightningModule]],
    data: pl.LightningDataModule,
    monitor: str,
    mode: Literal["min", "max"] = "max",
    budget: so.Budget | None = None,
    trainer: dict[str, Any] | None = None,
    executor: so.Executor | None = None,
    constraints: list[so.Constraint] | None = None,
    directory: Path = Path("sweep"),
    seed: int = 0,
    patience: int | None = None,
    repeats: int = 1,
    timeout: float | None = None,
    storage: str | None = None,
    mutate: list[so.GrowthStep] | None = None,
) -> None:
    """Train candidates a little and the best of them longer; write result.md, .csv, .json, .png and best.ckpt.

    Args:
        candidates: Modules by name, each by `class_path` and `init_args`.
        data: The LightningDataModule.
        monitor: The metric that counts, as modules log it.
        mode: Whether more or less of it is better.
        budget: Such as `SuccessiveHalving`.
        trainer: Plain arguments of each Trainer.
        executor: Such as `LocalProcesses` with `workers: 2`.
        constraints: Such as `MaxParameters`.
        directory: Where everything is written; run it again to go on.
        seed: Seeds every candidate.
        patience: Rounds without a better best after which the sweep ends.
        repeats: Seeds that each finalist is trained with.
        timeout: Seconds that a rung may take.
        storage: `journal:PATH` or the URL of a database.
        mutate: Steps of growth, such as `Widen`, by which survivors of a round give children.
    """
    result = so.ArchitectureSweep(
        candidates, monitor, mode, budget, trainer, executor, constraints or (), directory, seed, patience,
        repeats, timeout, storage, mutate=mutate or (),
    ).run(data)  # fmt: skip
    rich_print(result)
    write_tables(result, directory, "result")
    checkpoint = result.best.checkpoint
    if checkpoint is not None and checkpoint.is_file():  # a sharded one is a folder, and stays where it is
        shutil.copyfile(checkpoint, directory / "best.ckpt")


def doctor() -> None:
    """Print versions, devices and which optional packages are there."""
    table = Table("what", "found", title="lightning-structopt")
    table.add_row("lightning-structopt", so.__version__)
    for name in ("torch", "lightning", "torchmetrics", "optuna", "rich"):
        table.add_row(name, version(name))
    table.add_row("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    table.add_row("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    table.add_row("CUDA", ", ".join(gpus) or "no device")
    for extra, packages in extras().items():
        found = {name: _version_of(name) for name in packages}
        missing = [name for name, has in found.items() if has == "no"]
        there = ", ".join(f"{name} {has}" for name, has in found.items())
        table.add_row(f"extra: {extra}", f"no: {', '.join(missing)} missing" if missing else there)
    rich_print(table)


def extras() -> dict[str, list[str]]:
    """Return what each extra for users wants, by what the installed package says of itself."""
    found: dict[str, list[str]] = {}
    for line in requires("lightning-structopt") or []:
        wanted = Requirement(line)
        # An extra of another package, such as lightning[pytorch-extra], stands for what of it is used here.
        name = {"lightning": "jsonargparse"}.get(wanted.name, wanted.name) if wanted.extras else wanted.name
        for extra in _EXTRAS:
            if wanted.marker is not None and wanted.marker.evaluate({"extra": extra}):
                found.setdefault(extra, []).append(name)
    return found


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command for command in (sweep, distill, profile, compare, shrink, doctor)
}


def example_for(module: nn.Module, shape: Sequence[int] | None) -> Any:
    """Return an input of ``shape``, or what the module keeps as ``example_input_array``.

    Raises:
        ValueError: If there is neither.
    """
    if shape is not None:
        return torch.randn(*shape)
    example: Tensor | None = getattr(module, "example_input_array", None)
    if example is None:
        raise ValueError(
            f"An example input is needed. Found no `--input` and no `example_input_array` in "
            f"`{type(module).__name__}`. Give its shape, as in `--input [1,3,224,224]`."
        )
    return example


def write_tables(found: Any, folder: Path, name: str) -> None:
    """Write a report as Markdown, CSV, JSON and, where matplotlib is installed, as a plot."""
    folder.mkdir(parents=True, exist_ok=True)
    found.to_markdown(folder / f"{name}.md")
    found.to_csv(folder / f"{name}.csv")
    found.to_json(folder / f"{name}.json")
    if _version_of("matplotlib") != "no":
        found.plot(folder / f"{name}.png")


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "no"
