"""Nets that answer early where they are sure."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_in, require_list, require_type
from lightning_structopt._devices import device_of, moved
from lightning_structopt._precision import widened
from lightning_structopt._undisturbed import evaluating
from lightning_structopt.blocks.adaptive import AdaptiveBlock, flops
from lightning_structopt.blocks.rows import has_shards

Outputs = Tensor | tuple[Tensor, ...]


class EarlyExit(AdaptiveBlock):
    r"""Stages with a head each; in evaluation a sample leaves at the first head that is sure of it.

    In training all stages run, and ``forward`` returns the logits of every head, for :meth:`loss`:
    :math:`L = \sum_k w_k L_k / \sum_k w_k`. In evaluation it returns one set of logits a sample, and only the samples
    that are left go on to the next stage. Sure is :math:`\max p \ge \theta` (``"probability"``), or
    :math:`1 - H(p) / \log C \ge \theta` (``"entropy"``). The last head takes whoever comes.

    :meth:`fit_threshold` finds :math:`\theta` for a budget; it is saved with the weights. Under ``torch.compile`` the
    evaluation graph breaks after each head. Exported graphs run all stages and choose at the end.

    Teerapittayanon, McDanel and Kung, "BranchyNet: Fast Inference via Early Exiting", 2016
    (https://arxiv.org/abs/1709.01686).

    Args:
        stages: Modules that follow one another.
        heads: Modules from the outputs of each stage to logits of shape (batch, classes).
        weights: Of each head's loss; 1 each if not given.
        confidence: ``"probability"`` or ``"entropy"``.
        threshold: :math:`\theta`, in [0, 1], until it is fitted.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or there isn't one head a stage.

    Example:
        >>> net = EarlyExit([nn.Linear(4, 8), nn.Linear(8, 8)], [nn.Linear(8, 3), nn.Linear(8, 3)])
        >>> [logits.shape for logits in net(torch.randn(2, 4))]
        [torch.Size([2, 3]), torch.Size([2, 3])]
        >>> net.eval()(torch.randn(2, 4)).shape
        torch.Size([2, 3])
    """

    threshold: Tensor
    costs: Tensor

    def __init__(
        self,
        stages: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        *,
        weights: Sequence[float] | None = None,
        confidence: Literal["probability", "entropy"] = "probability",
        threshold: float = 0.9,
    ) -> None:
        super().__init__()
        _require_pairs(stages, heads)
        require_choice("confidence", confidence, ("probability", "entropy"))
        require_in("threshold", threshold, 0, 1)
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)
        self.weights = _checked_weights(weights, len(heads))
        self.confidence = confidence
        self.register_buffer("threshold", torch.tensor(float(threshold)))
        # The share of each stage with its head in all operations: alike, until they are counted.
        self.register_buffer("costs", torch.full((len(heads),), 1 / len(heads)))

    @override
    def forward(self, inputs: Tensor) -> Outputs:
        if self.training:
            self._remember(torch.ones(()))
            return self._every_exit(inputs)
        if self._runs_dense:
            outputs = self._every_exit(inputs)
            self._remember(torch.ones(()))
            return self._first_sure(outputs)
        return self._alone(inputs) if len(inputs) == 1 and not has_shards(self) else self._until_sure(inputs)

    def loss(
        self,
        outputs: Outputs,
        targets: Tensor,
        function: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    ) -> Tensor:
        """Return the joint loss of all heads; in evaluation, the loss of the logits that there are.

        Args:
            outputs: What ``forward`` returned.
            targets: What ``function`` takes.
            function: The loss of one head.

        Returns:
            A scalar.
        """
        if isinstance(outputs, Tensor):
            return function(outputs, targets)
        losses = [w * function(each, targets) for w, each in zip(self.weights, outputs, strict=True)]
        return torch.stack(losses).sum() / sum(self.weights)

    @torch.no_grad()
    def fit_threshold(self, loader: Iterable[Any], budget: float) -> float:
        """Set the threshold to the most cautious one whose mean cost stays within a budget.

        The costs are operations, counted on the first batch; samples whose confidences are tied leave together.

        Args:
            loader: Validation data: batches of inputs, or tuples that begin with them.
            budget: The share of the operations of a full pass that a sample may take on average, in (0, 1].

        Returns:
            The threshold, in [0, 1].

        Raises:
            ValueError: If ``budget`` is out of range or below the cost of the first exit, the loader is empty, or
                there are several processes, each of which would find another threshold.
        """
        require_in("budget", budget, 0, 1, closed="right")
        _require_one_process()
        confidences = self._confidences(loader)
        cumulative = self.costs.double().cumsum(0).cpu()
        cumulative = cumulative / cumulative[-1]  # exactly 1 in the end, as a budget of 1 allows
        if float(cumulative[0]) > budget:
            raise ValueError(
                f"`budget` must be at least the cost of the first exit. Found `budget = {budget}` and a first exit "
                f"that takes {float(cumulative[0]):.3f} of all operations. Raise it, or give a smaller first stage."
            )
        candidates = torch.cat([confidences.flatten().sort().values, torch.ones(1)])
        low, high = 0, len(candidates) - 1  # at the lowest all leave at once, which is within the budget
        while low < high:
            middle = (low + high + 1) // 2
            spent = float(cumulative[_exits(confidences, candidates[middle])].mean())
            low, high = (middle, high) if spent <= budget + 1e-9 else (low, middle - 1)
        self.threshold.fill_(float(candidates[low]))
        return float(self.threshold)

    @override
    def expected_cost(self, inputs: Tensor) -> Tensor:
        """Return the operations that each sample takes at the present threshold.

        Args:
            inputs: As for ``forward``.

        Returns:
            Of shape (batch,).
        """
        with torch.no_grad(), evaluating(self):
            sure = self._sureness(self._every_exit(inputs))
        per_row = torch.tensor(self._flops(inputs), device=inputs.device) / max(1, len(inputs))
        return per_row.cumsum(0)[_exits(sure, self.threshold)]

    @override
    def extra_repr(self) -> str:
        return f"confidence={self.confidence!r}, threshold={float(self.threshold):.4g}"

    def _every_exit(self, inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            inputs = stage(inputs)
            outputs.append(head(inputs))
        return tuple(outputs)

    def _first_sure(self, outputs: tuple[Tensor, ...]) -> Tensor:
        chosen = outputs[-1]
        for logits in reversed(outputs[:-1]):
            sure = self._confidence(logits) >= self.threshold
            chosen = torch.where(sure[:, None], logits, chosen)
        return chosen

    def _until_sure(self, inputs: Tensor) -> Tensor:
        left = torch.arange(len(inputs), device=inputs.device)
        where, parts, executed = [], [], inputs.new_zeros((), dtype=torch.float32)
        for index, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            if index and len(left) == 0 and not any(has_shards(part) for part in (stage, head)):
                continue
            executed = executed + self.costs[index] * len(left)
            inputs = stage(inputs)
            logits = head(inputs)
            stays = torch.zeros(len(left), dtype=torch.bool, device=left.device)
            if index < len(self.heads) - 1:
                stays = self._confidence(logits) < self.threshold
            where.append(left[~stays])
            parts.append(logits[~stays])
            left, inputs = left[stays], inputs[stays]
        order = torch.cat(where).argsort()
        self._remember(executed / max(1, len(order)))
        return torch.cat(parts)[order]

    def _alone(self, inputs: Tensor) -> Tensor:
        """Run a single sample, of which there are no rows to choose."""
        last = len(self.heads) - 1
        for index, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            inputs = stage(inputs)
            logits: Tensor = head(inputs)
            if index == last or bool(self._confidence(logits) >= self.threshold):
                break
        self._remember(self.costs[: index + 1].sum())
        return logits

    def _confidence(self, logits: Tensor) -> Tensor:
        logs = widened(logits).log_softmax(-1)
        if self.confidence == "probability":
            return logs.max(-1).values.exp()
        entropy = -(logs.exp() * logs).sum(-1)
        return 1 - entropy / math.log(logits.shape[-1])

    def _sureness(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """Return the confidence of all heads but the last, of shape (batch, heads - 1)."""
        return torch.stack([self._confidence(logits) for logits in outputs[:-1]], dim=1)

    def _confidences(self, loader: Iterable[Any]) -> Tensor:
        found: list[Tensor] = []
        with evaluating(self):
            for batch in loader:
                inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                inputs = moved(inputs, device_of(self))
                if not found:
                    counted = torch.tensor(self._flops(inputs))
                    self.costs.copy_(counted / counted.sum())
                found.append(self._sureness(self._every_exit(inputs)).float().cpu())
        if not found:
            raise ValueError("`loader` must have batches. Found none. Give validation data.")
        return torch.cat(found)

    def _flops(self, inputs: Tensor) -> list[float]:
        """Return the operations of each stage with its head, for all of ``inputs``."""
        found = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            with torch.no_grad(), evaluating(self):
                outputs = stage(inputs)
            found.append(flops(stage, inputs) + flops(head, outputs))
            inputs = outputs
        return found


def _exits(confidences: Tensor, threshold: Tensor) -> Tensor:
    """Return the exit at which each sample leaves, of shape (batch,)."""
    sure = confidences >= threshold.to(confidences)
    always = torch.ones(len(sure), 1, dtype=torch.bool, device=sure.device)
    return torch.cat([sure, always], dim=1).int().argmax(1)


def _require_pairs(stages: Sequence[nn.Module], heads: Sequence[nn.Module]) -> None:
    for name, parts in (("stages", stages), ("heads", heads)):
        require_list(name, parts)
        for part in parts:
            require_type(name, part, nn.Module)
    if len(stages) != len(heads) or len(stages) < 2:
        raise ValueError(
            "`EarlyExit` needs one head a stage, and at least two of them. Found "
            f"{len(stages)} stages and {len(heads)} heads. Give each stage a head; join stages that have none."
        )


def _checked_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is not None:
        require_list("weights", weights)
    found = (1.0,) * count if weights is None else tuple(weights)
    for weight in found:
        require_in("weights", weight, 0, math.inf, closed="left")
    if len(found) != count or sum(found) == 0:
        raise ValueError(
            f"`weights` must be one a head, and not all zero. Found {found} for {count} heads. Give {count} numbers."
        )
    return found


def _require_one_process() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            "`fit_threshold` must see all validation data. Found "
            f"{distributed.get_world_size()} processes. Call it in one process, on the checkpoint; it saves with it."
        )
