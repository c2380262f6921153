"""Taps: what modules put out in the middle of someone else's pass, caught by name."""

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

LOGITS = "logits"
"""The name of a model's own output, where other names are those of modules in it."""


def tensor_of(output: Any, name: str, owner: str) -> Tensor:
    """Return the tensor of ``output``: itself, its ``logits``, or the first tensor of a tuple.

    Args:
        output: What a module put out.
        name: The module, for the message.
        owner: Whose module it is, for the message.

    Raises:
        TypeError: If there is none.

    Example:
        >>> import torch
        >>> tensor_of({"logits": torch.ones(1), "states": None}, "logits", "teacher")
        tensor([1.])
    """
    if isinstance(output, Tensor):
        return output
    inner = output.get(LOGITS) if isinstance(output, Mapping) else getattr(output, LOGITS, None)
    if inner is None and isinstance(output, Sequence) and output:
        inner = output[0]
    if isinstance(inner, Tensor):
        return inner
    raise TypeError(
        f"`{name}` of the {owner} must put out a tensor, something with `logits`, or a tuple that starts with a "
        f"tensor. Found a `{type(output).__name__}`. Tap a module in it by name."
    )


class Taps:
    """Catches outputs of the modules called ``names``, each of which must run exactly once while taps are open.

    Taps are hooks: put in place by :meth:`attach`, taken away by :meth:`remove`, and idle unless opened, so that
    validation leaves nothing behind.

    Args:
        module: The model to tap.
        names: Of its modules; :data:`LOGITS` is the model itself.
        owner: What to call the model in messages.

    Raises:
        ValueError: If there is no such module.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> taps = Taps(net, ["0", "logits"], "student")
        >>> taps.attach()
        >>> with taps:
        ...     output = net(torch.ones(1, 3))
        >>> caught = taps.take()
        >>> torch.equal(caught["logits"], output), caught["0"].shape
        (True, torch.Size([1, 2]))
    """

    def __init__(self, module: nn.Module, names: Iterable[str], owner: str) -> None:
        self.owner = owner
        self.names = tuple(dict.fromkeys(names))
        self._module = module
        self._caught: dict[str, list[tuple[Any, int | None]]] = {}
        self._handles: list[RemovableHandle] = []
        self._open = False

    def attach(self) -> None:
        """Put the hooks in place; attached taps stay as they are.

        Raises:
            ValueError: If a name is not that of a module, with near names.
        """
        if not self._handles:
            modules = [self._find(name) for name in self.names]
            pairs = zip(self.names, modules, strict=True)
            self._handles = [module.register_forward_hook(self._hook(name)) for name, module in pairs]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._caught = [], {}

    def __enter__(self) -> "Taps":
        self.attach()
        self._caught = {name: [] for name in self.names}
        self._open = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._open = False

    def take(self) -> dict[str, Tensor]:
        """Return what was caught since taps were opened, and keep nothing.

        Raises:
            ValueError: If a module ran never or more than once, or its output was changed in place since.
            TypeError: If its output holds no tensor.
        """
        caught, self._caught = self._caught, {}
        return {name: self._only(name, caught[name]) for name in self.names}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Taps":
        # Hooks stay where they are: a copy of the model is tapped when someone attaches its taps.
        return Taps(copy.deepcopy(self._module, memo), self.names, self.owner)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": [], "_caught": {}}

    def _find(self, name: str) -> nn.Module:
        if name == LOGITS:
            return self._module
        modules: dict[str, nn.Module] = dict(self._module.named_modules())
        if name in modules and name:
            return modules[name]
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4) or [n for n in modules if n][:5]
        listed = ", ".join(f"`{candidate}`" for candidate in near)
        raise ValueError(
            f'A tap must name a module of the {self.owner}, or "{LOGITS}" for its output. Found `{name}`, which the '
            f"`{type(self._module).__name__}` doesn't have. Near it: {listed or 'none, as it has no modules'}."
        )

    def _hook(self, name: str) -> Any:
        def catch(module: nn.Module, args: Any, output: Any) -> None:
            if self._open:
                self._caught[name].append((output, _version_of(output)))

        return catch

    def _only(self, name: str, outputs: list[tuple[Any, int | None]]) -> Tensor:
        if len(outputs) != 1:
            raise ValueError(self._miscounted(name, len(outputs)))
        output, version = outputs[0]
        if version is not None and output._version != version:
            raise ValueError(
                f"What a tap catches must stay as it is. Found that the output of `{name}` of the {self.owner} was "
                "changed in place afterwards. Tap the module that changes it (often an activation), or give that "
                "`inplace=False`."
            )
        return tensor_of(output, name, self.owner)

    def _miscounted(self, name: str, runs: int) -> str:
        if name == LOGITS and runs == 0 and self.owner == "student":
            names = [n for n, _ in self._module.named_children()]
            return (
                "The student's output is what `self(...)` returns in its `training_step`. Found no such call. Name the "
                f'module that gives it: `loss={{("NAME", "logits"): ...}}`, with NAME one of {names} or deeper.'
            )
        return (
            f"`{name}` of the {self.owner} must run exactly once in a training step. Found {runs} runs. Tap another "
            "module, one that runs once."
        )


def _version_of(output: Any) -> int | None:
    """Return what counts changes in place; None where nothing does, or a compiler orders them."""
    if not isinstance(output, Tensor) or torch.compiler.is_compiling() or output.is_inference():
        return None
    return output._version
