"""Reports in the logger of a run: figures as metrics, the table as text, the plot as an image."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_structopt.profiling.tabular import as_markdown

_TRAILING = re.compile(r"\W+$")
_FORBIDDEN = re.compile(r"[^\w./-]+")  # by the strictest of them, MLflow


@dataclass(frozen=True)
class Content:
    """What a logger gets of a report.

    Args:
        metrics: By step the figures by name.
        header: Of the table.
        rows: Of the table, as text.
        figure: The plot, of matplotlib; None if there is none.
    """

    metrics: Mapping[int, Mapping[str, float]]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    figure: Any = None

    @property
    def markdown(self) -> str:
        """The table in Markdown."""
        return as_markdown(self.header, self.rows)


@rank_zero_only
def log_content(logger: Any, name: str, content: Content, step: int = 0) -> None:
    """Write ``content`` to ``logger``, each part where that logger has a place for it; on the first rank only.

    Which logger it is tells what it can do, not its class, so those of other packages do as well. Metrics go to all.
    W&B takes a table and an image, TensorBoard a text and a figure, MLflow both as artifacts. Of others that have a
    folder (CSV) they are ``NAME.md`` and ``NAME.png`` in it.

    Args:
        logger: One of Lightning's, such as ``trainer.logger``.
        name: What goes before the names of metrics, and that of the table.
        content: What to write.
        step: Which step the table and the plot are of.

    Raises:
        TypeError: If ``logger`` is none.
    """
    if not callable(getattr(logger, "log_metrics", None)):
        raise TypeError(
            f"`logger` must be one of Lightning's loggers. Found `logger = {logger!r}`. Give `trainer.logger`, of a "
            "Trainer that has one, or `CSVLogger(folder)`."
        )
    for at, metrics in content.metrics.items():
        sound = {f"{name}/{key}": value for key, value in metrics.items() if math.isfinite(value)}
        logger.log_metrics({_allowed(key): value for key, value in sound.items()}, at)
    place = _place(logger)
    if place is not None:
        place(logger, name, content, step)
    logger.save()


def _allowed(name: str) -> str:
    """Return ``name`` as every tracker takes it: "a/latency (ms)" is "a/latency_ms"."""
    return _FORBIDDEN.sub("_", _TRAILING.sub("", name))


def _place(logger: Any) -> Callable[[Any, str, Content, int], None] | None:
    """Return what writes tables and plots to ``logger``; None if it has no place for them."""
    if callable(getattr(logger, "log_table", None)) and callable(getattr(logger, "log_image", None)):
        return _to_wandb
    experiment = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_text", None)):
        return _to_tensorboard
    if callable(getattr(experiment, "log_text", None)) and hasattr(logger, "run_id"):
        return _to_mlflow
    return None if getattr(logger, "log_dir", None) is None else _to_folder


def _to_wandb(logger: Any, name: str, content: Content, step: int) -> None:
    logger.log_table(name, columns=list(content.header), data=[list(row) for row in content.rows], step=step)
    if content.figure is not None:
        logger.log_image(f"{name}/plot", [content.figure], step=step)


def _to_tensorboard(logger: Any, name: str, content: Content, step: int) -> None:
    logger.experiment.add_text(name, content.markdown, step)
    if content.figure is not None:
        logger.experiment.add_figure(f"{name}/plot", content.figure, step, close=False)


def _to_mlflow(logger: Any, name: str, content: Content, step: int) -> None:
    logger.experiment.log_text(logger.run_id, content.markdown, f"{name}.md")
    if content.figure is not None:
        logger.experiment.log_figure(logger.run_id, content.figure, f"{name}.png")


def _to_folder(logger: Any, name: str, content: Content, step: int) -> None:
    path = Path(logger.log_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.md").write_text(content.markdown + "\n")
    if content.figure is not None:
        content.figure.savefig(path.with_name(f"{path.name}.png"), dpi=120)
