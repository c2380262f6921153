"""Masks by parameter name: apply them, count them, save them."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_structopt._dtensors import full, local, part_of
from lightning_structopt.pruning.outputs import Outputs
from lightning_structopt.pruning.sharding import Sharding

# On a CPU the square root takes a detour at exact zeros (measured: 12 times slower), which Adam's steps would feel.
# What is remembered of a pruned weight moves nothing, so its second moments may as well be one.
_SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg"}
_REFRESH = 100  # steps after which they are one again; until then decay leaves 3e-5 of it at beta = 0.9


class MaskSet:
    """The masks of a set of parameters, which they hold at zero in place.

    Under FSDP2 each rank has the masks of its own parts; only :meth:`whole` and :meth:`pack`, which all ranks
    call together, put one parameter's mask together at a time.

    Args:
        parameters: The parameters by name. They are referred to, never replaced.
        biases: By the name of a parameter, the bias of its rows (its own name and itself): an entry is zeroed
            with the whole of its row. Biases do not count.
        outputs: Where the parameters have their rows; by default in the first dimension.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        biases: Mapping[str, tuple[str, nn.Parameter]] | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.biases = dict(biases or {})
        self.outputs = Outputs() if outputs is None else outputs
        self.sharding = Sharding.of(self.parameters)
        self.total = sum(parameter.numel() for parameter in self.parameters.values())
        self.pruned = 0
        self._ids = {id(parameter) for parameter in self.parameters.values()}
        self._device = next((p.device for p in self.parameters.values()), torch.device("cpu"))
        # 1 where a weight is kept, laid out in memory like its parameter. On the CPU a factor of the
        # parameter's own type multiplies three times faster than a bool, which matters at every step; on an
        # accelerator the bool is as fast and a quarter of the size.
        self._factors: dict[str, Tensor] = {}
        self._bias_factors: dict[str, Tensor] = {}

    @property
    def sparsity(self) -> float:
        """The fraction of weights that are pruned."""
        return self.pruned / self.total

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that this rank holds, detached."""
        return {name: local(parameter.detach()) for name, parameter in self.parameters.items()}

    def masks(self) -> dict[str, Tensor]:
        """Return fresh bool masks of the same weights, True where one is kept; all True before any pruning."""
        if not self._factors:
            return {
                name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights().items()
            }
        return {name: factor.bool().contiguous() for name, factor in self._factors.items()}

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the mask of each whole parameter; all ranks call it together."""
        for name, mask in self.masks().items():
            yield name, full(mask, self.parameters[name])

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks and zero the weights that they prune.

        Args:
            masks: A bool mask for every parameter, of the shape that this rank holds.
        """
        for name, weight in self.weights().items():
            self._factors[name] = _factor(masks[name], weight)
        for name, (_, bias) in self.biases.items():
            rows = self.outputs.first(name, masks[name]).flatten(1)
            self._bias_factors[name] = _factor(rows.any(1), local(bias.detach()))
        kept = (int(mask.count_nonzero()) for name, mask in masks.items() if self.sharding.counts(name))
        self.pruned = self.total - self.sharding.total(kept)
        self.apply()

    def prune_zeros(self, names: Iterable[str]) -> bool:
        """Also prune what is zero in those of these parameters that ``names`` lists; say whether anything was."""
        before, masks, weights = self.pruned, self.masks(), self.weights()
        self.update(masks | {name: masks[name] & (weights[name] != 0) for name in names if name in masks})
        return self.pruned != before

    def apply(self) -> None:
        """Zero the pruned weights."""
        if self._factors:
            biases = [local(bias.detach()) for _, bias in self.biases.values()]
            factors = [*self._factors.values(), *self._bias_factors.values()]
            torch._foreach_mul_([*self.weights().values(), *biases], factors)

    @torch.no_grad()
    def apply_to_gradients(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Zero the gradients of those pruned weights that are among ``parameters``.

        Returns:
            False if a gradient is sparse, and so was left as it is.
        """
        factors = self._factor_of()
        pairs = [
            (local(parameter.grad), factors[id(parameter)])
            for parameter in parameters
            if parameter.grad is not None and id(parameter) in factors
        ]
        dense = [(gradient, factor) for gradient, factor in pairs if gradient.layout == torch.strided]
        if dense:
            gradients, matching = zip(*dense, strict=True)
            torch._foreach_mul_(list(gradients), list(matching))
        return len(dense) == len(pairs)

    @torch.no_grad()
    def apply_to_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget what ``optimizer`` remembers of pruned weights: zero momentum, and neutral second moments."""
        for key, value, factor in self._remembered(optimizer):
            if key in _SECOND_MOMENTS and value.device.type == "cpu":
                value.masked_fill_(factor == 0, 1.0)
            else:
                value.mul_(factor)

    @torch.no_grad()
    def remembered_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Tell whether ``optimizer`` has momentum that would move a pruned weight."""
        return any(
            bool(value.masked_fill(factor != 0, 0).any())
            for key, value, factor in self._remembered(optimizer)
            if key not in _SECOND_MOMENTS
        )

    def _remembered(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield what ``optimizer`` remembers of each weight, by its key in the state, with the weights' factor."""
        factors = self._factor_of()
        for parameter, state in optimizer.state.items():
            factor = factors.get(id(parameter))
            for key, value in state.items():
                if factor is not None and isinstance(value, Tensor) and value.shape == parameter.shape:
                    yield key, local(value), factor

    @torch.no_grad()
    def refresh_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the second moments of pruned weights from decaying to zero; call it after each step.

        It counts the optimizer's own steps, which checkpoints hold, so that a resumed run does it at the same ones.
        """
        if not self._factors or self._device.type != "cpu":
            return
        state: dict[str, Any] = next((s for p, s in optimizer.state.items() if id(p) in self._ids), {})
        if "step" in state and not _SECOND_MOMENTS.isdisjoint(state):
            step = int(state["step"])
            if step == 1 or step % _REFRESH == 0:
                self.apply_to_state(optimizer)

    @torch.no_grad()
    def apply_to_copy(self, module: nn.Module) -> None:
        """Zero the pruned weights in ``module``, a copy of the module whose parameters these are."""
        copies = dict(module.named_parameters())
        for name, factor in self._factors.items():
            local(copies[name]).mul_(factor.to(copies[name].device))
        for name, factor in self._bias_factors.items():
            bias = copies[self.biases[name][0]]
            local(bias).mul_(factor.to(bias.device))

    def _factor_of(self) -> dict[int, Tensor]:
        weights = {id(self.parameters[name]): factor for name, factor in self._factors.items()}
        return weights | {id(self.biases[name][1]): factor for name, factor in self._bias_factors.items()}

    def pack(self) -> dict[str, dict[str, Any]]:
        """Return the masks as plain data, one bit a weight; empty before the first pruning."""
        if not self._factors:
            return {}
        return {
            name: {"shape": list(mask.shape), "bits": torch.from_numpy(_pack_bits(mask))}
            for name, mask in self.whole()
        }

    def unpack(self, packed: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over masks that :meth:`pack` returned, whatever the number of ranks then and now.

        Raises:
            ValueError: If names or shapes differ from those of the parameters.
        """
        if not packed:
            return
        _require_same_weights(packed, self.parameters)
        self.update({name: self._part(name, entry) for name, entry in packed.items()})

    def fits(self, packed: Mapping[str, Mapping[str, Any]]) -> bool:
        """Tell whether ``packed`` describes these weights as they are: it has their names, shapes and zeros."""
        same = {name: tuple(entry["shape"]) for name, entry in packed.items()}
        if same != {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}:
            return False
        weights = self.weights()
        revived = (
            int(weights[name][~self._part(name, entry)].count_nonzero()) for name, entry in packed.items()
        )
        return self.sharding.total(revived) == 0

    def _part(self, name: str, entry: Mapping[str, Any]) -> Tensor:
        parameter = self.parameters[name]
        return part_of(unpack_bits(entry).to(parameter.device), parameter)

    def digest(self) -> int:
        """Return a number of 63 bits that differs where any mask differs that all ranks should have alike."""
        digest = hashlib.blake2b(digest_size=8)
        for name, mask in self.masks().items():
            if name not in self.sharding.sharded:
                digest.update(name.encode())
                digest.update(_pack_bits(mask).tobytes())
        return int.from_bytes(digest.digest(), "big") >> 1


def _factor(mask: Tensor, like: Tensor) -> Tensor:
    """Return ``mask`` as what ``like`` is multiplied by."""
    dtype = like.dtype if like.device.type == "cpu" else torch.bool
    return torch.empty_like(like, dtype=dtype).copy_(mask)


def _pack_bits(mask: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return np.packbits(mask.cpu().numpy().reshape(-1))


def unpack_bits(entry: Mapping[str, Any]) -> Tensor:
    """Return the bool mask of one entry of :meth:`MaskSet.pack`."""
    shape = tuple(entry["shape"])
    bits = np.unpackbits(entry["bits"].cpu().numpy(), count=int(np.prod(shape)))
    return torch.from_numpy(bits).bool().view(shape)


def _require_same_weights(packed: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, Tensor]) -> None:
    saved = {name: tuple(entry["shape"]) for name, entry in packed.items()}
    here = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    differing = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    if differing:
        name = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise ValueError(
            "The masks in a checkpoint must fit the module. Found "
            f"`{name}` with {_shape(saved.get(name))} in the checkpoint and {_shape(here.get(name))} in the "
            f"module{more}. Resume with the module, `include` and `exclude` that the checkpoint was made with."
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no mask" if shape is None else f"shape {shape}"
