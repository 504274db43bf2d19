"""Pairings of base points with data points; the only module that imports scipy."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_number, is_positive

Rows: TypeAlias = Float[Tensor, "rows features"]
Contexts: TypeAlias = Float[Tensor, "rows context_features"]


class Pairing(ABC):
    """Pairing of base points with the rows of data in a minibatch."""

    @abstractmethod
    def __call__(self, x0: Rows, x1: Rows, context: Contexts | None = None) -> Rows:
        """Return the rows of `x0` in the order of their partners in `x1`.

        Args:
            x0: Independent base points; row i may be taken as drawn for the context of row i.
            x1: Points of the data.
            context: Context of each row of `x1`.
        """


@dataclass(frozen=True)
class IndependentPairing(Pairing):
    """Pairing of each data point with an independent base point."""

    def __call__(self, x0: Rows, x1: Rows, context: Contexts | None = None) -> Rows:
        """Return `x0`."""
        return x0


@dataclass(frozen=True, kw_only=True)
class OptimalTransport(Pairing):
    r"""Pairing with the least sum of squared distances, exactly, within each minibatch.

    Paths then hardly cross, so the velocities of paths through a point vary less, and the
    trajectories of the flow become straighter. Time grows about cubically with the rows, and memory
    quadratically.

    With contexts, a pairing by points alone is biased: the x0 of a row would depend on its context,
    but the flow starts from the whole base for every context, and would reach points where its
    field was not trained. Therefore x0 of row i is taken as drawn for the context of row i, and
    pairing it with row j of the data costs

    .. math:: \|x_{0,i} - x_{1,j}\|^2 + w \, \|c_i - c_j\|^2

    with each feature of the contexts divided by its standard deviation in the minibatch. If
    contexts are few and repeat, a large w pairs rows of the same context, without bias. If they do
    not repeat, a smaller w gives straighter paths and a larger bias, and a very large w gives the
    `IndependentPairing`.

    Raises:
        ValueError: If `context_weight` is not positive and finite.

    References:
        Pooladian et al. (2023), Multisample Flow Matching: Straightening Flows with Minibatch
        Couplings. https://arxiv.org/abs/2304.14772
        Tong et al. (2024), Improving and Generalizing Flow-Based Generative Models with Minibatch
        Optimal Transport. https://arxiv.org/abs/2302.00482
        Kerrigan et al. (2024), Dynamic Conditional Optimal Transport through Simulation-Free
        Flows. https://arxiv.org/abs/2404.04240
        Cheng & Schwing (2025), The Curse of Conditions: Analyzing and Improving Optimal Transport
        for Conditional Flow-Based Generation. https://arxiv.org/abs/2503.10636

    Example:
        >>> import torch
        >>> x0, x1 = torch.tensor([[0.0], [9.0]]), torch.tensor([[8.0], [1.0]])
        >>> OptimalTransport()(x0, x1).flatten()
        tensor([9., 0.])
    """

    context_weight: float = 100.0
    """Weight w of the distance between contexts."""

    def __post_init__(self) -> None:
        remedy = "Without it, the pairing of a conditional flow would be biased."
        weight = check_number(
            "context_weight", self.context_weight, "positive and finite", is_positive, remedy
        )
        object.__setattr__(self, "context_weight", weight)

    def __call__(self, x0: Rows, x1: Rows, context: Contexts | None = None) -> Rows:
        """Return the rows of `x0` in their optimal order."""
        from scipy.optimize import linear_sum_assignment

        ends, starts = _numbers(x1), _numbers(x0)
        if context is not None:
            contexts = _numbers(context)
            spread = contexts.std(0) / math.sqrt(self.context_weight)
            scaled = (contexts - contexts.mean(0)) / np.where(spread > 0, spread, 1)
            ends, starts = np.hstack([ends, scaled]), np.hstack([starts, scaled])
        # Half the squared distance, up to terms that are the same for each order: the square of the
        # start, and the minimum of each column and row, which would slow the search down.
        cost = 0.5 * (ends**2).sum(1, keepdims=True) - ends @ starts.T
        cost -= cost.min(0)
        cost -= cost.min(1, keepdims=True)
        return x0[linear_sum_assignment(cost)[1]]


def _numbers(x: Tensor) -> npt.NDArray[np.float64]:
    return np.asarray(x.detach().cpu().resolve_neg(), dtype=np.float64)
