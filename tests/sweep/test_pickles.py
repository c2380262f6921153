"""What trials load is what the driver wrote, without being read or shared for writing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import assert_same_state
from torch import nn

from lightning_structopt.sweep import pickles

LARGE = torch.randn(600, 400, generator=torch.Generator().manual_seed(0))
VALUES: dict[str, Any] = {
    "large": LARGE,
    "part": LARGE[:100],
    "transposed": LARGE[:90].t(),
    "strided": LARGE[::3, ::2],
    "bfloat16": LARGE.bfloat16(),
    "complex": torch.complex(LARGE, LARGE).conj(),
    "bools": LARGE > 0,
    "small": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
    "sparse": torch.eye(200).to_sparse(),
    "one twice": [LARGE[:50]] * 2,
    "plain": {"a": [1, "b", None]},
}


@pytest.mark.parametrize("name", VALUES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    pickles.dump(VALUES[name], tmp_path / "file")
    found, expected = pickles.load(tmp_path / "file"), VALUES[name]
    if name == "sparse":
        found, expected = found.to_dense(), expected.to_dense()
    assert_same_state(found, expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)


def test_arrays_modules_and_functions(tmp_path: Path) -> None:
    module = nn.Linear(40, 30)
    marked = LARGE[:5].clone()
    marked.source = "sensor"  # type: ignore[attr-defined]
    array = np.arange(10_000.0).reshape(100, 100)
    content = (array, array[:, ::2], module, lambda x: x + 1, marked, nn.Parameter(LARGE[:3].clone()))
    pickles.dump(content, tmp_path / "file")
    whole, part, loaded, function, named, parameter = pickles.load(tmp_path / "file")
    assert (whole == array).all()
    assert (part == array[:, ::2]).all()
    assert_same_state(loaded.state_dict(), module.state_dict())
    assert function(2) == 3
    assert named.source == "sensor"
    assert isinstance(parameter, nn.Parameter)
    assert parameter.requires_grad


def test_a_part_of_a_tensor_takes_the_room_of_a_part(tmp_path: Path) -> None:
    pickles.dump(LARGE[:6], tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < LARGE[:6].nbytes + 2000


def test_writing_into_what_was_loaded_changes_nothing_for_others(tmp_path: Path) -> None:
    pickles.dump((LARGE, LARGE.numpy().copy()), tmp_path / "file")
    first, second = pickles.load(tmp_path / "file"), pickles.load(tmp_path / "file")
    first[0].zero_()
    first[1][:] = 0
    for one in (second, pickles.load(tmp_path / "file")):
        assert torch.equal(one[0], LARGE)
        assert (one[1] == LARGE.numpy()).all()
    assert second[0].data_ptr() % 64 == 0


def test_a_new_file_leaves_what_others_have_loaded(tmp_path: Path) -> None:
    pickles.dump(LARGE, tmp_path / "file")
    loaded = pickles.load(tmp_path / "file")
    pickles.dump(LARGE[:2], tmp_path / "file")
    assert torch.equal(loaded, LARGE)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_pickled_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="pickle"):
        pickles.dump(__import__("threading").Lock(), tmp_path / "file")
    assert not list(tmp_path.iterdir())
