"""Planning to deepen: where, and what kind of layer keeps the function."""

from typing import Any

from torch import nn

from lightning_structopt.growth.deepening import Deepening, DeepenKind
from lightning_structopt.growth.places import require_submodule
from lightning_structopt.growth.positions import Position, bounds_of, positions
from lightning_structopt.growth.verify import Comparison
from lightning_structopt.shrinking.plan import as_tuple
from lightning_structopt.shrinking.verify import TOLERANCE

_ACTIVATIONS = {
    *("relu", "hardtanh", "gelu", "silu", "mish", "elu", "celu", "selu", "leaky_relu", "sigmoid", "tanh"),
    *("hardswish", "hardsigmoid", "softplus", "prelu", "_prelu_kernel", "rrelu_with_noise"),
}


def plan_deepening(
    module: nn.Module,
    after: str | None,
    example_input: Any,
    kind: DeepenKind,
    kernel_size: int,
    norm: bool,
    seed: int,
) -> Deepening:
    """Plan to add a layer.

    Args:
        module: The module; left as it is.
        after: The submodule that it follows; None for the last place before or after an activation that permits one.
        example_input: What its ``forward`` takes, a tuple for several.
        kind: ``"identity"`` or ``"residual"``.
        kernel_size: Of convolutions.
        norm: Whether a residual block has batch norms.
        seed: Of the weights that are drawn.

    Raises:
        ValueError: If there is no such place, or the function would change.
    """
    inputs = as_tuple(example_input)
    if after is not None:
        require_submodule(module, after, "after")
    found = positions(module, inputs)
    position = _last(found, module, kind) if after is None else _at(found, after)
    if norm:
        _require_normable(position, kind)
    if kind == "identity":
        first, bounds = _activation(position)
    else:
        first, bounds = False, (0.0,)
    deepening = Deepening(
        _whole_sequence(module, position.name),
        kind,
        position.width,
        position.places,
        kernel_size,
        bounds,
        first,
        norm,
        seed,
    )
    _require_same(module, inputs, deepening)
    return deepening


def _at(found: dict[str, Position], after: str) -> Position:
    if after not in found:
        raise ValueError(
            f"A layer is added after a part that runs and returns a tensor of floats. Found `after = {after!r}`, which "
            f"does not. Such parts are {', '.join(map(repr, list(found)[:5]))}."
        )
    return found[after]


def _last(found: dict[str, Position], module: nn.Module, kind: DeepenKind) -> Position:
    """Return the last place that permits a layer: for a residual block, next to any activation.

    Raises:
        ValueError: If there is none.
    """
    for position in reversed(found.values()):
        own = position.made_by[0] in _ACTIVATIONS or {each[0] for each in position.read_by} & _ACTIVATIONS
        if position.name and (position.activation if kind == "identity" else own):
            return position
    raise ValueError(
        "Without `after` a layer is added next to the last activation that permits one. Found none in "
        f"`{type(module).__name__}`. "
        + ('Give `kind="residual"`.' if kind == "identity" else "Give `after`.")
    )


def _require_normable(position: Position, kind: DeepenKind) -> None:
    if kind == "identity":
        raise ValueError(
            "A batch norm can't give back its input in training and in evaluation at once. Found `norm = True` with "
            '`kind = "identity"`. Give `kind="residual"`, whose last norm is zero, or leave out `norm`.'
        )
    if not position.places and len(position.shape) != 2:
        raise ValueError(
            "A batch norm takes vectors or images. Found features in the last dimension of "
            f"{list(position.shape)} at `{position.name}`. Leave out `norm`."
        )


def _activation(position: Position) -> tuple[bool, tuple[float, ...]]:
    """Return whether the activation follows the place, and what it cuts off at.

    Raises:
        ValueError: If there is none that leaves its own results as they are.
    """
    found = position.activation
    if found is None:
        around = list(dict.fromkeys(each for each, _ in (*position.read_by, position.made_by)))
        near = next((each for each in around if each in _ACTIVATIONS), None)
        what = f"the activation `{near}`" if near else " and ".join(f"`{each}`" for each in around[:3])
        raise ValueError(
            "An identity layer keeps the function next to an activation that leaves its own results as they are: ReLU, "
            f'ReLU6, Hardtanh. Found {what} at `{position.name}`. Give `kind="residual"`, which fits anywhere, or '
            "name the layer right before a ReLU."
        )
    operator, first = found
    bounds = bounds_of(operator)
    assert bounds is not None
    return first, bounds


def _whole_sequence(module: nn.Module, name: str) -> str:
    """Return the outermost plain sequence that ends where this part ends: one more part changes no names."""
    while name:
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        if type(parent) is not nn.Sequential or leaf != list(parent._modules)[-1]:
            return name
        name = owner
    return name


def _require_same(module: nn.Module, inputs: tuple[Any, ...], deepening: Deepening) -> None:
    comparison = Comparison(module, inputs)
    try:
        comparison.call(comparison.grown(deepening.grow))
        gap = comparison.gap(comparison.grown(deepening.grow))
    except (AttributeError, TypeError, RuntimeError, IndexError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"A layer is added where a module is called and nothing else is asked of it. Found that "
            f"`{deepening.after}` as a sequence gives {type(error).__name__}: {error}. Name the block around it."
        ) from error
    if gap > TOLERANCE:
        raise ValueError(
            "A deeper module must compute what it did before, in evaluation and in training. Found outputs that differ "
            f"by {gap:.1e} of the largest after `{deepening.after}`. Name another place."
        )
