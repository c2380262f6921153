"""`compare`: metrics against torchmetrics by hand, tests of significance against brute force, reports read back."""

import csv
import io
import itertools
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support import Classifier, dataset, loader, trainer
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric, MetricCollection, R2Score
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall
from torchmetrics.functional.text import bleu_score
from torchmetrics.text import WordErrorRate

from lightning_structopt.profiling import CostMonitor, TrainingCost, compare
from lightning_structopt.profiling.quality import evaluate, task_of
from lightning_structopt.profiling.significance import difference, mcnemar


def quick(modules: dict[str, nn.Module], data: Any, **options: Any) -> Any:
    return compare(modules, data, **{"seconds": 0.001, "progress": False, **options})


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, nn.Module], CostMonitor]:
    monitor, trained = CostMonitor(), Classifier()
    trainer(tmp_path_factory.mktemp("fit"), monitor, max_epochs=6).fit(trained, loader())
    return {"fresh": Classifier(), "trained": trained}, monitor


def test_classes(classifiers: Any) -> None:
    modules, monitor = classifiers
    report = quick(modules, loader(), training={"trained": monitor})
    inputs, labels = dataset().tensors
    for name, module in modules.items():
        with torch.no_grad():
            outputs = module.eval()(inputs)
        right = (outputs.argmax(1) == labels).float()
        found = report[name].metrics
        assert found["accuracy"] == pytest.approx(float(right.mean()))
        recalls = [float(right[labels == c].mean()) for c in range(4)]
        assert found["recall"] == pytest.approx(sum(recalls) / 4)
        assert next(iter(found)) == "accuracy"
        assert set(found) == {"accuracy", "precision", "recall", "F1", "AUROC", "calibration error"}
        assert report[name].costs["parameters"] == sum(p.numel() for p in module.parameters())
    assert report["trained"].against_first.p_value < 0.01
    assert report["trained"].against_first.is_significant
    assert report["fresh"].against_first is None
    assert report["trained"].training.steps == 24


def test_numbers() -> None:
    inputs = torch.randn(40, 3)
    target = inputs @ torch.tensor([[1.0], [2.0], [3.0]])
    exact, rough = nn.Linear(3, 1), nn.Linear(3, 1)
    exact.weight.data, exact.bias.data = torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1)
    report = quick({"rough": rough, "exact": exact}, [(inputs, target.squeeze(1))])
    with torch.no_grad():
        errors = (rough(inputs) - target).squeeze(1)
    found = report["rough"].metrics
    assert found["MSE"] == pytest.approx(float(errors.square().mean()), rel=1e-5)
    assert found["RMSE"] == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-5)
    assert found["MAE"] == pytest.approx(float(errors.abs().mean()), rel=1e-5)
    assert found["R2"] == pytest.approx(
        1 - float(errors.square().sum() / (target - target.mean()).square().sum()), rel=1e-4
    )
    assert report["exact"].metrics["MSE"] < 1e-10
    assert report["exact"].against_first.high < 0


