"""Damaged and hostile files: they run no code, lose no good copy, and give one clear error."""

import copy
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import FEATURES, Classifier, adamw, loader, trainer
from torch import nn

import lightning_structopt as so
from lightning_structopt.distillation.cache.fingerprint import fingerprint
from lightning_structopt.sweep.storage import cut_half_entry

SHRINKING = so.ChannelPruning(so.ChannelRatio(0.5), end=0.5, remove="now", verbose=False)
GROWING = so.NetworkGrowth([1], widen=so.Widen(1.5), deepen=so.Deepen("net.2"), verbose=False)
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


class Bomb:
    """Goes off when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a module that shrank and of one that grew."""
    root, found = tmp_path_factory.mktemp("trained"), {}
    for name, callback in (("load_shrunk", SHRINKING), ("load_grown", GROWING)):
        saved = ModelCheckpoint(root / name, save_last=True)
        trainer(root, callback, saved, max_epochs=3).fit(Classifier(adamw), loader())
        found[name] = Path(saved.last_model_path)
    found["member"] = found["load_grown"]
    return found


LOADERS: dict[str, Callable[[Path], Any]] = {
    "load_shrunk": lambda path: so.load_shrunk(Classifier, path),
    "load_grown": lambda path: so.load_grown(Classifier, path),
    "member": lambda path: so.ParallelEnsemble([(Classifier, path)]),
}
OWNERS = {"load_shrunk": "ChannelPruning", "load_grown": "NetworkGrowth"}
PLANS = {"load_shrunk": so.ShrinkPlan, "load_grown": so.GrowthPlan}
every_loader = pytest.mark.parametrize("name", LOADERS)


def damaged(content: bytes, count: int) -> Iterator[bytes]:
    """Yield ``content`` cut off, with one bit turned over, and with several, ``count`` times each."""
    chance = random.Random(0)
    for _ in range(count):
        yield content[: chance.randrange(len(content))]
        for bits in (1, 20):
            changed = bytearray(content)
            for _ in range(bits):
                changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            yield bytes(changed)


def assert_loads_or_says_why(load: Callable[[], Any]) -> bool:
    try:
        load()
    except (ValueError, TypeError) as error:
        if "Found" not in str(error):
            raise
        return False
    return True


def mutated(tree: Any, chance: random.Random) -> Any:
    """Return a copy of plain data in which something is another thing, or missing."""
    tree = copy.deepcopy(tree)
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in list(part) if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], (dict, list)):
                walk(part[key])

    walk(tree)
    part, key = chance.choice(places)
    if chance.random() < 0.2:
        del part[key]
    else:
        part[key] = chance.choice([
            None,
            -1,
            10**9,
            "x",
            [],
            {},
            [1, "a"],
            {"a": 1},
            0.5,
            True,
            [99],
            "__class__",
            0,
        ])
    return tree


@every_loader
def test_damaged_checkpoints(name: str, trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "damaged.ckpt"
    for content in damaged(trained[name].read_bytes(), 8):
        path.write_bytes(content)
        assert_loads_or_says_why(lambda: LOADERS[name](path))
        assert path.read_bytes() == content


@every_loader
def test_a_bomb_in_the_place_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    path, crater = tmp_path / "bomb.ckpt", tmp_path / "crater"
    for content in (pickle.dumps(Bomb(crater)), None):
        if content is None:
            torch.save({"state_dict": Bomb(crater), "callbacks": {}}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="A (member's )?checkpoint must be .*Found"):
            LOADERS[name](path)
        assert not crater.exists()


@every_loader
@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"state_dict": 3},
        {"state_dict": {}, "callbacks": 3},
        {"state_dict": {}, "callbacks": dict.fromkeys(OWNERS.values(), 3)},
        {"state_dict": {}, "callbacks": dict.fromkeys(OWNERS.values(), {"plan": [3]})},
    ],
    ids=str,
)
def test_other_things_in_the_place_of_a_checkpoint(name: str, content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    assert not assert_loads_or_says_why(lambda: LOADERS[name](tmp_path / "other.ckpt"))


@pytest.mark.parametrize("name", OWNERS)
def test_changed_plans_in_checkpoints(name: str, trained: Any, tmp_path: Path) -> None:
    chance, path = random.Random(1), tmp_path / "changed.ckpt"
    content = torch.load(trained[name], weights_only=True)
    plan = content["callbacks"][OWNERS[name]]["plan"]
    for _ in range(40):
        torch.save({**content, "callbacks": {OWNERS[name]: {"plan": mutated(plan, chance)}}}, path)
        assert_loads_or_says_why(lambda: LOADERS[name](path))


@pytest.mark.parametrize("name", PLANS)
def test_damaged_and_changed_plans(name: str, trained: Any, tmp_path: Path) -> None:
    kind, path, chance = PLANS[name], tmp_path / "plan.json", random.Random(2)
    plan = kind.from_data(torch.load(trained[name], weights_only=True)["callbacks"][OWNERS[name]]["plan"])
    plan.save(path)
    good = path.read_bytes()
    expected = plan.apply(Classifier())(torch.ones(2, FEATURES)).shape
    for content in damaged(good, 30):
        path.write_bytes(content)
        assert content == good or not assert_loads_or_says_why(lambda: kind.load(path))
    for _ in range(60):  # and by someone who took the checksum out
        changed = mutated({**json.loads(good), "checksum": 0}, chance)
        changed.pop("checksum", None)
        path.write_text(json.dumps(changed))
        assert_loads_or_says_why(lambda: kind.load(path).apply(Classifier()))
    path.write_bytes(good)
    assert kind.load(path).apply(Classifier())(torch.ones(2, FEATURES)).shape == expected


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_not_lost_when_another_cannot_be_saved(name: str, tmp_path: Path) -> None:
    kind = PLANS[name]
    good, path = kind.load(_small_plan(kind, tmp_path / "good.json")), tmp_path / "plan.json"
    good.save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        _with_class(good, object()).save(path)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"good.json", "plan.json"}


