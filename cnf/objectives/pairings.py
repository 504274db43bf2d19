"""Pairings: which point of the base meets which point of the data; the only module with scipy."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_number, is_positive


class Pairing(ABC):
    """Which rows of the base go with which rows of the data in a minibatch."""

    @abstractmethod
    def __call__(
        self,
        x0: Float[Tensor, "rows features"],
        x1: Float[Tensor, "rows features"],
        context: Float[Tensor, "rows context_features"] | None = None,
    ) -> Float[Tensor, "rows features"]:
        """The rows of `x0`, in the order in which they go with those of `x1`.

        Args:
            x0: Points of the base. They are independent, so that row i may be taken to belong to
                the context of row i before they are paired.
            x1: Points of the data.
            context: What each row of `x1` is conditioned on.
        """


@dataclass(frozen=True)
class IndependentPairing(Pairing):
    """Each point of the data with a point of the base that does not depend on it."""

    def __call__(
        self,
        x0: Float[Tensor, "rows features"],
        x1: Float[Tensor, "rows features"],
        context: Float[Tensor, "rows context_features"] | None = None,
    ) -> Float[Tensor, "rows features"]:
        """The rows of `x0` as they are."""
        del x1, context
        return x0


@dataclass(frozen=True, kw_only=True)
class OptimalTransport(Pairing):
    r"""The pairing of the least sum of squared distances, exactly, within each minibatch.

    Paths of pairs then hardly cross, so that the velocity at a point varies less between the
    pairs that pass it, and the paths of the flow become straighter. It costs time and memory that
    grow about cubically and quadratically with the rows.

    With contexts, a pairing that looks at points alone is biased: which x0 a row meets would
    depend on its context, and the flow, which starts from all of the base whatever the context,
    would come where its field was not trained. So x0 of row i first belongs to the context of row
    i, and to pair it with row j of the data costs

    .. math:: \|x_{0,i} - x_{1,j}\|^2 + w \, \|c_i - c_j\|^2

    with each feature of the contexts divided by its standard deviation in the minibatch. Where
    contexts are few and repeat, a large w makes pairs share their context, and nothing is biased;
    where they do not, a smaller w gives straighter paths and a larger bias, and a very large w the
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
    """The weight w of the distance between contexts, where there are any."""

    def __post_init__(self) -> None:
        remedy = "Without it, the pairing of a conditional flow would be biased."
        weight = check_number(
            "context_weight", self.context_weight, "positive and finite", is_positive, remedy
        )
        object.__setattr__(self, "context_weight", weight)

    def __call__(
        self,
        x0: Float[Tensor, "rows features"],
        x1: Float[Tensor, "rows features"],
        context: Float[Tensor, "rows context_features"] | None = None,
    ) -> Float[Tensor, "rows features"]:
        """The rows of `x0` in their optimal order."""
        from scipy.optimize import linear_sum_assignment

        ends, starts = _numbers(x1), _numbers(x0)
        if context is not None:
            scaled = math.sqrt(self.context_weight) * _standardized(_numbers(context))
            ends, starts = np.hstack([ends, scaled]), np.hstack([starts, scaled])
        # Half the squared distance, but for what is the same for each order: the square of the
        # start, and the least of each column and row, without which the search starts farther off.
        cost = 0.5 * (ends**2).sum(1, keepdims=True) - ends @ starts.T
        cost -= cost.min(0)
        cost -= cost.min(1, keepdims=True)
        return x0[linear_sum_assignment(cost)[1]]


def _numbers(x: Tensor) -> npt.NDArray[np.float64]:
    return np.asarray(x.detach().cpu().resolve_neg(), dtype=np.float64)


def _standardized(context: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    spread = context.std(0)
    scaled: npt.NDArray[np.float64] = (context - context.mean(0)) / np.where(spread > 0, spread, 1)
    return scaled
