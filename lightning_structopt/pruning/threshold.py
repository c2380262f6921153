"""The exact k-th smallest score over many tensors, found without putting them side by side.

A small even sample gives two values that bracket the k-th almost surely. One pass then counts the scores
below and keeps the few inside, among which the k-th is found. Ties at an end of the bracket take a second
pass. If the sample misled, histograms over the bits of all scores are equally exact.

What bounds the speed: each block of scores is read from memory once and, while in the cache, made absolute,
compared twice, counted and searched for the few hits. That costs less than ``abs().sum()`` where the latter's
temporary misses the cache, and more where it fits. On the CPU the masks are numpy's, whose comparisons into
bytes are several times faster than torch's; its calls release the GIL, so large inputs use threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_structopt._checks import require_whole

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_KEYS = {torch.float32: torch.int32, torch.float64: torch.int64}  # integers that hold the bits of a score
_BLOCK = (2**16, 2**18)  # scores and masks stay in a core's L2 cache, yet threads seldom meet at the GIL
_DIGIT = 11  # bits per histogram: 2048 counters stay in the L1 cache and are cheap to all-reduce
_MARGIN = 4.0  # standard deviations around the sample's guess; a miss, 1 in 10^4, only costs time


def kth_smallest(
    tensors: Sequence[Tensor],
    k: int,
    *,
    absolute: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""Return the exact k-th smallest of all elements, :math:`x_{(k)}`, as if the tensors were one.

    The tensors are neither concatenated nor changed; for large ones the extra memory is below 5% of theirs.
    Infinities rank at the ends, and ``-0.0`` equals ``0.0``.

    Args:
        tensors: Scores of any shapes, in float16, bfloat16, float32 or float64.
        k: Rank from 1 to the number of elements, as in :func:`torch.kthvalue`.
        absolute: Rank :math:`|x|` instead of :math:`x`.
        group: Processes that each hold a part of the scores, possibly no element, such as FSDP2's shards.
            Each passes its parts of the same tensors and the same ``k``, which counts over all parts; all get
            the same answer. They exchange about a dozen histograms of fixed size, never scores.

    Returns:
        A 0-dim tensor on the first tensor's device. Mixed dtypes rank without rounding and give their
        promoted dtype; convert scores to it before comparing, as torch would round a 0-dim float32 to the
        dtype of a bfloat16 tensor.

    Raises:
        TypeError: If one of ``tensors`` is not a plain floating-point tensor, or ``k`` is not an ``int``.
        ValueError: If there are no tensors, ``k`` is out of range, or a score is NaN.

    Example:
        >>> kth_smallest([torch.tensor([3.0, -1.0]), torch.tensor([[-2.0]])], k=2, absolute=True)
        tensor(2.)
    """
    _check(tensors)
    require_whole("k", k, 1)
    dtype = reduce(torch.promote_types, [t.dtype for t in tensors])
    # numpy has no bfloat16, and float32 holds every 16-bit score exactly.
    scores = _Scores(
        [t.detach() for t in tensors], torch.promote_types(dtype, torch.float32), absolute, group
    )
    (total,) = scores.over_ranks(scores.size)
    if k > total:
        raise ValueError(f"`k` must be at most the number of scores, {total}. Found `k = {k}`.")
    return (_search(scores, k, total) + 0.0).to(scores.device, dtype)  # -0.0 + 0.0 is 0.0


def _check(tensors: Sequence[Tensor]) -> None:
    """Raise unless ``tensors`` can be ranked.

    Raises:
        TypeError: If one of them is not a plain floating-point tensor.
        ValueError: If there are none.
    """
    if len(tensors) == 0:
        raise ValueError("`tensors` must hold at least one tensor. Found none. Check what selects them.")
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor) or hasattr(t, "to_local") or t.layout != torch.strided:
            found = f"Found a `{type(t).__name__}` at index {i}."
            raise TypeError(
                f"`tensors` must be plain tensors. {found} Of a DTensor, pass `to_local()` and `group`."
            )
        if t.dtype not in _DTYPES:
            found = f"Found {t.dtype} at index {i}."
            raise TypeError(f"Scores must be float16, bfloat16, float32 or float64. {found} Use `.float()`.")


