"""How long it takes to start: imports and the command line, against Lightning's own import.

    python benchmarks/start.py [--rounds 10] [--fast]

Each is a new interpreter, in turn and in random order; ratios are of seconds in the same round.
"""

import random
import subprocess
import sys
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Any

from common import parse_arguments, write_as_they_come
from rich.console import Console
from rich.table import Table

BASE = "import lightning"
STARTS = {
    BASE: ["-c", BASE],
    "import lightning.pytorch, torch": ["-c", "import lightning.pytorch, torch"],
    "import lightning_structopt": ["-c", "import lightning_structopt"],
    "structopt --help": ["-m", "lightning_structopt", "--help"],
}


def seconds(arguments: list[str]) -> float:
    start = perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", *arguments], check=True, capture_output=True)
    return perf_counter() - start


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    order, found = random.Random(0), {name: [] for name in STARTS}
    for turn in range(rounds + 1):
        for name in order.sample(list(STARTS), len(STARTS)):
            taken = seconds(STARTS[name])
            if turn:  # the first fills the file cache
                found[name].append(taken)
    for name, all_seconds in found.items():
        ratios = [mine / base for mine, base in zip(all_seconds, found[BASE], strict=True)]
        yield {"start": name, "seconds": median(all_seconds), "ratio": median(ratios)}


def main() -> None:
    arguments = parse_arguments("start", __doc__, rounds=10)
    found = write_as_they_come(arguments.output, "start", rows(1 if arguments.fast else arguments.rounds))
    table = Table("start", "seconds", "ratio", title="A new interpreter")
    for row in found:
        table.add_row(row["start"], f"{row['seconds']:.2f}", f"{row['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
