"""Two processes, by DDP and by FSDP2: as by hand, the same on both, and checkpoints for one process."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from students import ByHand, a_teacher, distilling
from support import Classifier, adamw, assert_same_state, dataset, loader, run_ranks, trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_structopt.distillation import (
    DistillationModule,
    EMATeacher,
    MutualDistillation,
    TeacherCache,
    WithIds,
)
from lightning_structopt.distillation.export import whole_on_cpu
from lightning_structopt.distillation.losses.features import Hint
from lightning_structopt.distillation.losses.logits import SoftTarget

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Headless(Classifier):
    """Its head doesn't count in the task, only in the pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class RandomHint(Hint):
    """With an adapter that each rank would start otherwise."""

    def adapt(self, student: Tensor, teacher: Tensor) -> None:
        self.seed = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        super().adapt(student, teacher)


def hinting() -> dict[Any, Any]:
    return {"logits": SoftTarget(), ("net.0", "net.0"): (0.5, RandomHint())}


def ddp(rank: int, root: Path) -> None:
    def fit(name: str, module: Any, ckpt: Any = None, data: Any = None, **kwargs: Any) -> Any:
        saved = ModelCheckpoint(root / name, save_top_k=-1, filename="{epoch}")
        run = trainer(root, saved, strategy="ddp", devices=2, **kwargs)
        run.fit(module, loader() if data is None else data, loader(), ckpt_path=ckpt)
        state = {"student": module.state_dict(), "logged": dict(run.callback_metrics)}
        if isinstance(module, DistillationModule):
            state["more"] = module._kd.state_dict()
        torch.save(state, root / f"{name}-{rank}.pt")
        return run

    fit("by hand", ByHand(a_teacher(), SoftTarget(), optimizer=adamw))
    fit("soft targets", distilling(), logger=False)
    fit("hints", distilling(hinting()))
    fit("hints, resumed", distilling(hinting()), root / "hints" / "epoch=1.ckpt")
    fit("features alone", distilling({("net.0", "net.0"): RandomHint()}, Headless(adamw), alpha=1.0))
    fit("accumulated", distilling(hinting()), accumulate_grad_batches=2)
    fit("average", DistillationModule(EMATeacher(0.9), Classifier(adamw)))
    fit("mutual", MutualDistillation([Classifier(adamw), Classifier(adamw, hidden=8)]))
    pl.seed_everything(0, verbose=False)
    fit("live", distilling(), data=DataLoader(dataset(), 8, shuffle=True))
    pl.seed_everything(0, verbose=False)
    cached = distilling(cache=TeacherCache(root / "cache", "float32"))
    asked: list[int] = []
    cached.teacher.register_forward_hook(lambda module, args, output: asked.append(len(output)))
    fit("cached", cached, data=DataLoader(WithIds(dataset()), 8, shuffle=True))
    (root / f"asked-{rank}.txt").write_text(str(len(asked)))


def load(root: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(root / f"{name}-{rank}.pt", weights_only=True)


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "running" not in name}


@pytest.mark.parametrize("name", ["soft targets", "hints", "features alone", "accumulated", "average"])
def test_ranks_agree(ddp_root: Path, name: str) -> None:
    zero, one = load(ddp_root, name, 0), load(ddp_root, name, 1)
    assert_same_state(weights(zero["student"]), weights(one["student"]))
    assert_same_state(zero["more"].get("comparison"), one["more"].get("comparison"))
    assert_same_state(
        {k: v for k, v in zero["logged"].items() if k.startswith("kd/")},
        {k: v for k, v in one["logged"].items() if k.startswith("kd/")},
    )


def test_weights_are_those_of_distillation_by_hand(ddp_root: Path) -> None:
    assert_same_state(load(ddp_root, "soft targets")["student"], load(ddp_root, "by hand")["student"])


def test_members_agree(ddp_root: Path) -> None:
    zero, one = load(ddp_root, "mutual", 0)["student"], load(ddp_root, "mutual", 1)["student"]
    assert_same_state(weights(zero), weights(one))


def test_ranks_share_a_cache(ddp_root: Path) -> None:
    """Each epoch shuffles samples between ranks, so each reads what the other has written."""
    for rank in (0, 1):
        cached, live = load(ddp_root, "cached", rank), load(ddp_root, "live", rank)
        torch.testing.assert_close(cached["student"], live["student"], rtol=1e-4, atol=1e-5)
        assert (ddp_root / f"asked-{rank}.txt").read_text() == str(
            2 + 3
        )  # the first epoch, and a look in each other


def test_adapters_resume(ddp_root: Path) -> None:
    for rank in (0, 1):
        resumed, straight = load(ddp_root, "hints, resumed", rank), load(ddp_root, "hints", rank)
        assert_same_state(weights(resumed["student"]), weights(straight["student"]))
        assert_same_state(resumed["more"], straight["more"])


