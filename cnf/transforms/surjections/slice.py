"""Slicing: features are dropped, and modelled given the others."""

import torch
from torch import Generator, Tensor, nn

from cnf._checks import check_count
from cnf.bases import ConditionalNormal
from cnf.transforms.base import WithLadj
from cnf.transforms.surjections.reduction import Reduction, as_base, count_dropped, no_ladj


class Slice(Reduction):
    r"""Slicing: z is the first features of x, and the others are modelled given z.

    The likelihood is exact: :math:`\log p(x) = \log p(z) + \log p(y | z)` with ``x = (z, y)``. Its
    `Inverse` is the augmentation by y; `Augment` is the same with a Gaussian y.

    Args:
        features: Size of x.
        kept: Size of z.
        context_features: Size of the context; 0 for none.
        dropped: Distribution of y, or a `cnf.Flow`, whose context is z, followed by the context if
            there is one; None for a `ConditionalNormal`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is out of range, or `dropped` does not fit.

    References:
        Nielsen et al. (2020), SurVAE Flows. https://arxiv.org/abs/2007.02731

    Example:
        >>> z, ladj = Slice(3, kept=1).to_base_and_ladj(torch.zeros(5, 3))
        >>> z.shape, ladj.shape
        (torch.Size([5, 1]), torch.Size([5]))
    """

    def __init__(
        self,
        features: int,
        kept: int,
        context_features: int = 0,
        *,
        dropped: nn.Module | None = None,
    ) -> None:
        features, kept = check_count("features", features), check_count("kept", kept)
        size = count_dropped(features, kept)
        if dropped is None:
            dropped = ConditionalNormal(size, kept + context_features)
        super().__init__(features, kept, context_features, as_base(dropped), dropped_features=size)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x[..., : self.kept], x[..., self.kept :], no_ladj(x)

    def _join(self, z: Tensor, y: Tensor, generator: Generator | None) -> WithLadj:
        return torch.cat([z, y], -1), no_ladj(z)
