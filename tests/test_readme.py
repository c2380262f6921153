"""README's code does what it says: each block runs, each command and file that it names is there."""

import re
import shlex
from dataclasses import dataclass
from importlib.metadata import metadata
from inspect import signature
from pathlib import Path

import lightning.pytorch as pl
import pytest
import users_names

import lightning_structopt as so
from lightning_structopt.cli import LIGHTNING_COMMANDS
from lightning_structopt.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code, and where it stands."""

    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"line {self.line}"


README = (ROOT / "README.md").read_text()
BLOCKS = [
    Block(found[1], found[2], README.count("\n", 0, found.start()) + 2) for found in FENCE.finditer(README)
]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


@pytest.mark.filterwarnings("ignore")  # tiny data: Lightning advises on everything
@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl, "Trainer", users_names.Trainer)
    monkeypatch.setattr("lightning_structopt.shrinking.timing.time_of", users_names.time_of)
    text = "\n" * (block.line - 1) + block.text.replace(
        "/shared", str(tmp_path)
    )  # tracebacks name README's lines
    exec(compile(text, "README.md", "exec"), users_names.names())


COMMAND = re.compile(r"python ((?:examples|benchmarks)/\w+\.py)([^`\n]*)")
SCRIPTS = sorted({found.groups() for found in COMMAND.finditer(README)})


@pytest.mark.parametrize(("script", "flags"), SCRIPTS, ids=lambda value: value.strip())
def test_scripts_are_there_and_take_their_flags(script: str, flags: str) -> None:
    source = (ROOT / script).read_text()
    for flag in re.findall(r"--(\w+)", flags):
        # Written out, or as an argument or a choice of the benchmarks' `parse_arguments`.
        assert re.search(rf'"--{flag}"|\b{flag}=|"{flag}": ', source), flag


def structopt_commands() -> list[list[str]]:
    lines = [
        line for block in of("bash") for line in block.text.splitlines() if line.startswith("structopt ")
    ]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("command", structopt_commands(), ids=" ".join)
def test_commands_are_there_and_take_their_flags(command: list[str]) -> None:
    name, *flags = command
    assert name in COMMANDS or name in LIGHTNING_COMMANDS
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        if flag == "--config":  # which `test_cli.py` runs
            assert (ROOT / "examples/configs" / value).is_file()
        else:
            assert flag.removeprefix("--") in signature(COMMANDS[name]).parameters


def test_extras_are_there() -> None:
    named = re.findall(r"pip install [^`\n]*?\[([\w,-]+)\]", README)
    assert named
    extras = metadata("lightning-structopt").get_all("Provides-Extra")
    assert {extra for names in named for extra in names.split(",")} <= set(extras or ())


def anchors(markdown: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        page = ROOT / path if path else ROOT / "README.md"
        assert page.exists(), target
        assert not anchor or anchor in anchors(page.read_text()), target


def test_files_that_it_names_are_there() -> None:
    named = set(re.findall(r"\b(?:examples|benchmarks|tests|\.ci)/[\w/]+(?:\.\w+)?", README))
    assert len(named) > 10
    assert not [path for path in named if not (ROOT / path).exists()]


def test_names_that_it_gives_are_exported() -> None:
    named = set(re.findall(r"\bso\.(\w+)", README))
    assert named <= {*dir(so)}
    box = README.partition("## What is in the box")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", box, re.MULTILINE)
    listed = {name for cell in cells for name in re.findall(r"`(\w+)", cell)} - {"structopt"}
    assert len(listed) > 50
    assert listed <= {*dir(so)}
