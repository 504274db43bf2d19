"""Vector field by a network of your own."""

from torch import Tensor, nn

from cnf._checks import is_hidden
from cnf.vector_fields.base import VectorField

_SHAPE_WORDS = ("dimension", "shape", "size", "argument")
"""Words in the messages of torch and Python about arguments that do not fit."""


class ModuleField(VectorField):
    """Vector field by any network.

    The network gets the context unscaled, unlike other fields: it may look up a class by it, or be
    pretrained. To scale it, let the network hold and call a
    `cnf.vector_fields.conditioning.ContextScaling`, which `fit` initialises.

    Args:
        network: Module called as ``network(t, x)``, or as ``network(t, x, context)`` if
            `context_features` is not 0, that returns the velocity, of the shape of x. There t has
            the shape ``()`` or ``(*batch,)``; to concatenate, give it the shape of x:
            ``torch.cat([x, t[..., None].expand(*x.shape[:-1], 1)], -1)``.
        features: Size of x.
        context_features: Size of the context; 0 for none.

    Raises:
        TypeError: If `network` is not a module.
        ValueError: If a size is out of range or, when called, the network fails or the velocity
            has the wrong shape, is not real, or on another device.

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

    def _velocity(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        inputs = (t, x) if context is None else (t, x, context)
        try:
            # Copies, because a network may change its inputs in place, and the solver owns them.
            velocity = self.network(*(part.clone() for part in inputs))
        except (IndexError, RuntimeError, TypeError) as error:
            if is_hidden(x) or not any(word in str(error) for word in _SHAPE_WORDS):
                raise
            raise ValueError(_failure(inputs, error)) from error
        if not isinstance(velocity, Tensor) or velocity.shape != x.shape:
            got = tuple(velocity.shape) if isinstance(velocity, Tensor) else type(velocity).__name__
            raise ValueError(f"network must return the shape of x, {tuple(x.shape)}; got {got}.")
        if not velocity.is_floating_point() or velocity.device != x.device:
            raise ValueError(
                f"network must return a velocity of dtype {x.dtype} on {x.device}; got "
                f"{velocity.dtype} on {velocity.device}."
            )
        return velocity


def _failure(inputs: tuple[Tensor, ...], error: Exception) -> str:
    """Return the message of a network that failed, mostly because of the shapes."""
    names = ("t", "x", "context")[: len(inputs)]
    shapes = [f"{name} {tuple(part.shape)}" for name, part in zip(names, inputs, strict=True)]
    rows = "*x.shape[:-1]"
    parts = ["x", f"t[..., None].expand({rows}, 1)", f"context.expand({rows}, -1)"][: len(inputs)]
    return (
        f"network failed, called as network({', '.join(names)}) with the shapes "
        f"{', '.join(shapes)}: {str(error).rstrip('.')}. To concatenate its inputs: "
        f"torch.cat([{', '.join(parts)}], -1)."
    )
