"""What a sweep adds to a candidate's Trainer: a stop at the rung, and a checkpoint from which all goes on exactly."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_structopt.sweep.constraints import Rule, first_reason, measure
from lightning_structopt.sweep.inheritance import names_of
from lightning_structopt.sweep.spec import Send, TrialSpec


class RefusedError(Exception):
    """A constraint refuses the candidate."""


class UnsoundError(Exception):
    """The candidate can't be compared with others."""


class ExactResume(Callback):
    """Writes the checkpoint of the rung and, at the next one, goes on as if training had not stopped.

    It comes before all other callbacks: what they do when training ends must not be in the checkpoint, and they must
    find the random state that they would have found.

    Args:
        spec: Where to write.
    """

    def __init__(self, spec: TrialSpec) -> None:
        self._spec = spec
        self._restored: Mapping[str, Any] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"ranks": self._ranks, "parameters": self._names} if hasattr(self, "_ranks") else {}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The place that stateful loaders are at is the end of an epoch, which they would come to once more. Data sets
        # with a state of their own may go on from it over epochs.
        if not any(hasattr(getattr(part, "dataset", None), "state_dict") for part in _loaders(trainer)):
            checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._restored is None:
            return
        # In the first epoch after a restart Lightning keeps the iterator that it made before samplers were told the
        # epoch (#21938), and before the random states are what they were. Here every rung begins with a new epoch.
        trainer.fit_loop._resuming_from_checkpoint = False
        _restore_randomness(trainer, self._restored["ranks"][trainer.global_rank])
        self._restored = None

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ranks = _of_all_ranks(_randomness(trainer))
        self._names = names_of(trainer.optimizers, pl_module)  # for children, which have others at each place
        target = Path(self._spec.save)
        unfinished = target.with_suffix(".part")
        try:
            trainer.save_checkpoint(unfinished)
            if trainer.is_global_zero:
                remove(target)
                os.replace(unfinished, target)
        except BaseException:
            remove(unfinished)
            raise
        trainer.strategy.barrier("checkpoint of the rung")


class Rung(Checkpoint):
    """Watches the metric, refuses what is too costly, and stops training at the rung.

    A ``Checkpoint``, as those come after all other callbacks, so that it sees what they log.

    Args:
        spec: Says when to stop and what to watch.
        rules: The constraints; none after the first rung.
        send: Takes messages for the driver.
    """

    def __init__(self, spec: TrialSpec, rules: Sequence[Rule], send: Send) -> None:
        self._spec, self._rules, self._send = spec, rules, send
        self._measured = spec.resume is not None and not spec.newborn
        self._epoch = 0
        self._score: float | None = None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._measured:
            return
        self._measured = True
        with isolate_rng():
            costs = trainer.strategy.broadcast(measure(pl_module, batch))
            reason = trainer.strategy.broadcast(first_reason(self._rules, pl_module, costs))
        self._tell(trainer, {"costs": costs})
        if reason is not None:
            raise RefusedError(reason)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch = trainer.current_epoch + 1
        value = trainer.callback_metrics.get(self._spec.monitor)
        score = trainer.strategy.broadcast(None if value is None else float(value))
        if score is not None:
            if not math.isfinite(score):
                raise UnsoundError(f"`{self._spec.monitor}` is {score} after epoch {self._epoch}")
            self._score = score
            self._tell(trainer, {"epoch": self._epoch, "score": score})
        if self._epoch >= self._spec.epochs:
            trainer.should_stop = True

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._epoch == 0:
            raise UnsoundError("no epoch of training took place")
        if self._score is None:
            found = ", ".join(map(repr, sorted(trainer.callback_metrics))) or "nothing"
            raise UnsoundError(
                f"`monitor = {self._spec.monitor!r}` must be logged in each rung. Found that {found} is logged"
            )
        ended = self._epoch < self._spec.epochs
        self._tell(trainer, {"done": {"epochs": self._epoch, "score": self._score, "ended": ended}})

    def _tell(self, trainer: pl.Trainer, message: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            self._send(message)


def remove(path: Path) -> None:
    """Remove a checkpoint, which may be a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _randomness(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the global random states and those of the loaders' own generators, as tensors and plain values."""
    states = _collect_rng_states()
    kind, keys, *rest = states["numpy"]
    states["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *rest)
    return {"global": states, "loaders": [generator.get_state() for generator in _generators(trainer)]}


def _restore_randomness(trainer: pl.Trainer, found: Mapping[str, Any]) -> None:
    states = dict(found["global"])
    kind, keys, *rest = states["numpy"]
    states["numpy"] = (kind, keys.numpy().astype("uint32"), *rest)
    states["python"] = _as_tuples(states["python"])
    _set_rng_states(states)
    for generator, state in zip(_generators(trainer), found["loaders"], strict=True):
        generator.set_state(state.cpu() if isinstance(state, Tensor) else state)


def _generators(trainer: pl.Trainer) -> list[torch.Generator]:
    return list({id(generator): generator for generator in _all_generators(trainer)}.values())


def _all_generators(trainer: pl.Trainer) -> Iterator[torch.Generator]:
    for loader in _loaders(trainer):
        batches = getattr(loader, "batch_sampler", None)
        for part in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                yield generator


def _loaders(trainer: pl.Trainer) -> list[Any]:
    return tree_leaves((trainer.train_dataloader, trainer.val_dataloaders))


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _of_all_ranks(state: dict[str, Any]) -> list[Any]:
    """Return the states of all ranks, which call this together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states
