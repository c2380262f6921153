"""How much each layer suffers from being pruned, and a share of sparsity that spares the ones that do."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lightning_structopt._checks import require_choice, require_in
from lightning_structopt._undisturbed import evaluating
from lightning_structopt.pruning.criteria import Criterion, Evidence, Magnitude
from lightning_structopt.pruning.distributions import PerLayer
from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.pruning.one_shot import advance
from lightning_structopt.pruning.patterns import Unstructured
from lightning_structopt.pruning.selection import Pick, select_parameters

Metric = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` measured.

    Args:
        baseline: The metric of the module as it was given.
        sparsities: The sparsities that were tried on each layer alone, rising.
        metrics: By parameter name, the metric at each of these.
        sizes: By parameter name, its number of weights.
        mode: Whether a larger metric is better (``"max"``) or a smaller one (``"min"``).
    """

    baseline: float
    sparsities: tuple[float, ...]
    metrics: dict[str, tuple[float, ...]]
    sizes: dict[str, int]
    mode: Literal["max", "min"]

    def loss(self, name: str) -> list[float]:
        """Return how much worse the metric gets with parameter ``name`` pruned, never less than before."""
        sign = 1 if self.mode == "max" else -1
        worst, losses = 0.0, []
        for metric in self.metrics[name]:
            worst = max(worst, sign * (self.baseline - metric))
            losses.append(worst)
        return losses

    def budget(self, sparsity: float) -> PerLayer:
        """Share ``sparsity`` out so that all layers lose alike, each pruned by itself.

        Between the sparsities that were tried, the loss is taken to be linear.

        Args:
            sparsity: Fraction of all weights to be zero, in [0, 1).

        Returns:
            A distribution for ``Unstructured(scope="layer", distribution=...)``.

        Raises:
            ValueError: If ``sparsity`` is out of range, or more than the largest that was tried.
        """
        require_in("sparsity", sparsity, 0, 1, closed="left")
        if sparsity > self.sparsities[-1]:
            raise ValueError(
                f"`sparsity` must be at most the largest that was tried. Found `sparsity = {sparsity}` after "
                f"`sparsities = {self.sparsities}`. Try larger ones."
            )
        low, high = 0.0, max(max(self.loss(name)) for name in self.metrics)
        for _ in range(100):  # halves until floats end
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean(self._bearing(middle)) < sparsity else (low, middle)
        shares = self._bearing(high)
        return PerLayer(
            _scaled(shares, sparsity / self._mean(shares)) if sparsity else dict.fromkeys(shares, 0.0)
        )

    def _bearing(self, loss: float) -> dict[str, float]:
        """Return the sparsity at which each layer, by itself, loses ``loss``."""
        return {name: _interpolate(self.loss(name), self.sparsities, loss) for name in self.metrics}

    def _mean(self, shares: dict[str, float]) -> float:
        return sum(shares[name] * size for name, size in self.sizes.items()) / sum(self.sizes.values())

    def table(self) -> Table:
        """Return a table of the metric, a row a parameter and a column a sparsity."""
        table = Table(title=f"Metric with one layer pruned (dense: {self.baseline:.4g})")
        table.add_column("parameter", overflow="fold")
        for sparsity in self.sparsities:
            table.add_column(f"{sparsity:.0%}", justify="right")
        for name, metrics in self.metrics.items():
            table.add_row(name, *(f"{metric:.4g}" for metric in metrics))
        return table

    def to_json(self, path: str | Path) -> None:
        """Write everything to ``path`` as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2))

    def to_csv(self, path: str | Path) -> None:
        """Write the table to ``path`` as CSV."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["parameter", *self.sparsities])
            writer.writerows([name, *metrics] for name, metrics in self.metrics.items())

    def plot(self, path: str | Path) -> None:
        """Draw a heat map of the loss into ``path``; needs matplotlib (the extra ``plot``)."""
        from matplotlib.figure import Figure

        figure = Figure(
            figsize=(2 + 0.8 * len(self.sparsities), 1.5 + 0.35 * len(self.metrics)), layout="constrained"
        )
        axes = figure.subplots()
        image = axes.imshow([self.loss(name) for name in self.metrics], aspect="auto", cmap="magma_r")
        axes.set_xticks(range(len(self.sparsities)), [f"{sparsity:.0%}" for sparsity in self.sparsities])
        axes.set_yticks(range(len(self.metrics)), list(self.metrics))
        axes.set(xlabel="sparsity of that layer alone", title="Loss of metric")
        figure.colorbar(image)
        figure.savefig(path, dpi=120)


