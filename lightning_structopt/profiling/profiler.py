"""What a module costs, in one table."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn
from typing_extensions import override

from lightning_structopt._checks import require_in, require_whole
from lightning_structopt.profiling.flops import count_flops
from lightning_structopt.profiling.inputs import Call, as_call
from lightning_structopt.profiling.latency import Latency, latency
from lightning_structopt.profiling.layer_times import layer_ms
from lightning_structopt.profiling.loggers import Content, log_content
from lightning_structopt.profiling.memory import forward_bytes, training_bytes
from lightning_structopt.profiling.tabular import Tabular
from lightning_structopt.profiling.weights import count_nonzero, own_tensors, saved_bytes, size_bytes

_TOTALS = ("parameters", "trainable", "nonzero", "size_bytes", "flops", "effective_flops", "activation_bytes")
_COLUMNS = ("layer", "kind", "parameters", "nonzero", "size", "FLOPs", "effective", "activations", "ms")


@dataclass(frozen=True)
class LayerCost:
    """What one submodule costs by itself, without those inside it.

    Args:
        name: Its name in the module; empty for the module itself.
        kind: Its class.
        parameters: Number of parameters. A parameter that is shared counts once, where it is met first.
        trainable: How many of them require gradients.
        nonzero: How many of them are not zero.
        size_bytes: Bytes of parameters and buffers in memory.
        flops: Floating-point operations of one forward pass.
        effective_flops: Those that are left when multiplications by a zero weight are not counted.
        activation_bytes: Bytes that its operators bring about in a forward pass, whether or not they live on.
        latency_ms: Median time of its operators in a forward pass, with the threads that PyTorch uses now. Hooks around
            each layer take their own time, so the layers' sum is more than the latency of the whole.
    """

    name: str
    kind: str
    parameters: int
    trainable: int
    nonzero: int
    size_bytes: int
    flops: int
    effective_flops: float
    activation_bytes: int
    latency_ms: float


@dataclass(frozen=True)
class Profile(Tabular):
    """What a module costs.

    Args:
        layers: Every submodule that has parameters, buffers, operations or activations of its own.
        saved_bytes: Bytes of the state dict as ``torch.save`` writes it.
        compressed_bytes: Bytes of that, deflated.
        forward_bytes: Peak of memory of a forward pass, besides the module and its input.
        training_bytes: Peak of memory of a forward and a backward pass, gradients included; None if not asked for.
        latencies: Times of a forward pass by batch size and threads.
        batch_size: Samples in the pass that operations and memory are for.
    """

    layers: tuple[LayerCost, ...]
    saved_bytes: int
    compressed_bytes: int
    forward_bytes: int
    training_bytes: int | None
    latencies: tuple[Latency, ...]
    batch_size: int

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def trainable(self) -> int:
        """Number of parameters that require gradients."""
        return sum(layer.trainable for layer in self.layers)

    @property
    def nonzero(self) -> int:
        """Number of parameters that are not zero."""
        return sum(layer.nonzero for layer in self.layers)

    @property
    def size_bytes(self) -> int:
        """Bytes of parameters and buffers in memory."""
        return sum(layer.size_bytes for layer in self.layers)

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward pass, of all its samples together."""
        return sum(layer.flops for layer in self.layers)

    @property
    def effective_flops(self) -> float:
        """Those that are left when multiplications by a zero weight are not counted."""
        return sum(layer.effective_flops for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Bytes that operators bring about in a forward pass: all of them, not only those that live at once."""
        return sum(layer.activation_bytes for layer in self.layers)

    @property
    def latency_ms(self) -> float:
        """The median time of a forward pass, in the first of the settings that were timed."""
        return self.latencies[0].median_ms

    def to_dict(self) -> dict[str, Any]:
        """Return totals, latencies and layers as plain data."""
        return {name: getattr(self, name) for name in _TOTALS} | asdict(self)

    def log_to(self, logger: Any, name: str = "profile", step: int = 0) -> None:
        """Write the profile to the logger of a run: the totals as metrics, the table of layers as text.

        Args:
            logger: One of Lightning's: TensorBoard, W&B, MLflow, CSV and others.
            name: What names begin with, as in ``profile/parameters``.
            step: The step that it is logged at.

        Raises:
            TypeError: If ``logger`` is none.
        """
        totals = {total: float(getattr(self, total)) for total in (*_TOTALS, "saved_bytes", "latency_ms")}
        log_content(logger, name, Content({step: totals}, *self.rows()), step)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of the table as text, the total last."""
        rows = [[layer.name or "(itself)", layer.kind, *_numbers(layer)] for layer in self.layers]
        return [*_COLUMNS], [*rows, ["total", "", *_numbers(self)]]

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the profile as JSON, and write it to ``path`` if given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def to_csv(self, path: str | Path) -> None:
        """Write one row for each layer to ``path``."""
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, [*LayerCost.__dataclass_fields__])
            writer.writeheader()
            writer.writerows(asdict(layer) for layer in self.layers)

    @override
    def table(self) -> Table:
        """Return the layers and their total as a table."""
        caption = [
            f"{self.trainable:,} trainable; saved {_short(self.saved_bytes)}B, "
            f"compressed {_short(self.compressed_bytes)}B",
            f"memory of a pass over {self.batch_size} samples: {_short(self.forward_bytes)}B"
            + ("" if self.training_bytes is None else f", to train {_short(self.training_bytes)}B"),
            *(
                f"{t.median_ms:.3g} ms ({t.quartiles_ms[0]:.3g} to {t.quartiles_ms[1]:.3g}) for {t.batch_size} "
                f"samples on {t.threads} threads"
                for t in self.latencies
            ),
        ]
        table = Table(caption="\n".join(caption), caption_justify="left")
        header, rows = self.rows()
        for index, column in enumerate(header):
            table.add_column(column, justify="left" if index < 2 else "right")
        for row in rows[:-1]:
            table.add_row(*row)
        table.add_section()
        table.add_row(*rows[-1])
        return table


