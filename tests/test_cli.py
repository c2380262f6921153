"""The command line, on the configurations that the examples have."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import lightning_structopt as so
from lightning_structopt.cli import main
from lightning_structopt.cli.commands import COMMANDS, extras

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
QUICK = (
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning advises on loaders, loggers and folders
Run = Callable[..., int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command with the configuration of that name, in one folder for all tests; the first one trains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cli"))
        patch.syspath_prepend(CONFIGS)

        def run(command: str, name: str, *more: str) -> int:
            return main([command, "--config", str(CONFIGS / f"{name}.yaml"), *more])

        assert run("fit", "quickstart", *QUICK) == 0
        yield run


def weights(path: str) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_fit_prunes(run: Run) -> None:
    matrices = [weight for weight in weights("runs/quickstart/last.ckpt").values() if weight.ndim > 1]
    zeros, total = sum(int((w == 0).sum()) for w in matrices), sum(w.numel() for w in matrices)
    assert zeros == round(0.9 * total)


def test_shrink_writes_what_load_shrunk_reads(run: Run) -> None:
    import digits

    assert run("shrink", "shrink") == 0
    small = so.load_shrunk(digits.Classifier, "runs/shrink/small.ckpt")
    again = so.ShrinkPlan.load("runs/shrink/plan.json").apply(digits.Classifier())
    again.load_state_dict(weights("runs/shrink/small.ckpt"))
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(small.eval()(images), again.eval()(images))
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(
        p.numel() for p in digits.Classifier().parameters()
    )


def test_shrink_without_a_target_keeps_outputs(run: Run) -> None:
    import digits

    assert run("shrink", "shrink", "--target", "null", "--output", "runs/exact") == 0
    whole = digits.Classifier.load_from_checkpoint("runs/quickstart/last.ckpt").eval()
    small = so.load_shrunk(digits.Classifier, "runs/exact/small.ckpt").eval()
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(small(images), whole(images), rtol=1e-5, atol=1e-5)


def test_distill_writes_a_student_of_its_own_class(run: Run) -> None:
    import digits

    assert run("distill", "distill", *QUICK) == 0
    assert digits.Classifier.load_from_checkpoint("runs/distill/student.ckpt").hparams.width == 8


def test_compare_reads_small_checkpoints_too(run: Run) -> None:
    assert run("shrink", "shrink") == 0
    models = [f"--models.{name}=digits.Classifier" for name in ("whole", "small")]
    paths = ["--checkpoints.whole=runs/quickstart/last.ckpt", "--checkpoints.small=runs/shrink/small.ckpt"]
    options = ["--data=digits.Digits", "--seconds=0.01", "--output=runs/compare"]
    assert main(["compare", *models, *paths, *options]) == 0
    whole, small = json.loads(Path("runs/compare/report.json").read_text())
    assert small["costs"]["parameters"] < 0.6 * whole["costs"]["parameters"]
    assert {path.suffix for path in Path("runs/compare").iterdir()} == {
        ".md",
        ".csv",
        ".json",
        ".html",
        ".png",
    }


def test_sweep_ranks_and_writes_tables(run: Run) -> None:
    more = ("--budget.init_args.max_epochs=3", "--candidates.huge=digits.Classifier")
    grow = "--mutate=[{class_path: lightning_structopt.Widen, init_args: {factor: 1.5}}]"
    assert run("sweep", "sweep", *more, grow) == 0
    found = json.loads(Path("runs/sweep/result.json").read_text())["candidates"]
    founders = {candidate["name"] for candidate in found if candidate["parent"] is None}
    assert founders == {"narrow", "middle", "wide", "huge"}
    assert [c["state"] for c in found if c["parent"] in founders] == ["finished"]
    assert found[0]["state"] == "finished"
    assert weights("runs/sweep/best.ckpt")


def test_profile_takes_a_shape(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "profile", "--seconds=0.01") == 0
    assert "19,658" in capsys.readouterr().out
    options = ("--seconds=0.01", "--batch_sizes=[1,4]", "--threads=[1,2]", "--output=runs/sizes")
    assert run("profile", "profile", *options) == 0
    times = json.loads(Path("runs/sizes/profile.json").read_text())["latencies"]
    assert [(time["batch_size"], time["threads"]) for time in times] == [(1, 1), (1, 2), (4, 1), (4, 2)]


def test_a_language_model_is_trained_and_distilled(run: Run) -> None:
    import text

    short = (*QUICK, "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--data.limit=20000")
    small = ("--model.width=16", "--model.layers=1")
    assert run("fit", "language_model", *short, *small) == 0
    teacher = ("--teacher.init_args.width=16", "--teacher.init_args.layers=1")
    more = ("--trainer.limit_train_batches=2", "--data.init_args.limit=20000")
    assert run("distill", "distill_language_model", *QUICK, *more, *teacher) == 0
    student = text.ByteModel.load_from_checkpoint("runs/language_model/student.ckpt")
    assert student.hparams.width == 32


@pytest.mark.parametrize("name", ["lottery_ticket", "channels", "grow", "adaptive", "ensemble"])
def test_other_configurations_fit(run: Run, name: str) -> None:
    assert run("fit", name, *QUICK, "--trainer.fast_dev_run", "true") == 0


def test_every_configuration_is_run_here() -> None:
    text = Path(__file__).read_text()
    assert [path.stem for path in CONFIGS.glob("*.yaml") if f'"{path.stem}"' not in text] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("profile", "profile", "--sconds=1"), "There is no 'sconds'. Did you mean 'seconds'"),
        (
            ("profile", "profile", "--model.init_args.widht=3"),
            "has no argument 'widht'. Did you mean 'width'",
        ),
        (("profile", "profile", "--model=digits.Clasifier"), "`digits` has no 'Clasifier'. .*'Classifier'"),
        (("profile", "profile", f"--checkpoint={__file__}"), "must be a file of tensors and plain data"),
        (("profile", "profile", "--checkpoint=none.ckpt"), "none.ckpt"),
        (("profile", "profile", "--checkpoint=runs/wrong.pt"), "doesn't fit `Classifier`"),
        (("profile", "profile", "--input=[2,3]"), r"got input of size: \[2, 3\]"),
        (("compare", "compare", "--checkpoints.other=x"), "Found 'other'"),
        (("sweep", "sweep", "--mode=best"), "mode"),
        (("profile", "profile", "--batch_sizes=[0]"), "`batch_sizes` must be at least 1"),
        (("fit", "quickstart", "--trainer.max_epocs=1"), "There is no 'trainer.max_epocs'. .*'max_epochs'"),
        (("fit", "quickstart", f"--ckpt_path={__file__}"), "A checkpoint must be a file of tensors"),
    ],
    ids=lambda value: value[-1].split("=")[0] if isinstance(value, tuple) else "",
)
def test_errors_are_one_line(
    run: Run, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weight": torch.ones(2)}, "runs/wrong.pt")
    capsys.readouterr()
    assert run(*arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"structopt {arguments[0]}: ")
    assert re.search(message, line)


MISTAKES = {
    "trainer": ({"trainer": {"max_epocs": 1}}, "There is no 'trainer.max_epocs'. .*'max_epochs'"),
    "command": ({"modle": {"class_path": "digits.Classifier"}}, "There is no 'modle.class_path'. .*'model'"),
    "callback": (
        {
            "trainer": {
                "callbacks": [{"class_path": "lightning_structopt.LRDecay", "init_args": {"intervall": 1}}]
            }
        },
        "`lightning_structopt.LRDecay` has no argument 'intervall'. Did you mean 'interval'",
    ),
    "class": (
        {"trainer": {"callbacks": [{"class_path": "lightning_structopt.IterativePrunning"}]}},
        "`lightning_structopt` has no 'IterativePrunning'. Did you mean 'IterativePruning'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_keys_that_do_not_exist_name_those_that_come_near(
    run: Run, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, message = MISTAKES[name]
    Path("wrong.yaml").write_text(json.dumps({"model": {"class_path": "digits.Classifier"}} | wrong))
    capsys.readouterr()
    assert main(["fit", "--config", "wrong.yaml"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, line)
    assert len(line) < 200


def test_debug_shows_the_traceback(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "profile", "--checkpoint=none.ckpt", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in shown
    assert "extra: examples" in shown
    assert version("scikit-learn") in shown
    assert extras()["onnx"] == ["onnx", "onnxruntime", "onnxscript"]
    assert extras()["cli"] == ["jsonargparse"]


def test_the_doctor_comes_where_the_commands_lack_jsonargparse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["doctor"]) == 0
    assert "extra: onnx" in capsys.readouterr().out
    assert main(["profile"]) == 2
    assert "lightning-structopt[cli]" in capsys.readouterr().err


def test_python_runs_it_as_a_module() -> None:
    command = [sys.executable, "-m", "lightning_structopt"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "usage: structopt" in shown
    failed = subprocess.run([*command, "profile", "--input=[1]"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines()[-1].startswith("structopt profile: ")


def test_every_example_has_a_configuration() -> None:
    examples = {path.stem for path in (CONFIGS.parent).glob("*.py")} - {"data"}
    assert examples <= {path.stem for path in CONFIGS.glob("*.yaml")}


def test_the_pipeline_of_one_command(run: Run) -> None:
    import digits

    assert (
        run("distill", "compress", "--trainer.max_epochs=6", "--teacher_checkpoint=runs/quickstart/last.ckpt")
        == 0
    )
    small = so.load_shrunk(digits.Classifier, "runs/compress/student.ckpt")
    assert sum(p.numel() for p in small.parameters()) < sum(
        p.numel() for p in digits.Classifier().parameters()
    )


def test_comparisons_take_metrics_and_what_training_took(run: Run) -> None:
    metric = {"class_path": "torchmetrics.classification.MulticlassRecall", "init_args": {"num_classes": 10}}
    settings = {
        "models": {"it": {"class_path": "digits.Classifier"}},
        "checkpoints": {"it": "runs/quickstart/last.ckpt"},
        "metrics": {"recall of all": metric},
        "data": {"class_path": "digits.Digits"},
        "seconds": 0.01,
        "output": "runs/measured",
    }
    Path("measured.yaml").write_text(json.dumps(settings))
    assert main(["compare", "--config", "measured.yaml"]) == 0
    (found,) = json.loads(Path("runs/measured/report.json").read_text())
    assert list(found["metrics"]) == ["recall of all"]
    assert found["training"]["epochs"] == 1


def test_an_unknown_command_names_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["shrnk"])
    assert ended.value.code == 2
    assert "shrink" in capsys.readouterr().err


def test_the_path_is_left_as_it_was(run: Run) -> None:
    before = list(sys.path)
    run("profile", "profile", "--seconds=0.01")
    assert sys.path == before
