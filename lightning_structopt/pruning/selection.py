"""Which parameters are pruned."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_structopt.pruning.outputs import Outputs

Pick = type[nn.Module] | str  # the type first, as a YAML file can name one only by a string
Spare = Literal["first", "last", "both"]

_WEIGHT_OWNERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_ATTENTION_WEIGHTS = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}


@dataclass(frozen=True)
class _Owner:
    """One place at which a parameter is registered."""

    name: str
    module: nn.Module

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def is_weight(self) -> bool:
        """Whether this is a weight that is pruned without asking."""
        if isinstance(self.module, nn.MultiheadAttention):
            return self.leaf in _ATTENTION_WEIGHTS
        if isinstance(self.module, (nn.RNNBase, nn.RNNCellBase)):
            return self.leaf.startswith("weight_")
        return isinstance(self.module, _WEIGHT_OWNERS) and self.leaf == "weight"

    def matches(self, pick: Pick) -> bool:
        if isinstance(pick, str):
            # `torch.compile` on a submodule puts `_orig_mod.` into its names; users know them without.
            return fnmatchcase(self.name, pick) or fnmatchcase(self.name.replace("_orig_mod.", ""), pick)
        return isinstance(self.module, pick)


def row_biases(
    module: nn.Module, weights: Mapping[str, Tensor], outputs: Outputs
) -> dict[str, tuple[str, nn.Parameter]]:
    """Return, by the name of a weight, the name and the bias that belong to its rows, where there is one."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    biases = {}
    for name, weight in weights.items():
        prefix, _, leaf = name.rpartition(".")
        bias_name = f"{prefix}.{leaf.replace('weight', 'bias')}".removeprefix(".")
        bias = parameters.get(bias_name)
        if bias is not None and bias.shape == (outputs.count(name, weight),):
            biases[name] = bias_name, bias
    return biases


def as_picks(name: str, picks: Pick | Sequence[Pick] | None) -> tuple[Pick, ...]:
    """Check ``include`` or ``exclude`` and return it as a tuple.

    Args:
        name: What the argument is called.
        picks: A glob on parameter names, a module type, several of them, or None.

    Raises:
        TypeError: If something else was given.
    """
    several = () if picks is None else tuple(picks) if isinstance(picks, (list, tuple)) else (picks,)
    for pick in several:
        if not isinstance(pick, str) and not (isinstance(pick, type) and issubclass(pick, nn.Module)):
            raise TypeError(f"`{name}` takes globs on parameter names and module types. Found {pick!r}.")
    return several


def code_of(picks: Sequence[Pick]) -> str:
    """Return code that evaluates to ``picks``, with module types by their full names."""
    if not picks:
        return "None"
    names = (repr(p) if isinstance(p, str) else f"{p.__module__}.{p.__qualname__}" for p in picks)
    return f"[{', '.join(names)}]"


def select_parameters(
    module: nn.Module,
    include: Pick | Sequence[Pick] | None = None,
    exclude: Pick | Sequence[Pick] | None = None,
    spare: Spare | None = None,
) -> dict[str, nn.Parameter]:
    """Pick the parameters to prune, by name.

    By default every weight of two or more dimensions of Linear, Bilinear, convolutions (transposed or not),
    MultiheadAttention and recurrent layers and cells. Norms, biases and embeddings are left alone, and so is a
    weight that is tied to an embedding. A tied parameter counts once, under its first name.

    Args:
        module: Where to look.
        include: Narrows the choice by globs such as ``"encoder.*"``. An exact name or a module type asks for
            those parameters whatever their kind, for instance ``torch.nn.Embedding``.
        exclude: Takes parameters out again, by globs or by module types.
        spare: Leaves out the ``"first"`` layer, the ``"last"`` one or ``"both"``, in the order of parameters.

    Returns:
        The chosen parameters in the order of ``module.named_parameters()``.

    Raises:
        TypeError: If ``include`` or ``exclude`` holds something other than strings and module types, or a
            chosen parameter is sparse, quantized or not initialized.
        ValueError: If a pick matches nothing, nothing is left, or a weight is computed by a parametrization.
    """
    included, excluded = as_picks("include", include), as_picks("exclude", exclude)
    parameters = dict(module.named_parameters())
    owners = _find_owners(module, parameters)
    chosen = _apply_include(owners, included)
    computed = [owner for owner in _computed_weights(module) if not included or _any_match(owner, included)]
    for pick in excluded:
        remaining = [owner for owner in computed if not owner.matches(pick)]
        if len(remaining) == len(computed):
            chosen -= _matching("exclude", pick, owners, lambda name: True)
        computed = remaining
    _refuse_computed_weights(computed)
    chosen -= _ends([name for name in parameters if name in chosen], spare)
    if not chosen:
        raise ValueError(
            "There must be at least one weight to prune. Found none in "
            f"`{type(module).__name__}` with `include = {include!r}` and `exclude = {exclude!r}`. "
            f"{_describe(parameters)} Give `include` the names or module types to prune."
        )
    selected = {name: parameter for name, parameter in parameters.items() if name in chosen}
    for name, parameter in selected.items():
        _require_prunable(name, parameter)
    return selected