def _search(scores: _Scores, k: int, total: int) -> Tensor:
    """Return the k-th smallest in one pass, two if it is tied, or more if the sample misled.

    Raises:
        ValueError: If a score is NaN.
    """
    low, high = _bracket(scores.sample(total), k / total)
    # The ends stay out: either may tie with half the scores, such as zeros pruned before.
    first, last = (low.nextafter(high), high.nextafter(low)) if low < high else (low, high)
    for _ in range(2):
        tally = scores.tally(float(first), float(last))
        below, inside, nans, kept = scores.over_ranks(*tally[:3], sum(map(len, tally.values)))
        if nans:
            raise ValueError(
                f"Scores must not be NaN. Found {nans} of {total}. Check that the loss is finite."
            )
        if below < k <= below + inside:
            if first == last:
                return first
            if kept == inside:
                return scores.only(torch.cat(tally.values)).select(k - below)
            break
        first = last = low if k <= below else high
    return scores.select(k)


def _bracket(sample: _Scores, share: float) -> tuple[Tensor, Tensor]:
    """Return two values with the quantile ``share`` between them almost surely, judging by ``sample``."""
    (size,) = sample.over_ranks(sample.size)
    margin = _MARGIN * (1 + math.sqrt(size * share * (1 - share)))  # the quantile's rank is binomial
    first, last = math.floor(size * share - margin), math.ceil(size * share + margin)
    low = sample.select(first) if first >= 1 else torch.tensor(-math.inf, dtype=sample.dtype)
    high = sample.select(last) if last <= size else torch.tensor(math.inf, dtype=sample.dtype)
    return low, high


class _Tally(NamedTuple):
    """What a pass found below a bracket and inside it."""

    below: int
    inside: int
    nans: int
    values: list[Tensor]  # those inside, unless there are too many to keep