class Scores(nn.Module):
    """Gives the same scores to whatever comes in."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scores.expand(len(inputs), *self.scores.shape[1:])


def test_tokens_and_their_padding() -> None:
    logits = torch.randn(1, 5, 7)
    target = torch.tensor([[0, 1, 2, -100, -100], [3, 4, 5, 6, -100]])
    found = quick({"it": Scores(logits)}, [(torch.zeros(2, 5), target)])["it"].metrics
    kept = target != -100
    losses = torch.nn.functional.cross_entropy(logits.expand(2, 5, 7)[kept], target[kept])
    assert found["perplexity"] == pytest.approx(float(losses.exp()), rel=1e-4)
    assert found["accuracy"] == pytest.approx(
        float((logits.expand(2, 5, 7).argmax(2) == target)[kept].float().mean())
    )


def test_pixels() -> None:
    target = torch.randint(3, (2, 4, 4))
    perfect = nn.functional.one_hot(target[:1], 3).permute(0, 3, 1, 2).float()
    found = quick({"it": Scores(perfect)}, [(torch.zeros(1, 4), target[:1])])["it"].metrics
    assert found == {"IoU": 1.0, "accuracy": 1.0}


def test_two_classes_by_one_output() -> None:
    found = quick({"it": nn.Linear(1, 1)}, [(torch.linspace(-9, 9, 20)[:, None], torch.arange(20) > 9)])
    assert found["it"].metrics["AUROC"] in {0.0, 1.0}


def test_text() -> None:
    class Speaker(nn.Linear):
        def say(self, batch: Any) -> list[str]:
            return ["the cat sat on the mat"] * len(batch)

    batch = (torch.zeros(1, 2), ["the cat sat on the mat"])
    report = quick(
        {"it": Speaker(2, 2)},
        [batch],
        predict=lambda module, batch: (module.say(batch[0]), batch[1]),
        example_input=torch.zeros(1, 2),
    )
    assert report["it"].metrics["BLEU"] == pytest.approx(1.0)
    assert report["it"].metrics["rougeL_fmeasure"] == pytest.approx(1.0)


class Line(nn.Linear):
    """Says the same to everything."""

    def __init__(self, line: str) -> None:
        super().__init__(1, 1)
        self.line = line


def test_lines_of_text_are_compared_one_by_one() -> None:
    known = ["the cat sat on the mat", "the cat sat on the rug"]
    report = quick(
        {"good": Line(known[0]), "bad": Line("nothing at all")},
        [(torch.zeros(2, 1), known)] * 5,
        predict=lambda module, batch: ([module.line] * 2, batch[1]),
        example_input=torch.zeros(1, 1),
    )
    by_hand = [bleu_score([known[0]], [[line]], smooth=True) for line in known]
    worst = [bleu_score(["nothing at all"], [[line]], smooth=True) for line in known]
    gap = report["bad"].against_first
    assert gap.mean == pytest.approx(float(sum(worst) - sum(by_hand)) / 2, abs=1e-6)
    assert gap.is_significant
    assert gap.p_value is None


def test_text_metrics_of_ones_own_get_lines_as_they_are() -> None:
    report = quick(
        {"it": Line("the cat sat")},
        [(torch.zeros(1, 1), ["the cat sat on"])],
        metrics=WordErrorRate(),
        predict=lambda module, batch: ([module.line], batch[1]),
        example_input=torch.zeros(1, 1),
    )
    assert report["it"].metrics == {"WordErrorRate": pytest.approx(0.25)}


def test_pixels_that_nobody_labelled_do_not_count() -> None:
    target = torch.randint(3, (1, 4, 4))
    scores = nn.functional.one_hot(target, 3).permute(0, 3, 1, 2).float()
    for void in (255, -100):
        labelled = target.clone()
        labelled[:, :2] = void
        found = quick({"it": Scores(scores)}, [(torch.zeros(1, 4), labelled)])["it"]
        assert found.metrics == {"IoU": 1.0, "accuracy": 1.0}


class Boxes(nn.Linear):
    """Gives what no task is known for."""

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"boxes": super().forward(inputs)}


class Count(Metric):
    """Counts boxes; less is better."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0.0))

    def update(self, preds: dict[str, Tensor], target: Any) -> None:
        self.count += len(preds["boxes"])

    def compute(self) -> Tensor:
        return self.count


def test_metrics_of_ones_own_take_outputs_of_any_kind() -> None:
    report = quick(
        {"one": Boxes(2, 4), "two": Boxes(2, 4)}, [(torch.zeros(3, 2), "any")] * 2, metrics=Count()
    )
    assert report["two"].metrics == {"Count": 6.0}
    assert report["two"].against_first is None
    with pytest.raises(ValueError, match="can be chosen for .* outputs a `dict` and targets a `str`"):
        quick({"one": Boxes(2, 4)}, [(torch.zeros(3, 2), "any")])


def test_of_some_metrics_less_is_better() -> None:
    """The worse one is slower as well, so only the exact one is on the front."""
    inputs = torch.randn(40, 3)
    exact, rough = nn.Linear(3, 1), nn.Sequential(*(nn.Linear(3, 3) for _ in range(60)), nn.Linear(3, 1))
    data = [(inputs, exact(inputs).detach().squeeze(1))]
    metrics = MetricCollection({"squares": MeanSquaredError(), "R2": R2Score()})
    for given in (None, MeanSquaredError(), metrics):
        report = quick({"exact": exact, "rough": rough}, data, metrics=given, seconds=0.02)
        assert [entry.is_pareto for entry in report.entries] == [True, False]
    assert report.lower_is_better == {"squares"}
    assert report.to_html().count('class="better"') == 0