def _ends(names: Sequence[str], spare: Spare | None) -> set[str]:
    """Return the parameters of the first layer, the last one or both; a layer may have several."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    spared = {"first": layers[:1], "last": layers[-1:], "both": [*layers[:1], *layers[-1:]]}
    return {name for name in names if spare and name.rpartition(".")[0] in spared[spare]}


def _find_owners(module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, list[_Owner]]:
    """Return, by first name, every place at which each parameter is registered."""
    first_name = {id(parameter): name for name, parameter in parameters.items()}
    owners: dict[str, list[_Owner]] = {name: [] for name in parameters}
    for prefix, child in module.named_modules(remove_duplicate=False):
        for leaf, parameter in child._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{leaf}" if prefix else leaf
                owners[first_name[id(parameter)]].append(_Owner(name, child))
    return owners


def _apply_include(owners: Mapping[str, list[_Owner]], include: tuple[Pick, ...]) -> set[str]:
    default = {name for name, places in owners.items() if _is_default(places)}
    if not include:
        return default
    chosen: set[str] = set()
    for pick in include:
        if isinstance(pick, str) and any(character in pick for character in "*?["):
            chosen |= _matching("include", pick, owners, default.__contains__)
        else:
            chosen |= _matching("include", pick, owners, lambda name: _is_matrix(owners[name][0]))
    return chosen


def _is_default(places: list[_Owner]) -> bool:
    tied_to_embedding = any(isinstance(place.module, (nn.Embedding, nn.EmbeddingBag)) for place in places)
    return any(place.is_weight for place in places) and not tied_to_embedding


def _is_matrix(owner: _Owner) -> bool:
    parameter = owner.module._parameters[owner.leaf]
    return isinstance(parameter, nn.UninitializedParameter) or (parameter is not None and parameter.ndim >= 2)


def _matching(
    argument: str, pick: Pick, owners: Mapping[str, list[_Owner]], allowed: Callable[[str], bool]
) -> set[str]:
    matched = {name for name, places in owners.items() if any(place.matches(pick) for place in places)}
    shown = repr(pick) if isinstance(pick, str) else pick.__name__
    if not matched:
        raise ValueError(f"No parameter matches `{argument} = {shown}`. {_describe(owners)}")
    picked = {name for name in matched if allowed(name)}
    if not picked:
        raise ValueError(
            f"`{argument} = {shown}` must match a weight of two or more dimensions. Found only "
            f"{_listing(sorted(matched))}, not pruned by default. Embeddings and parameters of your own layers "
            "are pruned when you give their exact name or their module type."
        )
    return picked


def _any_match(owner: _Owner, picks: tuple[Pick, ...]) -> bool:
    return any(owner.matches(pick) for pick in picks)


def _computed_weights(module: nn.Module) -> list[_Owner]:
    """Find weights that are recomputed before each forward, as under weight norm: they would lose zeros."""
    owners = (
        _Owner(f"{prefix}.weight" if prefix else "weight", child) for prefix, child in module.named_modules()
    )
    return [owner for owner in owners if owner.is_weight and "weight" not in owner.module._parameters]


def _refuse_computed_weights(computed: Sequence[_Owner]) -> None:
    if computed:
        name = computed[0].name
        raise ValueError(
            f"A pruned weight must be a parameter. Found that `{name}` is computed from other parameters "
            "(weight norm, spectral norm or another parametrization). Remove the parametrization, or give "
            f"`exclude = {name!r}`."
        )


def _require_prunable(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, nn.UninitializedParameter):
        raise TypeError(
            f"A pruned parameter must be initialized. Found that `{name}` is lazy. Run one forward pass (in "
            "`configure_model`, for instance) before training."
        )
    plain = type(parameter.data) in {Tensor, nn.Parameter, DTensor}
    if parameter.layout != torch.strided or not parameter.is_floating_point() or not plain:
        raise TypeError(
            f"A pruned parameter must be a dense floating-point tensor. Found that `{name}` is "
            f"{type(parameter.data).__name__} of {parameter.dtype}, {parameter.layout}. Give "
            f"`exclude = {name!r}`."
        )


def _describe(names: Mapping[str, object]) -> str:
    starts = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return f"Parameters start with: {_listing(starts)}." if starts else "The module has no parameters."


def _listing(names: Sequence[str], most: int = 8) -> str:
    def pieces() -> Iterator[str]:
        yield from (repr(name) for name in names[:most])
        if len(names) > most:
            yield f"and {len(names) - most} more"

    return ", ".join(pieces())
