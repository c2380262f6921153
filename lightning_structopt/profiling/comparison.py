"""Several modules on the same data: what each is worth and what it costs, against the first that runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.progress import Progress
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_structopt.profiling.inputs import inputs_of
from lightning_structopt.profiling.profiler import Profile, profile
from lightning_structopt.profiling.quality import Predict, Quality, evaluate, predict_pair
from lightning_structopt.profiling.report import ComparisonReport, Entry
from lightning_structopt.profiling.significance import difference
from lightning_structopt.profiling.training_cost import TrainingCost


@dataclass(frozen=True)
class _Sound:
    quality: Quality
    profile: Profile


@dataclass(frozen=True)
class _Failed:
    reason: str


def compare(
    modules: Mapping[str, nn.Module],
    datamodule: Any,
    metrics: Metric | MetricCollection | None = None,
    *,
    predict: Predict = predict_pair,
    example_input: Any = None,
    training: Mapping[str, Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> ComparisonReport:
    """Measure every module by quality and by cost on the same data, and set each against the first.

    A module that fails gets a row with the reason, and the others go on.

    Args:
        modules: The modules by name, each on a device of its own choice. They are left as they were.
        datamodule: A LightningDataModule, of which the test data are taken (validation data if there are none), or a
            loader. It must give the same samples in the same order every time.
        metrics: What to score by; chosen by the outputs and targets if not given: for classes accuracy, precision,
            recall, F1, AUROC and calibration error; for numbers MSE, RMSE, MAE and R2; for pixels IoU; for tokens
            accuracy and perplexity; for text BLEU and ROUGE. Those given get what ``predict`` returns.
        predict: From module and batch to outputs and targets; for batches that are no pair of inputs and targets.
        example_input: What to profile with, as in :func:`profile`; the inputs of the first batch if not given.
        training: By name, the :class:`CostMonitor` or :class:`TrainingCost` of the run that trained a module.
        progress: Whether to show a progress bar.
        **options: For :func:`profile`: ``batch_sizes``, ``threads``, ``seconds``, ``training``.

    Returns:
        A report: print it by ``rich``, or write it (``to_markdown``, ``to_csv``, ``to_json``, ``plot``, ``to_html``).

    Raises:
        TypeError: If an option is unknown, or something in ``training`` is no cost.
        ValueError: If there are no modules, ``training`` names one that isn't there, or all of them fail.

    Example:
        >>> import torch
        >>> loader = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> modules = {"small": nn.Linear(4, 3), "large": nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 3))}
        >>> report = compare(modules, loader, progress=False, seconds=0.01)
        >>> [(entry.name, entry.costs["parameters"]) for entry in report.entries]
        [('small', 15.0), ('large', 515.0)]
    """
    costs = _costs(modules, training or {})
    loader = _loader(datamodule)
    found: dict[str, _Sound | _Failed] = {}
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("Comparing", total=len(modules))
        for name, module in modules.items():
            found[name] = _measure(module, loader, metrics, predict, example_input, options)
            bar.advance(task)
    _require_one_sound(found)
    lower = next(result.quality.lower_is_better for result in found.values() if isinstance(result, _Sound))
    return ComparisonReport(tuple(_with_pareto(_entries(found, costs), lower)), lower)


def _costs(modules: Mapping[str, nn.Module], training: Mapping[str, Any]) -> dict[str, TrainingCost]:
    """Return the costs of training by name.

    Raises:
        TypeError: If one is no cost.
        ValueError: If there are no modules, or a name is unknown.
    """
    if not modules:
        raise ValueError(
            "`modules` must have at least one module. Found none. Give a dict of modules by name."
        )
    if unknown := [name for name in training if name not in modules]:
        raise ValueError(
            f"`training` must name modules. Found {unknown[0]!r}; the modules are {', '.join(map(repr, modules))}."
        )
    costs = {name: getattr(cost, "cost", cost) for name, cost in training.items()}
    for name, cost in costs.items():
        if not isinstance(cost, TrainingCost):
            raise TypeError(
                f"`training` must hold a `CostMonitor` or a `TrainingCost` for each name. Found {cost!r} for {name!r}."
            )
    return costs


def _loader(datamodule: Any) -> Iterable[Any]:
    if not hasattr(datamodule, "test_dataloader"):
        loader: Iterable[Any] = datamodule
        return loader
    datamodule.prepare_data()
    for stage, method in (("test", "test_dataloader"), ("validate", "val_dataloader")):
        owner = next(kind for kind in type(datamodule).__mro__ if method in vars(kind))
        if not owner.__module__.startswith(("lightning.", "pytorch_lightning.")):  # it is the user's own
            datamodule.setup(stage)
            return getattr(datamodule, method)()  # type: ignore[no-any-return]
    raise ValueError(
        f"`datamodule` must have test or validation data. Found neither in `{type(datamodule).__name__}`. Define "
        "`test_dataloader`, or give a loader."
    )


def _measure(
    module: nn.Module,
    loader: Iterable[Any],
    metrics: Metric | MetricCollection | None,
    predict: Predict,
    example_input: Any,
    options: Mapping[str, Any],
) -> _Sound | _Failed:
    try:
        quality = evaluate(module, loader, metrics, predict)
        if example_input is None:
            example_input = inputs_of(quality.first_batch)
        return _Sound(quality, profile(module, example_input, **options))
    except Exception as error:  # whatever a user's module may raise
        return _Failed(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _require_one_sound(found: Mapping[str, _Sound | _Failed]) -> None:
    """Raise unless a module could be measured.

    Raises:
        ValueError: If none could.
    """
    reasons = [f"{name}: {result.reason}" for name, result in found.items() if isinstance(result, _Failed)]
    if len(reasons) == len(found):
        raise ValueError(f"At least one module must run. Found that all fail. {'; '.join(reasons)}")


def _entries(found: Mapping[str, _Sound | _Failed], costs: Mapping[str, TrainingCost]) -> list[Entry]:
    first = next(result for result in found.values() if isinstance(result, _Sound))
    entries = []
    for name, result in found.items():
        entry = Entry(name, training=costs.get(name))
        if isinstance(result, _Failed):
            entries.append(replace(entry, failure=result.reason))
            continue
        samples = result.quality.samples
        compared = None
        if result is not first and len(samples):
            compared = difference(first.quality.samples, samples)
        entries.append(
            replace(entry, metrics=result.quality.metrics, profile=result.profile, against_first=compared)
        )
    return entries


def _with_pareto(entries: list[Entry], lower_is_better: frozenset[str]) -> list[Entry]:
    """Mark the modules that none beats in both the first metric and latency."""
    sound = {entry.name: _points(entry, lower_is_better) for entry in entries if entry.profile is not None}

    def beaten(mine: tuple[float, float]) -> bool:
        return any(
            theirs != mine and theirs[0] >= mine[0] and theirs[1] >= mine[1] for theirs in sound.values()
        )

    return [replace(e, is_pareto=e.name in sound and not beaten(sound[e.name])) for e in entries]


def _points(entry: Entry, lower_is_better: frozenset[str]) -> tuple[float, float]:
    metric, value = next(iter(entry.metrics.items()))
    assert entry.profile is not None
    return -value if metric in lower_is_better else value, -entry.profile.latency_ms
