"""Vector field that is tangent to a manifold."""

import torch
from torch import Tensor

from cnf._checks import check_type
from cnf.manifolds import Manifold
from cnf.vector_fields.base import VectorField


class TangentField(VectorField):
    r"""Vector field tangent to a manifold, from a field u of the space that it is embedded in.

    On the sphere, :math:`v(x) = u(x) - (x \cdot u(x)) \, x`. The divergence is the one on the
    manifold: with the Jacobian J of u at the embedded point, unit normals n and the sum c of the
    curvatures along each, (for the sphere in n dimensions, :math:`n = x` and :math:`c = n - 1`)

    .. math:: \nabla_M \cdot v = \mathrm{tr} J - \sum_n n^\top J n - \sum_n c_n \, n \cdot u

    Args:
        vector_field: The field u, whose features are the `embedded_features` of the manifold. Not
            one that starts from a multiple of x, such as an `MLPField` with a skip.
        manifold: The manifold.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the sizes do not fit.

    References:
        Mathieu and Nickel (2020), Riemannian Continuous Normalizing Flows.
        https://arxiv.org/abs/2006.10605

    Example:
        >>> from cnf.manifolds import Sphere
        >>> from cnf.vector_fields import LinearField
        >>> north = LinearField(3)
        >>> with torch.no_grad():
        ...     _ = north.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
        >>> field, pole = TangentField(north, Sphere(3)), torch.tensor([0.0, 0.0, 1.0])
        >>> field.velocity_and_divergence(torch.tensor(0.0), pole)[1].item()
        -2.0
    """

    def __init__(self, vector_field: VectorField, manifold: Manifold) -> None:
        check_type("vector_field", vector_field, VectorField, "wrap a network in ModuleField")
        check_type("manifold", manifold, Manifold, "use Sphere(3), Torus(2) or a Product")
        if vector_field.features != manifold.embedded_features:
            raise ValueError(
                f"vector_field must have the {manifold.embedded_features} embedded_features of "
                f"{manifold}; got {vector_field.features}."
            )
        super().__init__(manifold.features, vector_field.context_features)
        self.vector_field = vector_field
        self._manifold = manifold
        self.has_programs = vector_field.has_programs

    @property
    def manifold(self) -> Manifold:
        """The manifold."""
        return self._manifold

    @property
    def shares_times(self) -> bool:
        """Whether the inner field shares times."""
        return self.vector_field.shares_times

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether the inner field has one, and the manifold fewer normals than features."""
        normals, _ = self.manifold.normals(torch.ones(self.features))
        return self.vector_field.has_closed_form_divergence and len(normals) < self.features

    def _velocity(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        u = self.vector_field._velocity(t, self.manifold.embed(x), context)
        return self.manifold.tangent(x, u)

    def _velocity_and_products(
        self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self.vector_field.has_programs:  # its products are of reverse mode
            return super()._velocity_and_products(t, x, probes, context)
        y, directions = self.manifold.embed(x), self.manifold.embed_derivative(x, probes)
        u, du = self.vector_field._velocity_and_products(t, y, directions, context)
        products = self.manifold.tangent_derivative(x, probes, u, du)
        return self.manifold.tangent(x, u), products

    def _velocity_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self.has_closed_form_divergence:
            return super()._velocity_and_divergence(t, x, context)
        y = self.manifold.embed(x)
        normals, curvatures = self.manifold.normals(x)
        u, trace = self.vector_field._velocity_and_divergence(t, y, context)
        _, products = self.vector_field._velocity_and_products(t, y, normals, context)
        curvatures = curvatures.view(-1, *(1,) * x.ndim)
        lost = (normals * (products + curvatures * u)).sum(-1).sum(0)
        return self.manifold.tangent(x, u), trace - lost
