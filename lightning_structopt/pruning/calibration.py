"""Data by which weights are scored."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_structopt._checks import require_type, require_whole
from lightning_structopt._devices import device_of, moved
from lightning_structopt.pruning.sharding import Sharding

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Calibration:
    """A few batches by which a criterion scores weights, apart from training.

    The module runs in evaluation mode. Its modes, buffers and gradients are as before afterwards, and so is
    torch's random state, which is the same each time: a loader that shuffles gives the same batches. With
    several ranks each runs its own batches, and what they found is averaged.

    Args:
        batches: A loader, a list of batches, or one tensor, which is then one batch of inputs. A generator
            runs out, so it serves for one scoring only. Tensors in batches are moved to the module's device.
        loss: From the module and a batch to a scalar. By default batches are ``(inputs, labels)`` and the
            loss is the cross-entropy of ``module(inputs)``. Criteria that need no loss ignore it and take a
            batch's first element, or the batch if it is a tensor, as the inputs.
        limit: At most so many batches, at least 1; None for all.

    Raises:
        TypeError: If ``batches`` is not iterable, ``loss`` not callable or ``limit`` not a whole number.
        ValueError: If ``limit`` is less than 1.

    Example:
        >>> batches = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
        >>> calibration = Calibration(batches, limit=10)
    """

    # Data has neither a truth value when compared nor a hash. The loader is named, without its type argument,
    # so that a YAML file can make one by `class_path`.
    batches: DataLoader | Iterable[Any] = field(compare=False)  # type: ignore[type-arg]
    loss: Loss | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.batches, Iterable):
            raise TypeError(
                f"`batches` must be a loader, a list of batches or a tensor. Found `batches = {self.batches!r}`."
            )
        if self.loss is not None and not callable(self.loss):
            raise TypeError(
                f"`loss` must be a function of a module and a batch. Found `loss = {self.loss!r}`."
            )
        if self.limit is not None:
            require_whole("limit", self.limit, 1)

    def losses(self, module: nn.Module) -> Iterator[Tensor]:
        """Yield the loss of ``module`` on each batch.

        Raises:
            TypeError: If it is not a scalar tensor.
            ValueError: If it has no gradient.
        """
        for batch in self._batches(device_of(module)):
            loss = _cross_entropy(module, batch) if self.loss is None else self.loss(module, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise TypeError(f"`loss` must return a scalar tensor. Found {_shown(loss)}.")
            if not loss.requires_grad:
                raise ValueError(
                    "`loss` must depend on the weights. Found one without a gradient. Compute it from what the "
                    "given module returns, without `torch.no_grad()` or `detach()`."
                )
            yield loss

    def inputs(self, module: nn.Module) -> Iterator[Tensor]:
        """Yield the inputs of ``module`` in each batch.

        Raises:
            TypeError: If a batch has no tensor to begin with.
        """
        for batch in self._batches(device_of(module)):
            inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(inputs, Tensor):
                raise TypeError(
                    f"A batch must be a tensor of inputs or begin with one. Found {_shown(inputs)}. Wrap the "
                    "loader, and the module if it takes several inputs."
                )
            yield inputs

    def _batches(self, device: torch.device) -> Iterator[Any]:
        batches = [self.batches] if isinstance(self.batches, Tensor) else self.batches
        found = False
        for batch in islice(batches, self.limit):
            found = True
            yield moved(batch, device)
        if not found:
            raise ValueError(
                "`batches` must hold at least one batch. Found none. A generator runs out after one scoring: "
                "give a loader or a list."
            )


def require_calibration(criterion: object, calibration: Calibration | None) -> Calibration:
    """Return ``calibration``.

    Raises:
        ValueError: If there is none.
    """
    if calibration is None:
        name = type(criterion).__name__
        raise ValueError(
            f"`{name}` runs the module on data. Found no `calibration`. Give "
            f"`{name}(calibration=Calibration(batches))`."
        )
    return calibration


def require_calibration_type(calibration: Calibration | None) -> None:
    """Raise unless ``calibration`` is None or what it should be."""
    if calibration is not None:
        require_type("calibration", calibration, Calibration)


def require_unsharded(criterion: object, sharding: Sharding) -> None:
    """Raise if parameters are sharded, so that a rank can't run the module in ways of its own.

    Raises:
        ValueError: If they are.
    """
    if sharding.mesh is not None:
        raise ValueError(
            f"`{type(criterion).__name__}` with a `calibration` needs whole parameters. Found parameters "
            "sharded over ranks (FSDP2). Call `prune` before the module is sharded, or take a criterion that "
            "learns from training: `Taylor()`, `GradientSquared()`, `Movement()` or `Wanda()`."
        )


def _cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"Without a `loss`, batches must be `(inputs, labels)`. Found {_shown(batch)}. Give `Calibration` a "
            "`loss` of the module and a batch."
        )
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def _shown(thing: object) -> str:
    if isinstance(thing, Tensor):
        return f"a tensor of shape {tuple(thing.shape)}"
    return f"a `{type(thing).__name__}`"
