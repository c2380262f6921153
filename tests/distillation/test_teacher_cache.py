"""The teacher cache: what goes in comes out, and what doesn't belong together is refused."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import Classifier, dataset, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_structopt.distillation.cache.fingerprint import fingerprint
from lightning_structopt.distillation.cache.sample_ids import WithIds
from lightning_structopt.distillation.cache.teacher_cache import TeacherCache
from lightning_structopt.distillation.losses.logits import SoftTarget

ROUNDING = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}
every_dtype = pytest.mark.parametrize("dtype", ROUNDING)


def opened(directory: Path, teacher: str = "teacher", **kwargs: Any) -> TeacherCache:
    cache = TeacherCache(directory, **kwargs)
    cache.open(teacher)
    return cache


def outputs(count: int, classes: int = 5) -> dict[str, Tensor]:
    return {"logits": 4 * torch.randn(count, classes), "layer.2": torch.randn(count, 3, 2, 2)}


@every_dtype
def test_what_goes_in_comes_out_in_any_order(tmp_path: Path, dtype: str) -> None:
    cache, ids, given = opened(tmp_path, dtype=dtype), torch.tensor([7, 3, 11, 2**60, -4]), outputs(5)
    assert cache.get(ids) is None
    for rows in (slice(0, 2), slice(2, 5)):
        cache.put(ids[rows], {name: output[rows] for name, output in given.items()})
    order = torch.tensor([4, 0, 3, 3])
    for reader in (cache, opened(tmp_path, dtype=dtype)):
        assert len(reader) == 5
        found = reader.get(ids[order])
        assert found.keys() == given.keys()
        for name, output in found.items():
            assert output.dtype == torch.float32
            assert output == pytest.approx(given[name][order], rel=ROUNDING[dtype], abs=1e-7)
        assert reader.get(torch.tensor([7, 5])) is None
    assert torch.equal(found["logits"], given["logits"][order]) == (dtype == "float32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtype_may_be_torchs_and_teachers_in_half_precision_come_out_as_they_were(
    tmp_path: Path, dtype: Any
) -> None:
    cache, given = opened(tmp_path, dtype=dtype), torch.randn(4, 3).to(dtype)
    cache.put(torch.arange(4), {"logits": given})
    assert torch.equal(cache.get(torch.arange(4))["logits"], given.float())


def test_outputs_of_any_shape(tmp_path: Path) -> None:
    given = {"one": torch.randn(4), "row": torch.randn(4, 1), "text": torch.randn(4, 6, 5)}
    cache = opened(tmp_path, dtype="float32")
    cache.put(torch.arange(4), given)
    found = cache.get(torch.tensor([2, 0]))
    assert all(torch.equal(found[name], output[[2, 0]]) for name, output in given.items())


def test_outputs_need_not_be_contiguous_or_detached(tmp_path: Path) -> None:
    cache, given = opened(tmp_path, dtype="float32"), torch.randn(3, 6, requires_grad=True).T[::2]
    cache.put(torch.arange(3), {"logits": given})
    assert torch.equal(cache.get(torch.arange(3))["logits"], given.detach())


def test_infinite_logits_stay_infinite(tmp_path: Path) -> None:
    cache, given = opened(tmp_path), torch.tensor([[1.0, -math.inf, 3.0]])
    cache.put(torch.tensor([0]), {"logits": given})
    cache.check(torch.tensor([0]), {"logits": given})
    assert torch.equal(cache.get(torch.tensor([0]))["logits"], given)


# The largest logits


def test_top_k_keeps_probabilities_and_spreads_the_rest(tmp_path: Path) -> None:
    given = 3 * torch.randn(6, 10)
    cache = opened(tmp_path, dtype="float32", top_k=3)
    cache.put(torch.arange(6), {"logits": given, "layer": given})
    found = cache.get(torch.arange(6))
    assert torch.equal(found["layer"], given)  # only logits have classes
    p, q = given.softmax(1), found["logits"].softmax(1)
    for row in range(6):
        top = set(given[row].topk(3).indices.tolist())
        rest = [c for c in range(10) if c not in top]
        for c in range(10):
            expected = p[row, c] if c in top else p[row, rest].mean()
            assert q[row, c].item() == pytest.approx(expected.item(), rel=1e-5)
        assert all(found["logits"][row, c] == given[row, c] for c in top)


@pytest.mark.parametrize(("shape", "dim"), [((3, 6, 2, 4), 1), ((3, 5, 6), -1)], ids=["pixels", "tokens"])
def test_top_k_of_pixels_and_tokens(tmp_path: Path, shape: tuple[int, ...], dim: int) -> None:
    given = torch.randn(shape)
    cache = opened(tmp_path, dtype="float32", top_k=5, class_dim=dim)
    cache.put(torch.arange(3), {"logits": given})
    found = cache.get(torch.arange(3))["logits"]
    # What is left is one class, so nothing is lost.
    assert found == pytest.approx(given, rel=1e-5, abs=1e-5)
    cache.check(torch.arange(3), {"logits": given})
    with pytest.raises(ValueError, match="sample 1"):
        cache.check(
            torch.arange(3),
            {"logits": given * torch.tensor([1, 1.5, 1]).reshape(-1, *[1] * (given.ndim - 1))},
        )


def test_top_k_takes_less_room_and_the_loss_hardly_sees_it(tmp_path: Path) -> None:
    teacher, student = 4 * torch.randn(8, 1000), torch.randn(8, 1000)
    teacher[:, :5] += 12
    whole, largest = opened(tmp_path / "whole"), opened(tmp_path / "largest", top_k=20)
    for cache in (whole, largest):
        cache.put(torch.arange(8), {"logits": teacher})
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / name).rglob("rows.bin")) for name in ("whole", "largest")
    ]
    assert sizes == [8 * 1000 * 2, 8 * (20 * 2 + 2 + 20 * 4)]
    loss = SoftTarget(temperature=1.0)
    exact = loss(student, teacher).item()
    assert loss(student, largest.get(torch.arange(8))["logits"]).item() == pytest.approx(exact, rel=1e-2)


def test_top_k_with_ties_is_still_the_same(tmp_path: Path) -> None:
    given = torch.ones(2, 6)
    cache = opened(tmp_path, top_k=3)
    cache.put(torch.arange(2), {"logits": given})
    cache.check(torch.arange(2), {"logits": given + 1e-6 * torch.randn(2, 6)})


def test_top_k_must_be_smaller_than_the_classes(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"smaller than the number of classes\. Found `top_k = 5` and 5 classes"
    ):
        opened(tmp_path, top_k=5).put(torch.arange(2), outputs(2))


# The same sample twice


@pytest.mark.parametrize("kwargs", [{}, {"dtype": "float32"}, {"top_k": 2}], ids=str)
def test_same_outputs_again_are_fine_and_others_refused(tmp_path: Path, kwargs: Any) -> None:
    cache, ids, given = opened(tmp_path, **kwargs), torch.arange(4), outputs(4)
    cache.put(ids, given)
    noise = {name: output * (1 + 1e-5 * torch.randn_like(output)) for name, output in given.items()}
    more = {name: torch.cat([output, torch.randn_like(output)]) for name, output in noise.items()}
    cache.put(torch.arange(8), more)  # half of them new
    assert len(cache) == 8
    cache.check(ids, noise)
    other = {**given, "logits": given["logits"].roll(1, 1)}
    for refused in (cache.put, cache.check):
        with pytest.raises(
            ValueError, match=r"sample \d \(`logits`\) differ by .*`WithIds\(dataset, seed=0\)`"
        ):
            refused(ids, other)
    with pytest.raises(ValueError, match="sample 2"):
        cache.put(torch.tensor([9, 2]), {name: output[:2] for name, output in outputs(2).items()})
    assert cache.get(torch.tensor([9])) is None  # its batch isn't trusted


def test_a_number_that_comes_twice_in_a_batch(tmp_path: Path) -> None:
    cache, given = opened(tmp_path), outputs(1)
    cache.put(
        torch.tensor([5, 5]), {name: output.expand(2, *output.shape[1:]) for name, output in given.items()}
    )
    assert len(cache) == 1
    with pytest.raises(ValueError, match="sample 6"):
        cache.put(torch.tensor([6, 6]), outputs(2))


def test_rounding_noise_in_dead_features_is_no_difference(tmp_path: Path) -> None:
    cache, given = opened(tmp_path, dtype="float32"), torch.randn(4, 5)
    given[2] = 0
    cache.put(torch.arange(4), {"layer": given})
    cache.check(torch.arange(4), {"layer": given + 1e-6 * torch.randn(4, 5)})


def test_check_follows_the_precision_of_the_teacher(tmp_path: Path) -> None:
    cache, given = opened(tmp_path, dtype="float32"), {"logits": torch.randn(4, 5)}
    cache.put(torch.arange(4), given)
    off = {"logits": given["logits"] * 1.02}
    with pytest.raises(ValueError, match=r"differ by 0\.0"):
        cache.check(torch.arange(4), off)
    cache.check(torch.arange(4), {"logits": off["logits"].bfloat16()})
    cache.check(torch.arange(4), off, tolerance=0.05)
    cache.check(torch.tensor([], dtype=torch.long), {"logits": torch.zeros(0, 5)})
    with pytest.raises(ValueError, match="differ by inf"):
        cache.check(torch.arange(4), {"logits": torch.full((4, 5), math.nan)})
    with pytest.raises(ValueError, match=r"Found one that isn't\. Call `put` first"):
        cache.check(torch.tensor([9]), {"logits": torch.zeros(1, 5)})
    with pytest.raises(ValueError, match=r"Found `logits` of shape \(5,\) in .* and not `layer`"):
        cache.check(torch.arange(4), {"layer": torch.zeros(4, 5)})


# Another teacher, other settings


def test_cache_of_another_teacher_is_refused(tmp_path: Path) -> None:
    opened(tmp_path, "a" * 64).put(torch.arange(2), outputs(2))
    with pytest.raises(
        ValueError, match=r"one teacher\. Found outputs of teacher aaaaaaaaaaaa in .*bbbb, whose"
    ):
        opened(tmp_path, "b" * 64)
    late = TeacherCache(tmp_path / "empty")
    late.open("a" * 64)
    opened(tmp_path / "empty", "b" * 64).put(torch.arange(2), outputs(2))
    with pytest.raises(ValueError, match="belongs to one teacher"):  # written since
        late.get(torch.arange(2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "float32"}, r"Found `dtype = 'float16'` in .*, and now `dtype = 'float32'`"),
        ({"top_k": 3}, r"Found `top_k = None` in .*, and now `top_k = 3`"),
        ({"class_dim": -1}, r"Found `class_dim = 1` in"),
    ],
    ids=["dtype", "top_k", "class_dim"],
)
def test_other_settings_are_refused(tmp_path: Path, kwargs: Any, message: str) -> None:
    opened(tmp_path).put(torch.arange(2), outputs(2))
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, **kwargs)


def test_other_outputs_are_refused(tmp_path: Path) -> None:
    cache, given = opened(tmp_path), outputs(2)
    cache.put(torch.arange(2), given)
    for other in ({"logits": given["logits"]}, {**given, "logits": given["logits"][:, :4]}):
        with pytest.raises(
            ValueError, match=r"same outputs of every sample.*`layer.2` of shape \(3, 2, 2\), `logits`"
        ):
            cache.put(torch.tensor([3, 4]), other)
    again = TeacherCache(tmp_path)
    again.open("teacher", names=["logits"])
    with pytest.raises(ValueError, match=r"all outputs that are asked for.* and not `layer.3`"):
        again.open("teacher", names=["logits", "layer.3"])
    TeacherCache(tmp_path / "new").open("teacher", names=["anything"])


@pytest.mark.parametrize(
    ("ids", "given", "message"),
    [
        (
            torch.tensor([0.0]),
            torch.zeros(1, 3),
            r"`ids` must be whole numbers of shape \(N,\)\. Found torch.float32",
        ),
        (torch.tensor([[0]]), torch.zeros(1, 3), r"Found torch.int64 of shape \(1, 1\)"),
        (
            torch.tensor([0, 1]),
            torch.zeros(3, 3),
            r"\(2, \.\.\.\)\. Found `logits`: torch.float32 of shape \(3, 3\)",
        ),
        (torch.tensor([0]), torch.zeros(1, dtype=torch.long), r"Found `logits`: torch.int64"),
        (torch.tensor([0]), torch.tensor([[1.0, math.nan]]), "must be numbers. Found NaN"),
        (
            torch.tensor([0]),
            torch.tensor([[1.0, 1e5]]),
            r"at most 65504 to be kept in float16\. Found 1e\+05",
        ),
    ],
    ids=["float ids", "shape of ids", "count", "integers", "nan", "too large"],
)
def test_bad_input(tmp_path: Path, ids: Tensor, given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(tmp_path).put(ids, {"logits": given})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "float64"}, "`dtype` must be 'float16' or 'bfloat16' or 'float32'"),
        ({"dtype": torch.int8}, "`dtype` must be .* Found `dtype = 'int8'`"),
        ({"top_k": 0}, "`top_k` must be at least 1"),
        ({"class_dim": 0}, "Found 0, where samples are"),
    ],
    ids=str,
)
def test_arguments_are_checked(tmp_path: Path, kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherCache(tmp_path, **kwargs)


def test_must_be_opened_and_copies_open_for_themselves(tmp_path: Path) -> None:
    cache = opened(tmp_path, dtype="float32", top_k=2, class_dim=-1)
    for twin in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache), eval(repr(cache))):
        assert repr(twin) == repr(cache)
        assert len(twin) == 0
        with pytest.raises(RuntimeError, match=r"Found it not open\. Call `open\(fingerprint\(teacher\)\)`"):
            twin.get(torch.arange(2))


# Fingerprints


def test_fingerprint_knows_weights_buffers_names_and_classes() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())

    seen = {fingerprint(make())}
    assert seen == {fingerprint(make().eval()), fingerprint(copy.deepcopy(make()))}
    changes: list[Any] = [
        lambda m: m[0].weight.data.view(-1)[4].add_(1e-6),
        lambda m: m[1].running_mean.add_(1e-6),
        lambda m: m.__setitem__(2, nn.GELU()),
        lambda m: m.register_buffer("extra", torch.zeros(()), persistent=False),
        lambda m: m.half(),
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.T.contiguous())),
    ]
    for change in changes:
        module = make()
        change(module)
        seen.add(fingerprint(module))
    assert len(seen) == 1 + len(changes)


def make_teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))


def test_fingerprint_of_a_compiled_teacher() -> None:
    assert fingerprint(torch.compile(make_teacher())) == fingerprint(make_teacher())


def sharded_fingerprint(rank: int, directory: Path) -> None:
    """Each of two ranks has a part of the teacher, writes its own samples, and reads those of both."""
    dist.init_process_group("gloo")
    teacher = make_teacher()
    whole = fingerprint(teacher)
    fully_shard(teacher, mesh=init_device_mesh("cpu", (2,)))
    assert isinstance(teacher[0].weight, DTensor)
    assert fingerprint(teacher) == whole
    cache = opened(directory, whole, dtype="float32")
    ids = torch.arange(rank, 10, 2)
    cache.put(ids, {"logits": ids[:, None].float()})
    dist.barrier()
    assert torch.equal(cache.get(torch.arange(10))["logits"].flatten(), torch.arange(10.0))


def test_ranks_share_a_cache_and_know_a_sharded_teacher(tmp_path: Path) -> None:
    run_ranks(sharded_fingerprint, tmp_path)


def test_fingerprint_needs_weights() -> None:
    with pytest.raises(ValueError, match="Found `weight` on the meta device"):
        fingerprint(nn.Linear(2, 2, device="meta"))
    assert fingerprint(nn.Linear(2, 2).bfloat16())


# Filling ahead


@pytest.mark.parametrize("workers", [0, 2])
def test_fill_runs_the_teacher_once_a_sample(tmp_path: Path, workers: int, capsys: Any) -> None:
    teacher = Classifier().train()
    calls: list[int] = []
    teacher.net.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    cache, data = TeacherCache(tmp_path, dtype="float32"), dataset(20)
    loader = DataLoader(WithIds(data), batch_size=8, shuffle=True, num_workers=workers)
    cache.fill(teacher, loader)
    assert "Filling the teacher cache" in capsys.readouterr().out
    assert all(part.training for part in teacher.modules())
    assert teacher.net[1].num_batches_tracked == 0
    cache.fill(teacher, loader, progress=False)
    assert not capsys.readouterr().out.strip()  # rich 13 ends a line also where it shows nothing
    assert calls == [8, 8, 4]
    teacher.eval()
    found = cache.get(torch.arange(20))["logits"]
    assert found == pytest.approx(teacher(data.tensors[0]).detach(), abs=1e-6)
    assert not found.requires_grad


def test_fill_completes_what_is_there(tmp_path: Path) -> None:
    teacher, data = Classifier(), dataset(20)
    TeacherCache(tmp_path).fill(
        teacher, DataLoader(WithIds(data), batch_size=6, drop_last=True), progress=False
    )
    cache = TeacherCache(tmp_path)
    cache.fill(teacher, DataLoader(WithIds(data), batch_size=8), progress=False)
    assert len(cache) == 20


def test_fill_with_outputs_of_ones_own(tmp_path: Path) -> None:
    def both(teacher: nn.Module, batch: Any) -> dict[str, Tensor]:
        hidden = teacher.net[0](batch[0])
        return {"logits": teacher.net[1:](hidden), "hidden": hidden}

    cache, teacher = TeacherCache(tmp_path), Classifier()
    cache.fill(teacher, DataLoader(WithIds(dataset(8)), batch_size=4), forward=both, progress=False)
    assert {name: tuple(output.shape) for name, output in cache.get(torch.arange(8)).items()} == {
        "hidden": (8, 16),
        "logits": (8, 4),
    }


def test_fill_refuses_batches_without_numbers_and_random_augmentation(tmp_path: Path) -> None:
    class Augmented(list):
        def __getitem__(self, index: int) -> Tensor:
            return super().__getitem__(index) + torch.randn(12)

    cache, teacher = TeacherCache(tmp_path), Classifier()
    with pytest.raises(TypeError, match=r"Found batches without, of type `list`.*`WithIds\(dataset\)`"):
        cache.fill(teacher, DataLoader(dataset(8)), progress=False)
    numbered = WithIds(Augmented(torch.zeros(8, 12)))
    for data in (numbered, torch.utils.data.Subset(numbered, [2, 3])):
        with pytest.raises(ValueError, match="sample 0 differs each time it is drawn"):
            cache.fill(teacher, DataLoader(data), progress=False)
    assert len(cache) == 0
    assert all(part.training for part in teacher.modules())
    cache.fill(teacher, DataLoader(WithIds(Augmented(torch.zeros(8, 12)), seed=1)), progress=False)
    assert len(cache) == 8
