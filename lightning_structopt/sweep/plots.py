"""The plot of a sweep."""

from collections.abc import Sequence
from typing import Any

from lightning_structopt.sweep.pareto import Point


def draw(candidates: Sequence[Any], points: Sequence[Point], best: set[str], monitor: str, cost: str) -> Any:
    """Return a matplotlib figure: learning curves on the left, the metric over a cost on the right.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A plot needs matplotlib. Install `lightning-structopt[plot]`.") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, costs = figure.subplots(1, 2)
    for candidate in candidates:
        if candidate.curve:
            epochs = sorted(candidate.curve)
            (line,) = curves.plot(epochs, [candidate.curve[epoch] for epoch in epochs], label=candidate.name)
            rungs = [epoch for epoch in candidate.scores if epoch in candidate.curve]
            curves.plot(rungs, [candidate.scores[epoch] for epoch in rungs], "o", color=line.get_color())
    curves.set(xlabel="epoch", ylabel=monitor, title="learning curves; dots: rungs")
    if 0 < len(candidates) <= 12:
        curves.legend(fontsize="small")
    for candidate, x, y in points:
        costs.plot(x, y, "o", color="tab:blue" if candidate.name in best else "tab:gray")
        costs.annotate(candidate.name, (x, y), textcoords="offset points", xytext=(6, 4))
    costs.set(xlabel=cost, ylabel=monitor, title="blue: nothing is better in both")
    costs.margins(0.15)
    return figure
