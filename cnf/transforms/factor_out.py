"""Factoring out features: the multi-scale architecture."""

from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from cnf._checks import check_events, check_vector_or_image_shape, reference_tensor
from cnf._shapes import Context, Events
from cnf.bases import Likelihood
from cnf.regularizers import CostRate
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.chain import Chain, check_covered
from cnf.transforms.reshape import Permute


@torch.no_grad()
def rank_by_contributions(
    transforms: Iterable[Transform],
    x: Events,
    context: Context | None = None,
    *,
    shape: int | Sequence[int] | None = None,
) -> Permute:
    r"""Return the order of features by their share in the log-likelihood, the largest first.

    The share of an entry of z is the mean over rows of :math:`\log \mathcal N(z_i; 0, 1)` plus its
    `contributions`, so that the shares sum to the mean log-density of the flow of these transforms.
    Put the result between them and a `FactorOut`, which then keeps the first entries for more
    transforms. Rank once, from trained transforms: the order is fixed, and saved with the flow.

    Args:
        transforms: From data on, as far as the features are to be ranked.
        x: Rows ``(rows, *event)``.
        context: Context of each row.
        shape: Shape ``(channels, height, width)`` of z, whose channels are then ranked as wholes;
            None to rank single entries.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `shape` does not fit z, or there are no rows.
        NotImplementedError: If a transform has no `contributions`.

    References:
        Das, Abbeel & Spanos (2019), Likelihood Contribution based Multi-scale Architecture for
        Generative Flows. https://arxiv.org/abs/1908.01686

    Example:
        >>> from cnf.transforms import Affine
        >>> spread = Affine(2)
        >>> with torch.no_grad():
        ...     _ = spread.log_scale.copy_(torch.tensor([1.0, -1.0]))
        >>> rank_by_contributions([spread], torch.zeros(3, 2)).order
        (1, 0)
    """
    chain = Chain(transforms)
    check_events("x", x, chain.event_shape, like=reference_tensor(chain))
    if x.numel() == 0:
        raise ValueError(f"x must have rows to rank features by; got shape {tuple(x.shape)}.")
    size = chain.base_features
    channels, height, width = check_vector_or_image_shape(size if shape is None else shape)
    if channels * height * width != size:
        raise ValueError(f"shape must have the {size} entries of z; got {shape}.")
    z = chain.to_base(x, context)
    shares = chain.contributions(x, context) - 0.5 * z.square()
    shares = shares.reshape(-1, channels, height * width).double().mean((0, 2))
    order = shares.argsort(descending=True, stable=True)
    places = torch.arange(size, device=order.device).view(channels, -1)
    return Permute(places[order].flatten().tolist())


class FactorOut(Transform):
    """Multi-scale step: transforms of the first features; the others go to the base unchanged.

    With a base of independent features this is the factoring out of Real NVP: features factored
    out early skip the later layers, which then cost less. `transforms` take the kept features, and
    their result stands before the others. A transform with a narrower support, such as a
    `Dequantize` of some columns of a table, checks its own features.

    Args:
        transforms: From data to base; `features` of the first is the number of kept features.
        features: Size of x.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `transforms` is empty, they do not fit together, or nothing is left out.

    References:
        Dinh et al. (2017), Density Estimation Using Real NVP. https://arxiv.org/abs/1605.08803

    Example:
        >>> from cnf.transforms import Affine
        >>> FactorOut([Affine(3)], features=12)
        FactorOut(
          kept=3, left_out=9
          (transforms): Chain(
            (0): Affine()
          )
        )
    """

    def __init__(self, transforms: Iterable[Transform], features: int) -> None:
        chain = Chain(transforms)
        if len(chain.event_shape) != 1:
            raise ValueError(
                "transforms must take vectors; "
                f"{type(chain[0]).__name__} takes {tuple(chain.event_shape)}."
            )
        super().__init__(features, chain.context_features)
        self.kept = chain.features
        if self.kept >= self.features:
            raise ValueError(
                f"features must be more than the {self.kept} that transforms take; "
                f"got {self.features}."
            )
        check_covered(chain.transforms, "the factored-out part", constraints.real_vector)
        self.transforms = chain

    def extra_repr(self) -> str:
        """Numbers of features kept and left out."""
        return f"kept={self.kept}, left_out={self.features - self.kept}"

    @property
    def chain(self) -> Chain:
        """The transforms, from data to base: the same as `transforms`."""
        return self.transforms

    @property
    def base_features(self) -> int:
        """Number of entries of z."""
        return self.transforms.base_features + self.features - self.kept

    @property
    def likelihood(self) -> Likelihood:
        """The weakest likelihood among the transforms."""
        return self.transforms.likelihood

    @property
    def stochastic_to_base(self) -> bool:
        """Whether one of the transforms is stochastic towards the base."""
        return self.transforms.stochastic_to_base

    @property
    def stochastic_to_data(self) -> bool:
        """Whether one of the transforms is stochastic towards the data."""
        return self.transforms.stochastic_to_data

    @property
    def is_bijective(self) -> bool:
        """Whether all transforms are bijective."""
        return self.transforms.is_bijective

    @property
    def needs_initialization(self) -> bool:
        """Whether one of the transforms needs initialization."""
        return self.transforms.needs_initialization

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        self.transforms.initialize(self._split(x)[0], context, generator=generator)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        kept, rest = self._split(x)
        z, ladj = self.transforms.to_base_and_ladj(kept, context, generator=generator)
        return torch.cat([z, rest], -1), ladj

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        kept, rest = self._split(z)
        x, ladj = self.transforms.to_data_and_ladj(kept, context, generator=generator)
        return torch.cat([x, rest], -1), ladj

    def _to_base_with_costs(
        self,
        x: Tensor,
        context: Tensor | None,
        generator: Generator | None,
        regularizers: Sequence[CostRate],
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept, rest = self._split(x)
        z, ladj, costs = self.transforms.to_base_with_costs(
            kept, context, regularizers=regularizers, generator=generator
        )
        return torch.cat([z, rest], -1), ladj, costs

    def _to_base_value(
        self, x: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        kept, rest = self._split(x)
        z = self.transforms.to_base(kept, context, generator=generator)
        return torch.cat([z, rest], -1)

    def _to_data_value(
        self, z: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        kept, rest = self._split(z)
        x = self.transforms.to_data(kept, context, generator=generator)
        return torch.cat([x, rest], -1)

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        kept, rest = self._split(x)
        added = self.transforms._contributions(kept, context)
        return torch.cat([added, torch.zeros_like(rest)], -1)

    def _rearranged(self, numbers: Tensor) -> Tensor:
        kept, rest = self._split(numbers)
        return torch.cat([self.transforms._rearranged(kept), rest], -1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the entries for the transforms, and the others, as many on both sides."""
        kept = x.shape[-1] - (self.features - self.kept)
        return x[..., :kept], x[..., kept:]
