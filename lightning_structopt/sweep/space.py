"""A space of architectures to draw candidates from, by Optuna's samplers."""

from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from typing_extensions import override

from lightning_structopt._checks import require_mapping, require_type, require_whole
from lightning_structopt.sweep.candidates import Candidate, fingerprint

Domain = BaseDistribution | Callable[[Mapping[str, Any]], BaseDistribution | None]


class SearchSpace:
    """Candidates that a sampler draws, one by one, as they are needed.

    Args:
        build: Takes the drawn parameters as keywords and returns a LightningModule.
        parameters: Optuna's distributions by name. A function of the parameters before it makes one conditional: it
            returns a distribution, or None where there is no such parameter (``build`` then isn't given it).
        samples: How many candidates, at least 1.
        sampler: Any of Optuna's; by default random, with seed 0. Samplers that learn (TPE) see what has finished, so
            they need a budget that finishes candidates one after another: ``FixedRounds(rounds=1, ...)`` or
            ``AsynchronousHalving``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If there are no parameters or no samples.

    Example:
        >>> space = SearchSpace(dict, {"width": IntDistribution(8, 64, log=True)}, samples=20)
        >>> space.samples
        20
    """

    def __init__(
        self,
        build: Callable[..., Any],
        parameters: Mapping[str, Domain],
        samples: int,
        sampler: optuna.samplers.BaseSampler | None = None,
    ) -> None:
        require_whole("samples", samples, 1)
        require_mapping("parameters", parameters)
        if not parameters:
            raise ValueError("`parameters` must have at least one distribution. Found none.")
        for name, domain in parameters.items():
            if not isinstance(domain, BaseDistribution) and (
                isinstance(domain, type) or not callable(domain)
            ):
                raise TypeError(
                    "`parameters` must be Optuna's distributions, or functions that return one. Found "
                    f"`{name} = {domain!r}`."
                )
        self.build = Candidate(build)
        self.parameters = dict(parameters)
        self.samples = samples
        self.sampler = optuna.samplers.RandomSampler(seed=0) if sampler is None else sampler
        require_type("sampler", self.sampler, optuna.samplers.BaseSampler)

    def candidates(self) -> dict[str, Candidate]:
        """Return the candidates, which differ by their parameters alone."""
        return {f"sample {number}": self.build for number in range(self.samples)}

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """Draw the parameters of one candidate.

        Raises:
            TypeError: If a condition returns something else than a distribution or None.
        """
        drawn: dict[str, Any] = {}
        for name, domain in self.parameters.items():
            distribution = domain if isinstance(domain, BaseDistribution) else domain(dict(drawn))
            if distribution is not None:
                drawn[name] = _suggest(trial, name, distribution)
        return drawn

    def describe(self) -> dict[str, str]:
        """Return what makes this space another than others."""
        return {
            name: distribution_to_json(domain)
            if isinstance(domain, BaseDistribution)
            else fingerprint(Candidate(domain))
            for name, domain in self.parameters.items()
        } | {"sampler": type(self.sampler).__name__}

    @override
    def __repr__(self) -> str:
        return f"SearchSpace({self.build.build!r}, {self.parameters!r}, {self.samples}, {self.sampler!r})"


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    if isinstance(distribution, FloatDistribution):
        return trial.suggest_float(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    raise TypeError(
        f"`{name}` must have an int, float or categorical distribution of Optuna. Found {distribution!r}."
    )
