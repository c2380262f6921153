"""What an ensemble is made of: modules, checkpoints with their class, and what loads itself."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_structopt._checks import require_list


class Loadable(Protocol):
    """Something that gives a module when asked, as the results of a sweep do."""

    def load(self) -> nn.Module:
        """Return the module."""


Member: TypeAlias = nn.Module | tuple[type[nn.Module], str | Path] | Loadable


def settle(members: Sequence[Member], *, trained: bool = False) -> list[nn.Module]:
    """Load ``members``, each once, and get them ready for an ensemble.

    Args:
        members: Modules, pairs of a LightningModule's class and the path of a checkpoint, or objects with ``load()``.
        trained: Whether the ensemble trains them. If not, they are put in evaluation mode and need no gradients.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        TypeError: If one is something else.
        ValueError: If there is none, or a checkpoint doesn't fit its class.

    Example:
        >>> [member.training for member in settle([nn.Linear(2, 3), nn.Linear(2, 3)])]
        [False, False]
    """
    given = (
        [members] if isinstance(members, nn.Module) and not isinstance(members, nn.ModuleList) else members
    )
    require_list("members", given)
    loaded = [_loaded(member, index) for index, member in enumerate(given)]
    if not loaded:
        raise ValueError(
            "`members` must have at least one member. Found none. Give modules, pairs of a class and a checkpoint's "
            "path, or results of a sweep."
        )
    if not trained:
        _freeze(loaded)
    return loaded


def _loaded(member: Any, index: int) -> nn.Module:
    if isinstance(member, nn.Module):
        return member
    if isinstance(member, (tuple, list)) and len(member) == 2 and inspect.isclass(member[0]):
        return _from_checkpoint(*member)
    if not inspect.isclass(member) and callable(getattr(member, "load", None)):
        module = member.load()
        if isinstance(module, nn.Module):
            return module
    raise TypeError(
        "A member must be a module, a pair of a LightningModule's class and the path of a checkpoint, or an object "
        f"whose `load()` returns a module. Found `members[{index}] = {member!r}`."
    )


def _from_checkpoint(kind: Any, path: str | Path) -> nn.Module:
    if not hasattr(kind, "load_from_checkpoint"):
        raise TypeError(
            "A checkpoint is loaded by a LightningModule's class. Found a pair with "
            f"`{kind.__name__}`, which has no `load_from_checkpoint`. Load it yourself, and give the module."
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"A member's checkpoint must be a file. Found none at `{path}`.")
    try:
        module: nn.Module = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling raises on a file that is something else
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"A member's checkpoint must be of its class. Found `{path}`, which `{kind.__name__}` can't load: "
            f"{reason} Give the class that saved it, with hyperparameters saved; or load it yourself."
        ) from error
    return module


def _freeze(members: Sequence[nn.Module]) -> None:
    training = [str(i) for i, m in enumerate(members) if any(part.training for part in m.modules())]
    if training:
        rank_zero_info(
            f"Members in training mode are put in evaluation mode, as the ensemble doesn't train them: "
            f"{', '.join(training)}."
        )
    for member in members:
        member.eval().requires_grad_(False)