@torch.no_grad()
def sensitivity(
    module: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    metric: Metric,
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99),
    *,
    mode: Literal["max", "min"] = "max",
    criterion: Criterion | None = None,
    include: Pick | Sequence[Pick] | None = None,
    exclude: Pick | Sequence[Pick] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure ``metric`` with one layer at a time pruned, at each of ``sparsities``.

    The module is evaluated in eval mode and left as it was.

    Args:
        module: Called with the first element of a batch.
        loader: Batches of inputs and targets; gone through once for every layer and sparsity.
        metric: A torchmetrics metric, or a function of all outputs and all targets.
        sparsities: What to try on each layer, in (0, 1).
        mode: Whether a larger metric is better or a smaller one.
        criterion: How important a weight is; :class:`~lightning_structopt.Magnitude` if not given.
        include: Which layers to try, as in :class:`~lightning_structopt.IterativePruning`.
        exclude: Which to leave out.
        progress: Whether to show a progress bar.

    Returns:
        The metric by layer and sparsity, with a table, a heat map and a budget for a global target.

    Raises:
        ValueError: If ``sparsities`` are none or out of range, or nothing is chosen.
    """
    require_choice("mode", mode, ("max", "min"))
    tried = tuple(sorted(set(sparsities)))
    if not tried:
        raise ValueError("`sparsities` must hold at least one. Found none.")
    for sparsity in tried:
        require_in("sparsities", sparsity, 0, 1, closed="neither")
    parameters = select_parameters(module, include, exclude)
    with evaluating(module):
        baseline = _evaluate(module, loader, metric)
        found: dict[str, list[float]] = {name: [] for name in parameters}
        work = [(name, sparsity) for name in parameters for sparsity in tried]
        for name, sparsity in track(work, "Sensitivity", disable=not progress):
            found[name].append(
                _with_one_pruned(module, name, parameters[name], sparsity, criterion, loader, metric)
            )
    metrics = {name: tuple(values) for name, values in found.items()}
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    return Sensitivity(baseline, tried, metrics, sizes, mode)


def _with_one_pruned(
    module: nn.Module,
    name: str,
    parameter: nn.Parameter,
    sparsity: float,
    criterion: Criterion | None,
    loader: Iterable[Sequence[Tensor]],
    metric: Metric,
) -> float:
    whole = parameter.detach().clone()
    try:
        masks = MaskSet({name: parameter})
        advance(masks, sparsity, criterion or Magnitude(), Unstructured(), lambda: Evidence(module))
        return _evaluate(module, loader, metric)
    finally:
        parameter.copy_(whole)


def _evaluate(module: nn.Module, loader: Iterable[Sequence[Tensor]], metric: Metric) -> float:
    pairs = [(module(batch[0]), batch[1]) for batch in loader]
    if not (hasattr(metric, "update") and hasattr(metric, "compute")):
        outputs, targets = zip(*pairs, strict=True)
        return float(metric(torch.cat(outputs), torch.cat(targets)))
    torchmetric = cast("Any", metric)
    torchmetric.reset()
    for output, target in pairs:
        torchmetric.update(output, target)
    return float(torchmetric.compute())


def _interpolate(losses: Sequence[float], sparsities: Sequence[float], loss: float) -> float:
    """Return the largest sparsity whose loss, linear between those tried, is at most ``loss``."""
    before_loss, before = 0.0, 0.0
    for this_loss, this in zip(losses, sparsities, strict=True):
        if this_loss > loss:
            return before + (this - before) * (loss - before_loss) / (this_loss - before_loss)
        before_loss, before = this_loss, this
    return before


def _scaled(shares: dict[str, float], factor: float) -> dict[str, float]:
    return {name: min(share * factor, 1 - 1e-9) for name, share in shares.items()}
