"""How large activations and gradients are, layer by layer, and whether that is a problem."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lightning_structopt._dtensors import local
from lightning_structopt._precision import widened

Trouble = Literal["vanishing", "exploding"]


@dataclass(frozen=True)
class Finding:
    """A layer whose signal is too small or too large.

    Args:
        layer: Its name.
        signal: ``"activations"`` or ``"gradients"``.
        trouble: ``"vanishing"`` or ``"exploding"``, which stands for values that are not finite too.
        size: The root mean square of the signal.
    """

    layer: str
    signal: Literal["activations", "gradients"]
    trouble: Trouble
    size: float


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that mix their inputs by a weight of their own, such as linear and convolutional ones."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(weight := getattr(part, "weight", None), nn.Parameter) and weight.ndim > 1
    }


def root_mean_square(tensor: Tensor) -> Tensor:
    """Return the size of a signal: a scalar on its device, so that nobody waits."""
    return widened(local(tensor.detach())).square().mean().sqrt()


class ActivationTap:
    """Notes the size of every layer's outputs while it is open.

    Args:
        module: The module whose layers to watch.
    """

    def __init__(self, module: nn.Module) -> None:
        self._sizes: dict[str, Tensor] = {}
        self._handles = [
            layer.register_forward_hook(self._note(name)) for name, layer in layers_of(module).items()
        ]

    def close(self) -> dict[str, float]:
        """Stop watching, and return the sizes by layer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return {name: float(size) for name, size in self._sizes.items()}

    def _note(self, name: str) -> Any:
        def note(layer: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                self._sizes[name] = root_mean_square(output)

        return note


def gradient_sizes(module: nn.Module) -> dict[str, float]:
    """Return the size of the gradient of each layer's weight that has one."""
    found = {}
    for name, layer in layers_of(module).items():
        gradient = layer.weight.grad
        if isinstance(gradient, Tensor) and local(gradient).numel():
            found[name] = root_mean_square(gradient)
    return {name: float(size) for name, size in found.items()}


def judge(
    signal: Literal["activations", "gradients"],
    sizes: Mapping[str, float],
    low: float,
    high: float,
    zero_is_meant: bool,
) -> list[Finding]:
    """Return the layers whose signal is below ``low`` or above ``high``.

    Args:
        signal: Which one.
        sizes: By layer. Gradients have no scale of their own: they vanish against the largest of them.
        low: The least size that is fine.
        high: The largest.
        zero_is_meant: Whether exact zeros are fine, as behind a norm that starts at zero.

    Returns:
        The findings, in the order of the layers.
    """
    finite = [size for size in sizes.values() if size < float("inf")]
    unit = max(finite, default=1.0) if signal == "gradients" else 1.0
    found = []
    for layer, size in sizes.items():
        if not size <= high:  # also what is not a number
            found.append(Finding(layer, signal, "exploding", size))
        elif size < low * unit and not (size == 0 and zero_is_meant):
            found.append(Finding(layer, signal, "vanishing", size))
    return found


def explain(findings: list[Finding], step: int, low: float, high: float) -> str:
    """Return one warning about all of ``findings``, which are of one signal and one kind."""
    first = findings[0]
    shown = ", ".join(f"`{each.layer}` ({each.size:.2g})" for each in findings[:5])
    more = f" and {len(findings) - 5} more" if len(findings) > 5 else ""
    when = "at initialization" if step == 0 else f"at step {step}"
    if first.signal == "activations":
        rule = f"The activations of a layer must keep a root mean square of {low:g} to {high:g}."
    else:
        rule = (
            f"Gradients must stay below {high:g}, and above {low:g} of those of the layer with the largest."
        )
    if first.trouble == "vanishing":
        remedy = "Start with `initialize(net, LSUV(), batch=inputs)`, add norms, or use residual blocks."
    else:
        remedy = "Add norms, clip gradients (`gradient_clip_val`), or lower the learning rate."
    return f"{rule} Found {first.trouble} {first.signal} {when}: {shown}{more}. {remedy}"


def by_kind(findings: list[Finding]) -> Iterator[list[Finding]]:
    """Yield the findings of each signal and kind together."""
    for signal in ("activations", "gradients"):
        for trouble in ("vanishing", "exploding"):
            alike = [each for each in findings if (each.signal, each.trouble) == (signal, trouble)]
            if alike:
                yield alike
