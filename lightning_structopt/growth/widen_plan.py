"""Planning to widen: which channels, how often, and the attributes that go with them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_structopt.growth.copies import Multiples, copied_indices, multiplicities
from lightning_structopt.growth.places import groups_of, is_layer, require_copyable
from lightning_structopt.growth.readers import Readers, find_readers
from lightning_structopt.growth.verify import Comparison
from lightning_structopt.growth.widening import Widening
from lightning_structopt.shrinking.attributes import Edits, candidate_edits, choose_edits
from lightning_structopt.shrinking.groups import ChannelGroup, find_groups
from lightning_structopt.shrinking.literals import literals_of
from lightning_structopt.shrinking.structure import Structure, structure_of
from lightning_structopt.shrinking.surgery import set_attributes, sizes_that_tell
from lightning_structopt.shrinking.tracing import tensors_of, trace
from lightning_structopt.shrinking.verify import TOLERANCE, failing_parts

_Counts = list[tuple[ChannelGroup, Tensor]]


def plan_widening(
    module: nn.Module, name: str, factor: float, example_input: Any, noise: float, seed: int
) -> Widening:
    """Plan to widen what a layer makes, or what is within a block.

    Args:
        module: The module; left as it is.
        name: Of a layer or a block.
        factor: How many times as many channels there shall be.
        example_input: What its ``forward`` takes, a tuple for several.
        noise: Standard deviation of the noise that tells copies apart, relative to that of the weights.
        seed: Of which channels are copied once more, and of the noise.

    Raises:
        ValueError: If it can't be done with the function kept.
    """
    require_copyable(module)
    structure = structure_of(module, example_input)
    readers = _readers(structure)
    generator = torch.Generator().manual_seed(seed)
    counts = _counted(structure, name, factor, readers, generator)
    trial = _Trial(structure, readers, noise, seed)
    found = trial.chosen(counts)
    if found is not None:
        return found
    if is_layer(module.get_submodule(name)):
        raise trial.failure(counts)
    return trial.chosen_of_some(counts)


def _readers(structure: Structure) -> Readers:
    traces = [(structure.traced, structure.found.classes)]
    if structure.traced.unused.numel():  # heads that run in training only
        trained = trace(structure.module, structure.inputs, training=True)
        traces.append((trained, find_groups([trained]).classes))
    return find_readers(traces)


def _counted(
    structure: Structure, name: str, factor: float, readers: Readers, generator: torch.Generator
) -> _Counts:
    """Return the groups that grow, with how often each of their members is there.

    Raises:
        ValueError: If none can, or a layer's can't.
    """
    groups = groups_of(structure, name)
    reasons = {group.name: _obstacle(group, factor, readers) for group in groups}
    free = [group for group in groups if not reasons[group.name]]
    held = [group for group in groups if reasons[group.name]]
    if held and (is_layer(structure.module.get_submodule(name)) or not free):
        raise ValueError(
            f"Channels grow where that keeps the function. Found that the group of `{held[0].name}` "
            f"({held[0].size}) is {reasons[held[0].name]}."
        )
    counts = [(group, multiplicities(group.size, factor, generator)) for group in free]
    counts = [(group, often) for group, often in counts if bool((often > 1).any())]
    if not counts:
        raise ValueError(
            f"`factor` must add a channel. Found that {free[0].size} of `{free[0].name}`, times {factor:g}, are "
            f"{free[0].size} when rounded. Give a larger one."
        )
    return counts


def _obstacle(group: ChannelGroup, factor: float, readers: Readers) -> str:
    """Say why a group can't grow with the function kept, if so."""
    if group.normalized and factor != round(factor):
        return (
            "under a layer, group or RMS norm or a mean, whose results stay only if all channels are copied equally "
            f"often; `factor = {factor:g}` is not whole. Give 2.0 or 3.0"
        )
    for slot, indices in group.slots.items():
        if not readers.multiplied.get(slot, set()).isdisjoint(indices.reshape(-1).tolist()):
            return (
                f"read by no weight: two activations, one made by `{slot[0]}`, are multiplied and added up over them. "
                "Name another layer"
            )
    return ""


