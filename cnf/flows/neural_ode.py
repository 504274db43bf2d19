"""Neural ODE: the map x(0) -> x(1) along a vector field, without density."""

from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cnf._checks import (
    check_context,
    check_count,
    check_type,
    check_vectors,
    joint_batch_shape,
    reference_tensor,
)
from cnf._shapes import Context, Rows
from cnf.flows.trajectory import check_times
from cnf.ode import ODESolver, State
from cnf.vector_fields import VectorField


class NeuralODE(nn.Module):
    """Layer that solves dx/dt = v(t, x | context) from t = 0 to t = 1, for regression and the like.

    Trajectories of an ODE cannot cross, so in one dimension the map is increasing, and in the
    plane points inside a closed curve stay inside. With `augment`, that many zeros are appended to
    x, and trajectories have room to pass each other. Nothing scales x or the context.

    Args:
        vector_field: The field v, of size ``features + augment``.
        augment: Number of zeros appended to x; 0 for none.
        solver: How the ODE is solved; None for `ODESolver()`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `augment` is negative or leaves no feature to x.

    References:
        Chen et al. (2018), Neural Ordinary Differential Equations.
        https://arxiv.org/abs/1806.07366
        Dupont, Doucet and Teh (2019), Augmented Neural ODEs. https://arxiv.org/abs/1904.01681

    Example:
        >>> import torch
        >>> from cnf.vector_fields import MLPField
        >>> ode = NeuralODE(MLPField(features=3), augment=1)
        >>> model = nn.Sequential(ode, nn.Linear(3, 1))
        >>> model(torch.zeros(5, 2)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self, vector_field: VectorField, *, augment: int = 0, solver: ODESolver | None = None
    ) -> None:
        super().__init__()
        check_type("vector_field", vector_field, VectorField, "wrap a network in ModuleField")
        if solver is not None:
            check_type("solver", solver, ODESolver, "use ODESolver(method=...)")
        self.augment = check_count("augment", augment, least=0)
        self.features = vector_field.features - self.augment
        if self.features < 1:
            raise ValueError(
                f"augment must be less than the {vector_field.features} features of vector_field, "
                f"which count x and the zeros together; got {augment}. "
                f"Make the field with {augment} features more than x has."
            )
        self.context_features = vector_field.context_features
        self.vector_field = vector_field
        self.solver = ODESolver() if solver is None else solver

    def forward(
        self, x: Rows, context: Context | None = None
    ) -> Float[Tensor, "*joint_batch augmented"]:
        """Solve from `x` at t = 0, and return the whole state at t = 1.

        Args:
            x: Points, ``(*batch, features)``.
            context: Context of a conditional field.

        Returns:
            The final state, ``(*batch, features + augment)``.

        Raises:
            TypeError: If `x` or `context` is not a tensor.
            ValueError: If either has a wrong shape, dtype or device, or holds NaN or inf.
            ODEError: If the solve fails.
        """
        start = self._validate(x, context)
        return self._follow(start, torch.tensor([0.0, 1.0]).to(start), context)[-1]

    def trajectory(
        self, x: Rows, times: Float[Tensor, " times"], context: Context | None = None
    ) -> Float[Tensor, "times *joint_batch augmented"]:
        """Return the states at `times`, ``(times, *batch, features + augment)``.

        `times` are strictly increasing from 0, where the state is `x`, and at most 1. See `forward`
        for the other arguments and errors.
        """
        start = self._validate(x, context)
        times = check_times(times, like=start, starts={0.0: "x"})
        return self._follow(start, times, context)

    def log_prob(self, x: Rows, context: Context | None = None) -> NoReturn:
        """Not available: a `CNF` is the density model.

        Raises:
            NotImplementedError: Always.
        """
        if self.augment == 0:
            raise NotImplementedError(
                "a NeuralODE is a map without density, so it has no log_prob. Use "
                "Flow([ContinuousTransform(vector_field)]), or a CNF."
            )
        raise NotImplementedError(
            "an augmented NeuralODE has no log_prob: with constant zeros, the augmented points are "
            "a set of measure zero, and have no density. Use "
            f"CNF(features, augment={self.augment}) for a lower bound of log p(x), or a CNF "
            "without augmentation."
        )

    def _validate(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Check both tensors; return `x` with zeros, in the joint batch shape."""
        like = reference_tensor(self)
        if self.augment and isinstance(x, Tensor) and x.shape[-1:] == (self.vector_field.features,):
            raise ValueError(
                f"x must have shape (*batch, {self.features}), because the "
                f"{self.vector_field.features} features of vector_field include augment="
                f"{self.augment} zeros; got {tuple(x.shape)}."
            )
        check_vectors("x", x, self.features, like=like)
        check_context(context, self.context_features, like=like)
        x = x.expand(*joint_batch_shape(x, context), self.features)
        return nn.functional.pad(x, (0, self.augment))

    def _follow(self, start: Tensor, times: Tensor, context: Tensor | None) -> Tensor:
        def rhs(t: Tensor, state: State) -> State:
            return (self.vector_field(t, state[0], context),)

        (states,) = self.solver.solve(
            rhs,
            (start,),
            times,
            way=(0.0, float(times[-1])) if self.solver.times else (0.0, 1.0),
            dependencies=lambda: self.vector_field.dependencies(context),
        )
        return states
