"""Surface in a larger space, as the image of a plane under conformal maps."""

from collections.abc import Iterable

import torch
from torch import Generator, Tensor

from cnf._checks import check_count
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.chain import Chain


class ConformalEmbedding(Transform):
    r"""Embeds vectors of m features as a surface in D dimensions, by conformal maps.

    To the data, z is padded with zeros to D features and moved by `transforms`. To the base, their
    inverse maps are followed by a crop to the first m features: a left inverse, with which
    `Flow.distance` measures how far rows are from the surface. It is the nearest point of the
    surface in first order only.

    With the factor :math:`\lambda` of the conformal maps the surface stretches by
    :math:`\lambda^m`, so that the ladj to the data is :math:`m \log \lambda`, or m / D times the
    ladj of the maps: the density is one on the surface, "on_manifold". In three dimensions or more
    conformal maps take planes to planes and spheres alone (Liouville's theorem), in pieces with a
    `PiecewiseConformal`; so a surface is simple, whatever the number of maps.

    Only a `Flatten` or a `Permute` may stand before it in a flow, since other maps stretch the
    surface by a factor of their own; behind it stands a flow of m features. Train it with
    `cnf.objectives.ManifoldLikelihood`.

    Args:
        transforms: Conformal maps, from data to base: `Similarity`, `SpecialConformal`,
            `PiecewiseConformal`, `Orthogonal`, `Permute`.
        base_features: Size m of z, less than that of x.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a transform is not conformal or does not take vectors, or `base_features` is
            out of range.

    References:
        Ross & Cresswell (2021), Tractable Density Estimation on Learned Manifolds with Conformal
        Embedding Flows. https://arxiv.org/abs/2106.05275

    Example:
        >>> from cnf.transforms import Similarity, SpecialConformal
        >>> embedding = ConformalEmbedding([Similarity(3), SpecialConformal(3)], base_features=2)
        >>> embedding.likelihood
        'on_manifold'
        >>> embedding.to_data(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0, 0.0]
    """

    def __init__(self, transforms: Iterable[Transform], base_features: int) -> None:
        chain = Chain(transforms)
        for part in chain:
            if not part.is_conformal or len(part.event_shape) != 1:
                raise ValueError(
                    "transforms must be conformal maps of vectors, such as Similarity, "
                    f"SpecialConformal and Orthogonal; got {type(part).__name__}. Put others "
                    "behind the embedding."
                )
        super().__init__(chain.features)
        self._size = check_count("base_features", base_features, most=self.features - 1)
        self.transforms = chain

    def extra_repr(self) -> str:
        """Number of entries of z."""
        return f"base_features={self.base_features}"

    @property
    def base_features(self) -> int:
        """Number of entries of z."""
        return self._size

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        z, ladj = self.transforms.to_base_and_ladj(x)
        return z[..., : self._size], self._share * ladj

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        x, ladj = self.transforms.to_data_and_ladj(self._padded(z))
        return x, self._share * ladj

    def _to_base_value(
        self, x: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        return self.transforms.to_base(x)[..., : self._size]

    def _to_data_value(
        self, z: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        return self.transforms.to_data(self._padded(z))

    @property
    def _share(self) -> float:
        """Share of the ladj of the maps, of D features, that the surface of m features has."""
        return self._size / self.features

    def _padded(self, z: Tensor) -> Tensor:
        rest = self.features - self._size
        return torch.cat([z, z.new_zeros(*z.shape[:-1], rest)], -1)
