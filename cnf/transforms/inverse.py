"""Inverse of a transform: its two directions, swapped."""

from torch import Generator, Tensor
from torch.distributions import constraints

from cnf._checks import check_type
from cnf.bases import Likelihood, weakest
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.chain import Chain
from cnf.transforms.from_data.base import DataTransform


class Inverse(Transform):
    """Inverse of a transform: towards the base it does what the other does towards the data.

    Where the other draws x given z, the inverse draws its z given its x: the inverse of a
    surjection with an exact likelihood has a lower bound, and the other way round. So
    ``Inverse(Abs(2))`` gives signs to numbers of at least 0, ``Inverse(Slice(5, 2))`` augments,
    and ``Inverse(Round(2))`` is uniform dequantisation without a scale. (Nielsen et al. call these
    generative surjections.)

    Args:
        transform: The other transform, of vectors; no part of it may be set from data, because its
            data are not those of the inverse.

    Raises:
        TypeError: If `transform` is not a transform.
        ValueError: If it does not take vectors, or is set from data; when called, if x is outside
            of its codomain.

    References:
        Nielsen et al. (2020), SurVAE Flows. https://arxiv.org/abs/2007.02731

    Example:
        >>> import torch
        >>> from cnf.transforms import Abs
        >>> signed = Inverse(Abs(2))
        >>> signed.to_data(torch.tensor([1.0, -2.0])), signed.likelihood
        (tensor([1., 2.]), 'lower_bound')
    """

    def __init__(self, transform: Transform) -> None:
        check_type("transform", transform, Transform, "put several into a Chain([...])")
        if len(transform.event_shape) != 1:
            raise ValueError(
                "transform must take vectors, as every base side does; "
                f"{type(transform).__name__} takes {tuple(transform.event_shape)}."
            )
        for part in transform.modules():
            if isinstance(part, DataTransform):
                raise ValueError(
                    f"transform must not be set from data; {type(part).__name__} is, and its data "
                    "are not those of the inverse."
                )
        super().__init__(transform.base_features, transform.context_features)
        self.transform = transform

    @property
    def base_features(self) -> int:
        """Number of entries of z."""
        return self.transform.features

    @property
    def support(self) -> constraints.Constraint | None:
        """The codomain of the other transform."""
        return self.transform.codomain

    @property
    def codomain(self) -> constraints.Constraint | None:
        """The support of the other transform."""
        return self.transform.support

    @property
    def stochastic_to_base(self) -> bool:
        """Whether the other transform draws towards the data."""
        return self.transform.stochastic_to_data

    @property
    def stochastic_to_data(self) -> bool:
        """Whether the other transform draws towards the base."""
        return self.transform.stochastic_to_base

    @property
    def is_bijective(self) -> bool:
        """Whether the other transform is."""
        return self.transform.is_bijective

    @property
    def likelihood(self) -> Likelihood:
        """Kind of likelihood: from draws and sizes, and the estimates inside."""
        parts = [part for part in self.transform.modules() if isinstance(part, Transform)]
        kinds = {part.likelihood for part in parts} & {"estimate", "biased_estimate"}
        if _projects(self.transform):
            kinds.add("not_a_likelihood")
        return weakest([super().likelihood, *kinds])

    @property
    def needs_initialization(self) -> bool:
        """Whether the other transform needs initialization."""
        return self.transform.needs_initialization

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        z = self.transform.to_data(x, context, generator=generator)
        self.transform.initialize(z, context, generator=generator)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self.transform.to_data_and_ladj(x, context, generator=generator)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self.transform.to_base_and_ladj(z, context, generator=generator)

    def _to_base_value(
        self, x: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        return self.transform.to_data(x, context, generator=generator)

    def _to_data_value(
        self, z: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        return self.transform.to_base(z, context, generator=generator)


def _projects(part: Transform) -> bool:
    """Return whether a part maps all of space to a surface, without a draw of what it drops."""
    if isinstance(part, Inverse):
        return part.transform.likelihood == "not_a_likelihood"
    if isinstance(part, Chain):
        return any(_projects(each) for each in part)
    return part.likelihood == "on_manifold"
