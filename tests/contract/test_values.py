"""What every value object promises: schedules, ramps, criteria, patterns."""

import copy
import dataclasses
import inspect
import pickle

import pytest

import lightning_structopt as so

VALUES = [
    so.Constant(),
    so.Linear(end=0.1),
    so.Polynomial(power=2.0),
    so.Exponential(gamma=0.9),
    so.Step(step_size=3, gamma=0.5),
    so.MultiStep(milestones=(2, 5)),
    so.Cosine(minimum=0.1),
    so.Warmup(2, then=so.Linear()),
    so.OneShotRamp(),
    so.LinearRamp(),
    so.CubicRamp(),
    so.GeometricRamp(),
    so.OneCycleRamp(steepness=12.0),
    so.Magnitude(p=2),
    so.Random(seed=3),
    so.LAMP(),
    so.Taylor(p=2),
    so.GradientSquared(),
    so.Movement(),
    so.HessianDiagonal(),
    so.JacobianImportance(),
    so.Wanda(),
    so.BatchNormScale(),
    so.GeometricMedian(),
    so.Unstructured(scope="layer", distribution=so.ErdosRenyi(kernel=False)),
    so.NByM(2, 4),
    so.Block((4, 2), scope="layer"),
    so.Neurons(scope="global"),
    so.L1(1e-4),
    so.L2(1e-4),
    so.GroupLasso(1e-3, groups="channel"),
    so.RewindWeights(to=0.05),
    so.RewindLR(to=0.05),
    so.RigL(fraction=0.2, every=50, until=0.6),
    so.EMATeacher(decay=0.99),
    so.ChannelRatio(0.5),
    so.FLOPs(0.5),
    so.Parameters(0.3),
    so.Uniform(),
    so.ErdosRenyi(),
    so.PerLayer({"net.0.weight": 0.5}),
    so.Latency(0.6),
    so.MaxBytes(1_000_000),
    so.StraightThrough(temperature=0.5),
    so.Annealed(start=1.0, end=0.1, steps=100),
    so.GateBudget(target=0.5),
    so.Kaiming(mode="fan_out"),
    so.Xavier(distribution="normal"),
    so.Orthogonal(),
    so.LSUV(),
    so.SuccessiveHalving(1, 9, 3),
    so.AsynchronousHalving(1, 9, 3),
    so.Hyperband(1, 9, 3),
    so.FixedRounds(rounds=2, epochs=1, keep=0.5),
    so.LocalProcesses(workers=2),
    so.RayCluster(resources={"CPU": 2}),
    so.RegularizedEvolution(population=20, tournament=5),
    so.Plateau("val_loss", patience=2),
    so.Widen(1.5, "net.0"),
    so.Deepen(kind="residual"),
    so.MaxParameters(1000),
    so.MaxFLOPs(1e6),
    so.MaxLatency(5.0),
]
every_value = pytest.mark.parametrize("value", VALUES, ids=repr)


def test_every_exported_dataclass_is_registered() -> None:
    exported = {
        name for name in so.__all__ if inspect.isclass(c := getattr(so, name)) and dataclasses.is_dataclass(c)
    }
    # Of data, functions, names and indices; and what is returned, not given.
    holders = {
        "Calibration",
        "Candidate",
        "CollateWithIds",
        "GrowthPlan",
        "Predictions",
        "Selection",
        "ShrinkPlan",
        "SweepResult",
    }
    assert exported - holders == {type(value).__name__ for value in VALUES}


@every_value
def test_is_an_immutable_value(value: object) -> None:
    twin = eval(repr(value), vars(so))
    for other in (twin, copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert other == value
        assert hash(other) == hash(value)
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


@every_value
def test_says_what_it_is(value: object) -> None:
    assert inspect.getdoc(type(value))
    assert type(value).__doc__ != inspect.getdoc(type(value).__mro__[1])
