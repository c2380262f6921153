"""Criteria that score whole filters: all weights of a filter have its score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._precision import widened
from lightning_structopt.pruning.criteria import NOTHING, Criterion, Evidence, Scores
from lightning_structopt.pruning.outputs import TRANSPOSED, outputs_first

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DISTANCES = 2**24  # how many are computed at once


@dataclass(frozen=True)
class GeometricMedian(Criterion):
    r"""How far a filter is from the others of its layer, :math:`\sum_k \lVert F_i - F_k \rVert_2`.

    Filters near the geometric median go first: the others can stand in for them, whatever their size. A filter
    is what makes one output: a row of a linear layer, an output channel of a convolution. As distances grow
    with the size of a filter, compare within layers: ``Neurons()`` or ``Unstructured(scope="layer")``.

    Of sharded weights (FSDP2) one layer at a time is put together on every rank.

    He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration"
    (2019).

    Example:
        >>> weight = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
        >>> GeometricMedian().score({"weight": weight}).values["weight"][:, 0]
        tensor([6.0000, 9.2426, 5.2426])
    """

    @override
    def score(self, weights: Mapping[str, Tensor], evidence: Evidence = NOTHING) -> Scores:
        return Scores({name: self._score(name, weight, evidence) for name, weight in weights.items()})

    def _score(self, name: str, weight: Tensor, evidence: Evidence) -> Tensor:
        whole = widened(evidence.whole(name, weight))
        layer = None if evidence.module is None else _owner(evidence.module, name)[1]
        distances = _sums_of_distances(_filters(whole, layer)).to(whole.dtype)
        return evidence.part(name, _spread(distances, whole, layer))


@dataclass(frozen=True)
class BatchNormScale(Criterion):
    r"""The scale of the batch norm that follows the layer, :math:`|\gamma_c|` for all weights of output ``c``.

    Train with an L1 penalty on the scales to make them tell. The norm must be the next module after the layer
    in their parent, of as many features as the layer has outputs: the order in which modules are assigned must
    be that in which they run. A layer without such a norm is an error; choose layers by ``include`` or
    ``exclude``.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (2017).

    Raises:
        ValueError: When scoring, and before training, if a weight has no batch norm behind it.

    Example:
        >>> from lightning_structopt.pruning import Neurons, prune
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> masks = prune(net, 0.5, criterion=BatchNormScale(), pattern=Neurons(), include="0.*")
    """

    @override
    def require(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        _norms(module, list(parameters))

    @override
    def score(self, weights: Mapping[str, Tensor], evidence: Evidence = NOTHING) -> Scores:
        module = evidence.root()
        norms = _norms(module, list(weights))
        return Scores({
            name: self._score(name, weight, norms[name], evidence) for name, weight in weights.items()
        })

    def _score(self, name: str, weight: Tensor, norm: nn.Module, evidence: Evidence) -> Tensor:
        scale = norm.get_parameter("weight").detach()
        scale = scale.full_tensor() if hasattr(scale, "full_tensor") else scale
        like = evidence.parameter(name)
        layer = _owner(evidence.root(), name)[1]
        return evidence.part(name, _spread(widened(scale).abs(), like, layer))


def _sums_of_distances(rows: Tensor) -> Tensor:
    """Return for each of ``rows`` the sum of its distances to all."""
    # By matrix multiplication this is ten times faster, but rough for rows that are nearly the same, hence
    # float64, which Apple's MPS lacks, and rows around zero.
    wide = rows if rows.device.type == "mps" else rows.double()
    centred = wide - wide.mean(0)
    some_at_once = max(1, _DISTANCES // max(1, len(rows)))
    sums = [
        torch.cdist(some, centred, compute_mode="use_mm_for_euclid_dist").sum(1)
        for some in centred.split(some_at_once)  # type: ignore[no-untyped-call]
    ]
    return torch.cat(sums)


def _norms(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the batch norm behind the layer of each of the named weights.

    Raises:
        ValueError: If there is none.
    """
    found = {name: norm for name in names if (norm := _norm_behind(module, name)) is not None}
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            "`BatchNormScale` needs a batch norm with a scale right behind each layer. Found none behind "
            f"{', '.join(f'`{name}`' for name in missing)}. Give `exclude = {missing!r}`, or `include` only "
            "layers that have one."
        )
    return found


def _norm_behind(module: nn.Module, name: str) -> nn.Module | None:
    path, layer = _owner(module, name)
    parent_path, _, leaf = path.rpartition(".")
    siblings = module.get_submodule(parent_path)._modules
    if name.rpartition(".")[2] != "weight" or leaf not in siblings:
        return None
    behind = list(siblings)[list(siblings).index(leaf) + 1 :]
    norm = siblings[behind[0]] if behind else None
    outputs = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    if isinstance(norm, _BATCH_NORMS) and norm.affine and norm.num_features == outputs:
        return norm
    return None


def _owner(module: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Return the path and the module that hold parameter ``name``."""
    path = name.rpartition(".")[0]
    return path, module.get_submodule(path)


def _filters(weight: Tensor, layer: nn.Module | None) -> Tensor:
    """Return one row for each output of ``layer``."""
    rows = outputs_first(weight, layer.groups) if isinstance(layer, TRANSPOSED) else weight
    return rows.flatten(1)


def _spread(scores: Tensor, weight: Tensor, layer: nn.Module | None) -> Tensor:
    """Give every weight the score of its output, without a copy where outputs are rows."""
    kernel = [1] * (weight.ndim - 2)
    if isinstance(layer, TRANSPOSED):
        per_group = scores.view(layer.groups, -1)
        inputs = len(weight) // layer.groups
        return per_group.repeat_interleave(inputs, 0).view(len(weight), -1, *kernel).expand(weight.shape)
    return scores.view(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)
