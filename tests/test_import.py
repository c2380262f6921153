"""What importing the package loads, and that names that load on use are there like all others."""

import subprocess
import sys

import pytest

import lightning_structopt

HEAVY = ("optuna", "ray", "matplotlib.pyplot", "onnx", "sklearn", "pandas", "torchvision", "transformers")


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return set(found.stdout.split())


def test_importing_loads_nothing_heavy_that_lightning_does_not() -> None:
    before = modules_after("import lightning.pytorch, torch")
    after = modules_after("import lightning_structopt")
    assert not {name for name in HEAVY if name in after - before}
    assert "lightning_structopt.sweep" not in after


def test_sweeps_load_on_use() -> None:
    after = modules_after("from lightning_structopt import ArchitectureSweep")
    assert "optuna" in after


def test_every_name_is_there() -> None:
    for name in lightning_structopt.__all__:
        assert getattr(lightning_structopt, name).__name__ == name
        assert name in dir(lightning_structopt)
    everything: dict[str, object] = {}
    exec("from lightning_structopt import *", everything)
    assert set(lightning_structopt.__all__) <= set(everything)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'ArchitectureSweeep'"):
        _ = lightning_structopt.ArchitectureSweeep
