"""Cutting parameters and buffers, and setting the attributes that held their sizes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_structopt.pruning.outputs import TRANSPOSED
from lightning_structopt.shrinking.copies import compute_weights, copied

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def smaller_copy(module: nn.Module, kept: Mapping[str, Mapping[int, list[int]]]) -> nn.Module:
    """Return a copy of which parameters and buffers keep the given indices; what is shared stays shared.

    Args:
        module: The module; left as it is.
        kept: For each name, the indices to keep along each dimension.
    """
    memo: dict[int, Any] = {}
    for name, dims in kept.items():
        owner, _, leaf = name.rpartition(".")
        old = getattr(module.get_submodule(owner), leaf)
        new = smaller_tensor(old, dims)
        memo[id(old)] = (
            type(old)(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        )
    # What deepcopy finds in its memo it takes as copied, wherever it meets it: tied weights, the list of weights
    # that a recurrent layer keeps.
    small = copied(module, memo)
    compute_weights(small)
    return small


@torch.no_grad()
def smaller_tensor(old: Tensor, dims: Mapping[int, list[int]]) -> Tensor:
    """Return a tensor of the given indices along each dimension, in the same memory format."""
    new = old.detach()
    for dim, indices in dims.items():
        new = new.index_select(dim, torch.tensor(indices, device=new.device))
    if old.ndim == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    return new


def set_attributes(module: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set attributes of submodules, as the kind of sequence that they were."""
    for path, values in attributes.items():
        part = module.get_submodule(path)
        for name, value in values.items():
            old = getattr(part, name)
            setattr(part, name, type(old)(value) if isinstance(old, (tuple, list)) else value)


def sizes_that_tell(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the attributes of torch's own layers that must say the shapes of their parameters."""
    found = {}
    for path, part in module.named_modules():
        values = {name: value for name, value in _told(part).items() if getattr(part, name, value) != value}
        if values:
            found[path] = values
    return found


def _told(part: nn.Module) -> dict[str, Any]:
    weight = getattr(part, "weight", None)
    if isinstance(part, nn.RNNBase):
        return {
            "hidden_size": part.get_parameter("weight_hh_l0").shape[1],
            "input_size": part.get_parameter("weight_ih_l0").shape[1],
        }
    if isinstance(part, nn.RNNCellBase):
        return {"hidden_size": part.weight_hh.shape[1], "input_size": part.weight_ih.shape[1]}
    if isinstance(part, nn.modules.batchnorm._NormBase):
        first = weight if isinstance(weight, Tensor) else part.running_mean
        return {} if first is None else {"num_features": len(first)}
    if not isinstance(weight, Tensor):
        return {}
    shape = tuple(weight.shape)
    if isinstance(part, nn.Linear):
        return {"in_features": shape[1], "out_features": shape[0]}
    if isinstance(part, TRANSPOSED):
        return {"in_channels": shape[0], "out_channels": shape[1] * part.groups}
    if isinstance(part, _CONVOLUTIONS):
        return {"in_channels": shape[1] * part.groups, "out_channels": shape[0]}
    if isinstance(part, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": shape}
    if isinstance(part, nn.GroupNorm):
        return {"num_channels": shape[0]}
    if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    return {"num_parameters": shape[0]} if isinstance(part, nn.PReLU) else {}
