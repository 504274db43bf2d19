"""Shape annotations of public methods."""

from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

Events: TypeAlias = Float[Tensor, "*batch_and_event"]
"""Data points: vectors, or events of another shape such as images."""
Rows: TypeAlias = Float[Tensor, "*batch features"]
"""Vectors."""
EmbeddedRows: TypeAlias = Float[Tensor, "*batch embedded_features"]
"""Vectors of the space in which a manifold is embedded."""
BaseRows: TypeAlias = Float[Tensor, "*batch base_features"]
"""Base points, which are vectors."""
Context: TypeAlias = Float[Tensor, "*c_batch context_features"]
"""Contexts of a conditional density; batch axes broadcast against the points'."""
Values: TypeAlias = Float[Tensor, "*batch"]
"""One number for each point, such as a ladj."""
Costs: TypeAlias = Float[Tensor, "costs *batch"]
"""One number for each regularizer and point."""
Times: TypeAlias = Float[Tensor, "*t_batch"]
"""Times: one for all points, or one for each."""
Probes: TypeAlias = Float[Tensor, "probes *batch features"]
"""Several vectors for each point: random ones, a basis, or products with a Jacobian."""
NarrowProbes: TypeAlias = Float[Tensor, "probes *batch bottleneck"]
"""Probes of the width of the bottleneck of a vector field."""
