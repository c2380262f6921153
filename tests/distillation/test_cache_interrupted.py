"""The teacher cache when things go wrong: kills, cut-off files, a full disk, and others who write at once."""

import os
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_structopt.distillation.cache import memory_maps
from lightning_structopt.distillation.cache.teacher_cache import TeacherCache

WIDTH = 64
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def outputs(ids: Tensor, width: int = WIDTH) -> dict[str, Tensor]:
    return {"logits": ids[:, None] + torch.arange(width) / width}


def opened(directory: Path) -> TeacherCache:
    cache = TeacherCache(directory, dtype="float32")
    cache.open("teacher")
    return cache


def forked(work: Callable[[], None]) -> int:
    """Call ``work`` in a process of its own, which starts at once and ends with status 0 if all went well."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forking with threads, none of which is needed here
        process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def assert_ends_well(process: int) -> None:
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def assert_true_and_completed(directory: Path, ids: Tensor, width: int = WIDTH) -> int:
    """Assert that what is there is right, and that what isn't can be added; return how many were there."""
    cache = opened(directory)
    there = [i for i in ids.tolist() if cache.get(torch.tensor([i])) is not None]
    known = torch.tensor(there, dtype=torch.long)
    if there:
        assert torch.equal(cache.get(known)["logits"], outputs(known, width)["logits"])
    assert len(cache) == len(there)
    if len(there) < len(ids):
        assert cache.get(ids) is None
    cache.put(ids, outputs(ids, width))
    for reader in (cache, opened(directory)):
        assert torch.equal(reader.get(ids)["logits"], outputs(ids, width)["logits"])
    return len(there)


# Cut off

ROW, RECORD = WIDTH * 4, 16
CUTS: dict[str, Callable[[Path], int]] = {
    "rows, between two": lambda shard: cut(shard / "rows.bin", 3 * ROW, 3),
    "rows, within one": lambda shard: cut(shard / "rows.bin", 3 * ROW - 1, 2),
    "rows, all": lambda shard: cut(shard / "rows.bin", 0, 0),
    "records, between two": lambda shard: cut(shard / "records.bin", 5 * RECORD, 5),
    "records, within one": lambda shard: cut(shard / "records.bin", 5 * RECORD + 9, 5),
    "records, all": lambda shard: cut(shard / "records.bin", 0, 0),
    "records, gone": lambda shard: (shard / "records.bin").unlink() or 0,
    "index, within": lambda shard: cut(shard / "index.json", 20, 0),
    "index, gone": lambda shard: (shard / "index.json").unlink() or 0,
    "row, changed": lambda shard: change(shard / "rows.bin", 2 * ROW + 17, 7),
    "row, never written": lambda shard: hole(shard / "rows.bin", 2 * ROW, ROW, 7),
    "number, changed": lambda shard: change(shard / "records.bin", 4 * RECORD, 7),
    "checksum, changed": lambda shard: change(shard / "records.bin", 4 * RECORD + 8, 7),
    "record, never written": lambda shard: hole(shard / "records.bin", 4 * RECORD, RECORD, 7),
}


def cut(path: Path, size: int, left: int) -> int:
    os.truncate(path, size)
    return left


def change(path: Path, where: int, left: int) -> int:
    data = bytearray(path.read_bytes())
    data[where] ^= 0x10
    path.write_bytes(data)
    return left


def hole(path: Path, where: int, size: int, left: int) -> int:
    data = bytearray(path.read_bytes())
    data[where : where + size] = bytes(size)
    path.write_bytes(data)
    return left


@pytest.mark.parametrize("damage", CUTS.values(), ids=CUTS)
def test_what_is_damaged_is_missing_and_the_rest_is_there(
    tmp_path: Path, damage: Callable[[Path], int]
) -> None:
    ids = torch.arange(8) + 1
    opened(tmp_path).put(ids, outputs(ids))
    (shard,) = tmp_path.iterdir()
    left = damage(shard)
    assert assert_true_and_completed(tmp_path, ids) == left


# Killed


@needs_fork
@pytest.mark.parametrize("pause_ms", [0, 0.3, 0.7, 1.5, 2.2, 3.1, 4.8, 7, 11])
def test_a_writer_that_is_killed(tmp_path: Path, pause_ms: float) -> None:
    """Large rows, so that the kill mostly falls into the middle of writing one."""
    ids, width = torch.arange(60), 100_000
    started, starts = os.pipe()

    def write() -> None:
        cache = opened(tmp_path)
        for part in ids.split(2):
            cache.put(part, outputs(part, width))
            os.write(starts, b".")
        time.sleep(60)

    writer = forked(write)
    assert os.read(started, 1) == b"."
    time.sleep(pause_ms / 1000)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    os.close(started)
    os.close(starts)
    assert assert_true_and_completed(tmp_path, ids, width) >= 2


# Full


