"""One deepening as plain data: which layer is added, and where."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_structopt.growth.layers import identity, zero_residual

DeepenKind: TypeAlias = Literal["identity", "residual"]


@dataclass(frozen=True)
class Deepening:
    r"""Adds a layer that gives back its input.

    An identity layer :math:`\phi(I \phi(x)) = \phi(x)` with an activation that leaves its own results as they are,
    or a residual block :math:`x + 0`.

    Args:
        after: The submodule that it follows.
        kind: ``"identity"`` or ``"residual"``.
        width: Features or channels.
        places: How many dimensions of places follow the channels; 0 for features in the last dimension.
        kernel_size: Of convolutions.
        bounds: What the activation cuts off at, from below and above; without an upper one it is ReLU.
        activation_first: Whether an activation follows the place, so that the new one comes before the new layer.
        norm: Whether a residual block has batch norms.
        seed: Of what is drawn.
    """

    after: str
    kind: DeepenKind
    width: int
    places: int
    kernel_size: int = 3
    bounds: Sequence[float] = (0.0,)
    activation_first: bool = False
    norm: bool = False
    seed: int = 0

    def grow(self, module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """Deepen ``module`` where it is.

        A plain ``nn.Sequential`` gets one more part; any other place is replaced by a sequence of itself and the new
        layer. Parameters of the new layer join the group of the last one before them of as many dimensions.

        Args:
            module: The module.
            optimizers: Those that move its parameters.

        Raises:
            ValueError: If the place is the whole module and no ``nn.Sequential``.
        """
        place = module.get_submodule(self.after)
        new = self.layer().train(place.training)
        like = next((each for part in (place, module) for each in part.parameters()), None)
        if like is not None:
            new.to(like.device, like.dtype)
        if type(place) is nn.Sequential:
            place.append(new)
        elif not self.after:
            raise ValueError(
                "A layer is added after a part of the module. Found the whole module, a "
                f"`{type(module).__name__}`. Name one of its parts in `after`."
            )
        else:
            owner, _, leaf = self.after.rpartition(".")
            follow = nn.Sequential(place, new).train(place.training)
            setattr(module.get_submodule(owner), leaf, follow)
        _join_groups(module, new, optimizers)

    def layer(self) -> nn.Module:
        """Return the new layer; the stream of random numbers stays where it is."""
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(self.seed)
            if self.kind == "residual":
                return zero_residual(self.width, self.places, self.kernel_size, self.norm)
            activation = nn.ReLU() if len(self.bounds) == 1 else nn.Hardtanh(self.bounds[0], self.bounds[1])
            parts = [identity(self.width, self.places, self.kernel_size), activation]
            return nn.Sequential(*(reversed(parts) if self.activation_first else parts))


def _join_groups(module: nn.Module, new: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Put new parameters into the groups of those before them."""
    fresh = {id(parameter) for parameter in new.parameters()}
    owners = list(_groups(optimizers))
    for parameter in new.parameters() if optimizers else ():
        group = _nearest_group(module, parameter, fresh, owners)
        if group is not None:
            group["params"].append(parameter)


def _groups(optimizers: Sequence[Optimizer]) -> Iterator[tuple[dict[str, object], set[int]]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield group, {id(parameter) for parameter in group["params"]}


def _nearest_group(
    module: nn.Module,
    new: Tensor,
    fresh: set[int],
    owners: Sequence[tuple[dict[str, object], set[int]]],
) -> dict[str, list[Tensor]] | None:
    """Return the group of the last parameter before ``new``, if possible of as many dimensions; else the next one.

    Weights and biases may be in different groups, as those with and without weight decay.
    """
    parameters = list(module.parameters())
    at = next(number for number, each in enumerate(parameters) if each is new)
    known = [each for each in [*reversed(parameters[:at]), *parameters[at:]] if id(each) not in fresh]
    alike = [each for each in known if (each.ndim > 1) == (new.ndim > 1)]
    for each in [*alike, *known]:
        for group, members in owners:
            if id(each) in members:
                return group  # type: ignore[return-value]
    return None
