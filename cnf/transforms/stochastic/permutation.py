"""Random order of points, in both directions."""

from torch import Generator, Tensor

from cnf.bases.ordered_normal import check_point_features
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.surjections.reduction import no_ladj
from cnf.transforms.surjections.sort import permuted_points


class StochasticPermutation(Transform):
    r"""Random order of points, drawn uniformly in both directions.

    A flow that starts with it has a density that is invariant to permutations: the mean of the
    density over all orders. `Flow.log_prob` is a lower bound of its logarithm, tighter with more
    `importance_samples`. The contribution is 0. `Sort` is invariant too, and exact.

    Args:
        features: Size of x.
        point_features: Number of entries of a point.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is less than 1, or `point_features` does not divide `features`.

    References:
        Nielsen et al. (2020), SurVAE Flows, appendix E. https://arxiv.org/abs/2007.02731

    Example:
        >>> import torch
        >>> z = StochasticPermutation(3).to_base(torch.tensor([1.0, 2.0, 3.0]))
        >>> z.sort().values
        tensor([1., 2., 3.])
    """

    support = None
    stochastic_to_base = True
    stochastic_to_data = True

    def __init__(self, features: int, *, point_features: int = 1) -> None:
        super().__init__(features)
        self.point_features = check_point_features(point_features, self.features)

    def extra_repr(self) -> str:
        """Sizes of x and of a point."""
        return f"features={self.features}, point_features={self.point_features}"

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return permuted_points(x, self.point_features, generator), no_ladj(x)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return permuted_points(z, self.point_features, generator), no_ladj(z)
