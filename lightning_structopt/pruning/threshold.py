"""The exact k-th smallest score over many tensors, found without putting them side by side.

A small even sample gives two values that bracket the k-th almost surely. One pass then counts the scores below
the bracket and keeps the few inside it, among which a histogram over the floats' bits finds the k-th. If the
sample misled, that histogram runs over all scores: slower, equally exact.

What bounds the speed: on a CPU, half the time goes to reading every score from memory once, and half to two
comparisons and the search for the few hits while a block of scores is in the cache. The masks are numpy's, whose
comparisons into bytes are several times faster than torch's; blocks are shared out to
``torch.get_num_threads()`` threads, as numpy releases the GIL. Other devices do the same with torch in larger
blocks and one synchronization each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial, reduce

import numpy as np
import torch

from lightning_structopt._checks import require_whole

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KEYS = {torch.float32: torch.int32, torch.float64: torch.int64}  # what holds a score's bits
_BLOCK = 2**16  # scores and masks of a block stay in a core's L2 cache
_DEVICE_BLOCK = 2**22  # elsewhere launches cost more than cache misses
_DIGIT = 11  # bits per histogram: 2048 counters stay in the L1 cache and are cheap to all-reduce
_MARGIN = 4.0  # standard deviations on either side of the sample's guess; a miss (1 in 10^4) only costs time


def kth_smallest(
    tensors: Sequence[torch.Tensor],
    k: int,
    *,
    absolute: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    r"""Return the exact k-th smallest of all elements, :math:`x_{(k)}`, as if the tensors were one.

    The tensors are neither concatenated nor changed; extra memory stays below 5% of theirs for large inputs.
    Infinities rank at the ends, and ``-0.0`` equals ``0.0``.

    Args:
        tensors: Scores of any shapes, in float16, bfloat16, float32 or float64.
        k: Rank from 1 to the number of elements, as in :func:`torch.kthvalue`.
        absolute: Rank :math:`|x|` instead of :math:`x`.
        group: Processes that each hold a part of the scores, possibly no element, such as FSDP2's local shards.
            All call with the same ``k``, which counts over all parts, and get the same answer. They exchange a
            dozen histograms of fixed size, never scores.

    Returns:
        A 0-dim tensor on the first tensor's device. Mixed dtypes are ranked without rounding and give their
        promoted dtype. Convert scores to it before comparing: next to a bfloat16 tensor, torch would round a
        0-dim float32.

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
    # numpy has no bfloat16, and float32 holds each 16-bit score exactly.
    scores = _Scores(
        [t.detach() for t in tensors], torch.promote_types(dtype, torch.float32), absolute, group
    )
    if k > (total := scores.count()):
        raise ValueError(f"`k` must be in [1, {total}], from one to the number of scores. Found `k = {k}`.")
    return _search(scores, k, total).to(tensors[0].device, dtype)


def _check(tensors: Sequence[torch.Tensor]) -> None:
    """Raise unless ``tensors`` can be ranked."""
    if len(tensors) == 0:
        raise ValueError(
            "`tensors` must hold at least one tensor. Found none. Check what selects the parameters."
        )
    for i, t in enumerate(tensors):
        if not isinstance(t, torch.Tensor) or hasattr(t, "to_local"):
            found, remedy = type(t).__name__, "Pass a DTensor's `to_local()` together with `group`."
            raise TypeError(f"`tensors` must hold plain tensors. Found a `{found}` at index {i}. {remedy}")
        if t.dtype not in _DTYPES:
            rule = "Scores must be float16, bfloat16, float32 or float64."
            raise TypeError(f"{rule} Found {t.dtype} at index {i}. Convert it with `.float()`.")


def _search(scores: _Scores, k: int, total: int) -> torch.Tensor:
    """Return the k-th smallest of ``scores`` by one pass, or a few where values are tied or the sample misled."""
    low, high = _bracket(scores.sample(total), k / total)
    # The bracket's ends stay out of it: either may be a tie of half the scores, such as zeros pruned before.
    first, last = (low.nextafter(high), high.nextafter(low)) if low < high else (low, high)
    for _ in range(2):
        tally = scores.tally(float(first), float(last))
        kept = sum(map(len, tally.values))
        below, inside, kept, nans = scores.over_ranks(tally.below, tally.inside, kept, tally.nans)
        if nans:
            raise ValueError(f"Scores must not be NaN. Found {nans} among {total}. Look for a diverged loss.")
        if below < k <= below + inside:
            if first == last:
                return first
            if kept == inside:
                return scores.only(tally.values).select(k - below)
            break
        first = last = low if k <= below else high
    return scores.select(k)


