"""Surjections that drop a part of x, and model it given the rest."""

from abc import abstractmethod
from typing import Any

from torch import Generator, Tensor
from torch.distributions import constraints

from cnf.bases import Base, Likelihood, weakest
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.chain import Chain
from cnf.transforms.support.constraints import covers
from cnf.transforms.surjections.transformed_base import TransformedBase
from cnf.vector_fields.conditioning import ContextScaling, beside, scaled_context


class Reduction(Transform):
    r"""Surjection to fewer numbers: x is split into z and a dropped part y.

    Towards the base y is dropped, and its conditional log-density counts; towards the data y is
    drawn. The likelihood is exact:

    .. math:: \log p(x) = \log p(z) + \log p(y | z) + \log |\det \partial(z, y) / \partial x|

    A subclass writes `_split` and `_join`, and passes the distribution of y to the constructor.

    Args:
        features: Size of x.
        kept: Size of z.
        context_features: Size of the context; 0 for none.
        dropped: Distribution of y. Its context is z, followed by the context if there is one; or
            none.
        range_of_dropped: Constraint on the entries of y.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is out of range, or `dropped` does not fit.
    """

    stochastic_to_data = True

    def __init__(
        self,
        features: int,
        kept: int,
        context_features: int,
        dropped: Base,
        *,
        dropped_features: int,
        range_of_dropped: constraints.Constraint = constraints.real,
    ) -> None:
        super().__init__(features, context_features)
        self.kept = kept
        self.dropped = dropped
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)
        name = type(self).__name__
        if dropped.features != dropped_features:
            raise ValueError(
                f"dropped must have the {dropped_features} features that {name} drops; got "
                f"{dropped.features}."
            )
        given = kept + self.context_features
        if dropped.context_features not in (0, given):
            raise ValueError(
                f"dropped must have context_features={given} for {name}, the size of z and "
                f"context, or 0; got {dropped.context_features}."
            )
        wider = covers(range_of_dropped, dropped.support)
        if not wider or not covers(dropped.support, range_of_dropped):
            raise ValueError(
                f"dropped must have its density on {range_of_dropped} for {name}; it is on "
                f"{dropped.support}. Choose another base, such as ConditionalNormal for real "
                "numbers; for numbers of at least 0 HalfNormal, or "
                "TransformedBase([Unconstrain(['positive', ...])], ConditionalNormal(...))."
            )
        if dropped.likelihood not in ("exact", "estimate"):
            raise ValueError(
                f"dropped must have an exact likelihood, or an estimate; got one that is "
                f"{dropped.likelihood!r}."
            )

    def extra_repr(self) -> str:
        """Sizes of x and z."""
        return f"features={self.features}, kept={self.kept}"

    @property
    def base_features(self) -> int:
        """Number of entries of z."""
        return self.kept

    @property
    def likelihood(self) -> Likelihood:
        """Kind of likelihood of the distribution of the dropped part."""
        return weakest([super().likelihood, self.dropped.likelihood])

    @property
    def needs_initialization(self) -> bool:
        """Whether the scaling of the context, or the dropped part's distribution, is to be set."""
        scaling: ContextScaling | None = getattr(self, "context_scaling", None)
        own = scaling is not None and scaling.needs_initialization
        return own or self.dropped.needs_initialization

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        if self.context_features:
            self.context_scaling.initialize(context)
        z, y, _ = self._split(x)
        self.dropped.initialize(y, self._given(z, context), generator=generator)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        z, y, ladj = self._split(x)
        log_prob = self.dropped.log_prob(y, self._given(z, context), generator=generator)
        return z, ladj + log_prob

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        given = self._given(z, context)
        y = self.dropped.rsample(z.shape[:-1], given, generator=generator)
        x, ladj = self._join(z, y, generator)
        return x, ladj - self.dropped.log_prob(y, given, generator=generator)

    def _to_base_value(
        self, x: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        return self._split(x)[0]

    def _to_data_value(
        self, z: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        y = self.dropped.rsample(z.shape[:-1], self._given(z, context), generator=generator)
        return self._join(z, y, generator)[0]

    def _given(self, z: Tensor, context: Tensor | None) -> Tensor | None:
        """Return the context of the dropped part."""
        if not self.dropped.context_features:
            return None
        return beside(z, scaled_context(self, context))

    @abstractmethod
    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hook: z, y, and log|det d(z, y)/dx| of each row, or its equivalent for a draw."""

    @abstractmethod
    def _join(self, z: Tensor, y: Tensor, generator: Generator | None) -> WithLadj:
        """Hook: x, and minus the last number of `_split`."""


def as_base(dropped: Any) -> Base:
    """Return a base, or the base made of the transforms and the base of a flow."""
    if isinstance(dropped, Base):
        return dropped
    transforms, base = (getattr(dropped, name, None) for name in ("transforms", "base"))
    if isinstance(transforms, Chain) and isinstance(base, Base):
        return TransformedBase(transforms, base)
    raise TypeError(
        "dropped must be a cnf.bases.Base, such as ConditionalNormal, or a Flow; got "
        f"{type(dropped).__name__}."
    )


def no_ladj(x: Tensor) -> Tensor:
    """Return a ladj of 0 for each row."""
    return x.new_zeros(x.shape[:-1])


def count_dropped(features: int, kept: int) -> int:
    """Return the number of dropped features, after the check that there are some."""
    if kept >= features:
        raise ValueError(f"kept must be less than the {features} features; got {kept}.")
    return features - kept
