"""Plans as plain data and as files."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from typing_extensions import Self

from lightning_structopt._files import as_a_whole
from lightning_structopt._stand_ins import original_of

VERSION = 1


class SavedPlan(ABC):
    """What is done to modules of one class. It holds names and numbers only, so that loading one runs no code."""

    module_class: str
    parts: ClassVar[str]
    """What its data has, in words."""

    @abstractmethod
    def _data(self) -> dict[str, Any]:
        """Return the plan as plain data."""

    @classmethod
    @abstractmethod
    def _of_data(cls, data: Mapping[str, Any]) -> Self:
        """Return the plan of what :meth:`_data` returned, also after a way through JSON."""

    def require_class_of(self, module: nn.Module) -> None:
        """Raise unless ``module`` is of the class that the plan was made for.

        Raises:
            ValueError: If it isn't.
        """
        if class_name(module) != self.module_class:
            raise ValueError(
                f"A plan fits the class that it was made for, `{self.module_class}`. Found "
                f"`{class_name(module)}`. Give a fresh module of that class."
            )

    def as_data(self) -> dict[str, Any]:
        """Return the plan as plain data, which :meth:`from_data` reads."""
        return {"version": VERSION, **self._data()}

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file, with a checksum; one that was there before stays until the new one is."""
        data = json.loads(json.dumps(self.as_data()))
        with as_a_whole(Path(path)) as beside:
            beside.write_text(json.dumps({**data, "checksum": _checksum(data)}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan that :meth:`save` wrote.

        Raises:
            ValueError: If the file is not a plan, one of another version, or changed since.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(
                f"A plan is a JSON file. Found {str(path)!r}: {error}. Save one by `plan.save`."
            ) from error
        if isinstance(data, dict) and "checksum" in data and data.pop("checksum") != _checksum(data):
            raise ValueError(
                f"A plan must be as it was saved. Found {str(path)!r}, which has changed since. Save it anew; if you "
                "changed it on purpose, remove its `checksum`."
            )
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Return the plan of what :func:`json.loads` returned.

        Raises:
            ValueError: If that is not a plan, or one of another version.
        """
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION:
            raise ValueError(
                f"This release reads plans of version {VERSION}. Found version {version!r}. Make the plan anew, or "
                "install the release that wrote it."
            )
        try:
            return cls._of_data(data)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"A plan has {cls.parts}. Found {error!r}. Save one by `plan.save`.") from error


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class; of the module that it stands in for, if it does."""
    kind = type(original_of(module))
    return f"{kind.__module__}.{kind.__qualname__}"


@contextmanager
def naming_what_is_there() -> Iterator[None]:
    """Turn what torch says of names and indices that aren't there into an error about the plan.

    Raises:
        ValueError: If torch raises.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            "A plan must name parts of the module, and indices and values that they can have. Found one that doesn't: "
            f"{type(error).__name__}: {error}. Make the plan anew, for a module of this class and these sizes."
        ) from error


def _checksum(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
