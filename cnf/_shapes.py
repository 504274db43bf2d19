"""Names of the shapes that public methods take and give, for their annotations."""

from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

Events: TypeAlias = Float[Tensor, "*batch_and_event"]
"""Points on the side of the data: vectors, or events of another shape such as images."""
Rows: TypeAlias = Float[Tensor, "*batch features"]
"""Vectors."""
BaseRows: TypeAlias = Float[Tensor, "*batch base_features"]
"""Points on the side of the base, which are vectors."""
Context: TypeAlias = Float[Tensor, "*c_batch context_features"]
"""Contexts, which a density is conditioned on; batch axes broadcast against the points'."""
Values: TypeAlias = Float[Tensor, "*batch"]
"""One number for each point, such as a ladj."""
Costs: TypeAlias = Float[Tensor, "costs *batch"]
"""One number for each point by each regularizer."""
Times: TypeAlias = Float[Tensor, "*t_batch"]
"""Times: one for all points, or one for each."""
Probes: TypeAlias = Float[Tensor, "probes *batch features"]
"""Several vectors for each point: random ones, a basis, or products with a Jacobian."""
NarrowProbes: TypeAlias = Float[Tensor, "probes *batch bottleneck"]
"""The same, as wide as the bottleneck of a vector field."""
