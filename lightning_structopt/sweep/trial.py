"""One rung of one candidate, as it runs in a process of its own."""

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_structopt._checks import require_lightning
from lightning_structopt.sweep.callback import ExactResume, RefusedError, Rung, UnsoundError
from lightning_structopt.sweep.candidates import Candidate
from lightning_structopt.sweep.channel import Channel
from lightning_structopt.sweep.heirs import Mutation
from lightning_structopt.sweep.inheritance import Birth, BirthError, example_of
from lightning_structopt.sweep.pickles import load
from lightning_structopt.sweep.spec import Send, TrialSpec

_LONGEST_REASON = 200  # characters; the log has all of it
_QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def run_trial(spec: TrialSpec, send: Send) -> None:
    """Train a candidate up to its rung; what comes of it goes through ``send``, and errors do too.

    Args:
        spec: What to do.
        send: Takes ``{"costs": ...}``, one ``{"epoch": ..., "score": ...}`` for each epoch, and in the end
            ``{"done": ...}``, ``{"refused": reason}`` or ``{"failed": reason}``.

    Raises:
        KeyboardInterrupt: If that is what ended it.
    """
    finished: list[dict[str, Any]] = []
    start = monotonic()

    def forward(message: dict[str, Any]) -> None:
        # The last word is only said when training is torn down, so that nothing can still go wrong after it.
        (finished.append if "done" in message else send)(message)

    try:
        _fit(spec, forward)
    except (RefusedError, BirthError) as refusal:
        send({"refused": str(refusal)})
    except UnsoundError as reason:
        send({"failed": str(reason)})
    except (Exception, SystemExit) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # of which Lightning makes an exit
            raise KeyboardInterrupt from None
        send({"failed": _in_a_line(error)})
        with suppress(OSError):  # a full disk, which may be what went wrong
            traceback.print_exc()
    else:
        for message in finished:
            send({"done": message["done"] | {"seconds": monotonic() - start}})


def _fit(spec: TrialSpec, send: Send) -> None:
    sys.path[:] = [*spec.import_path] or sys.path
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    candidate, arguments, rules, parameters, changes = load(Path(spec.candidate))
    data = _data(spec, candidate)
    pl.seed_everything(spec.seed, workers=True, verbose=False)
    module = build(spec.name, candidate, parameters, changes[:-1] if spec.newborn else changes)
    callbacks: list[pl.Callback] = [ExactResume(spec), Rung(spec, rules, send)]
    resume = spec.resume
    if spec.newborn:
        birth = _birth(spec, module, changes[-1])
        callbacks.insert(1, birth)
        resume = str(birth.file)
    trainer = pl.Trainer(**_arguments(spec, arguments, callbacks))
    require_lightning("ArchitectureSweep", trainer, module)
    # Safe: this process has just run what lay beside that checkpoint, and hyperparameters may be of any class.
    options: dict[str, Any] = {"ckpt_path": resume, "weights_only": False}
    if isinstance(data[0], pl.LightningDataModule):
        trainer.fit(module, datamodule=data[0], **options)
    else:
        trainer.fit(module, *data, **options)


def _data(spec: TrialSpec, candidate: Candidate) -> tuple[Any, Any]:
    data = candidate.data
    if data is None or callable(data):
        shared = load(Path(spec.data))
        data = shared if data is None else _part_of(shared, data)
    return data if isinstance(data, tuple) else (data, None)


def _birth(spec: TrialSpec, module: Any, change: tuple[Mutation, Path]) -> Birth:
    def again() -> tuple[Any, Any]:  # data that training doesn't use
        return _data(spec, load(Path(spec.candidate))[0])

    assert spec.resume is not None
    return Birth(
        module, change[0], example_of(module, again), Path(spec.resume), change[1], Path(spec.directory)
    )


def _part_of(shared: tuple[Any, Any], choose: Callable[[Any], Any]) -> Any:
    """Return a candidate's own part of the data that were given to ``run``."""
    return choose(shared[0] if isinstance(shared[0], pl.LightningDataModule) else shared)


def build(
    name: str,
    candidate: Candidate,
    parameters: Mapping[str, Any],
    changes: Sequence[tuple[Mutation, Path]] = (),
) -> Any:
    """Build the module of ``candidate``, and change it as its ``changes`` say, which lie in files.

    Raises:
        TypeError: If it is no LightningModule.
    """
    module = candidate.build(**parameters)
    if not isinstance(module, torch.nn.Module) or not hasattr(module, "training_step"):
        raise TypeError(
            f"Candidate {name!r} must return a LightningModule. Found a `{type(module).__name__}`."
        )
    for mutation, file in changes:
        mutation.saved_plan(file).apply_in_place(module)
    return module


def _arguments(spec: TrialSpec, given: Mapping[str, Any], ours: list[pl.Callback]) -> dict[str, Any]:
    """Return the Trainer's arguments: the user's callbacks lie between ours, of which Lightning puts one last."""
    callbacks = given.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    logger = given.get("logger", False)
    named = callable(logger) and not isinstance(logger, pl.loggers.Logger)
    return {
        **_QUIET,
        **given,
        "logger": logger(spec.name) if named else logger,  # a function of the name: a run for each candidate
        "callbacks": [*ours[:-1], *callbacks, ours[-1]],
        "enable_checkpointing": True,  # the rung's callback counts as one; there is no other unless given
        "max_epochs": spec.total_epochs,
        "default_root_dir": spec.directory,
    }


def main(path: str) -> None:
    """Run the trial of the spec at ``path``; ranks other than the first have nobody to tell."""
    spec = TrialSpec.read(path)
    descriptor = os.environ.pop("STRUCTOPT_CHANNEL", None)
    if descriptor is None:
        _fit(spec, _ignore)
        return
    channel = Channel(int(descriptor))
    channel.die_with_driver()
    run_trial(spec, channel.send)


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


def _ignore(message: dict[str, Any]) -> None:
    """Only the first rank has somebody to tell."""
