"""Whole architectures with random weights lose half their channels and compute what the masked ones do."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from zoo import MODELS, row  # noqa: E402

NEEDS = {"timm": "timm", "transformers": "transformers"}


@pytest.mark.zoo
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.filterwarnings("ignore")  # of the models' own code
def test_half_of_the_channels(model: str, request: pytest.FixtureRequest) -> None:
    if "zoo" not in request.config.option.markexpr:
        pytest.skip("takes half an hour: `pytest -m zoo`")
    library = NEEDS.get(model.partition(":")[0], "torchvision")
    if find_spec(library) is None:
        pytest.skip(f"needs {library}")
    found = row(model, keep=0.5, same_class=None)
    assert found["form"] in {"class", "graph"}, found.get("error")
    assert found["include_normalized"] or found["difference"] <= 1e-5
    assert found["parameters"] < 0.95
