"""Any network as a vector field."""

from jaxtyping import Float
from torch import Tensor, nn

from cnf.vector_fields.base import VectorField


class ModuleField(VectorField):
    """Any network as a vector field.

    The network sees the context as it comes, unlike those of the other fields: it may look a class
    up by it, or may have been trained already. Where it is to be scaled, let the network hold a
    `cnf.vector_fields.conditions.ContextScaling` and call it; `fit` finds that, and sets it.

    Args:
        network: Module called as ``network(t, x)``, or as ``network(t, x, context)`` if
            `context_features` is not 0, that returns the velocity, of the shape of x. To
            concatenate, give t the shape of x: ``t[..., None].expand(*x.shape[:-1], 1)``.
        features: Size of x.
        context_features: Size of the context; 0 for none.

    Raises:
        TypeError: If `network` is not a module.
        ValueError: If a size is out of range or, when called, the velocity has the wrong shape.

    Example:
        >>> import torch
        >>> class Spiral(torch.nn.Module):
        ...     def forward(self, t, x):
        ...         return torch.stack([-x[..., 1], x[..., 0]], -1) - 0.5 * x
        >>> field = ModuleField(Spiral(), features=2)
        >>> field.velocity_and_divergence(torch.tensor(0.0), torch.ones(1, 2))[1]
        tensor([-1.])
    """

    def __init__(self, network: nn.Module, features: int, context_features: int = 0) -> None:
        super().__init__(features, context_features)
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module; got {type(network).__name__}.")
        self.network = network

    def forward(
        self,
        t: Float[Tensor, "*t_batch"],
        x: Float[Tensor, "*batch features"],
        context: Float[Tensor, "*c_batch context_features"] | None = None,
    ) -> Float[Tensor, "*batch features"]:
        """Velocity at `x`, as the network gives it."""
        velocity = self.network(t, x) if context is None else self.network(t, x, context)
        if not isinstance(velocity, Tensor) or velocity.shape != x.shape:
            got = tuple(velocity.shape) if isinstance(velocity, Tensor) else type(velocity).__name__
            raise ValueError(f"network must return the shape of x, {tuple(x.shape)}; got {got}.")
        return velocity