def test_a_metric_by_class_has_a_row_for_each() -> None:
    found = quick({"it": Classifier()}, loader(), metrics=MulticlassRecall(4, average=None))["it"].metrics
    assert list(found) == [f"MulticlassRecall[{c}]" for c in range(4)]


def test_metrics_of_another_task_say_what_they_got() -> None:
    with pytest.raises(
        ValueError, match=r"Found outputs \(8, 4\) of torch.float32 .* for MeanSquaredError, which say"
    ):
        quick({"it": Classifier()}, loader(), metrics=MeanSquaredError())


def test_a_metric_of_ones_own_is_left_as_it_was() -> None:
    metric = MulticlassAccuracy(4, average="micro")
    metric.update(torch.eye(4), torch.arange(4))
    report = quick({"it": Classifier()}, loader(), metrics=metric)
    assert list(report["it"].metrics) == ["MulticlassAccuracy"]
    assert metric.compute() == 1


def test_a_datamodule_gives_its_test_data_or_else_its_validation_data() -> None:
    class Data(pl.LightningDataModule):
        def setup(self, stage: str) -> None:
            self.stage = stage

        def val_dataloader(self) -> Any:
            return loader(samples=8)

    class WithTest(Data):
        def test_dataloader(self) -> Any:
            return loader(samples=16)

    for data, stage, samples in ((Data(), "validate", 8), (WithTest(), "test", 16)):
        report = quick({"one": Classifier(), "two": Classifier(seed=2)}, data)
        assert data.stage == stage
        assert len(evaluate(Classifier(), loader(samples=samples)).samples) == samples
        assert report["two"].against_first is not None


