"""The command line, on the configurations that the examples have."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lightning_structopt as so
from lightning_structopt.cli import main
from lightning_structopt.cli.commands import COMMANDS

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
    assert (
        run("sweep", "sweep", "--budget.init_args.max_epochs=3", "--candidates.huge=digits.Classifier") == 0
    )
    found = json.loads(Path("runs/sweep/result.json").read_text())["candidates"]
    assert {candidate["name"] for candidate in found} == {"narrow", "middle", "wide", "huge"}
    assert found[0]["state"] == "finished"


def test_profile_takes_a_shape(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "profile", "--seconds=0.01") == 0
    assert "19,658" in capsys.readouterr().out


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
        (("profile", "profile", "--sconds=1"), "unrecognized arguments: --sconds.* Did you mean 'seconds'"),
        (("profile", "profile", "--model.init_args.widht=3"), "'widht' is not accepted Did you mean 'width'"),
        (("profile", "profile", "--model=digits.Clasifier"), "no attribute 'Clasifier'"),
        (("profile", "profile", f"--checkpoint={__file__}"), "must be a file of tensors and plain data"),
        (("profile", "profile", "--checkpoint=none.ckpt"), "none.ckpt"),
        (("profile", "profile", "--checkpoint=runs/wrong.pt"), "doesn't fit `Classifier`"),
        (("profile", "profile", "--input=[2,3]"), r"got input of size: \[2, 3\]"),
        (("compare", "compare", "--checkpoints.other=x"), "Found 'other'"),
        (("sweep", "sweep", "--mode=best"), "mode"),
        (("fit", "quickstart", "--trainer.max_epocs=1"), "max_epocs"),
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
    assert torch.__version__.split("+")[0] in capsys.readouterr().out


def test_an_unknown_command_names_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["shrnk"])
    assert ended.value.code == 2
    assert "shrink" in capsys.readouterr().err


def test_the_path_is_left_as_it_was(run: Run) -> None:
    before = list(sys.path)
    run("profile", "profile", "--seconds=0.01")
    assert sys.path == before