def profile(
    module: nn.Module,
    example_input: Any,
    *,
    batch_sizes: int | Iterable[int] | None = None,
    threads: int | Iterable[int] | None = None,
    seconds: float = 0.5,
    training: bool = True,
) -> Profile:
    """Measure what ``module`` costs: parameters, bytes, operations, memory and time.

    The module is left as it was: modes, running statistics, gradients, random state.

    Args:
        module: The module, on any device. Of one sharded by FSDP2 all ranks call this together; counts are of the
            whole, memory and saved bytes of this rank's part.
        example_input: A tensor, a tuple of arguments, or a dict of keyword arguments, on the module's device.
            Operations and memory are for its batch.
        batch_sizes: Batch sizes to time; that of ``example_input`` if not given. Its samples are repeated.
        threads: Numbers of CPU threads to time; as many as PyTorch uses now if not given.
        seconds: How long to time each setting.
        training: Whether to measure the memory of a forward and a backward pass too.

    Returns:
        The profile: print it by ``rich``, or take its fields.

    Raises:
        TypeError: If an argument is of the wrong kind or ``example_input`` doesn't fit the forward pass.
        ValueError: If a number is out of range, or the input is on another device than the module.

    Example:
        >>> import torch
        >>> found = profile(nn.Linear(100, 10), torch.ones(8, 100), seconds=0.01)
        >>> found.parameters, found.flops, found.size_bytes
        (1010, 16000, 4040)
    """
    settings = [
        {"batch_size": size, "threads": count}
        for size in _listed("batch_sizes", batch_sizes)
        for count in _listed("threads", threads)
    ]
    require_in("seconds", seconds, 0, math.inf, closed="neither")
    call = as_call(module, example_input)
    peak, activations = forward_bytes(module, call)
    costs = tuple(_layers(module, call, activations, layer_ms(module, call, seconds / 2)))
    saved, compressed = saved_bytes(module)
    return Profile(
        layers=costs,
        saved_bytes=saved,
        compressed_bytes=compressed,
        forward_bytes=peak,
        training_bytes=training_bytes(module, call) if training else None,
        latencies=tuple(latency(module, example_input, **each, seconds=seconds) for each in settings),
        batch_size=call.batch_size,
    )


def _layers(
    module: nn.Module, call: Call, activations: Mapping[str, int], times: Mapping[str, float]
) -> Iterable[LayerCost]:
    count_of = {parameter: count_nonzero(parameter) for parameter in module.parameters()}
    flops = count_flops(module, call, count_of)
    for name, part, parameters, buffers in own_tensors(module):
        dense, effective = flops.get(name, (0, 0.0))
        if parameters or buffers or dense or activations.get(name):
            yield LayerCost(
                name=name,
                kind=type(part).__name__,
                parameters=sum(p.numel() for p in parameters),
                trainable=sum(p.numel() for p in parameters if p.requires_grad),
                nonzero=sum(count_of[p] for p in parameters),
                size_bytes=sum(map(size_bytes, [*parameters, *buffers])),
                flops=int(dense),
                effective_flops=effective,
                activation_bytes=activations.get(name, 0),
                latency_ms=times.get(name, 0.0),
            )


def _listed(name: str, values: int | Iterable[int] | None) -> Sequence[int | None]:
    """Return each of ``values``, of which None stands for what is there already.

    Raises:
        TypeError: If one is not a whole number.
        ValueError: If there are none, or one is below 1.
    """
    listed = list(values) if isinstance(values, Iterable) else [values]
    if not listed:
        raise ValueError(
            f"`{name}` must have at least one number. Found none. Leave it out for the present one."
        )
    for value in listed:
        if value is not None:
            require_whole(name, value, 1)
    return listed


def _numbers(cost: LayerCost | Profile) -> list[str]:
    return [
        f"{cost.parameters:,}",
        f"{cost.nonzero:,}",
        f"{_short(cost.size_bytes)}B",
        _short(cost.flops),
        _short(cost.effective_flops),
        f"{_short(cost.activation_bytes)}B",
        f"{cost.latency_ms:.3g}",
    ]


def _short(count: float) -> str:
    """Return three digits and a unit: 36.9 k, 1.25 G."""
    units = ["", "k", "M", "G", "T"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"
