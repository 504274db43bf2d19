"""Maximum of features, and max pooling: the others are modelled by their distance from it."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.distributions import constraints

from cnf._checks import check_count, check_image_shape
from cnf.bases import Base, HalfNormal
from cnf.transforms.base import WithLadj
from cnf.transforms.surjections.reduction import Reduction, as_base, no_ladj


class GroupMaximum(Reduction):
    """Maximum of each group of features; which of a group it is, is a fair draw towards the data.

    Args:
        groups: Number of groups.
        size: Features of a group.
        context_features: Size of the context; 0 for none.
        offsets: Distribution of the distances of the others from their maximum, or a flow.
    """

    def __init__(
        self, groups: int, size: int, context_features: int, offsets: nn.Module | None
    ) -> None:
        others = groups * (size - 1)
        super().__init__(
            groups * size,
            groups,
            context_features,
            as_base(HalfNormal(others) if offsets is None else offsets),
            dropped_features=others,
            range_of_dropped=constraints.nonnegative,
        )
        self.size = size

    @property
    def offsets(self) -> Base:
        """Distribution of the distances from the maximum."""
        return self.dropped

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = self._grouped(x)
        z, index = groups.max(-1, keepdim=True)
        offsets = (z - groups).gather(-1, self._others(index))
        # Equal numbers stay within the support of a positive distribution.
        offsets = offsets.clamp(min=torch.finfo(x.dtype).tiny)
        return z.squeeze(-1), offsets.flatten(-2), no_ladj(x) - self._log_choices

    def _join(self, z: Tensor, y: Tensor, generator: Generator | None) -> WithLadj:
        z = z.unsqueeze(-1)
        index = torch.randint(0, self.size, z.shape, generator=generator, device=z.device)
        others = z - y.unflatten(-1, (self.kept, self.size - 1))
        groups = torch.cat([z, others], -1)
        place = torch.cat([index, self._others(index)], -1)
        x = self._ungrouped(groups.gather(-1, place.argsort(-1)))
        return x, no_ladj(x) + self._log_choices

    @property
    def _log_choices(self) -> float:
        return self.kept * math.log(self.size)

    def _others(self, index: Tensor) -> Tensor:
        """Return the places of a group but this one, in order."""
        places = torch.arange(self.size - 1, device=index.device)
        return places + (places >= index)

    @abstractmethod
    def _grouped(self, x: Tensor) -> Tensor:
        """Hook: x as ``(*batch, groups, size)``."""

    @abstractmethod
    def _ungrouped(self, groups: Tensor) -> Tensor:
        """Hook: x from its groups."""


class Maximum(GroupMaximum):
    r"""Maximum of all features; the others are modelled by their distance from it.

    Towards the data the place of the maximum is a fair draw, and the distances y of the others, in
    order, are drawn given z. The likelihood is exact:
    :math:`\log p(x) = \log p(z) + \log p(y | z) - \log D`.

    Args:
        features: Size of x, the D of the formula; at least 2.
        context_features: Size of the context; 0 for none.
        offsets: Distribution of y, of ``features - 1`` numbers of at least 0, or a `cnf.Flow`. Its
            context is z, followed by the context if there is one; or none. None for a `HalfNormal`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is out of range, or `offsets` does not fit.

    References:
        Nielsen et al. (2020), SurVAE Flows, appendix D. https://arxiv.org/abs/2007.02731

    Example:
        >>> Maximum(3).to_base(torch.tensor([1.0, 5.0, 2.0]))
        tensor([5.])
    """

    def __init__(
        self, features: int, context_features: int = 0, *, offsets: nn.Module | None = None
    ) -> None:
        size = check_count("features", features, least=2)
        super().__init__(1, size, context_features, offsets)

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2)

    def _ungrouped(self, groups: Tensor) -> Tensor:
        return groups.squeeze(-2)


class MaxPool2d(GroupMaximum):
    r"""Max pooling of each 2 x 2 square of a flattened image, per channel.

    Towards the data the place of the maximum in each square is a fair draw, and the distances y of
    the other three are drawn given z. The likelihood is exact:
    :math:`\log p(x) = \log p(z) + \log p(y | z) - n \log 4` for n squares.

    Args:
        shape: Shape ``(channels, height, width)`` of the image that x is, flattened in C order.
        context_features: Size of the context; 0 for none.
        offsets: Distribution of y, three numbers of at least 0 for each square, square by square,
            or a `cnf.Flow`. Its context is z, followed by the context if there is one; or none.
            None for a `HalfNormal`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is out of range, height or width is odd, or `offsets` does not fit.

    References:
        Nielsen et al. (2020), SurVAE Flows, section 4.3. https://arxiv.org/abs/2007.02731

    Example:
        >>> pool = MaxPool2d((1, 4, 4))
        >>> pool.to_base(torch.arange(16.0)), pool.pooled_shape
        (tensor([ 5.,  7., 13., 15.]), (1, 2, 2))
    """

    def __init__(
        self, shape: Sequence[int], context_features: int = 0, *, offsets: nn.Module | None = None
    ) -> None:
        sizes = check_image_shape(shape)
        if sizes[1] % 2 or sizes[2] % 2:
            raise ValueError(
                f"shape must be (channels, height, width), the last two even; got {sizes}."
            )
        super().__init__(math.prod(sizes) // 4, 4, context_features, offsets)
        self.shape = sizes

    @property
    def pooled_shape(self) -> tuple[int, int, int]:
        """Shape of the image that z is, flattened."""
        channels, height, width = self.shape
        return channels, height // 2, width // 2

    def _grouped(self, x: Tensor) -> Tensor:
        channels, height, width = self.pooled_shape
        squares = x.reshape(*x.shape[:-1], channels, height, 2, width, 2)
        return squares.transpose(-3, -2).reshape(*x.shape[:-1], self.kept, 4)

    def _ungrouped(self, groups: Tensor) -> Tensor:
        channels, height, width = self.pooled_shape
        squares = groups.reshape(*groups.shape[:-2], channels, height, width, 2, 2)
        return squares.transpose(-3, -2).reshape(*groups.shape[:-2], self.features)
