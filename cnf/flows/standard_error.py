"""Standard error of an estimated likelihood, from its probes."""

from functools import partial
from operator import methodcaller

import torch
from torch import Generator, Tensor

from cnf._shapes import BaseRows, Context, Events, Values
from cnf.bases import Likelihood
from cnf.divergence import Divergence, Exact, FieldEvaluation, Hutchinson
from cnf.regularizers import Regularizer
from cnf.transforms.chain import Chain
from cnf.transforms.continuous import ContinuousTransform, map_continuous, without_costs


def to_base_with_error(
    chain: Chain,
    x: Events,
    context: Context | None,
    *,
    kind: Likelihood,
    generator: Generator | None,
) -> tuple[BaseRows, Values, Values]:
    """Map data to base: z, ladj and the standard error of ladj, in nats.

    Each probe gives an independent estimate of the integral. `Flow.log_prob_and_error` lists the
    errors.
    """
    if kind not in ("exact", "estimate"):
        raise ValueError(
            f"the likelihood must be exact or an unbiased estimate; it is {kind!r}. Leave out "
            "transforms such as Augment, Dequantize or a truncated series."
        )
    if kind == "exact":
        z, ladj = chain.to_base_and_ladj(x, context, generator=generator)
        return z, ladj, torch.zeros_like(ladj)
    probes = _number_of_probes(chain)
    each = [
        Regularizer(f"probe {i}", partial(_estimate, i=i), needs_products=False)
        for i in range(probes)
    ]
    z, ladj, estimates = chain.to_base_with_costs(
        x, context, regularizers=each, generator=generator
    )
    # Not estimates.std(0), which warns of a batch without rows.
    spread = (estimates - estimates.mean(0)).square().sum(0) / (probes - 1)
    return z, ladj, (spread / probes).sqrt()


def _number_of_probes(chain: Chain) -> int:
    exact = methodcaller("using", divergence=Exact())
    others = {
        type(part).__name__ for part in chain if map_continuous(part, exact).likelihood != "exact"
    }
    if hidden := hidden_estimates(chain):
        raise ValueError(
            f"a standard error does not see the estimates inside of {', '.join(hidden)}. Use "
            "flow.using(divergence=Exact()), or the spread of repeated calls of log_prob."
        )
    parts = (part for part in chain.modules() if isinstance(part, ContinuousTransform))
    estimates = [part.divergence for part in parts if _is_estimate(part.divergence)]
    numbers = {part.probes for part in estimates if isinstance(part, Hutchinson)}
    others |= {type(part).__name__ for part in estimates if not isinstance(part, Hutchinson)}
    if others:
        raise ValueError(
            f"a standard error needs estimates by Hutchinson only; got {sorted(others)}."
        )
    if len(numbers) != 1 or numbers == {1}:
        raise ValueError(
            "a standard error needs the same number of probes, at least 2, in every estimate; got "
            f"{sorted(numbers)}. Perhaps flow.using(divergence=Hutchinson(probes=8))."
        )
    return numbers.pop()


def hidden_estimates(chain: Chain) -> list[str]:
    """Return the names of transforms with estimates inside whose paths have no costs."""
    return sorted({name for name, part in without_costs(chain) if _is_estimate(part.divergence)})


def _is_estimate(divergence: Divergence | None) -> bool:
    return divergence is not None and not divergence.is_exact


def _estimate(evaluation: FieldEvaluation, i: int) -> Tensor:
    """Return the divergence by probe i alone; 0, without error, where it is exact."""
    if evaluation.estimates is None:
        return torch.zeros_like(evaluation.divergence)
    return evaluation.estimates[i]