def _bracket(sample: _Scores, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two values that hold the quantile ``share`` between them almost surely, judged by a sample."""
    size = sample.count()
    margin = _MARGIN * (
        1 + math.sqrt(size * share * (1 - share))
    )  # binomial deviation of the quantile's rank
    first, last = math.floor(size * share - margin), math.ceil(size * share + margin)
    low = sample.select(first) if first >= 1 else torch.tensor(-math.inf, dtype=sample.dtype)
    high = sample.select(last) if last <= size else torch.tensor(math.inf, dtype=sample.dtype)
    return low, high


@dataclass
class _Tally:
    """What one pass over scores found below a bracket and inside it."""

    below: int = 0
    inside: int = 0
    nans: int = 0
    values: list[torch.Tensor] = field(default_factory=list)  # those inside, unless they are too many to keep


@dataclass(frozen=True)
class _Scores:
    """Tensors ranked as one in ``dtype``, together with those on the other processes of ``group``."""

    tensors: Sequence[torch.Tensor]
    dtype: torch.dtype
    absolute: bool
    group: torch.distributed.ProcessGroup | None

    def count(self) -> int:
        """Return the number of scores on all ranks."""
        return self.over_ranks(sum(t.numel() for t in self.tensors))[0]

    def over_ranks(self, *counts: int) -> list[int]:
        """Sum each of ``counts`` over the ranks."""
        return list(counts) if self.group is None else self._all_reduce(torch.tensor(counts)).tolist()

    def _all_reduce(self, counts: torch.Tensor) -> torch.Tensor:
        if self.group is not None:
            counts = counts.to(self.tensors[0].device)  # NCCL reduces nothing on the CPU
            torch.distributed.all_reduce(counts, group=self.group)
        return counts.cpu()

    def only(self, values: Sequence[torch.Tensor]) -> _Scores:
        """Return scores that are just ``values``, which were loaded from these."""
        device = self.tensors[0].device
        joined = torch.cat([torch.empty(0, dtype=self.dtype, device=device), *(v.to(device) for v in values)])
        return _Scores([joined], self.dtype, False, self.group)

    def sample(self, total: int) -> _Scores:
        """Return evenly spread scores, about ``2 * total ** (2 / 3)`` over all ranks.

        More would cost what they save: the bracket only shrinks with the root of the sample.
        """
        stride = round(total ** (1 / 3) / 2) | 1  # odd, not to pick the same few columns of a matrix
        parts, seen = [], 0
        for block in self._blocks():
            parts.append(self._load(block.reshape(-1)[-seen % stride :: stride]))
            seen += block.numel()
        return self.only(parts)

    def select(self, k: int) -> torch.Tensor:
        """Return the k-th smallest score, digit by digit, each from a histogram of all scores."""
        bits, key = torch.finfo(self.dtype).bits, torch.iinfo(_KEYS[self.dtype]).min
        for shift in reversed(range(0, bits, _DIGIT)):
            ranks = self._all_reduce(self._histogram(key, shift)).cumsum(0)
            key += (int(torch.searchsorted(ranks, k)) - 1) << shift
        return _swap_order(torch.tensor(key, dtype=_KEYS[self.dtype])).view(self.dtype)

    def _histogram(self, key: int, shift: int) -> torch.Tensor:
        """Count by the digit at ``shift`` the scores that begin like ``key``, between those below and above."""
        counts = torch.zeros(2**_DIGIT + 2, dtype=torch.int64)
        limits = torch.iinfo(_KEYS[self.dtype])
        lowest, highest = max(key - 1, limits.min), min(key + (2**_DIGIT << shift), limits.max)
        for block in self._blocks():
            keys = _swap_order(self._load(block).view(_KEYS[self.dtype]))
            # Clamped first, as the subtraction could overflow.
            digits = (keys.clamp_(lowest, highest) >> shift) - ((key >> shift) - 1)
            counts += torch.bincount(digits.reshape(-1), minlength=len(counts)).to(counts.device)
        return counts

    def tally(self, low: float, high: float) -> _Tally:
        """Count this rank's scores below ``low``, and count and collect those from ``low`` to ``high``."""
        room = max(2**17, sum(t.numel() for t in self.tensors) // 64)
        devices: dict[torch.device, list[torch.Tensor]] = {}
        for block in self._blocks():
            devices.setdefault(block.device, []).append(block)
        host = devices.pop(torch.device("cpu"), [])
        # Not in threads, which would not queue their kernels on the caller's CUDA stream.
        tallies = [self._tally_device(blocks, low, high, room) for blocks in devices.values()]
        workers = min(
            torch.get_num_threads(), len(host) // 16 + 1
        )  # a thread starts in the time of a few blocks
        work = partial(self._tally_host, low=low, high=high, room=room // workers)
        with ThreadPoolExecutor(
            workers
        ) as pool:  # for this call alone: no thread that a later fork would lose
            run = pool.map if workers > 1 else map
            tallies += run(work, [host[i::workers] for i in range(workers)])
        return _Tally(
            sum(t.below for t in tallies),
            sum(t.inside for t in tallies),
            sum(t.nans for t in tallies),
            [values for t in tallies for values in t.values],
        )

    def _tally_host(self, blocks: Sequence[torch.Tensor], low: float, high: float, room: int) -> _Tally:
        """Tally with numpy, in buffers that stay in the cache from block to block."""
        tally = _Tally()
        buffer = torch.empty(_BLOCK, dtype=self.dtype)
        masks = np.empty((2, _BLOCK), dtype=bool)
        for block in blocks:
            scores = self._load(block, buffer).numpy()
            below, above = masks[:, : scores.size].reshape(2, *scores.shape)
            np.less(scores, low, out=below)
            np.greater(scores, high, out=above)
            values = scores[np.equal(below, above, out=above)]  # neither: inside, or NaN
            tally.below += int(np.count_nonzero(below))
            tally.nans += int(np.count_nonzero(np.isnan(values)))
            tally.inside += values.size
            if tally.inside <= room:
                tally.values.append(torch.from_numpy(values))
        return tally

    def _tally_device(self, blocks: Sequence[torch.Tensor], low: float, high: float, room: int) -> _Tally:
        """Tally with torch; picking out the values is the one synchronization per block."""
        tally = _Tally()
        below = nans = torch.zeros((), dtype=torch.int64, device=blocks[0].device)
        for block in blocks:
            scores = self._load(block)
            under = scores < low
            values = scores[under == (scores > high)]  # neither: inside, or NaN
            below = below + under.count_nonzero()
            nans = nans + values.isnan().count_nonzero()
            tally.inside += len(values)
            if tally.inside <= room:
                tally.values.append(values)
        tally.below, tally.nans = int(below), int(nans)
        return tally

    def _load(self, block: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Return what ``block`` ranks by, in ``buffer`` if given and needed."""
        if block.dtype == self.dtype and not self.absolute:
            return block
        out = (
            torch.empty_like(block, dtype=self.dtype)
            if buffer is None
            else buffer[: block.numel()].view(block.shape)
        )
        if block.dtype != self.dtype:
            block = out.copy_(block)
        return torch.abs(block, out=out) if self.absolute else out

    def _blocks(self) -> Iterator[torch.Tensor]:
        """Cut the tensors into views that fit a cache."""
        for tensor in self.tensors:
            yield from _cut(tensor, _BLOCK if tensor.device.type == "cpu" else _DEVICE_BLOCK)


def _cut(tensor: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Cut ``tensor`` into views of at most ``size`` elements, in memory order."""
    tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(size)
    elif tensor.numel() <= size:
        yield tensor
    else:
        for part in tensor.split(max(1, size // tensor[0].numel())):
            yield from _cut(part, size)


def _swap_order(bits: torch.Tensor) -> torch.Tensor:
    """Turn the bits of floats into integers of the same order, and back; both zeros become 0."""
    return torch.where(bits < 0, torch.iinfo(bits.dtype).min - bits, bits)