@dataclass(frozen=True)
class _Scores:
    """Tensors that rank as one in ``dtype``, with those of the other processes of ``group``."""

    tensors: Sequence[Tensor]
    dtype: torch.dtype
    absolute: bool
    group: torch.distributed.ProcessGroup | None
    scratch: bool = False  # whether there is one tensor, ours to reorder

    @property
    def size(self) -> int:
        return sum(t.numel() for t in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def over_ranks(self, *counts: int) -> list[int]:
        """Sum each count over the ranks."""
        return self._all_reduce(torch.tensor(counts)).tolist()

    def _all_reduce(self, counts: Tensor) -> Tensor:
        if self.group is not None:
            counts = counts.to(self.device)  # NCCL reduces nothing on the CPU
            torch.distributed.all_reduce(counts, group=self.group)
        return counts.cpu()

    def only(self, values: Tensor) -> _Scores:
        """Return scores that consist of ``values``, taken from these and loaded."""
        return _Scores([values], self.dtype, False, self.group, scratch=True)

    def sample(self, total: int) -> _Scores:
        """Return evenly spread scores, about ``2 * total ** (2 / 3)`` over all ranks.

        The bracket shrinks with the root of the sample, so more would cost what they save.
        """
        stride = round(total ** (1 / 3) / 2) | 1  # odd, not to meet the same few columns of a matrix
        parts, seen = [], 0
        for t in self.tensors:
            positions = torch.arange(min(-seen % stride, t.numel()), t.numel(), stride, device=t.device)
            parts.append(self._load(t.take(positions)))
            seen += t.numel()
        return self.only(torch.cat(parts))

    def select(self, k: int) -> Tensor:
        """Return the k-th smallest, digit by digit, each from a histogram over all scores."""
        if self.scratch and self.group is None:
            values = self.tensors[0].cpu().numpy()
            values.partition(k - 1)  # faster for a few
            return torch.tensor(values[k - 1], dtype=self.dtype)
        key = torch.iinfo(_KEYS[self.dtype]).min
        for shift in reversed(range(0, torch.finfo(self.dtype).bits, _DIGIT)):
            ranks = self._all_reduce(self._histogram(key, shift)).cumsum(0)
            key += (int(torch.searchsorted(ranks, k)) - 1) << shift
        return _swap_order(torch.tensor(key, dtype=_KEYS[self.dtype])).view(self.dtype)

    def _histogram(self, key: int, shift: int) -> Tensor:
        """Count by the digit at ``shift`` what begins like ``key``, between what lies below and above."""
        counts = torch.zeros(2**_DIGIT + 2, dtype=torch.int64)
        limits = torch.iinfo(_KEYS[self.dtype])
        lowest, highest = max(key - 1, limits.min), min(key + (2**_DIGIT << shift), limits.max)
        for block in self._blocks():
            keys = _swap_order(self._load(block).view(_KEYS[self.dtype])).clamp_(lowest, highest)
            digits = (keys >> shift).sub_((key >> shift) - 1)  # would overflow without the clamp
            counts += torch.bincount(digits.reshape(-1), minlength=len(counts)).cpu()
        return counts

    def tally(self, low: float, high: float) -> _Tally:
        """Count this rank's scores below ``low``; count and, if few, keep those from ``low`` to ``high``."""
        blocks = list(self._blocks())
        room = max(2**17, sum(t.nbytes for t in self.tensors) // self.dtype.itemsize // 64)
        # Each thread has buffers, so they are few. Where torch converts, it has threads of its own.
        uses_numpy = all(t.device.type == "cpu" and t.dtype == self.dtype for t in self.tensors)
        workers = min(torch.get_num_threads(), self.size // 2**23 + 1) if uses_numpy else 1
        work = partial(self._tally, low=low, high=high, room=room // workers)
        shares = [blocks[i::workers] for i in range(workers)]
        with ThreadPoolExecutor(workers) as pool:  # for this pass alone: a later fork finds no thread
            tallies = list(pool.map(work, shares) if workers > 1 else map(work, shares))
        below, inside, nans = (sum(counts) for counts in zip(*(tally[:3] for tally in tallies), strict=True))
        return _Tally(below, inside, nans, [values for tally in tallies for values in tally.values])

    def _tally(self, blocks: Sequence[Tensor], low: float, high: float, room: int) -> _Tally:
        library, native = _library(self.device)
        size = max((block.numel() for block in blocks), default=0)
        buffer = native(torch.empty(size, dtype=self.dtype, device=self.device))
        masks = native(torch.empty(2, size, dtype=torch.bool, device=self.device))
        below, inside, nans, kept = 0, 0, 0, [buffer[:0]]
        for block in blocks:
            slot = buffer[: block.numel()].reshape(block.shape)
            under, over = (mask[: block.numel()].reshape(block.shape) for mask in masks)
            if block.dtype != self.dtype or block.device != self.device:
                block = torch.as_tensor(slot).copy_(block)
            scores = library.absolute(native(block), out=slot) if self.absolute else native(block)
            library.less(scores, low, out=under)
            library.greater(scores, high, out=over)
            values = scores[under == over]  # neither: inside, or NaN
            # No `int` here: on CUDA it would wait. Picking the values does, once per block.
            below += library.count_nonzero(under)
            nans += library.count_nonzero(library.isnan(values))
            inside += len(values)
            if inside <= room:
                kept.append(values)
        return _Tally(int(below), inside, int(nans), list(map(torch.as_tensor, kept)))

    def _load(self, block: Tensor) -> Tensor:
        """Return what ``block`` ranks by."""
        block = block.to(self.device, self.dtype)
        return block.abs() if self.absolute else block

    def _blocks(self) -> Iterator[Tensor]:
        """Cut the tensors into views whose temporaries are small, fit a cache, or are worth a launch."""
        least, most = _BLOCK
        size = min(most, self.size // 256) if self.device.type == "cpu" else self.size // 64
        for tensor in self.tensors:
            yield from _cut(tensor, max(least, size))


def _cut(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """Cut ``tensor`` into views of at most ``size`` elements, in the order of memory."""
    if tensor.numel() <= size:
        yield tensor
        return
    tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(size)  # type: ignore[no-untyped-call]
    else:
        step = max(1, size // tensor[0].numel())
        for start in range(0, len(tensor), step):
            yield from _cut(tensor[start : start + step], size)


def _library(device: torch.device) -> tuple[Any, Callable[[Tensor], Any]]:
    """Return the library that compares fastest on ``device``, and what turns tensors into its arrays."""
    return (np, Tensor.numpy) if device.type == "cpu" else (torch, Tensor.detach)


def _swap_order(bits: Tensor) -> Tensor:
    """Turn the bits of floats into integers of the same order, and back."""
    integers = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (integers.bits - 1)) & integers.max)
