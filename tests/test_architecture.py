"""The house: who may import Lightning, and which floor stands on which."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_structopt"
FILES = sorted(PACKAGE.rglob("*.py"))
# What even the ground floor stands on.
GROUND = {
    "_checkpoints",
    "_checks",
    "_devices",
    "_dtensors",
    "_files",
    "_folds",
    "_horizon",
    "_precision",
    "_rates",
    "_release",
    "_stand_ins",
    "_undisturbed",
}
FLOORS = [
    GROUND | {"profiling"},
    {"schedules", "pruning", "sweep"},
    {"regularization", "shrinking", "distillation", "lr_decay"},
    {"growth", "__init__"},
    {"cli"},  # on the public names
    {"__main__"},
]
ALONE = {"blocks", "ensembles"}  # they stand on the ground floor only
MAY_IMPORT_LIGHTNING = {"callback.py", "module.py", "lr_decay.py"}
ROOMS_OF_LIGHTNING = {"sweep", "cli"}


def imports(file: Path) -> set[str]:
    """Return the dotted names of the modules that ``file`` imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively"
            names.add(node.module or "")
    return names


def room(name: str) -> str:
    return name.split(".")[1] if name.count(".") else "__init__"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_adapters_import_lightning(file: Path) -> None:
    used = {name for name in imports(file) if name.split(".")[0] in {"lightning", "pytorch_lightning"}}
    if file.name not in MAY_IMPORT_LIGHTNING and file.relative_to(PACKAGE).parts[0] not in ROOMS_OF_LIGHTNING:
        assert not used
    assert not any(name.startswith("pytorch_lightning") for name in used)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_each_floor_stands_on_those_below(file: Path) -> None:
    here = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    ours = {room(name) for name in imports(file) if name.startswith("lightning_structopt")} - {here}
    if here == "__init__":
        return
    if here in ALONE:
        assert ours <= FLOORS[0]
        return
    floor = next(index for index, rooms in enumerate(FLOORS) if here in rooms)
    assert ours <= set().union(*FLOORS[: max(floor, 0)]) or (floor == 0 and ours <= GROUND)


def test_no_file_is_too_long_to_read_in_one_sitting() -> None:
    """The one table of contents, two lines a name, is read in none."""
    files = [file for file in FILES if file != PACKAGE / "__init__.py"]
    long = {file.name: lines for file in files if (lines := len(file.read_text().splitlines())) > 350}
    assert not long