def test_one_that_fails_has_a_row_with_the_reason() -> None:
    class Broken(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            raise RuntimeError("out of order\nand more")

    report = quick({"broken": Broken(12, 4), "sound": nn.Linear(12, 4)}, loader())
    assert report["broken"].failure == "RuntimeError: out of order"
    assert report.reference.name == "sound"
    assert "out of order" in report.to_markdown()
    with pytest.raises(ValueError, match="all fail. broken: RuntimeError: out of order"):
        quick({"broken": Broken(12, 4)}, loader())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compare({}, loader()), ValueError, "`modules` must have at least one"),
        (lambda: quick({"a": Classifier()}, []), ValueError, "must have at least one batch"),
        (lambda: quick({"a": Classifier()}, [torch.ones(2, 12)]), ValueError, "must be a pair of inputs and"),
        (
            lambda: quick({"a": Classifier()}, loader(), training={"b": TrainingCost()}),
            ValueError,
            "Found 'b'; the modules are 'a'",
        ),
        (
            lambda: quick({"a": Classifier()}, loader(), training={"a": 3.0}),
            TypeError,
            "Found 3.0 for 'a'",
        ),
        (lambda: quick({"a": Classifier()}, pl.LightningDataModule()), ValueError, "must have test or val"),
        (lambda: task_of(torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"outputs \(2, 3\) of torch.float32"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_mcnemar_counts_coin_tosses() -> None:
    for worse, better in itertools.product(range(6), repeat=2):
        tosses = list(itertools.product([0, 1], repeat=worse + better))
        as_uneven = [t for t in tosses if min(sum(t), len(t) - sum(t)) <= min(worse, better)]
        assert mcnemar(worse, better) == pytest.approx(len(as_uneven) / len(tosses))
    assert 0 < mcnemar(4000, 5000) < 1e-20


@pytest.mark.parametrize("kind", ["right or wrong", "numbers"])
def test_the_interval_is_that_of_resampling(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gaps = torch.randn(1500, generator=generator) + 0.1
    if kind == "right or wrong":
        gaps = gaps.sign().clamp_min(0) - (torch.rand(1500, generator=generator) < 0.4).float()
    found = difference(torch.zeros(1500), gaps)
    rng = random.Random(0)
    values = gaps.tolist()
    means = sorted(sum(rng.choices(values, k=1500)) / 1500 for _ in range(400))
    assert found.mean == pytest.approx(float(gaps.mean()), abs=1e-6)
    assert found.low == pytest.approx(means[10], abs=0.012)
    assert found.high == pytest.approx(means[390], abs=0.012)


def test_the_front_is_what_nothing_beats() -> None:
    fast, slow = nn.Linear(12, 4), nn.Sequential(*(nn.Linear(12, 12) for _ in range(60)), nn.Linear(12, 4))
    report = quick({"fast": fast, "slow": slow}, loader(), seconds=0.02)
    assert report["fast"].is_pareto
    better = report["slow"].metrics["accuracy"] > report["fast"].metrics["accuracy"]
    assert report["slow"].is_pareto == better


def test_reports_read_back(tmp_path: Path, classifiers: Any) -> None:
    modules, monitor = classifiers
    report = quick(modules, loader(), training={"trained": monitor})
    rows = list(csv.DictReader(io.StringIO(report.to_csv(tmp_path / "report.csv"))))
    assert [row["model"] for row in rows] == ["fresh", "trained"]
    assert float(rows[1]["accuracy"]) == report["trained"].metrics["accuracy"]
    data = json.loads(report.to_json(tmp_path / "report.json"))
    assert data[1]["profile"]["batch_size"] == 8
    header, rule, *lines = report.to_markdown(tmp_path / "report.md").splitlines()
    assert header.count("|") == rule.count("|") == lines[0].count("|") == lines[1].count("|")
    assert all(name in header for name in ("training (s)", "samples/s", "epochs", "training peak (bytes)"))
    assert float(rows[1]["training_samples_per_second"]) == monitor.cost.samples_per_second
    assert rows[0]["training_epochs"] == ""
    assert rows[1]["training_epochs"] == "6"
    assert "*" in lines[1]
    assert all((tmp_path / f"report.{kind}").stat().st_size > 100 for kind in ("csv", "json", "md"))
    assert "trained" in str(report)


def test_the_page_is_well_formed_and_needs_no_network(tmp_path: Path, classifiers: Any) -> None:
    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.found.append(tag)
            assert not {"src", "href"} & {name for name, value in attrs if not str(value).startswith("#")}

    modules, _ = classifiers
    page = quick({"<b>": modules["fresh"], "trained": modules["trained"]}, loader()).to_html(
        tmp_path / "r.html"
    )
    tags = Tags()
    tags.feed(page)
    assert tags.found.count("tr") == 1 + 2 + 6 + 7  # models, two groups, metrics, costs
    assert tags.found.count("td") == 2 * (6 + 7)
    assert "svg" in tags.found
    assert "<b>" not in page
    assert (tmp_path / "r.html").read_text().strip() == page


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here to look at the page with")
def test_a_browser_shows_the_page(tmp_path: Path, classifiers: Any) -> None:
    modules, _ = classifiers
    models = {"fresh": modules["fresh"], "trained": modules["trained"], "broken": nn.Linear(3, 3)}
    quick(models, loader()).to_html(tmp_path / "report.html")
    picture = tmp_path / "report.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    for what in ("--dump-dom", f"--screenshot={picture}"):
        command = [BROWSER, *options, what, (tmp_path / "report.html").as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        if what == "--dump-dom":
            assert re.search(r">broken<span class=\"mark\">failed</span>", shown.stdout)
            assert "Against fresh</h1>" in shown.stdout
    assert picture.stat().st_size > 10_000


def test_plot(tmp_path: Path, classifiers: Any) -> None:
    report = quick(classifiers[0], loader())
    figure = report.plot(tmp_path / "front.png", cost="parameters")
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"fresh", "trained"}
    assert (tmp_path / "front.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="`cost` must be one of 'parameters'"):
        report.plot(cost="price")


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_monitor_counts_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    saved = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    monitor = CostMonitor()
    trainer(tmp_path, monitor, saved).fit(Classifier(), loader(), loader())
    cost = monitor.cost
    assert (cost.epochs, cost.steps, cost.samples) == (4, 16, 128)
    assert cost.seconds > 0
    assert cost.peak_bytes > 1_000_000
    assert cost.samples_per_second == pytest.approx(128 / cost.seconds)
    assert monitor.cost == cost  # and the clock has stopped

    resumed = CostMonitor()
    run = trainer(tmp_path, resumed, pl.callbacks.ModelCheckpoint(tmp_path), max_epochs=6)
    run.fit(Classifier(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert (resumed.cost.epochs, resumed.cost.steps, resumed.cost.samples) == (6, 24, 192)


def test_the_monitor_starts_anew_with_each_fit(tmp_path: Path) -> None:
    monitor = CostMonitor()
    for _ in range(2):
        trainer(tmp_path, monitor, max_epochs=2).fit(Classifier(), loader())
        assert monitor.cost.steps == 8
