"""RigL against an update done by brute force, and everything that training may do to it."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support import (
    Classifier,
    ManualClassifier,
    adamw,
    assert_same_state,
    files_of_ranks,
    loader,
    sgd,
    trainer,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_structopt._dtensors import full, part_of
from lightning_structopt.pruning import (
    Block,
    CubicRamp,
    ErdosRenyi,
    IterativePruning,
    LinearRamp,
    NByM,
    Neurons,
    Random,
    RewindWeights,
    RigL,
    Taylor,
    Unstructured,
)
from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.pruning.regrowth import exchange
from lightning_structopt.regularization import L1, SparsityPenalty

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
ERK = Unstructured("layer", ErdosRenyi())


def by_hand(weight: Any, gradient: Any, mask: Any, share: float) -> Any:
    """One update as the paper has it, one weight at a time: drop the smallest, grow the steepest."""
    weight, gradient, mask = (np.asarray(a).reshape(-1) for a in (weight, gradient, mask))
    alive, dead = [i for i in range(mask.size) if mask[i]], [i for i in range(mask.size) if not mask[i]]
    k = min(round(share * len(alive)), len(dead))
    dropped = sorted(alive, key=lambda i: (abs(weight[i]), i))[:k]
    grown = sorted(dead, key=lambda i: (-abs(gradient[i]), -i))[:k]
    new = mask.copy()
    new[dropped], new[grown] = False, True
    return new


def drawn(kind: str, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.3
    if kind == "ties":
        weight, gradient = (torch.randint(-2, 3, shape, generator=generator).float() for _ in range(2))
    else:
        weight, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    return weight * mask, gradient.to(torch.bfloat16 if kind == "bf16" else torch.float32), mask


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(7, 9), (6, 3, 2, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "bf16"])
def test_one_exchange_as_by_hand(kind: str, shape: tuple[int, ...], share: float) -> None:
    layers = {name: drawn(kind, shape, seed) for seed, name in enumerate(("one", "two"))}
    weights, gradients, masks = ({n: layer[i] for n, layer in layers.items()} for i in range(3))
    stays, comes = exchange(weights, gradients, masks, share)
    for name, (weight, gradient, mask) in layers.items():
        expected = by_hand(weight, gradient.float(), mask, share).reshape(shape)
        assert torch.equal(stays[name] | comes[name], torch.from_numpy(expected))
        assert int((stays[name] | comes[name]).sum()) == int(mask.sum())
        assert not (comes[name] & mask).any(), "what has just died was grown"


@pytest.mark.parametrize("mask", [torch.ones(3, 4).bool(), torch.zeros(3, 4).bool()], ids=["full", "empty"])
def test_a_full_or_an_empty_layer_stays_as_it_is(mask: Tensor) -> None:
    stays, comes = exchange({"w": mask.float()}, {"w": torch.randn(3, 4)}, {"w": mask}, 0.5)
    assert torch.equal(stays["w"], mask)
    assert not comes["w"].any()


def test_a_layer_with_few_dead_weights_exchanges_as_many() -> None:
    mask = torch.tensor([True, True, True, False])
    stays, comes = exchange({"w": torch.tensor([3.0, 1, 2, 0])}, {"w": torch.zeros(4)}, {"w": mask}, 1.0)
    assert stays["w"].tolist() == [True, False, True, False]
    assert comes["w"].tolist() == [False, False, False, True]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.9])
def test_the_share_falls_along_a_cosine(fraction: float) -> None:
    rule = RigL(fraction)
    found = [rule.share(t / 20) for t in range(20)]
    assert found == pytest.approx([fraction * math.cos(math.pi * t / 40) ** 2 for t in range(20)])
    assert found[0] == fraction


class Look(pl.Callback):
    """Keeps weights, gradients and masks before each step; with the mask and optimizer after `pruning` acted."""

    def __init__(self, pruning: IterativePruning) -> None:
        self.pruning = pruning
        self.seen: list[tuple[dict, dict, dict]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        weights = {name: parameters[name].detach().clone() for name in self.pruning.masks}
        gradients = {name: parameters[name].grad.clone() for name in weights}
        state = {
            name: {k: v.clone() for k, v in optimizer.state[parameters[name]].items()} for name in weights
        }
        self.seen.append((self.pruning.masks, weights, gradients, state))


def rigl(**kwargs: Any) -> IterativePruning:
    options = {
        "regrow": RigL(every=3),
        "pattern": ERK,
        "criterion": Random(seed=0),
        "verbose": False,
        **kwargs,
    }
    return IterativePruning(0.8, **options)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize(
    "ways",
    [{}, {"accumulate_grad_batches": 2, "max_epochs": 8}, {"gradient_clip_val": 0.1}],
    ids=["plain", "accumulation", "clipping"],
)
def test_training_exchanges_as_by_hand(tmp_path: Path, optimizer: Any, ways: dict) -> None:
    """16 steps: exchanges before steps 3, 6 and 9, none from 12 = 0.75 * 16 on."""
    pruning = rigl()
    before, after = Look(pruning), Look(pruning)
    trainer(tmp_path, before, pruning, after, **ways).fit(Classifier(optimizer), loader())
    assert len(before.seen) == 16
    for step, (old, new) in enumerate(zip(before.seen, after.seen, strict=True)):
        for name, mask in old[0].items():
            due = step in {3, 6, 9}
            share = 0.3 / 2 * (1 + math.cos(math.pi * step / 12))
            expected = (
                by_hand(old[1][name], old[2][name], mask, share) if due else np.asarray(mask).reshape(-1)
            )
            assert torch.equal(new[0][name], torch.from_numpy(expected).view(mask.shape)), (step, name)
            grown = new[0][name] & ~mask
            assert bool(grown.any()) == due
            assert not new[1][name][grown].any(), "grown at zero"
            for value in new[3][name].values():
                assert value.shape != mask.shape or not value[grown].any(), "state of what has grown is empty"
            if step + 1 < len(before.seen) and due:  # and it moves at once
                assert before.seen[step + 1][1][name][grown].any()


@pytest.mark.parametrize("pattern", [ERK, Unstructured(), Unstructured("layer")], ids=repr)
@pytest.mark.parametrize("criterion", [Random(seed=0), Taylor()], ids=repr)
def test_the_number_of_alive_weights_is_constant_in_each_layer(
    tmp_path: Path, pattern: Any, criterion: Any
) -> None:
    pruning = rigl(pattern=pattern, criterion=criterion)
    look = Look(pruning)
    trainer(tmp_path, pruning, look).fit(Classifier(adamw), loader())
    counts = [{name: int(mask.sum()) for name, mask in masks.items()} for masks, *_ in look.seen]
    assert all(count == counts[0] for count in counts)
    assert sum(counts[0].values()) == pytest.approx(0.2 * 256, abs=1)
    assert len({str(masks) for masks, *_ in look.seen}) == 4


@pytest.mark.parametrize("epoch", range(5))
@pytest.mark.parametrize(
    "make", [lambda: Classifier(sgd), lambda: ManualClassifier(optimizer=adamw)], ids=["sgd", "manual"]
)
def test_resume_equals_straight(tmp_path: Path, epoch: int, make: Any) -> None:
    def fit(*more: Any, ckpt: Any = None) -> tuple[Any, IterativePruning]:
        pruning = rigl()
        run = trainer(tmp_path, pruning, EMAWeightAveraging(decay=0.9), *more, max_epochs=6)
        run.fit(make(), loader(), ckpt_path=ckpt)
        return run, pruning

    straight, one = fit(ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"))
    resumed, other = fit(ckpt=tmp_path / f"epoch={epoch}.ckpt")
    assert_same_state(other.masks, one.masks)
    assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
    for left, right in zip(resumed.optimizers, straight.optimizers, strict=True):
        assert_same_state(left.state_dict(), right.state_dict())


def test_layers_of_two_optimizers_are_exchanged_when_theirs_steps(tmp_path: Path) -> None:
    """The head's optimizer steps at odd batches only, the exchanges are due at even ones."""

    class Changes(pl.Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            masks = pruning.masks
            for name in masks:
                if self.last and not torch.equal(masks[name], self.last[name]):
                    self.seen.append((trainer.fit_loop.total_batch_idx, name))
            self.last = masks

        last: Any = None

    for raw in (False, True):
        pruning, changes = rigl(regrow=RigL(every=4)), Changes()
        changes.seen = []
        trainer(tmp_path, pruning, changes).fit(ManualClassifier(raw=raw), loader())
        assert changes.seen == [
            (4, "net.0.weight"),
            (5, "net.3.weight"),
            (8, "net.0.weight"),
            (9, "net.3.weight"),
        ]


def test_a_step_with_infinite_gradients_is_passed_over(tmp_path: Path) -> None:
    class Overflow(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 3:
                pl_module.net[0].weight.grad[0, 0] = math.inf

    class Repair(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            pl_module.net[0].weight.grad.nan_to_num_(posinf=0.0)

    pruning = rigl()
    look = Look(pruning)
    trainer(tmp_path, Overflow(), pruning, Repair(), look).fit(Classifier(), loader())
    first, second = ([masks[name] for masks, *_ in look.seen] for name in ("net.0.weight", "net.3.weight"))
    assert [torch.equal(first[i], first[i + 1]) for i in (2, 3)] == [True, False]
    assert [torch.equal(second[i], second[i + 1]) for i in (2, 3)] == [False, True]


def test_fit_again_exchanges_again(tmp_path: Path) -> None:
    pruning, module = rigl(), Classifier()
    for _ in range(2):
        look = Look(pruning)
        trainer(tmp_path, pruning, look).fit(module, loader())
        assert len({str(masks) for masks, *_ in look.seen}) == 4


def test_a_criterion_is_shown_what_the_first_mask_takes_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        Taylor, "accumulate", lambda self, total, weight, gradient: seen.append(total.add_(1))
    )
    trainer(tmp_path, rigl(criterion=Taylor())).fit(Classifier(), loader())
    assert len(seen) == 2  # layers, in one step


def test_fast_dev_run_exchanges_once(tmp_path: Path) -> None:
    pruning = rigl()
    before, after = Look(pruning), Look(pruning)
    trainer(tmp_path, before, pruning, after, fast_dev_run=True).fit(Classifier(), loader())
    assert str(before.seen[0][0]) != str(after.seen[0][0])


def on_ranks(rank: int, root: Path) -> None:
    pruning = rigl()
    run = trainer(root, pruning, max_epochs=6, strategy="ddp", devices=2, use_distributed_sampler=False)
    module = Classifier()
    run.fit(module, loader())
    torch.save({"masks": pruning.masks, "module": module.state_dict()}, root / f"ddp-{rank}.pt")
    mesh = init_device_mesh("cpu", (2,))
    for kind in ("normal", "ties"):
        torch.save(sharded_exchange(kind, mesh), root / f"{kind}-{rank}.pt")


def two_layers(kind: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    module = nn.Sequential(nn.Linear(9, 7, bias=False), nn.Linear(7, 3, bias=False))
    layers = {n: drawn(kind, tuple(p.shape), seed) for seed, (n, p) in enumerate(module.named_parameters())}
    module.load_state_dict({name: layer[0] for name, layer in layers.items()})
    return module, {n: layer[1] for n, layer in layers.items()}, {n: layer[2] for n, layer in layers.items()}


def sharded_exchange(kind: str, mesh: Any) -> dict[str, Tensor]:
    """The first layer is in parts on the ranks, the second whole on each."""
    module, gradients, masks = two_layers(kind)
    fully_shard(module[0], mesh=mesh)
    parameters = dict(module.named_parameters())
    held = MaskSet(parameters)
    held.unpack({n: {"shape": m.shape, "bits": torch.from_numpy(np.packbits(m))} for n, m in masks.items()})
    own = {
        name: part_of(gradients[name], parameter)  # as `backward` leaves them
        for name, parameter in parameters.items()
    }
    stays, comes = exchange(held.weights(), own, held.masks(), 0.4, held.sharding)
    return {name: full(stays[name] | comes[name], parameters[name]) for name in parameters}


root = files_of_ranks(on_ranks)


def test_ranks_exchange_alike(root: Path, tmp_path: Path) -> None:
    """Both ranks see all the data, so their averaged gradients are those of one process."""
    zero, one = (torch.load(root / f"ddp-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same_state(zero, one)
    pruning, module = rigl(), Classifier()
    trainer(tmp_path, pruning, max_epochs=6).fit(module, loader())
    assert_same_state(zero["masks"], pruning.masks)
    assert_same_state(zero["module"], module.state_dict())


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_parts_are_exchanged_as_the_whole(root: Path, kind: str) -> None:
    module, gradients, masks = two_layers(kind)
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    stays, comes = exchange(weights, gradients, masks, 0.4)
    for rank in (0, 1):
        found = torch.load(root / f"{kind}-{rank}.pt", weights_only=True)
        assert_same_state(found, {name: stays[name] | comes[name] for name in weights})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, r"`fraction` must be in \(0, 1\)\. Found `fraction = 0.0`"),
        ({"fraction": 1.0}, r"`fraction` must be in \(0, 1\)\. Found `fraction = 1.0`"),
        ({"fraction": math.nan}, "Found `fraction = nan`"),
        ({"every": 0}, "`every` must be at least 1. Found `every = 0`"),
        ({"until": 0.0}, r"`until` must be in \(0, 1\]\. Found `until = 0.0`"),
        ({"until": 1.1}, "Found `until = 1.1`"),
    ],
)
def test_arguments_of_the_rule(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RigL(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"begin": 0.1}, r"the mask is drawn at the start and sparsity is constant. Found `begin = 0.1`"),
        ({"ramp": CubicRamp()}, r"Found `begin = 0.0` and `ramp = CubicRamp\(\)`. Leave both out"),
        ({"ramp": LinearRamp(), "begin": 0.0}, r"`ramp = LinearRamp\(\)`"),
        ({"pattern": NByM(2, 4)}, r"single weights, which `Unstructured` allows. Found `pattern = NByM"),
        ({"pattern": Block((2, 2))}, "Found `pattern = Block"),
        ({"pattern": Neurons()}, "Found `pattern = Neurons"),
        ({"rewind": RewindWeights()}, r"no rounds to rewind. Found `rewind = RewindWeights\(to=0.0\)`"),
        ({"regrow": 0.3}, "`regrow` must be a `Regrow`. Found `regrow = 0.3`"),
        ({"regrow": RigL}, r"Did you mean `RigL\(\)`"),
    ],
)
def test_what_contradicts_regrowth_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        IterativePruning(0.8, **{"regrow": RigL(), **arguments})


def test_a_training_without_an_exchange_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"at least once. Found `RigL\(.*every=12.*` in a training of 16 steps"
    ):
        trainer(tmp_path, rigl(regrow=RigL(every=12))).fit(Classifier(), loader())


def test_zeros_that_are_handed_over_are_refused(tmp_path: Path) -> None:
    penalty = SparsityPenalty(L1(1e-3), freeze_zeros=True)
    with pytest.raises(ValueError, match="Found a `SparsityPenalty` with `freeze_zeros = True`"):
        trainer(tmp_path, rigl(), penalty).fit(Classifier(), loader())
