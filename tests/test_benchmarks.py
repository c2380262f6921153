"""The page of all results: every comparison has its place, and nothing that was measured is left out."""

import importlib.util
import json
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("benchmarks_run", BENCHMARKS / "run.py")
assert spec is not None
assert spec.loader is not None
page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)


def test_every_comparison_is_run() -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {"common", "run"}
    assert set(page.RUNS) == scripts
    for name, options in page.RUNS.items():
        source = (BENCHMARKS / f"{name}.py").read_text()
        for option, choice in options:
            assert f'"{option}":' in source or f'"--{option}"' in source
            assert f'"{choice}"' in source


def test_every_result_belongs_to_a_run() -> None:
    expected = {
        f"{name}_{choice}" if choice else name
        for name, options in page.RUNS.items()
        for _, choice in options or [("", "")]
    }
    assert {path.stem for path in page.RESULTS.glob("*.json")} <= expected


def test_the_page_has_every_row_of_every_result() -> None:
    shown = page.render(page.RESULTS.glob("*.json"))
    for path in page.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        section = shown.partition(f"\n## {path.stem}\n")[2].partition("\n## ")[0]
        assert section.count("\n|") == 2 + len(result["rows"])
        assert result["environment"]["date"][:10] in section
        assert result["environment"]["torch"] in section
        assert result["environment"].get("note", "") in section
        assert f"`python benchmarks/{result['benchmark']}.py" in section
    lines = shown.splitlines()
    for above, rule in zip(lines, lines[1:], strict=False):
        if rule.startswith("|---"):
            assert above.count(" |") == rule.count("---")


def test_cells_are_for_people() -> None:
    values = [None, True, 1234567, 0.123456, 98765.4, {"a": 1.0}, [1, 2.5], "x|y"]
    assert [page.cell(value) for value in values] == [
        "", "yes", "1,234,567", "0.1235", "98,765", "a: 1", "1, 2.5", "x|y",
    ]  # fmt: skip
    assert list(page.table([{"part": "p", "model": "x|y", "gain": 0.5}, {"part": "p", "other": 2}])) == [
        "| model | gain | other |", "|---|---|---|", "| x\\|y | 0.5 |  |", "|  |  | 2 |",
    ]  # fmt: skip
