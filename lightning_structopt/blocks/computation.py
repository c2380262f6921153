"""Cells that repeat until they have thought enough."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_in, require_type, require_whole
from lightning_structopt.blocks.adaptive import AdaptiveBlock, Pass, flops
from lightning_structopt.blocks.halting import act_distribution, kl_to_geometric, ponder_distribution
from lightning_structopt.blocks.rows import as_logits, has_shards, over_rows, require_same_shape


class Pondered(NamedTuple):
    """What PonderNet thinks at every step of a training pass.

    Args:
        states: Of shape (steps, batch, ...).
        probabilities: To halt at each step, of shape (steps, batch), with gradients.
    """

    states: Tensor
    probabilities: Tensor

    def expected(self, losses: Tensor) -> Tensor:
        r"""Return the mean over the batch of :math:`\sum_n p_n L_n`.

        Args:
            losses: Of each sample at each step, of shape (steps, batch).

        Returns:
            A scalar.

        Raises:
            ValueError: If ``losses`` has another shape.
        """
        if losses.shape != self.probabilities.shape:
            raise ValueError(
                f"`losses` must be one a step and sample, of shape {tuple(self.probabilities.shape)}. Found "
                f'{tuple(losses.shape)}. Give the loss `reduction="none"` and stack over steps.'
            )
        return (self.probabilities * losses).sum(0).mean()


class AdaptiveComputationUnit(AdaptiveBlock):
    r"""A cell that is applied to its own state, more often to hard samples than to easy ones.

    :math:`s_n = \text{cell}(s_{n-1})` with halting probabilities :math:`h_n = \sigma(\text{gate}(s_n))`. Given a state
    besides inputs, as for ``nn.GRUCell``, it is :math:`s_n = \text{cell}(x, s_{n-1})`.

    ``halting="act"``: the output is :math:`\sum_n p_n s_n` over the :math:`N` steps until :math:`\sum h` reaches
    :math:`1 - \epsilon`; :math:`\tau \cdot \mathrm{mean}(N + R)` is the auxiliary loss. Graves, "Adaptive Computation
    Time for Recurrent Neural Networks", 2016 (https://arxiv.org/abs/1603.08983).

    ``halting="ponder"``: in training all steps run and ``forward`` returns :class:`Pondered`, whose ``expected``
    weighs your losses; :math:`\tau \cdot \mathrm{KL}(p \,\|\, \mathrm{Geom}(\lambda_p))` is the auxiliary loss. In
    evaluation a sample gives the state at which it has halted with a probability of at least one half. Banino,
    Balaguer and Blundell, "PonderNet: Learning to Ponder", 2021 (https://arxiv.org/abs/2107.05407).

    In evaluation the cell runs on the samples that have not halted, and stops after the last of them. Under
    ``torch.compile`` the graph breaks after each step. Exported graphs have all steps.

    Args:
        cell: Keeps the shape of the state.
        gate: Gives one logit a sample, such as ``Gate(features, opening=0.5)``.
        max_steps: The most steps, at least 1.
        halting: ``"act"`` or ``"ponder"``.
        strength: :math:`\tau`, what time costs, at least 0.
        epsilon: :math:`\epsilon` of ACT, in (0, 1).
        prior: :math:`\lambda_p` of PonderNet, in (0, 1): one over the steps that it should take.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range. In ``forward``: if the cell changes the shape of the state, or the
            gate doesn't give one logit a sample.

    Example:
        >>> from lightning_structopt.blocks.gates import Gate
        >>> unit = AdaptiveComputationUnit(nn.Linear(4, 4), Gate(4, opening=0.999), max_steps=5).eval()
        >>> unit(torch.randn(2, 4)).shape, unit.executed_fraction
        (torch.Size([2, 4]), 0.2)
    """

    def __init__(
        self,
        cell: nn.Module,
        gate: nn.Module,
        max_steps: int,
        halting: Literal["act", "ponder"] = "act",
        *,
        strength: float = 0.01,
        epsilon: float = 0.01,
        prior: float = 0.2,
    ) -> None:
        super().__init__()
        require_type("cell", cell, nn.Module)
        require_type("gate", gate, nn.Module)
        require_whole("max_steps", max_steps, 1)
        require_choice("halting", halting, ("act", "ponder"))
        require_in("strength", strength, 0, float("inf"), closed="left")
        require_in("epsilon", epsilon, 0, 1, closed="neither")
        require_in("prior", prior, 0, 1, closed="neither")
        self.cell, self.gate = cell, gate
        self.max_steps, self.halting = max_steps, halting
        self.strength, self.epsilon, self.prior = strength, epsilon, prior

    @override
    def forward(self, inputs: Tensor, state: Tensor | None = None) -> Tensor | Pondered:
        """Repeat the cell.

        Args:
            inputs: The first state; or what the cell reads at each step, if ``state`` is given.
            state: The first state then.

        Returns:
            Of the shape of the state; in training under ``halting="ponder"``, :class:`Pondered`.
        """
        if not self.training and not self._runs_dense:
            return self._compacted(inputs, state)
        states, halts = self._steps(inputs, state)
        if self.halting == "act":
            return self._act(states, halts)
        return self._ponder(states, halts)

    @override
    def expected_cost(self, inputs: Tensor, state: Tensor | None = None) -> Tensor:
        """Return the operations of one step times the steps that each sample is expected to take.

        Args:
            inputs: As for ``forward``.
            state: As for ``forward``.

        Returns:
            Of shape (batch,).
        """
        arguments = (inputs,) if state is None else (inputs, state)
        first: Tensor = inputs if state is None else state
        one_step = (flops(self.cell, *arguments) + flops(self.gate, first)) / max(1, len(first))
        with torch.no_grad():
            _, halts = self._steps(inputs, state)
        if self.halting == "act":
            return one_step * act_distribution(halts, self.epsilon)[1]
        return one_step * _halted_at(halts)

    @override
    def extra_repr(self) -> str:
        return f"max_steps={self.max_steps}, halting={self.halting!r}, strength={self.strength}"

    def _step(self, inputs: Tensor, state: Tensor | None) -> Tensor:
        new: Tensor = self.cell(inputs) if state is None else self.cell(inputs, state)
        require_same_shape("AdaptiveComputationUnit", new, inputs if state is None else state)
        return new

    def _halt(self, state: Tensor) -> Tensor:
        return torch.sigmoid(as_logits("AdaptiveComputationUnit", self.gate(state), state))

    def _steps(self, inputs: Tensor, state: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Run all samples: under ACT until the last has halted, where that is known without asking other ranks."""
        states: list[Tensor] = []
        halts: list[Tensor] = []
        now, recurrent = (inputs, False) if state is None else (state, True)
        may_stop = self.halting == "act" and not self._runs_dense and not has_shards(self)
        for _ in range(self.max_steps):
            now = self._step(inputs, now) if recurrent else self._step(now, None)
            states.append(now)
            halts.append(self._halt(now))
            if may_stop and bool((torch.stack(halts).sum(0) >= 1 - self.epsilon).all()):
                break
        return states, torch.stack(halts)

    def _act(self, states: list[Tensor], halts: Tensor) -> Tensor:
        weights, steps, remainder = act_distribution(halts, self.epsilon)
        output = _weighted(states, weights)
        loss = self.strength * (steps + remainder).mean()
        self._remember(steps.float().mean() / self.max_steps, output, Pass(loss) if self.training else None)
        return output

    def _ponder(self, states: list[Tensor], halts: Tensor) -> Tensor | Pondered:
        stacked = torch.stack(states)
        if not self.training:
            steps = _halted_at(halts)
            self._remember(steps.float().mean() / self.max_steps)
            return _weighted(states, nn.functional.one_hot(steps - 1, len(states)).T)
        probabilities = ponder_distribution(halts)
        loss = self.strength * kl_to_geometric(probabilities, self.prior).mean()
        counts = torch.arange(1, len(states) + 1, device=halts.device)[:, None]
        share = (probabilities * counts).sum(0).mean() / self.max_steps
        self._remember(share, stacked, Pass(loss))
        return Pondered(stacked, probabilities)

    def _compacted(self, inputs: Tensor, state: Tensor | None) -> Tensor:
        """Run each step on the samples that are left."""
        now, recurrent = (inputs, False) if state is None else (state, True)
        left = torch.arange(len(now), device=now.device)
        done = torch.zeros(len(now), device=now.device)  # under ACT the sum of h, under PonderNet that of p
        output, taken = torch.zeros_like(now), 0
        for step in range(self.max_steps):
            if len(left) == 0 and not has_shards(self):
                break
            taken += len(left)
            now = self._step(inputs, now) if recurrent else self._step(now, None)
            halt = self._halt(now)
            done, weight, stays = self._decide(done.to(halt), halt, last=step == self.max_steps - 1)
            output = output.to(torch.promote_types(output.dtype, now.dtype))
            output = output.index_add(0, left, (over_rows(weight, now) * now).to(output.dtype))
            left, now, done = left[stays], now[stays], done[stays]
            inputs = inputs[stays] if recurrent else inputs
        self._remember(taken / max(1, len(output)) / self.max_steps)
        return output

    def _decide(self, done: Tensor, halt: Tensor, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is done after a step, the weight of the step's state, and who goes on."""
        if self.halting == "act":
            stays = (done + halt < 1 - self.epsilon) & (not last)
            return done + halt, torch.where(stays, halt, 1 - done), stays
        done = done + (1 - done) * halt
        stays = (done < 0.5) & (not last)
        return done, (~stays).to(halt), stays


def _halted_at(halts: Tensor) -> Tensor:
    """Return the first step by which a sample has halted with a probability of at least one half."""
    done = torch.zeros_like(halts[0])
    steps = torch.ones_like(done, dtype=torch.long)
    for halt in halts[:-1]:
        done = done + (1 - done) * halt
        steps = steps + (done < 0.5)
    return steps


def _weighted(states: list[Tensor], weights: Tensor) -> Tensor:
    total = torch.zeros_like(states[0])
    for state, weight in zip(states, weights, strict=True):
        total = total + over_rows(weight, state) * state
    return total
