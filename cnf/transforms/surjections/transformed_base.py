"""Base made of a chain of transforms and another base: a flow as a conditional distribution."""

import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from cnf._checks import holds, joint_batch_shape, rows_inside
from cnf._row_names import rows_of_caller
from cnf.bases import Base
from cnf.transforms.base import Transform
from cnf.transforms.chain import Chain, agreed_context_features, base_for
from cnf.transforms.support.constraints import row_before, select, spread


class TransformedBase(Base):
    """Distribution of ``transforms.to_data(z)`` for z drawn from a base; a flow, used as a base.

    With a context it models a part of x given the rest, as `Slice` and the funnels need it; there a
    `cnf.Flow` may be given in its place.

    Args:
        transforms: From the values of this distribution to the base, of vectors.
        base: Base distribution; None for a standard normal.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the parts do not fit together.

    Example:
        >>> from cnf.transforms import Affine
        >>> TransformedBase([Affine(2)]).log_prob(torch.zeros(2)).item()  # -log(2 pi)
        -1.837877...
    """

    def __init__(self, transforms: Iterable[Transform], base: Base | None = None) -> None:
        chain = Chain(transforms)
        if len(chain.event_shape) != 1:
            raise ValueError(
                f"transforms must take vectors; {type(chain[0]).__name__} takes "
                f"{tuple(chain.event_shape)}."
            )
        if chain.likelihood == "on_manifold":
            raise ValueError(
                "transforms must cover all of space, because the density of points off a surface "
                "would be asked for too. Put the transforms themselves into the flow."
            )
        base = base_for(chain.transforms, base)
        super().__init__(chain.features, agreed_context_features([chain, base]))
        self.transforms = chain
        self.base = base

    @property
    def support(self) -> constraints.Constraint:
        """Support of the first transform that has one, or of the base."""
        return self.base.support if self.transforms.support is None else self.transforms.support

    @property
    def has_rsample(self) -> bool:
        """Whether the draws of the base are differentiable."""
        return self.base.has_rsample

    @property
    def needs_initialization(self) -> bool:
        """Whether a part needs initialization."""
        return self.transforms.needs_initialization or self.base.needs_initialization

    def _initialize(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        self.transforms.initialize(z, context, generator=generator)
        if self.base.needs_initialization:
            z = self.transforms.to_base(z, context, generator=generator)
            self.base.initialize(z, context, generator=generator)

    def _log_prob(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> Tensor:
        z = z.expand(*joint_batch_shape(z, context), -1)
        # NaN is outside of every support, but no point without density.
        inside = rows_inside(z, self.support) | z.detach().isnan().any(-1)
        if holds(~inside.all()):
            with rows_of_caller(row_before(inside)):
                log_prob = self.log_prob(*select(inside, z, context), generator=generator)
            return spread(inside, log_prob, elsewhere=-math.inf)
        z, ladj = self.transforms.to_base_and_ladj(z, context, generator=generator)
        log_prob = self.base.log_prob(z, context, generator=generator) + ladj
        return torch.where(inside, log_prob, -math.inf)  # within torch.vmap, too

    def _rsample(
        self, shape: torch.Size, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        z = self.base.rsample(shape, context, generator=generator)
        return self.transforms.to_data(z, context, generator=generator)