def _small_plan(kind: Any, path: Path) -> Path:
    rest = ({}, {}) if kind is so.ShrinkPlan else ((),)
    kind("torch.nn.modules.linear.Linear", *rest).save(path)
    return path


def _with_class(plan: Any, name: Any) -> Any:
    return type(plan)(name, *([{}, {}] if isinstance(plan, so.ShrinkPlan) else [()]))


def test_damaged_caches(tmp_path: Path) -> None:
    teacher, ids = nn.Linear(3, 2), torch.arange(20)
    outputs = {"logits": torch.randn(20, 2)}
    directory = tmp_path / "cache"

    def opened() -> so.TeacherCache:
        cache = so.TeacherCache(directory, dtype="float32")
        cache.open(fingerprint(teacher))
        return cache

    opened_first = opened()
    opened_first.put(ids, outputs)
    files = [path for path in directory.rglob("*") if path.is_file()]
    for path in files:
        good = path.read_bytes()
        for content in [*damaged(good, 5), pickle.dumps(Bomb(tmp_path / "crater"))]:
            path.write_bytes(content)

            def read() -> None:
                found = opened()
                for i in ids.tolist():  # each is right, or said to be missing
                    row = found.get(torch.tensor([i]))
                    assert row is None or torch.equal(row["logits"][0], outputs["logits"][i])

            assert_loads_or_says_why(read)
            assert path.read_bytes() == content
        path.write_bytes(good)
    assert torch.equal(opened().get(ids)["logits"], outputs["logits"])
    assert not (tmp_path / "crater").exists()


def test_damaged_journals(tmp_path: Path) -> None:
    def sweep() -> so.ArchitectureSweep:
        return so.ArchitectureSweep(
            {f"width {width}": (lambda width=width: Classifier(adamw, width)) for width in (2, 4)},
            "val_acc",
            budget=so.FixedRounds(rounds=2, epochs=1, keep=1),
            trainer={"accelerator": "cpu"},
            executor=so.InProcess(),
            directory=tmp_path / "sweep",
            progress=False,
        )

    def scores() -> list[float]:
        return [candidate.score for candidate in sweep().run(loader(), loader()).candidates]

    expected, journal = scores(), tmp_path / "sweep" / "journal.log"
    good = journal.read_bytes()
    lines = good.splitlines(keepends=True)
    for content in [good[:-7], b"".join(lines[: len(lines) // 2]), good[: len(good) // 3] + b"\n"]:
        journal.write_bytes(content)  # cut off: what is lost is done again
        assert not assert_loads_or_says_why(scores) or scores() == expected
    for content in [b"", *damaged(good, 4), pickle.dumps(Bomb(tmp_path / "crater"))]:
        journal.write_bytes(content)
        assert_loads_or_says_why(scores)
    assert not (tmp_path / "crater").exists()


def test_a_half_written_entry_is_cut_off_before_the_next(tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    for content, kept in [(b'{"a": 1}\n{"b"', b'{"a": 1}\n'), (b'{"a": 1}\n', b'{"a": 1}\n'), (b'{"a"', b"")]:
        journal.write_bytes(content)
        cut_half_entry(journal)
        assert journal.read_bytes() == kept
    cut_half_entry(tmp_path / "none.log")