class _Trial:
    """Tries what makes the wider module work, on copies.

    Args:
        structure: The module.
        readers: What reads channels.
        noise: As in :func:`plan_widening`.
        seed: Likewise.
    """

    def __init__(self, structure: Structure, readers: Readers, noise: float, seed: int) -> None:
        self._structure, self._readers = structure, readers
        self._noise, self._seed = noise, seed
        self._comparison = Comparison(structure.module, structure.inputs)
        self._found: Widening | None = None
        self._plain = Widening({}, {}, {})
        self._reason, self._gap, self._failed = "", 0.0, ""

    def chosen(self, counts: _Counts) -> Widening | None:
        """Return the widening of these groups with the attributes with which it works; None if there are none."""
        self._found, self._gap = None, 0.0
        self._plain = self._without_attributes(counts)
        traced, module = self._structure.traced, self._structure.module
        often = torch.ones(traced.space.size, dtype=torch.int64)
        for group, count in counts:
            often[group.classes] = count
        literals = literals_of(traced, Multiples(traced.values, self._structure.found.classes, often))
        choose_edits(module, candidate_edits(module, literals), self._works)
        return self._found

    def chosen_of_some(self, counts: _Counts) -> Widening:
        """Return the widening of those groups that can grow.

        Raises:
            ValueError: If there are none.
        """
        working: _Counts = []
        best = None
        for each in counts:
            found = self.chosen([*working, each])
            if found is not None:
                working.append(each)
                best = found
        if best is None:
            raise self.failure(counts)
        return best

    def failure(self, counts: _Counts) -> ValueError:
        """Return the error that says why the last trial failed."""
        names = ", ".join(f"`{group.name}`" for group, _ in counts[:4])
        why = f"does not run, as sizes are written into code{self._reason}."
        if self._failed_in_attention:
            why = (
                f"does not run, as torch's `nn.MultiheadAttention`, here `{self._failed}`, wants as many features of "
                "its heads as it has inputs, so neither grows alone. Make attention of linear layers to grow it."
            )
        elif self._gap and (normed := self._weight_norms(counts)):
            why = (
                f"changes outputs by {self._gap:.1e} of the largest: {normed} reads these channels under a weight "
                "norm, whose length their copies would change. Remove it by "
                "`nn.utils.parametrize.remove_parametrizations`."
            )
        elif self._gap:
            why = (
                f"changes outputs by {self._gap:.1e} of the largest: a weight both makes and reads these channels "
                "(a tied embedding), or a norm divides by their length."
            )
        return ValueError(
            "A wider module must compute what it did before, in evaluation and in training. Found that widening "
            f"{names} {why} Name another layer."
        )

    @property
    def _failed_in_attention(self) -> bool:
        parts = dict(self._structure.module.named_modules())
        return not self._gap and isinstance(parts.get(self._failed), nn.MultiheadAttention)

    def _weight_norms(self, counts: _Counts) -> str:
        """Return the layers under a parametrization that read the channels that grow."""
        slots = {slot for group, _ in counts for slot in group.slots}
        marked = sorted({
            n for n, dim in slots if ".parametrizations." in n and (n, dim) in self._readers.read
        })
        return ", ".join(f"`{name.partition('.parametrizations.')[0]}`" for name in marked[:3])

    def _without_attributes(self, counts: _Counts) -> Widening:
        copies = copied_indices(self._structure.traced.origins, counts)
        tensors = tensors_of(self._structure.module)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if name in copies}
        read = {
            name: [dim for dim in sorted(dims) if (name, dim) in self._readers.read]
            for name, dims in copies.items()
        }
        divided = {name: dims for name, dims in read.items() if dims}
        return Widening(copies, divided, shapes, noise=self._noise, seed=self._seed)

    def _works(self, edits: Edits) -> bool | list[str]:
        widening = replace(self._plain, attributes=edits)
        grown = self._comparison.grown(widening.grow)
        told = sizes_that_tell(grown)
        set_attributes(grown, told)
        try:
            self._comparison.run(grown)
        except Exception as error:  # whatever the user's code raises when sizes don't fit
            failed = failing_parts(grown, error)
            first = str(error).strip().splitlines() or [""]
            self._failed = (failed or [""])[0]
            self._reason = f" (`{(failed or [''])[0]}`: {first[0]})"
            return failed
        self._gap = self._comparison.gap(grown)
        if self._gap > TOLERANCE:
            return False
        paths = dict.fromkeys([*edits, *told])
        attributes = {path: {**edits.get(path, {}), **told.get(path, {})} for path in paths}
        self._found = replace(widening, attributes=attributes)
        return True