def test_adapters_learn(ddp_root: Path) -> None:
    state = load(ddp_root, "features alone")["more"]["comparison"]["losses"]
    fresh = Hint()
    fresh.adapt(torch.zeros(1, 16), torch.zeros(1, 24))
    assert not torch.equal(state["0.adapter.weight"], fresh.adapter.weight)


class Sharded(Classifier):
    def __init__(self) -> None:
        super().__init__(adamw, hidden=17)

    def configure_model(self) -> None:
        if not isinstance(self.net[0].weight, DTensor):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class ShardedByHand(ByHand):
    configure_model = Sharded.configure_model


class Unsharded(Classifier):
    pass


def fsdp2(rank: int, root: Path) -> None:
    def fit(name: str, module: Any, ckpt: Any = None, distributed: bool = False, **kwargs: Any) -> Any:
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed
        )
        saved = ModelCheckpoint(root / name, save_top_k=-1, filename="{epoch}")
        run = trainer(root, saved, strategy=strategy, devices=2, **kwargs)
        run.fit(module, loader(), ckpt_path=ckpt)
        torch.save(whole_on_cpu(module.state_dict()), root / f"{name}-{rank}.pt")
        return module

    def refused(name: str, module: Any) -> None:
        try:
            fit(name, module)
        except (TypeError, ValueError) as error:
            (root / f"{name}-{rank}.txt").write_text(str(error))

    fit("by hand", ShardedByHand(a_teacher(), SoftTarget(), optimizer=adamw, hidden=17))
    module = fit("live", distilling(student=Sharded()))
    module.export_student(root / "student.ckpt")
    fit("resumed", distilling(student=Sharded()), root / "live" / "epoch=1.ckpt")
    fit("split", distilling(student=Sharded()), distributed=True)
    fit("split, resumed", distilling(student=Sharded()), root / "split" / "epoch=1.ckpt", distributed=True)
    teacher = a_teacher()
    sharing = fit("sharded teacher", DistillationModule(teacher, Sharded(), shard_teacher=True))
    shares = all(isinstance(weight, DTensor) for weight in teacher.parameters())
    (root / f"shares-{rank}.txt").write_text(f"{shares} {isinstance(sharing.teacher, FSDPModule)}")
    fit("sharded teacher, again", sharing)
    refused("adapters", distilling({("net.0", "net.0"): Hint()}, Sharded()))
    refused("average", DistillationModule(EMATeacher(), Sharded()))
    refused("no configure_model", distilling(student=Unsharded()))


def both(rank: int, root: Path) -> None:
    ddp(rank, root / "ddp")
    fsdp2(rank, root / "fsdp2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    for name in ("ddp", "fsdp2"):
        (root / name).mkdir()
    run_ranks(both, root)  # one start for all fits
    return root


@pytest.fixture
def ddp_root(root: Path) -> Path:
    return root / "ddp"


@pytest.fixture
def fsdp2_root(root: Path) -> Path:
    return root / "fsdp2"


@pytest.mark.parametrize("name", ["live", "resumed", "split", "split, resumed", "sharded teacher"])
def test_shards_are_trained_as_by_hand(fsdp2_root: Path, name: str) -> None:
    for rank in (0, 1):
        found, expected = load(fsdp2_root, name, rank), load(fsdp2_root, "by hand", rank)
        if name == "sharded teacher":  # its sums may be in another order
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        else:
            assert_same_state(weights(found), weights(expected))


def test_a_big_teacher_is_divided_among_ranks(fsdp2_root: Path) -> None:
    assert [(fsdp2_root / f"shares-{rank}.txt").read_text() for rank in (0, 1)] == ["True True"] * 2


def test_a_student_trained_in_shards_is_exported_whole(fsdp2_root: Path) -> None:
    state = torch.load(fsdp2_root / "student.ckpt", weights_only=True)["state_dict"]
    assert_same_state(dict(state), load(fsdp2_root, "live"))
    Classifier(hidden=17).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapters", "one optimizer can't train them with shards. Found `ModelParallelStrategy`"),
        ("average", "`EMATeacher` holds a copy of the student. Found a student in shards"),
        ("no configure_model", "required to override the `configure_model()`"),
    ],
)
def test_what_shards_can_not_do_is_refused_on_every_rank(fsdp2_root: Path, name: str, message: str) -> None:
    for rank in (0, 1):
        assert message in (fsdp2_root / f"{name}-{rank}.txt").read_text()


def test_a_teacher_in_shards_needs_the_strategy(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="`shard_teacher=True` divides the teacher as `ModelParallelStrategy`"
    ):
        trainer(tmp_path).fit(distilling(shard_teacher=True), loader())