def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    cache, ids = opened(tmp_path), torch.arange(6)
    cache.put(ids[:2], outputs(ids[:2]))
    (shard,) = tmp_path.iterdir()
    (shard / "rows.bin").rename(shard / "kept")
    (shard / "rows.bin").symlink_to(full)
    with pytest.raises(
        OSError, match=r"room on the disk\. Found none left .* 2 samples and stays usable\. Free"
    ):
        cache.put(ids, outputs(ids))
    (shard / "rows.bin").unlink()
    (shard / "kept").rename(shard / "rows.bin")
    assert torch.equal(cache.get(ids[:2])["logits"], outputs(ids[:2])["logits"])
    assert cache.get(ids) is None
    cache.put(ids, outputs(ids))
    assert torch.equal(cache.get(ids)["logits"], outputs(ids)["logits"])


@needs_fork
def test_a_limit_on_files_within_a_row(tmp_path: Path) -> None:
    """The last row is written in part, and the next row must not follow it there."""
    resource = pytest.importorskip("resource")
    ids = torch.arange(8)

    def write() -> None:
        cache = opened(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * ROW + 100, resource.RLIM_INFINITY))
        cache.put(ids[:3], outputs(ids[:3]))
        with pytest.raises(OSError, match="Found none left"):
            cache.put(ids, outputs(ids))
        assert cache.get(ids[:3]) is not None
        assert cache.get(ids) is None
        cache.put(ids[3:6], outputs(ids[3:6]))  # to another file
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        cache.put(ids[:7], outputs(ids[:7]))
        assert torch.equal(cache.get(ids[:7])["logits"], outputs(ids[:7])["logits"])

    assert_ends_well(forked(write))
    assert assert_true_and_completed(tmp_path, ids) == 7


def test_other_errors_are_not_explained_away(tmp_path: Path) -> None:
    cache, ids = opened(tmp_path), torch.arange(2)
    cache.put(ids, outputs(ids))
    (shard,) = tmp_path.iterdir()
    (shard / "rows.bin").unlink()
    (shard / "rows.bin").mkdir()
    with pytest.raises(IsADirectoryError):
        cache.put(ids + 2, outputs(ids + 2))
    assert cache._store is not None
    assert cache._store._writer is None


# Together


@needs_fork
def test_processes_write_at_once_and_read_what_all_wrote(tmp_path: Path) -> None:
    everything = torch.cat([torch.arange(60), torch.tensor([100, 101])])

    def write(rank: int) -> None:
        cache, shared = opened(tmp_path), everything[-2:]
        for part in torch.arange(rank, 60, 3).split(4):
            cache.put(part, outputs(part))
            cache.put(shared, outputs(shared))  # all write these
        deadline = time.monotonic() + 30
        while (found := cache.get(everything)) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert torch.equal(found["logits"], outputs(everything)["logits"])

    for process in [forked(lambda rank=rank: write(rank)) for rank in range(3)]:
        assert_ends_well(process)
    assert len(list(tmp_path.iterdir())) == 3
    assert assert_true_and_completed(tmp_path, everything) == 62


def test_readers_see_what_came_since(tmp_path: Path) -> None:
    writer, reader = opened(tmp_path), opened(tmp_path)
    for step in range(5):
        ids = torch.arange(3 * step, 3 * step + 3)
        writer.put(ids, outputs(ids))
        every = torch.arange(3 * step + 3)
        assert torch.equal(reader.get(every)["logits"], outputs(every)["logits"])


def test_opening_again_reads_and_writes_on_where_it_was(tmp_path: Path) -> None:
    cache, other, ids = opened(tmp_path), opened(tmp_path), torch.arange(6)
    cache.put(ids[:2], outputs(ids[:2]))
    store = cache._store
    other.put(ids[2:4], outputs(ids[2:4]))
    cache.open("teacher")
    assert cache._store is store
    assert len(cache) == 4
    cache.put(ids[4:], outputs(ids[4:]))
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="belongs to one teacher"):
        cache.open("another")


def test_a_directory_that_was_removed_is_started_anew(tmp_path: Path) -> None:
    cache, ids = opened(tmp_path / "cache"), torch.arange(4)
    cache.put(ids, outputs(ids))
    shutil.rmtree(tmp_path / "cache")
    cache.open("teacher")
    assert cache.get(ids) is None
    assert assert_true_and_completed(tmp_path / "cache", ids) == 0
    shutil.rmtree(tmp_path / "cache")
    cache.open("another")
    cache.put(ids, outputs(ids + 1))


def test_large_caches_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_maps, "_LARGEST", 4 * ROW)
    cache = opened(tmp_path)
    for part in torch.arange(20).split(3):
        cache.put(part, outputs(part))
    assert len(list(tmp_path.iterdir())) == 4
    order = torch.randperm(20)
    assert torch.equal(cache.get(order)["logits"], outputs(order)["logits"])


@needs_fork
def test_a_forked_process_writes_to_a_file_of_its_own(tmp_path: Path) -> None:
    cache, ids = opened(tmp_path), torch.arange(6)
    cache.put(ids[:2], outputs(ids[:2]))
    assert_ends_well(forked(lambda: cache.put(ids[2:4], outputs(ids[2:4]))))
    cache.put(ids[4:], outputs(ids[4:]))
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(cache.get(ids)["logits"], outputs(ids)["logits"])


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "shard-started").mkdir()
    ids = torch.arange(4)
    assert assert_true_and_completed(tmp_path, ids) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
