"""One model out of several: the average of their weights."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_structopt._checks import require_choice, require_in
from lightning_structopt._devices import device_of
from lightning_structopt.ensembles.batches import Read, read_pair
from lightning_structopt.ensembles.members import Member, settle
from lightning_structopt.ensembles.predictions import predictions
from lightning_structopt.ensembles.scores import Score, signed_score


def soup(
    members: Sequence[Member],
    kind: Literal["uniform", "greedy"] = "uniform",
    *,
    loader: Iterable[Any] | None = None,
    metric: Score | None = None,
    start: nn.Module | Mapping[str, Tensor] | None = None,
    similarity: float = 0.2,
    statistics: Iterable[Any] | None = None,
    read: Read = read_pair,
) -> nn.Module:
    r"""Average the weights of models that were trained from one start.

    .. math:: \theta = \frac{1}{|S|} \sum_{i \in S} \theta_i

    ``"uniform"`` takes all. ``"greedy"`` goes through them from the best to the worst by themselves, and keeps each one
    with which the average is no worse on held-out data; so it is never worse there than the best of them.

    Averages are good only between models that descend from the same weights, such as fine-tuned ones. That is checked
    by the cosine between all weight matrices of each member and of ``start`` (or of the first member): it is near 0
    for models that were initialized apart, however similar they behave.

    Args:
        members: Models of one class and the same shapes, as members of :class:`~lightning_structopt.ParallelEnsemble`.
            They are left as they were.
        kind: Which to average.
        loader: For ``"greedy"``: held-out data.
        metric: For ``"greedy"``: a torchmetrics metric, or a function of outputs and target, higher being better.
        start: The weights that training started from, if they are still there.
        similarity: The cosine below which a member is refused, in [-1, 1].
        statistics: Training data, from which the running statistics of batch normalization are computed anew; without,
            they are averaged. With ``"greedy"`` this is done at every step, and must repeat.
        read: From a batch to inputs and target.

    Returns:
        A new model of their class, in evaluation mode.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, architectures differ, members don't come from one start, or
            ``"greedy"`` has no data or no metric.

    Example:
        >>> one = nn.Linear(2, 2)
        >>> other = copy.deepcopy(one)
        >>> with torch.no_grad():
        ...     _ = other.bias.add_(1.0)
        >>> soup([one, other]).bias - one.bias
        tensor([0.5000, 0.5000], grad_fn=<SubBackward0>)

    See Wortsman et al., "Model soups", 2022 (https://arxiv.org/abs/2203.05482).
    """
    require_choice("kind", kind, ("uniform", "greedy"))
    require_in("similarity", similarity, -1, 1)
    modules = settle(members, trained=True)  # so they are left as they were
    _require_same_architecture(modules)
    _require_common_start(modules, start, similarity)
    if kind == "uniform":
        return _mixed(modules, statistics, read)
    if loader is None or metric is None:
        missing = "loader" if loader is None else "metric"
        raise ValueError(
            f'`kind="greedy"` chooses by held-out data. Found no `{missing}`. Give `loader` and `metric`.'
        )
    return _greedy(modules, list(loader), metric, statistics, read)


def _greedy(
    modules: list[nn.Module], data: list[Any], metric: Score, statistics: Iterable[Any] | None, read: Read
) -> nn.Module:
    def value(module: nn.Module) -> float:
        found = predictions([module], data, read)
        return signed_score(metric, found.outputs[0], found.target)

    alone = [value(module) for module in modules]
    order = sorted(range(len(modules)), key=lambda index: -alone[index])  # stable: equals in their order
    kept, best = [modules[order[0]]], alone[order[0]]
    mixed = copy.deepcopy(kept[0]).eval()
    for index in order[1:]:
        candidate = _mixed([*kept, modules[index]], statistics, read)
        if (reached := value(candidate)) >= best:
            kept, best, mixed = [*kept, modules[index]], reached, candidate
    return mixed


@torch.no_grad()
def _mixed(modules: list[nn.Module], statistics: Iterable[Any] | None, read: Read) -> nn.Module:
    mixed = copy.deepcopy(modules[0]).eval()
    states = [module.state_dict() for module in modules]
    for name, value in mixed.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            # In double precision, in which the average of equals is that very value.
            total = sum(state[name].to(value.device, torch.float64) for state in states)
            value.copy_(total / len(states))
    if statistics is not None:
        update_bn((read(batch)[0] for batch in statistics), mixed, device_of(mixed))
        mixed.eval()
    return mixed


def _require_same_architecture(modules: list[nn.Module]) -> None:
    first = modules[0]
    shapes = {name: value.shape for name, value in first.state_dict().items() if isinstance(value, Tensor)}
    for index, module in enumerate(modules[1:], start=1):
        if type(module) is not type(first):
            found = f"`{type(module).__name__}` in member {index} and `{type(first).__name__}` in member 0"
        elif differing := _first_difference(shapes, module):
            found = f"another `{differing}` in member {index} than in member 0"
        else:
            continue
        raise ValueError(
            f"Only models of one architecture have weights to average. Found {found}. Leave out those that differ, or "
            "combine what they put out by `ParallelEnsemble`."
        )


def _first_difference(shapes: Mapping[str, torch.Size], module: nn.Module) -> str | None:
    other = {name: value.shape for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    names = [*shapes, *(name for name in other if name not in shapes)]
    return next((name for name in names if shapes.get(name) != other.get(name)), None)


def _require_common_start(
    modules: list[nn.Module], start: nn.Module | Mapping[str, Tensor] | None, similarity: float
) -> None:
    origin = modules[0].state_dict() if start is None else start
    reference = origin.state_dict() if isinstance(origin, nn.Module) else origin
    names = [name for name, value in modules[0].named_parameters() if value.ndim > 1]
    if missing := [name for name in names if name not in reference]:
        raise ValueError(
            f"`start` must have the members' weights. Found none called `{missing[0]}`. Give the state dict that "
            "training started from."
        )
    for index, module in enumerate(modules):
        found = _cosine(module.state_dict(), reference, names)
        if found < similarity:
            raise ValueError(
                f"Only models that were trained from one start have an average worth having. Found that member {index} "
                f"and {'member 0' if start is None else '`start`'} have a cosine of {found:.3f}, below `similarity = "
                f"{similarity}`. Train them from the same weights, or combine what they put out by `ParallelEnsemble`."
            )


@torch.no_grad()
def _cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: list[str]) -> float:
    pairs = [(one[name].double().flatten().cpu(), other[name].double().flatten().cpu()) for name in names]
    if not pairs:
        return 1.0
    products = torch.stack([torch.stack([a @ b, a @ a, b @ b]) for a, b in pairs]).sum(0)
    return float(products[0] / (products[1] * products[2]).sqrt().clamp_min(1e-300))
