"""Check that a point of the base side lies in the codomain of a surjection."""

from torch import Tensor

from cnf._checks import holds, rows_inside
from cnf._row_names import name_rows
from cnf.transforms.base import Transform


def check_codomain(transform: Transform, z: Tensor, expected: str, remedy: str) -> None:
    """Refuse rows of z outside of the codomain, which no x is mapped to."""
    if transform.codomain is None:
        return
    outside = ~rows_inside(z, transform.codomain)
    if holds(outside.any()):
        value = z.detach()[outside][0].tolist()
        raise ValueError(
            f"z must be {expected} for {type(transform).__name__} (x, for its Inverse); got "
            f"{value} in {name_rows(outside)}. {remedy}"
        )
