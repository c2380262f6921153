"""Every comparison, one after the other, and all of their results on one page.

    python benchmarks/run.py              # all of them, for hours; then benchmarks/RESULTS.md
    python benchmarks/run.py flops start  # these
    python benchmarks/run.py --render     # only the page, from benchmarks/results/*.json

A comparison that fails is named in the end, and the others go on; its last results stay.
"""

import argparse
import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE / "RESULTS.md"
# Each writes results/SCRIPT.json, or results/SCRIPT_CHOICE.json for an option with choices.
RUNS: dict[str, Sequence[tuple[str, str]]] = {
    "accuracy": [("network", "lenet"), ("network", "resnet")],
    "blocks": [("part", each) for each in ("nets", "depth", "gates", "exits", "routed", "experts")],
    "channels": [("part", "latency"), ("part", "quality"), ("part", "time")],
    "criteria": [],
    "distillation": [("part", "time"), ("part", "accuracy")],
    "endurance": [],
    "ensembles": [("part", "quality"), ("part", "cascade"), ("part", "stacked")],
    "flops": [],
    "growth": [],
    "replay": [("part", "samplers"), ("part", "halving")],
    "sharded": [],
    "start": [],
    "step_cost": [],
    "sweep": [],
    "threshold": [],
    "zoo": [],
}
HEAD = """# Results

What `python benchmarks/run.py` found; each section says when, with what and by which command. Every row that was
measured is here, also where another is better. Times that are compared were taken in turn in one run, unless a
section says otherwise; those of different sections may not be compared. `ratio` is to the row above it that does
without.
"""


def commands(names: Iterable[str]) -> Iterator[list[str]]:
    """Yield the arguments of each run of the scripts."""
    for name in names:
        for option, choice in RUNS[name] or [("", "")]:
            yield [f"benchmarks/{name}.py", *([f"--{option}", choice] if option else [])]


def run(names: Iterable[str], fast: bool) -> list[str]:
    """Run the scripts, and return the commands that failed."""
    failed = []
    for arguments in commands(names):
        command = [sys.executable, *arguments, *(["--fast"] if fast else [])]
        print(f"--- {' '.join(arguments)}", flush=True)
        if subprocess.run(command, cwd=HERE.parent, check=False).returncode:
            failed.append(" ".join(arguments))
    return failed


def render(results: Iterable[Path]) -> str:
    """Return the page of all results."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results)}
    listed = " · ".join(f"[{name}](#{name})" for name in found)
    return "\n".join([HEAD, listed, *(section(name, result) for name, result in found.items())]) + "\n"


def section(name: str, result: Mapping[str, Any]) -> str:
    """Return what one file of results says."""
    script, where = result["benchmark"], result["environment"]
    choice = name.removeprefix(script).removeprefix("_")
    options = [f"--{option} {value}" for option, value in RUNS[script] if value == choice]
    command = where.get("command", " ".join([f"python benchmarks/{script}.py", *options]))
    about = (ast.get_docstring(ast.parse((HERE / f"{script}.py").read_text())) or "").splitlines()[0]
    versions = f"torch {where['torch']}, lightning {where['lightning']}, Python {where['python']}"
    machine = f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads, {where['platform']}"
    loaded = f", load {where['load_average']}" if where.get("load_average") is not None else ""
    facts = f"{where['date'][:10]}: `{command}`; {versions}; {machine}{loaded}."
    note = [f"{where['note']}\n"] if "note" in where else []  # by hand: what else one must know of these rows
    return "\n".join([f"\n## {name}\n", f"{about}\n", f"{facts}\n", *note, *table(result["rows"])])


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table; what all rows have alike in `part` or `network` is left out."""
    names = dict.fromkeys(name for row in rows for name in row)
    shown = [name for name in names if name not in {"part", "network"}]
    yield "| " + " | ".join(shown) + " |"
    yield "|" + "---|" * len(shown)
    for row in rows:
        yield "| " + " | ".join(cell(row.get(name)).replace("|", "\\|") for name in shown) + " |"


def cell(value: Any) -> str:
    """Return a value for people: four digits, lists and mappings without brackets."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {cell(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return str(value)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(RUNS)}; all if none is given")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--fast", action="store_true", help="tiny sizes, to see that they run; no page")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in RUNS]:
        parser.error(f"There is no comparison {unknown[0]!r}. There are {', '.join(RUNS)}.")
    failed = [] if arguments.render else run(arguments.names or RUNS, arguments.fast)
    if not arguments.fast:
        PAGE.write_text(render(RESULTS.glob("*.json")))
        print(f"Written to {PAGE}")
    for command in failed:
        print(f"Failed: {command}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
