"""2:4 sparse weights in the form that sparse tensor cores read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured
from typing_extensions import override

_OLDEST = (8, 0)  # compute capability of Ampere, the first with sparse tensor cores


@dataclass(frozen=True)
class SemiStructuredReport:
    """What :func:`to_semi_structured` did.

    Args:
        converted: Names of the weights that are semi-structured now.
        left: Names of those that are as they were, each with the reason.
    """

    converted: tuple[str, ...]
    left: Mapping[str, str]

    @override
    def __hash__(self) -> int:
        return hash((self.converted, tuple(self.left.items())))

    @override
    def __str__(self) -> str:
        lines = [f"{name}: converted" for name in self.converted]
        return "\n".join([*lines, *(f"{name}: left dense, {reason}" for name, reason in self.left.items())])


def to_semi_structured(
    module: nn.Module, masks: Iterable[str] | Mapping[str, Tensor] | None = None
) -> SemiStructuredReport:
    """Convert 2:4 sparse weights of linear layers in place, to run faster on a GPU that can.

    Train with ``pattern=NByM(2, 4)`` first, then move the module to the GPU, to half precision and to ``eval()``.
    What comes out is for inference: the weights do not train, and torch's sparse tensors do not go into
    checkpoints that others read, so save before. Outputs differ by rounding only. What can't be converted stays
    as it was, and the report has the reason: nothing is padded, cast, moved or pruned on the way.

    Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021).

    Args:
        module: The module; its linear layers get weights of another tensor type, under the same names.
        masks: What to convert, for instance ``callback.masks``: names of parameters. By default the weights of all
            linear layers.

    Returns:
        The names of the weights that were converted, and why the others were not.

    Raises:
        ValueError: If ``masks`` has a name that is no parameter of ``module``.

    Example:
        >>> report = to_semi_structured(nn.Sequential(nn.Linear(64, 64), nn.Conv2d(4, 4, 3)), ["1.weight"])
        >>> print(report)
        1.weight: left dense, it belongs to a `Conv2d`, and only linear layers have a sparse kernel
    """
    names = _linear_weights(module) if masks is None else list(masks)
    owners = _owners(module)
    converted: list[str] = []
    left: dict[str, str] = {}
    for name in names:
        if name not in owners:
            raise ValueError(
                f"`masks` must name parameters of the module. Found `{name}`, which is none of "
                f"`{type(module).__name__}`. Give the masks of this module."
            )
        reason = _obstacle(module, owners, name) or _convert(owners[name], name.rpartition(".")[2])
        if reason is None:
            converted.append(name)
        else:
            left[name] = reason
    return SemiStructuredReport(tuple(converted), left)


def _linear_weights(module: nn.Module) -> list[str]:
    return [
        f"{path}.weight".removeprefix(".") for path, m in module.named_modules() if isinstance(m, nn.Linear)
    ]


def _owners(module: nn.Module) -> dict[str, nn.Module]:
    """Return, for every place at which a parameter is or would be, the module that has it."""
    places = {
        f"{path}.{leaf}".removeprefix("."): child
        for path, child in module.named_modules(remove_duplicate=False)
        for leaf in child._parameters
    }
    computed = {
        f"{path}.weight".removeprefix("."): child
        for path, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }
    return computed | places


def _obstacle(module: nn.Module, owners: Mapping[str, nn.Module], name: str) -> str | None:
    """Return why the named weight can't be converted, or None."""
    layer, leaf = owners[name], name.rpartition(".")[2]
    if not isinstance(layer, nn.Linear) or leaf != "weight":
        return f"it belongs to a `{type(layer).__name__}`, and only linear layers have a sparse kernel"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "its attention reads it without calling the layer"
    around = module.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    if isinstance(around, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        remedy = "call `torch.backends.mha.set_fastpath_enabled(False)`"
        return f"the fast path of its `TransformerEncoderLayer` reads it without calling the layer; {remedy}"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "it is computed from other parameters; remove the parametrization first"
    if isinstance(weight, SparseSemiStructuredTensor):
        return "it is semi-structured already"
    if isinstance(weight, DTensor):
        return "it is sharded over ranks"
    others = (
        other for other, place in owners.items() if place._parameters.get(other.rpartition(".")[2]) is weight
    )
    if shared := [other for other in others if other != name]:
        return f"it is shared with `{shared[0]}`"
    return _obstacle_of(weight)


def _obstacle_of(weight: Tensor) -> str | None:
    """Return what speaks against a plain matrix, the reasons that a user can do something about first."""
    groups = weight.shape[1] // 4
    if weight.shape[1] % 4 or int((weight != 0).view(-1, groups, 4).sum(-1).max()) > 2:
        return "it is not 2:4 sparse; train with `pattern=NByM(2, 4)`"
    limits = _backend()._DTYPE_SHAPE_CONSTRAINTS
    if weight.dtype not in limits:
        return (
            f"its type is {weight.dtype}; the kernel takes {' and '.join(map(str, sorted(limits, key=str)))}"
        )
    rows, columns = limits[weight.dtype].sparse_min_rows, limits[weight.dtype].sparse_min_cols
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"its shape {tuple(weight.shape)} is not a multiple of ({rows}, {columns})"
    if not weight.is_cuda:
        return f"it is on the device {weight.device}; sparse tensor cores are on GPUs"
    if torch.version.hip is None and torch.cuda.get_device_capability(weight.device) < _OLDEST:
        return f"{torch.cuda.get_device_name(weight.device)} has no sparse tensor cores (from Ampere on)"
    return None


def _backend() -> type[SparseSemiStructuredTensor]:
    """Return the backend that torch converts to, which knows the types and shapes that it takes."""
    if SparseSemiStructuredTensor._FORCE_CUTLASS:
        return torch.sparse.SparseSemiStructuredTensorCUTLASS
    return torch.sparse.SparseSemiStructuredTensorCUSPARSELT


def _convert(layer: nn.Module, leaf: str) -> str | None:
    """Convert, or return why torch refused: a build of it may lack the kernels."""
    weight = layer.get_parameter(leaf).detach().contiguous()
    try:
        sparse = to_sparse_semi_structured(weight)
    except (RuntimeError, NotImplementedError) as error:
        return f"torch refused: {str(error).splitlines()[0]}"
    setattr(layer, leaf, nn.Parameter(sparse, requires_grad=False))
    return None
