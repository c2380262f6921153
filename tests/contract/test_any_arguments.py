"""Any argument gives an object or one of our errors: what is wrong, what was found; never a traceback of torch's."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from support import Classifier
from torch import nn

import lightning_structopt as so

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


def linear() -> nn.Module:
    return nn.Linear(4, 4)


def members() -> list[nn.Module]:
    return [Classifier(), Classifier(seed=2)]


# What each class needs at least, made anew each time.
NEEDS: dict[str, Callable[[], dict[str, Any]]] = {
    "AdaptiveComputationUnit": lambda: {"cell": linear(), "gate": so.Gate(4), "max_steps": 3},
    "ArchitectureSweep": lambda: {"candidates": {"a": Classifier}, "monitor": "val_acc"},
    "Block": lambda: {"shape": (2, 2)},
    "Calibration": lambda: {"batches": [1]},
    "Candidate": lambda: {"build": Classifier},
    "CapsuleRouting": lambda: dict.fromkeys(
        ("in_capsules", "in_features", "out_capsules", "out_features"), 2
    ),
    "ChannelPruning": lambda: {"target": so.FLOPs(0.5)},
    "CollateWithIds": lambda: {"collate_fn": list},
    "ConvNet": lambda: {"in_channels": 1, "widths": [2], "classes": 2},
    "DistillationModule": lambda: {"teacher": linear(), "student": Classifier()},
    "EarlyExit": lambda: {"stages": [linear(), linear()], "heads": [linear(), linear()]},
    "Exponential": lambda: {"gamma": 0.5},
    "Gate": lambda: {"features": 4},
    "GatedBlock": lambda: {"body": linear(), "gate": so.Gate(4)},
    "GatingNetwork": lambda: {"network": linear()},
    "LRDecay": lambda: {"schedule": so.Linear()},
    "MLP": lambda: {"in_features": 2, "widths": [3], "classes": 2},
    "MaxBytes": lambda: {"size_bytes": 9},
    "MaxFLOPs": lambda: {"flops": 9.0},
    "MaxLatency": lambda: {"milliseconds": 9.0},
    "MaxParameters": lambda: {"count": 9},
    "MixedEnsemble": lambda: {"members": members(), "combiner": nn.Linear(8, 4)},
    "MultiStep": lambda: {"milestones": (1, 2)},
    "MutualDistillation": lambda: {"members": members()},
    "NByM": lambda: {"n": 2, "m": 4},
    "NetworkGrowth": lambda: {"when": [1], "widen": so.Widen(1.5)},
    "ParallelEnsemble": lambda: {"members": members()},
    "PerLayer": lambda: {"sparsities": {"net.0.weight": 0.5}},
    "Plateau": lambda: {"monitor": "val_loss"},
    "ResidualBlock": lambda: {"body": linear()},
    "RoutedBlock": lambda: {"experts": [linear(), linear()], "router": nn.Linear(4, 2)},
    "SearchSpace": lambda: {
        "build": Classifier,
        "parameters": {"hidden": optuna.distributions.IntDistribution(2, 4)},
        "samples": 3,
    },
    "SerialEnsemble": lambda: {"members": members()},
    "SparsityPenalty": lambda: {"penalty": so.L1(0.1)},
    "Step": lambda: {"step_size": 2},
    "TeacherCache": lambda: {"directory": "cache"},
    "Teachers": lambda: {"members": [linear(), linear()]},
    "TemperatureScaling": lambda: {"module": linear()},
    "Warmup": lambda: {"steps": 2, "then": so.Linear()},
    "Widen": lambda: {"factor": 1.5},
    "WithIds": lambda: {"dataset": [1, 2]},
    **{name: lambda: {"keep": 0.5} for name in ("ChannelRatio", "FLOPs", "Latency", "Parameters")},
    **{name: lambda: {"strength": 0.5} for name in ("L1", "L2", "GroupLasso")},
}
# Made by functions of ours, not by users.
RETURNED = {
    "GrowthPlan",
    "OutOfFold",
    "Predictions",
    "Selection",
    "ShrinkPlan",
    "SweepResult",
    "AllFailedError",
}
PUBLIC = sorted(
    name
    for name in so.__all__
    if inspect.isclass(kind := getattr(so, name))
    and not inspect.isabstract(kind)
    and name not in RETURNED | {"AdaptiveBlock"}
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    # Sizes that a computer has room for, and such as no number of torch holds.
    st.integers(-3, 64) | st.just(10**30),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from([
        "net.*",
        "layer",
        b"y",
        1j,
        object,
        nn.Linear,
        linear,
        range(3),
        torch.ones(2),
        torch.tensor(0.5),
    ]),
)
ANYTHING = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.tuples(SCALARS, SCALARS),
    st.dictionaries(st.text(max_size=2), SCALARS, max_size=2),
)


def arguments_of(kind: type) -> list[str]:
    found = inspect.signature(kind).parameters.values()
    return [each.name for each in found if each.kind not in {each.VAR_KEYWORD, each.VAR_POSITIONAL}]


def assert_ours(error: Exception) -> None:
    assert isinstance(error, (TypeError, ValueError, FileNotFoundError)), repr(error)
    assert "Found" in str(error), repr(error)


@pytest.mark.parametrize("name", [name for name in PUBLIC if arguments_of(getattr(so, name))])
def test_any_argument(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(so, name)
    make = NEEDS.get(name, dict)
    monkeypatch.chdir(tmp_path)
    repr(kind(**make()))

    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(arguments_of(kind)), ANYTHING)
    def check(argument: str, value: Any) -> None:
        try:
            repr(kind(**{**make(), argument: value}))
        except Exception as error:
            assert_ours(error)

    check()
