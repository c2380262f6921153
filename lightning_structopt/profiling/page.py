"""A report as one page for browsers, which needs nothing else: no network, no scripts."""

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --paper: #fff; --band: #f6f8fa;
  --better: #1a7f37; --worse: #b35900; --mark: #0969da; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117;
  --band: #151b23; --better: #3fb950; --worse: #e3964a; --mark: #4493f8; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2.5rem auto; padding: 0 1.5rem;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, footer { color: var(--soft); } footer { font-size: .85rem; margin-top: 2rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem; text-align: right; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; background: var(--band); min-width: 8rem; overflow-wrap: anywhere; }
th:first-child { text-align: left; font-weight: 500; position: sticky; left: 0; background: var(--paper);
  white-space: nowrap; min-width: 0; }
tr.group th { background: var(--band); color: var(--soft); font-size: .8rem; text-transform: uppercase;
  letter-spacing: .05em; }
td small { display: block; color: var(--soft); } .better { color: var(--better); } .worse { color: var(--worse); }
.mark { display: inline-block; margin-left: .4rem; padding: 0 .5rem; border: 1px solid var(--mark); border-radius: 1rem;
  color: var(--mark); font-size: .75rem; font-weight: 500; }
figure { margin: 0; padding: .5rem; background: #fff; border: 1px solid var(--line); border-radius: .5rem;
  max-width: 42rem; } figure svg { width: 100%; height: auto; display: block; }
"""

Cell = tuple[str, str, str]  # a value, what it is to the first model's, and "better" or "worse" than that
Row = tuple[str, Sequence[Cell]]  # its name, and a cell for each model


def page(
    title: str,
    models: Sequence[tuple[str, str]],
    groups: Iterable[tuple[str, Sequence[Row]]],
    notes: Sequence[str],
    svg: str,
) -> str:
    """Return the page.

    Args:
        title: The heading.
        models: Names of the columns, each with a word beside it, or none.
        groups: Names of groups of rows, with the rows.
        notes: Lines below the table.
        svg: A picture, or nothing.
    """
    head = "".join(
        f'<th scope="col">{escape(name)}{f"<span class=mark>{escape(mark)}</span>" if mark else ""}</th>'
        for name, mark in models
    )
    body = "".join(
        f'<tr class="group"><th colspan="{len(models) + 1}">{escape(name)}</th></tr>'
        + "".join(map(_row, rows))
        for name, rows in groups
    )
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><p>Below each value is what it is to the first model that runs.</p>"
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        + (f"<h2>Notes</h2><ul>{listed}</ul>" if listed else "")
        + (f"<h2>Quality over cost</h2><figure>{svg}</figure>" if svg else "")
        + "<footer>* more than chance: the 95% bootstrap interval of the difference by sample leaves out zero. "
        "Pareto: no other model is both better and cheaper.</footer></body></html>"
    )


def _row(row: Row) -> str:
    name, cells = row
    shown = "".join(
        f"<td>{escape(value)}"
        + (f'<small class="{kind}">{escape(against)}</small>' if against else "")
        + "</td>"
        for value, against, kind in cells
    )
    return f'<tr><th scope="row">{escape(name)}</th>{shown}</tr>'
