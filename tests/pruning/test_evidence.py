"""What is collected in training: the right sums, on every rank, through a resume, and at no cost if not needed."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import assert_same_state, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_structopt._dtensors import full
from lightning_structopt.pruning import Magnitude, prune
from lightning_structopt.pruning.calibration import Calibration
from lightning_structopt.pruning.criteria import Criterion, Evidence
from lightning_structopt.pruning.curvature import HessianDiagonal
from lightning_structopt.pruning.evidence import EvidenceCollector
from lightning_structopt.pruning.filter_criteria import BatchNormScale, GeometricMedian
from lightning_structopt.pruning.gradient_criteria import GradientSquared, Movement, Taylor
from lightning_structopt.pruning.jacobian import JacobianImportance
from lightning_structopt.pruning.sharding import WHOLE, Sharding
from lightning_structopt.pruning.wanda import Wanda
from lightning_structopt.pruning.weight_criteria import LAMP, Random

NAMES = ("0.weight", "3.weight")


def net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def batch(step: int, samples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(samples, 4, generator=generator), torch.randint(3, (samples,), generator=generator)


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: module.get_parameter(name) for name in NAMES}


class Run:
    """A training loop with a collector in the place that a callback gives it."""

    def __init__(self, criterion: Criterion, module: nn.Module | None = None) -> None:
        self.module = net() if module is None else module
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)
        self.collector = EvidenceCollector(criterion, weights_of(self.module))
        self.collector.attach(self.module)
        self.history: list[dict[str, tuple[Tensor, Tensor]]] = []

    def step(self, *numbers: int) -> None:
        for number in numbers:
            inputs, labels = batch(number)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.module(inputs), labels).backward()
            self.history.append({
                name: (p.detach().clone(), p.grad.clone()) for name, p in weights_of(self.module).items()
            })
            self.collector.observe_gradients(p for g in self.optimizer.param_groups for p in g["params"])
            self.optimizer.step()

    def scores(self) -> dict[str, Tensor]:
        weights = {name: p.detach() for name, p in weights_of(self.module).items()}
        evidence = self.collector.evidence(self.module, WHOLE)
        return {n: s.clone() for n, s in self.collector.criterion.score(weights, evidence).values.items()}


FORMULAS: dict[str, tuple[Criterion, Callable[[Tensor, list[tuple[Tensor, Tensor]]], Tensor]]] = {
    "Taylor": (Taylor(), lambda now, steps: sum((w * g).abs() for w, g in steps) / len(steps)),
    "Taylor, squared": (Taylor(p=2), lambda now, steps: sum((w * g) ** 2 for w, g in steps) / len(steps)),
    "GradientSquared": (
        GradientSquared(),
        lambda now, steps: now**2 * sum(g**2 for _, g in steps) / len(steps),
    ),
    "Movement": (Movement(), lambda now, steps: -sum(w * g for w, g in steps)),
}
every_formula = pytest.mark.parametrize(("criterion", "formula"), FORMULAS.values(), ids=FORMULAS)
COLLECTING = {**{name: criterion for name, (criterion, _) in FORMULAS.items()}, "Wanda": Wanda()}
every_collecting = pytest.mark.parametrize("criterion", COLLECTING.values(), ids=COLLECTING)


@every_formula
def test_scores_are_the_formula_over_training_steps(criterion: Criterion, formula: Any) -> None:
    run = Run(criterion)
    run.step(*range(5))
    for name, score in run.scores().items():
        now = run.module.get_parameter(name).detach()
        torch.testing.assert_close(score, formula(now, [step[name] for step in run.history]))


@every_formula
def test_after_a_step_of_the_ramp_they_start_anew_but_movement_runs_on(
    criterion: Criterion, formula: Any
) -> None:
    run = Run(criterion)
    run.step(0, 1, 2)
    run.scores()
    run.collector.forget()
    run.step(3, 4)
    since = 0 if isinstance(criterion, Movement) else 3
    for name, score in run.scores().items():
        now = run.module.get_parameter(name).detach()
        torch.testing.assert_close(score, formula(now, [step[name] for step in run.history[since:]]))


@every_collecting
def test_what_was_used_serves_until_there_is_news(criterion: Criterion) -> None:
    run = Run(criterion)
    run.step(0, 1)
    first = run.scores()
    run.collector.forget()
    run.collector.forget()
    assert_same_state(run.scores(), first)


def test_optimizers_that_step_at_different_times_have_counts_of_their_own() -> None:
    run = Run(Taylor())
    body, head = (torch.optim.SGD(run.module[i].parameters(), lr=0.1) for i in (0, 3))
    seen: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for number in range(4):
        inputs, labels = batch(number)
        run.module.zero_grad()
        nn.functional.cross_entropy(run.module(inputs), labels).backward()
        for name, optimizer in ((NAMES[0], body), (NAMES[1], head)):
            if name == NAMES[0] or number == 2:
                parameter = run.module.get_parameter(name)
                seen[name].append((parameter * parameter.grad).abs().detach())
                run.collector.observe_gradients(optimizer.param_groups[0]["params"])
        if number == 0:
            with pytest.raises(ValueError, match="Found none of `3.weight`"):
                run.scores()
    for name, score in run.scores().items():
        torch.testing.assert_close(score, sum(seen[name]) / len(seen[name]))


def test_a_trained_weight_without_a_gradient_scores_zero_and_a_frozen_one_is_an_error() -> None:
    run = Run(Taylor())
    for name in NAMES:
        run.module.get_parameter(name).grad = torch.ones_like(run.module.get_parameter(name))
    run.collector.observe_gradients(run.module.parameters())
    run.module[0].weight.grad = None
    run.collector.observe_gradients(run.module.parameters())
    half = run.module[0].weight.detach().abs() / 2  # one step of two
    torch.testing.assert_close(run.scores()["0.weight"], half)

    frozen = Run(Taylor())
    frozen.module[0].requires_grad_(False)
    frozen.collector.observe_gradients(frozen.module.parameters())
    with pytest.raises(ValueError, match="Found none of `0.weight`.*not trained belongs in `exclude`"):
        frozen.scores()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_step_that_a_gradient_scaler_skips_does_not_count(bad: float) -> None:
    run, clean = Run(Taylor()), Run(Taylor())
    run.step(0)
    clean.step(0)
    run.module[3].weight.grad[1, 1] = bad
    run.collector.observe_gradients(run.module.parameters())
    assert_same_state(run.scores(), clean.scores())


def test_sparse_gradients() -> None:
    module = nn.Embedding(5, 3, sparse=True)
    collector = EvidenceCollector(Taylor(), {"weight": module.weight})
    module(torch.tensor([1, 1, 4])).sum().backward()
    collector.observe_gradients(module.parameters())
    total = collector.evidence(module, WHOLE).totals["weight"]
    torch.testing.assert_close(total, module.weight.detach().abs() * torch.tensor([0, 2, 0, 0, 1.0])[:, None])


def test_wanda_sees_training_and_not_validation() -> None:
    run = Run(Wanda())
    inputs = []
    for number in range(3):
        run.step(number)
        inputs.append(batch(number)[0])
        with torch.no_grad():
            run.module(batch(50)[0])
        with torch.inference_mode():
            run.module(batch(51)[0])
    expected = run.module[0].weight.detach().abs() * torch.cat(inputs).norm(dim=0)
    torch.testing.assert_close(run.scores()["0.weight"], expected)
    run.collector.detach()
    before = run.scores()
    run.step(4)
    run.module.load_state_dict(net().state_dict())
    assert not any(m._forward_pre_hooks for m in run.module.modules())
    assert run.collector.evidence(run.module, WHOLE).steps == {"0.weight": 3, "3.weight": 3}
    assert before.keys() == set(NAMES)


@pytest.mark.parametrize(
    "criterion",
    [Magnitude(), Random(), LAMP(), GeometricMedian(), Taylor(calibration=Calibration([batch(0)])),
     Wanda(Calibration([batch(0)])), HessianDiagonal(Calibration([batch(0)]))],
)  # fmt: skip
def test_nothing_is_collected_that_is_not_needed(criterion: Criterion) -> None:
    run = Run(criterion)
    run.step(0, 1)
    assert not any(m._forward_pre_hooks for m in run.module.modules())
    assert run.collector.state_dict() == {}
    evidence = run.collector.evidence(run.module, WHOLE)
    assert evidence.totals == {}
    assert run.scores().keys() == set(NAMES)


@every_collecting
@pytest.mark.parametrize("kill", [0, 1, 3, 4])
def test_resume_equals_straight(criterion: Criterion, kill: int, tmp_path: Path) -> None:
    def go(run: Run, *numbers: int) -> None:
        for number in numbers:
            run.step(number)
            if number == 2:
                run.collector.forget()

    straight = Run(criterion)
    go(straight, *range(6))

    killed = Run(criterion)
    go(killed, *range(kill))
    torch.save(
        [r.state_dict() for r in (killed.module, killed.optimizer, killed.collector)], tmp_path / "a.pt"
    )
    states = torch.load(tmp_path / "a.pt", weights_only=True)
    before = copy.deepcopy(states)
    resumed = Run(criterion)
    for part, state in zip((resumed.module, resumed.optimizer, resumed.collector), states, strict=True):
        part.load_state_dict(state)
    go(resumed, *range(kill, 6))
    assert_same_state(resumed.scores(), straight.scores())
    assert_same_state(states[2], before[2])


def test_what_another_criterion_collected_is_left_aside() -> None:
    run, other = Run(Taylor()), Run(Wanda())
    run.step(0)
    other.collector.load_state_dict(run.collector.state_dict())
    other.collector.load_state_dict({})
    assert other.collector.state_dict() == {}


@every_collecting
def test_it_pickles_and_copies_when_detached(criterion: Criterion) -> None:
    run = Run(criterion)
    run.step(0)
    run.collector.detach()
    for twin in (pickle.loads(pickle.dumps(run.collector)), copy.deepcopy(run.collector)):
        assert_same_state(twin.state_dict(), run.collector.state_dict())


def test_attaching_twice_counts_once() -> None:
    run, once = Run(Wanda()), Run(Wanda())
    run.collector.attach(run.module)
    run.step(0)
    once.step(0)
    assert_same_state(run.scores(), once.scores())


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (HessianDiagonal(), "`HessianDiagonal` runs the module on data"),
        (JacobianImportance(), "`JacobianImportance` runs the module on data"),
        (BatchNormScale(), "Found none behind `3.weight`"),
    ],
)
def test_what_can_not_work_is_an_error_before_training(criterion: Criterion, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(criterion)


CALIBRATED = {
    "Taylor": lambda data: Taylor(calibration=Calibration(data)),
    "GradientSquared": lambda data: GradientSquared(Calibration(data)),
    "HessianDiagonal": lambda data: HessianDiagonal(Calibration(data), probes=2),
    "JacobianImportance": lambda data: JacobianImportance(Calibration(data)),
    "Wanda": lambda data: Wanda(Calibration(data)),
}


def on_ranks(rank: int, root: Path) -> None:
    dist.init_process_group("gloo")
    check_ddp(rank)
    check_fsdp(rank, root)


def check_ddp(rank: int) -> None:
    """Ranks that see halves of a batch score as one that sees all of it."""
    for name, criterion in COLLECTING.items():
        alone = Run(criterion, nn.Sequential(net()[0], nn.Identity(), net()[2], net()[3]))
        module = copy.deepcopy(alone.module)
        collector = EvidenceCollector(criterion, weights_of(module))
        collector.attach(module)
        wrapped = DistributedDataParallel(module)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
        for number in range(4):
            if number == 2:  # killed and resumed
                state = collector.state_dict()
                collector.detach()
                collector = EvidenceCollector(criterion, weights_of(module))
                collector.attach(module)
                collector.load_state_dict(state)
            alone.step(number)
            inputs, labels = (part.chunk(2)[rank] for part in batch(number))
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(inputs), labels).backward()
            collector.observe_gradients(wrapped.parameters())
            optimizer.step()
        weights = {n: p.detach() for n, p in weights_of(module).items()}
        scores = criterion.score(weights, collector.evidence(module, WHOLE)).values
        # The one process must not talk to others, so it scores by its own totals.
        evidence = Evidence(alone.module, alone.collector._totals, alone.collector._steps)
        expected = criterion.score(
            {n: p.detach() for n, p in weights_of(alone.module).items()}, evidence
        ).values
        for key, score in scores.items():
            torch.testing.assert_close(score, expected[key], rtol=1e-4, atol=1e-6, msg=name)
            assert same_everywhere(score), name

    module = net()
    weights = {n: p.detach() for n, p in weights_of(module).items()}
    for name, make in CALIBRATED.items():
        mine = [batch(10 + rank)]
        scores = make(mine).score(weights, Evidence(module, group=dist.group.WORLD)).values
        separate = [make([batch(10 + r)]).score(weights, Evidence(module)).values for r in range(2)]
        together = make([batch(10), batch(11)]).score(weights, Evidence(module)).values
        for key, score in scores.items():
            assert same_everywhere(score), name
            # In one process the second batch has probes of its own.
            mean = (separate[0][key] + separate[1][key]) / 2
            torch.testing.assert_close(score, mean if name == "HessianDiagonal" else together[key], msg=name)


def same_everywhere(tensor: Tensor) -> bool:
    everyone = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(everyone, tensor.contiguous())
    return torch.equal(*everyone)


def check_fsdp(rank: int, root: Path) -> None:
    """Scores of shards, put together, are the scores of the whole; so is what is saved."""
    mesh = init_device_mesh("cpu", (2,))
    for name, criterion in {
        **COLLECTING,
        "Magnitude": Magnitude(),
        "Random": Random(3),
        "LAMP": LAMP(),
        "GeometricMedian": GeometricMedian(),
        "BatchNormScale": BatchNormScale(),
    }.items():
        plain = nn.Sequential(net()[0], nn.BatchNorm1d(7), net()[2], net()[3])
        torch.manual_seed(rank + 5)
        module = copy.deepcopy(plain)
        for layer in (plain[1], module[1]):
            layer.weight.data.copy_(torch.linspace(-1, 1, 7))
            layer.eval()
        names = NAMES[:1] if name == "BatchNormScale" else NAMES
        fully_shard(module[0], mesh=mesh)
        fully_shard(module, mesh=mesh)  # 7 and 3 rows do not divide by two
        parameters = {n: module.get_parameter(n) for n in names}
        sharding = Sharding.of(parameters)
        collector = EvidenceCollector(criterion, parameters)
        collector.attach(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        alone = EvidenceCollector(criterion, {n: plain.get_parameter(n) for n in names})
        alone.attach(plain)
        other = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
        for number in range(4):
            if number == 2:
                state = collector.state_dict()
                collector.detach()
                collector = EvidenceCollector(criterion, parameters)
                collector.attach(module)
                collector.load_state_dict(state)
            inputs, labels = batch(number)
            for one, watch, steps, chosen in (
                (module, collector, optimizer, slice(4 * rank, 4 * rank + 4)),
                (plain, alone, other, slice(None)),
            ):
                steps.zero_grad()
                nn.functional.cross_entropy(one(inputs[chosen]), labels[chosen]).backward()
                watch.observe_gradients(one.parameters())
                steps.step()
        weights = {n: p.detach().to_local() for n, p in parameters.items()}
        scores = criterion.score(weights, collector.evidence(module, sharding))
        evidence = Evidence(plain, alone._totals, alone._steps)
        expected = criterion.score({n: plain.get_parameter(n).detach() for n in names}, evidence)
        for key in names:
            assert scores.values[key].shape == weights[key].shape, name
            whole = full(scores.dense(key).contiguous(), parameters[key])
            torch.testing.assert_close(whole, expected.dense(key), rtol=1e-4, atol=1e-6, msg=f"{name} {key}")
        if name == "Random":
            assert torch.equal(whole, expected.values[key])
        saved = collector.state_dict()
        if saved:
            lone = EvidenceCollector(criterion, {n: plain.get_parameter(n) for n in names})
            lone.load_state_dict(saved)
            if name != "Wanda" or rank == 0:
                torch.testing.assert_close(lone._totals, alone._totals, rtol=1e-4, atol=1e-6)
            assert lone._steps == alone._steps

    check_random_on_other_shards(mesh)
    for make in CALIBRATED.values():
        criterion = make([batch(0)])
        for refuse in (
            lambda criterion=criterion: prune(module, 0.5, criterion=criterion),
            lambda criterion=criterion: EvidenceCollector(criterion, parameters).attach(module),
        ):
            with pytest.raises(
                ValueError, match="needs whole parameters. Found parameters sharded over ranks"
            ):
                refuse()
    (root / f"{rank}").touch()


def check_random_on_other_shards(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = torch.randn(5, 3, 4)
    expected = Random(1).score({"weight": weight}).values["weight"]
    for dim in range(3):
        module = nn.Module()
        module.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(dim)]))
        sharding = Sharding.of({"weight": module.weight})
        part = module.weight.detach().to_local()
        scores = Random(1).score({"weight": part}, Evidence(module, sharding=sharding)).values["weight"]
        assert torch.equal(full(scores, module.weight), expected)


def test_ranks_score_alike_under_ddp_and_fsdp(tmp_path: Path) -> None:
    run_ranks(on_ranks, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
