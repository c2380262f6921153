import datetime
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import run_ranks
from torch import Tensor

from lightning_structopt.pruning import threshold
from lightning_structopt.pruning.threshold import kth_smallest

SIZE = 3600
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INFINITY = float("inf")


def expected(tensors, k, absolute=False):
    joined = torch.cat([t.detach().flatten() for t in tensors])  # promotes mixed dtypes
    return (joined.abs() if absolute else joined).sort().values[k - 1]


def assert_exact(tensors, k, absolute=False, group=None, everywhere=None):
    found = kth_smallest(tensors, k, absolute=absolute, group=group)
    torch.testing.assert_close(found, expected(everywhere or tensors, k, absolute), rtol=0, atol=0)


def ranks(size):
    return sorted({1, min(2, size), max(1, size // 2), round(0.9 * size), max(1, size - 1), size})


def normal(size):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))


def signs(size):
    return normal(size).sign()


DISTRIBUTIONS = {
    "normal": normal,
    "norm scales": lambda n: 1 + 1e-3 * normal(n),
    "constant": lambda n: torch.full((n,), -0.3, dtype=torch.float64),
    "zeros of both signs": lambda n: signs(n) * 0.0,
    "two values": lambda n: torch.where(normal(n) > 0.5, 2.0, -1.0).double(),
    "half zeros": lambda n: normal(n) * (normal(n + 1)[1:] > 0),
    "half minus infinity": lambda n: normal(n).masked_fill(normal(n + 1)[1:] > 0, -INFINITY),
    "infinities": lambda n: signs(n) * torch.where(normal(n).abs() > 0.5, INFINITY, 1.0),
    "huge range": lambda n: signs(n) * 10 ** torch.linspace(-38, 38, n, dtype=torch.float64),
    "denormals": lambda n: normal(n) * 1e-39,
    "sorted": lambda n: normal(n).sort().values,
    "reversed": lambda n: normal(n).sort(descending=True).values,
}


def strided(flat):
    return torch.stack([flat, torch.full_like(flat, 7)], dim=1)[:, 0]


ARRANGEMENTS = {
    "one": lambda flat: [flat],
    "0-dim, empty and the rest": lambda flat: [
        flat[0],
        flat[:0],
        flat[1:].reshape(-1, 1),
        flat[:0].view(0, 3),
    ],
    "matrices": lambda flat: [part.view(60, -1) for part in flat.chunk(3)],
    "transposed": lambda flat: [flat.view(60, -1).t(), flat[:6].view(2, 3).t()],
    "not dense": lambda flat: [strided(flat), strided(flat).view(60, -1).t()[::2], flat[:1].expand(40)],
    "channels last": lambda flat: [flat.view(10, 4, 9, 10).to(memory_format=torch.channels_last)],
    "many small": lambda flat: list(flat.split([7] * 514 + [2])),
}


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_equals_sorting(distribution, arrangement, dtype, absolute):
    tensors = ARRANGEMENTS[arrangement](DISTRIBUTIONS[distribution](SIZE).to(dtype))
    for k in ranks(sum(t.numel() for t in tensors)):
        assert_exact(tensors, k, absolute)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_every_rank(size, absolute):
    tensors = [normal(size).float(), normal(size + 5).float().round()]
    for k in range(1, 2 * size + 6):
        assert_exact(tensors, k, absolute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_several_blocks(distribution, dtype):
    flat = DISTRIBUTIONS[distribution](600_000).to(dtype)
    tensors = [
        flat[:300_000].view(1000, 300).t(),
        strided(flat[300_000:500_000]).view(500, 400),
        flat[500_000:].view(10, 10, 100, 10).to(memory_format=torch.channels_last),
    ]
    for k in ranks(600_000):
        assert_exact(tensors, k, absolute=True)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_threads(workers, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: workers)
    tensors = list(torch.randn(2**24 + 1).split(5_000_000))  # enough for three
    threads = threading.active_count()
    found = kth_smallest(tensors, k=15_000_000, absolute=True)
    assert sum(int((t.abs() < found).sum()) for t in tensors) == 14_999_999
    assert sum(int((t.abs() <= found).sum()) for t in tensors) >= 15_000_000
    assert threading.active_count() == threads


def test_leaves_torch_threads_alone():
    before = torch.get_num_threads()
    kth_smallest([torch.randn(2**24)], k=9)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_torch_instead_of_numpy(distribution, dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(threshold, "_library", lambda device: asked.append(device) or (torch, Tensor.detach))
    tensors = list(DISTRIBUTIONS[distribution](SIZE).to(dtype).view(60, 60).split(13))
    for k in ranks(SIZE):
        assert_exact(tensors, k, absolute=True)
        assert_exact(tensors, k)
    assert asked


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_cuda(distribution):
    tensors = list(DISTRIBUTIONS[distribution](600_000).float().split(70_000))
    for k in ranks(600_000):
        found = kth_smallest([t.cuda() for t in tensors], k, absolute=True)
        assert found.is_cuda
        assert found.cpu() == expected(tensors, k, absolute=True)


@pytest.fixture
def histograms(monkeypatch):
    """Count the histograms over more scores than a sample has."""
    calls, original = [], threshold._Scores._histogram

    def record(self, *args):
        calls.append(self.size)
        return original(self, *args)

    monkeypatch.setattr(threshold._Scores, "_histogram", record)
    return calls


def sampled(size):
    """Return the positions of a tensor that the sample looks at."""
    positions = torch.arange(size, dtype=torch.float64)
    return threshold._Scores([positions], torch.float64, False, None).sample(size).tensors[0].long()


def hide_everything(flat):
    """Let the sample see one value, so that the k-th is outside of its bracket."""
    flat[sampled(len(flat))] = 5.0


def hide_the_cluster(flat):
    """Let the sample see two far ends, so that the bracket holds far more than there is room for."""
    flat[sampled(len(flat))] = 1e6
    flat[sampled(len(flat))[::2]] = -1e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mislead", [hide_everything, hide_the_cluster])
def test_misled_sample(mislead, dtype, histograms):
    flat = normal(500_000).to(dtype)
    mislead(flat)
    assert_exact(flat.split(200_000), k=250_000)
    assert set(histograms) == {500_000}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_honest_sample_needs_no_histogram(distribution, histograms):
    flat = DISTRIBUTIONS[distribution](500_000).float()
    for k in ranks(500_000):
        assert_exact(flat.split(200_000), k)
    assert not histograms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_histograms_alone(distribution, dtype):
    tensors = list(DISTRIBUTIONS[distribution](SIZE).to(dtype).split(1000))
    for k in ranks(SIZE):
        for absolute in (False, True):
            found = threshold._Scores(tensors, dtype, absolute, None).select(k)
            assert found == expected(tensors, k, absolute)


@pytest.mark.parametrize(
    ("first", "second", "promoted"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes(first, second, promoted):
    tensors = [normal(1000).to(first), normal(900).to(second)]
    assert kth_smallest(tensors, k=950).dtype == promoted
    for k in ranks(1900):
        assert_exact(tensors, k, absolute=True)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_negative_zero_becomes_zero(k):
    found = kth_smallest([torch.tensor([-0.0, 0.0, -0.0])], k)
    assert not found.signbit()


def test_arguments_and_gradients_are_left_alone():
    weight = torch.nn.Parameter(normal(50).float())
    before = weight.detach().clone()
    found = kth_smallest([weight], k=5, absolute=True)
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=0)
    assert not found.requires_grad
    found += 1  # and is no view of a weight
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5000, 400_000])
@pytest.mark.parametrize("absolute", [False, True])
def test_nan(size, dtype, absolute):
    for where in (0, size // 2, size - 1):
        scores = torch.ones(size, dtype=dtype)
        scores[where] = torch.nan
        for k in (1, size):
            with pytest.raises(ValueError, match=f"must not be NaN. Found 1 of {size + 2}. Check that"):
                kth_smallest([torch.zeros(2), scores], k, absolute=absolute)


def test_all_nan():
    with pytest.raises(ValueError, match="Found 400000 of 400000"):
        kth_smallest([torch.full((400_000,), torch.nan)], k=1)


@pytest.mark.parametrize(
    ("tensors", "k", "error", "message"),
    [
        ([], 1, ValueError, "`tensors` must hold at least one tensor. Found none."),
        ([torch.ones(3), torch.ones(2).long()], 1, TypeError, "Found torch.int64 at index 1. Use `.float"),
        ([torch.ones(3, dtype=torch.bool)], 1, TypeError, "must be float16, .* Found torch.bool"),
        ([torch.ones(3).cfloat()], 1, TypeError, "Found torch.complex64"),
        ([[1.0, 2.0]], 1, TypeError, "plain tensors. Found a `list` at index 0"),
        ([torch.eye(3).to_sparse()], 1, TypeError, "plain tensors. Found a `Tensor`"),
        ([torch.ones(3)], 0, ValueError, "`k` must be at least 1. Found `k = 0`"),
        ([torch.ones(3)], 1.0, TypeError, "`k` must be a whole number. Found `k = 1.0`"),
        ([torch.ones(3)], True, TypeError, "`k` must be a whole number"),
        ([torch.ones(3), torch.ones(2)], 6, ValueError, "at most the number of scores, 5. Found `k = 6`"),
        ([torch.ones(0)], 1, ValueError, "at most the number of scores, 0. Found `k = 1`"),
    ],
)
def test_errors(tensors, k, error, message):
    with pytest.raises(error, match=message):
        kth_smallest(tensors, k)


@pytest.mark.parametrize("tensor", [torch.ones(700, 1000), torch.ones(3, 5, 9, 10_000).transpose(1, 3)])
def test_dense_memory_is_not_copied(tensor):
    pieces = list(threshold._cut(tensor, 2**17))
    assert sum(piece.numel() for piece in pieces) == tensor.numel()
    assert max(piece.numel() for piece in pieces) <= 2**17
    assert {p.untyped_storage().data_ptr() for p in pieces} == {tensor.untyped_storage().data_ptr()}
    assert all(piece.is_contiguous() for piece in pieces)


MEMORY = """
import re, sys, torch
from lightning_structopt.pruning import kth_smallest

def peak():  # unlike `ru_maxrss`, does not start from that of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

dtype, strided, signed = getattr(torch, sys.argv[1]), sys.argv[2] == "strided", sys.argv[3] == "signed"
size = 320_000_000 // dtype.itemsize // 10
tensors = [torch.empty(size, dtype=dtype).normal_() for _ in range(10)]
if strided:
    tensors = [t.view(1000, -1).t()[1:] for t in tensors]
kth_smallest([torch.ones(9)], 9, absolute=True)  # loads code
before = peak()
for share in (0.5, 0.9):
    kth_smallest(tensors, int(share * sum(t.numel() for t in tensors)), absolute=not signed)
print((peak() - before) / sum(t.numel() * dtype.itemsize for t in tensors))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "case", ["float32 dense absolute", "float32 strided signed", "bfloat16 dense absolute"]
)
def test_extra_memory_is_below_5_percent(case):
    command = [sys.executable, "-c", MEMORY, *case.split()]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(output.stdout) < 0.05


def group_cases():
    """Return for every case the tensors of rank 0, those of rank 1, and whether to rank magnitudes."""
    for name, distribution in DISTRIBUTIONS.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            flat = distribution(9000).to(dtype)
            yield f"{name} {dtype}", [flat[:5000], flat[6000:]], [flat[5000:5500], flat[5500:6000]], True
            yield (
                f"{name} {dtype} on one rank",
                [flat[:0], flat[:0]],
                [flat[:400].view(20, 20), flat[400:]],
                False,
            )
    flat = normal(600_000).float()
    flat[:500_000][sampled(500_000)] = 5.0
    yield "rank 0 misleads", [flat[:500_000]], [flat[500_000:]], False
    yield "large", list(normal(500_000).float().chunk(3)), [normal(300_001).float()] * 3, True
    yield "tiny", [torch.tensor([3.0])], [torch.tensor([])], True


def check_group(rank, folder):
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    group, original, sizes = torch.distributed.group.WORLD, torch.distributed.all_reduce, []

    def record(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    torch.distributed.all_reduce = record
    for _, first, second, absolute in group_cases():
        for k in ranks(sum(t.numel() for t in first + second)):
            sizes.clear()
            assert_exact((first, second)[rank], k, absolute, group, everywhere=first + second)
            assert len(sizes) <= 4 + 3 * 6  # a float64 has 6 digits of 11 bits
            assert max(sizes) <= 2**11 + 2
    nan = torch.tensor([1.0, torch.nan, 2.0]) if rank == 1 else torch.ones(4)
    with pytest.raises(ValueError, match="must not be NaN. Found 1 of 7"):
        kth_smallest([nan], 2, group=group)
    with pytest.raises(ValueError, match="at most the number of scores, 6. Found `k = 7`"):
        kth_smallest([torch.ones(3)], 7, group=group)
    # One that does not take part in a group asks about its own scores only.
    assert kth_smallest([torch.tensor([rank, 5.0])], 1) == rank
    Path(folder, f"done-{rank}").touch()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_group_of_two(tmp_path):
    run_ranks(check_group, tmp_path)
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
