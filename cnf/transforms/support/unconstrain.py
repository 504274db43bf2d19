"""Bounded, periodic and integer columns of a table as real numbers."""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.distributions import constraints

from cnf._checks import check_support, check_vectors
from cnf.manifolds import Euclidean, OnManifold, Product, Torus
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.from_data import Standardize
from cnf.transforms.support.columns import Support, column_map
from cnf.transforms.support.dequantize import COARSEST_NOISE

_SEARCHED = 1 / 16
"""Part of the circle, to each side of a cut, in which the data are counted."""


class Unconstrain(Transform):
    r"""Maps each column to the real line, or to angles, by its support.

    - ``"real"``: any number; the identity.
    - ``"positive"``: greater than 0; the logarithm, so that a heavy tail becomes a light one.
    - ``("interval", low, high)``: between the two, the ends excluded; the logit of the position.
      If rounding puts data on an end, widen the interval by half a step of the rounding.
    - ``("circle", low, high)``: a circle, such as a time of day, where low and high are the same
      point; an angle from -π to π. What follows must be on the manifold of these angles and of the
      other columns, the `codomain`: a `CNF` takes it from there, and its density has no seam.
    - ``("periodic", low, high, cut)``: a circle for a flow of real numbers. It is cut open at `cut`
      (default: low), and treated as an interval. The density is exact. It is 0 at the cut, or may
      differ on its two sides, so the cut belongs where data are rare, as `transforms_for` chooses
      it.
    - ``"integer"``: integers of either sign, with a probability. Uniform noise in [0, 1) is added,
      so that the likelihood is a lower bound; towards the data, numbers are rounded down, without
      gradient.

    Args:
        columns: Support of each column.

    Raises:
        TypeError: If `columns` is not a list.
        ValueError: If an entry of `columns` is none of these; when called, if x is outside of the
            support.

    References:
        Theis, van den Oord & Bethge (2016), A Note on the Evaluation of Generative Models, for the
        noise. https://arxiv.org/abs/1511.01844

    Example:
        >>> unconstrain = Unconstrain(["positive", ("interval", 0, 10)])
        >>> unconstrain.to_base(torch.tensor([1.0, 5.0]))
        tensor([0., 0.])
    """

    def __init__(self, columns: Iterable[Support]) -> None:
        if isinstance(columns, str | Tensor) or not isinstance(columns, Iterable):
            raise TypeError(f"columns must be a list with one entry for each; got {columns!r}.")
        specifications = list(columns)
        if not specifications:
            raise ValueError("columns must have at least one entry; got none.")
        super().__init__(len(specifications))
        self._maps = [column_map(i, column) for i, column in enumerate(specifications)]
        self.columns = tuple(
            column if isinstance(column, str) else tuple(map(_plain, column))
            for column in specifications
        )

    def extra_repr(self) -> str:
        """Support of each column."""
        return f"columns={list(self.columns)}"

    @property
    def support(self) -> constraints.Constraint:
        """Support of the columns, as one constraint of whole rows."""
        return constraints.independent(
            constraints.cat([column.constraint for column in self._maps], dim=-1), 1
        )

    @property
    def codomain(self) -> constraints.Constraint:
        """Real numbers; with circles, the manifold of angles and real numbers."""
        if not any(column.is_angle for column in self._maps):
            return constraints.real_vector
        runs = itertools.groupby(column.is_angle for column in self._maps)
        counts = [(is_angle, sum(1 for _ in run)) for is_angle, run in runs]
        factors = [Torus(count) if is_angle else Euclidean(count) for is_angle, count in counts]
        return OnManifold(factors[0] if len(factors) == 1 else Product(factors))

    @property
    def stochastic_to_base(self) -> bool:
        """Whether a column holds integers, to which noise is added."""
        return any(column.constraint.is_discrete for column in self._maps)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        z, log_slopes = self._to_reals(x, generator)
        return z, -log_slopes.sum(-1)

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        if self.stochastic_to_base:
            return super()._contributions(x, context)
        return -self._to_reals(x, None)[1]

    def _to_reals(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Return the real numbers, and the log of dx/dz of each column."""
        check_support("x", x, self.support)
        columns = zip(self._maps, x.unbind(-1), strict=True)
        pairs = [column.to_reals(values, generator) for column, values in columns]
        z, log_slopes = (torch.stack(parts, -1) for parts in zip(*pairs, strict=True))
        return z, log_slopes

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        columns = zip(self._maps, z.unbind(-1), strict=True)
        pairs = [column.from_reals(values) for column, values in columns]
        x, log_slopes = (torch.stack(parts, -1) for parts in zip(*pairs, strict=True))
        return x, log_slopes.sum(-1)


def _plain(entry: Any) -> str | int | float:
    """Return an entry of a column as a plain Python object, which can be saved."""
    return entry if isinstance(entry, str | int) else float(entry)


def transforms_for(
    x: Float[Tensor, "rows features"], support: Iterable[Support]
) -> list[Transform]:
    """Return the transforms for a table, to come before an ODE: `Unconstrain`, `Standardize`.

    Angles of circles are not standardised.

    Args:
        x: Training rows.
        support: Support of each column, as for `Unconstrain`. A "periodic" column without a cut is
            cut where `x` is rare.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is not one entry for each column, `x` is outside of the support or
            constant in a column, or its dtype too coarse for noise between its integers.

    Example:
        >>> hours = torch.tensor([[23.0, 1.5], [1.0, 20.0], [3.0, 0.1]])
        >>> transforms_for(hours, [("periodic", 0, 24), "positive"])
        [Unconstrain(columns=[('periodic', 0, 24, 13.0), 'positive']), Standardize(...)]
    """
    check_vectors("x", x, x.shape[-1] if isinstance(x, Tensor) and x.ndim else 0, like=x)
    try:
        unconstrain = Unconstrain(support)
    except (TypeError, ValueError) as error:  # which names the argument `columns`
        raise type(error)(f"support is invalid: {error}") from error
    if x.ndim != 2 or x.shape[-1] != unconstrain.features:
        raise ValueError(
            "support must have one entry for each column of x, which has shape (rows, columns); "
            f"got {unconstrain.features} and x of shape {tuple(x.shape)}."
        )
    check_support("x", x, unconstrain.support)
    if all(column == "real" for column in unconstrain.columns):
        return [Standardize.from_data(x)]
    for i, column in enumerate(unconstrain.columns):
        largest = float(x[:, i].abs().max())
        if column == "integer" and largest * torch.finfo(x.dtype).eps > COARSEST_NOISE:
            raise ValueError(
                f"x must have a finer dtype than {x.dtype} for the integers of column {i}, up to "
                f"{largest:.6g}: noise between them is rounded away. Use float64, or the support "
                "'real'."
            )
    unconstrain = Unconstrain(
        (*column, rarest_place(x[:, i], *map(float, column[1:])))
        if column[0] == "periodic" and len(column) == 3
        else column
        for i, column in enumerate(unconstrain.columns)
    )
    noise = torch.Generator(x.device).manual_seed(0)  # the same transforms at each call
    codomain = unconstrain.codomain
    manifold = codomain.manifold if isinstance(codomain, OnManifold) else None
    standardize = Standardize(unconstrain.features, manifold=manifold).to(x)
    standardize.initialize(unconstrain.to_base(x.detach(), generator=noise))
    return [unconstrain, standardize]


def rarest_place(values: Float[Tensor, " rows"], low: float, high: float) -> float:
    """Return the place on the circle from `low` to `high` to cut it open, far from the values.

    Among the midpoints between neighbours, take the one with fewest values within a sixteenth of
    the circle to each side; near it, the middle of the widest gap.
    """
    circle = high - low
    near = _SEARCHED * circle
    around = torch.remainder(values.detach().double().cpu() - low, circle).sort().values
    gaps = torch.cat([around[1:], around[:1] + circle]) - around
    middles = around + gaps / 2
    laps = torch.cat([around - circle, around, around + circle])
    counts = torch.searchsorted(laps, middles + near) - torch.searchsorted(laps, middles - near)
    centre = middles[counts.argmin()]
    distance = torch.remainder(middles - centre + circle / 2, circle) - circle / 2
    best = torch.where(distance.abs() <= near, gaps, 0).argmax()
    return low + float(torch.remainder(middles[best], circle))
