"""Conformal maps of all of space: each stretches all directions at a point alike."""

import torch
from torch import Generator, Tensor, nn

from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.linear.orthogonal import rotation


class ConformalMap(Transform):
    r"""Bijection whose Jacobian is :math:`\lambda(z)` times an orthogonal matrix.

    The ladj of the map from z to x is :math:`D \log \lambda`, with D features.
    """

    is_conformal = True


class Similarity(ConformalMap):
    r"""Scaling and shift, ``x = scale * z + shift``, with one positive scale for all features.

    A new one is the identity. The factor :math:`\lambda` is the scale.

    Args:
        features: Size of x.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.

    References:
        Ross & Cresswell (2021), Tractable Density Estimation on Learned Manifolds with Conformal
        Embedding Flows. https://arxiv.org/abs/2106.05275

    Example:
        >>> similarity = Similarity(2)
        >>> similarity.log_scale.data.fill_(0.5)
        tensor(0.5000)
        >>> similarity.to_data_and_ladj(torch.zeros(2))[1].item()
        1.0
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(features))

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        z = (x - self.shift) * (-self.log_scale).exp()
        return z, (-self.features * self.log_scale).expand(x.shape[:-1])

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        x = z * self.log_scale.exp() + self.shift
        return x, (self.features * self.log_scale).expand(z.shape[:-1])


class SpecialConformal(ConformalMap):
    r"""Special conformal map, an inversion, a shift by -b and another inversion.

    .. math:: x = \frac{z - b \, |z|^2}{L}, \qquad L = 1 - 2 b \cdot z + |b|^2 |z|^2,
        \qquad \lambda = \frac{1}{|L|}

    It maps planes to spheres. The inverse has -b in place of b. A new one, with b = 0, is the
    identity. The point :math:`b / |b|^2` goes to infinity.

    Args:
        features: Size of x.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.

    References:
        Ross & Cresswell (2021), Conformal Embedding Flows. https://arxiv.org/abs/2106.05275

    Example:
        >>> special = SpecialConformal(2)
        >>> special.b.data.copy_(torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
        >>> special.to_data(torch.tensor([1.0, 0.0]))  # on the circle of diameter 1 below 0
        tensor([ 0.5000, -0.5000], grad_fn=<DivBackward0>)
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.b = nn.Parameter(torch.zeros(features))

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._moved(x, -self.b)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._moved(z, self.b)

    def _moved(self, points: Tensor, b: Tensor) -> WithLadj:
        square = points.square().sum(-1, keepdim=True)
        # Numerator and L, both over 1 + |z|^2, so that neither overflows far away.
        near, far = points / (1 + square), square / (1 + square)
        moved, b_square = near - b * far, b.square().sum()
        ratio = 1 / (1 + square) - 2 * (near * b).sum(-1, keepdim=True) + b_square * far
        # The terms of L cancel near the point that goes to infinity; |z - b |z|^2|^2 = |z|^2 L.
        cancels = b_square * square > 0.25
        quotient = moved.square().sum(-1, keepdim=True) / far.where(cancels, 1.0)
        ratio = torch.where(cancels, quotient, ratio)
        # It may be 0 by rounding at that point.
        ratio = ratio.clamp(min=torch.finfo(points.dtype).tiny)
        log_stretch = (ratio.log() + square.log1p()).squeeze(-1)
        return moved / ratio, -self.features * log_stretch


class PiecewiseConformal(ConformalMap):
    r"""Two rotations about the origin: one within the unit sphere, the other from it outwards.

    Both keep the norm, so that the inverse knows which one it was; :math:`\lambda = 1`. Where they
    differ the map tears space along the unit sphere. A new one is the identity.

    Args:
        features: Size of x.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.

    References:
        Ross & Cresswell (2021), Conformal Embedding Flows. https://arxiv.org/abs/2106.05275

    Example:
        >>> z, ladj = PiecewiseConformal(2).to_base_and_ladj(torch.tensor([3.0, 4.0]))
        >>> z.norm().item(), ladj.item()
        (5.0, 0.0)
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.skew = nn.Parameter(torch.zeros(2, features, features))

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._rotated(x, rotation(self.skew).mT), x.new_zeros(x.shape[:-1])

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._rotated(z, rotation(self.skew)), z.new_zeros(z.shape[:-1])

    def _rotated(self, points: Tensor, matrices: Tensor) -> Tensor:
        with torch.autocast(points.device.type, enabled=False):  # which lowers the precision
            inner, outer = (points @ matrix.mT for matrix in matrices.to(points.dtype))
        is_outer = points.detach().norm(dim=-1, keepdim=True) >= 1
        return torch.where(is_outer, outer, inner)
