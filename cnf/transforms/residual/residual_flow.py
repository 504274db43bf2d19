"""Residual flows: the identity plus a contraction."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

from cnf._checks import check_fraction, check_type
from cnf._warnings import warn
from cnf.bases import Likelihood
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.residual.contractions import ContractiveNetwork
from cnf.transforms.residual.fixed_point import fixed_point
from cnf.transforms.residual.log_det import ExactLogDet, LogDet, RussianRoulette
from cnf.transforms.residual.spectral_layers import Map
from cnf.vector_fields.jacobian.autograd import (
    outside_inference_mode,
    refuse_transformed_functions,
    usable_by_autograd,
    vector_jacobian_product,
)

_FEW_FEATURES = 8


class ResidualFlow(Transform):
    r"""Residual flow: the identity plus a contraction, ``z = x + g(x | context)``.

    It is a bijection: :math:`x = z - g(x)` has one solution, a fixed point. The ladj is exact or an
    estimate, as `log_det` computes it: an i-ResNet truncates a power series, a residual flow
    truncates it at random. The mean of the gradients of an estimate is the gradient of its mean.

    The way to the data iterates until the error of x is at most `tolerance` times the sum of the
    norms of x and z, or as small as rounding allows. Its gradient, by implicit differentiation, is
    another fixed-point iteration; there is no second derivative. Everything is computed in the
    precision of x, also under autocast.

    Args:
        network: The contraction g, such as `LipschitzMLP`, `LipschitzConv` or `LipschitzAttention`.
        log_det: `ExactLogDet`, `TruncatedSeries` or `RussianRoulette`; None for the first with at
            most 8 features, else the last.
        tolerance: Largest relative error of x on the way to the data, less than 1.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `tolerance` is out of range.
        RuntimeError: On the way to the data, if the network is no contraction or values are not
            finite.

    Warns:
        UserWarning: If `log_det` is a `RussianRoulette` whose variance may be infinite for the
            coefficient of the network.

    References:
        Behrmann et al. (2019), Invertible Residual Networks. https://arxiv.org/abs/1811.00995
        Chen et al. (2019), Residual Flows for Invertible Generative Modeling.
        https://arxiv.org/abs/1906.02735

    Example:
        >>> from cnf.transforms import LipschitzMLP, TruncatedSeries
        >>> ResidualFlow(LipschitzMLP(2)).likelihood
        'exact'
        >>> ResidualFlow(LipschitzMLP(64)).likelihood
        'estimate'
        >>> ResidualFlow(LipschitzMLP(2), log_det=TruncatedSeries(terms=5)).likelihood
        'biased_estimate'
    """

    def __init__(
        self, network: ContractiveNetwork, *, log_det: LogDet | None = None, tolerance: float = 1e-6
    ) -> None:
        check_type("network", network, ContractiveNetwork, "use LipschitzMLP(features)")
        if log_det is not None:
            check_type("log_det", log_det, LogDet, "use RussianRoulette()")
        super().__init__(network.features, network.context_features)
        self.network = network
        few = self.features <= _FEW_FEATURES
        self.log_det = log_det or (ExactLogDet() if few else RussianRoulette())
        _warn_of_infinite_variance(self.log_det, network.coefficient)
        self.tolerance = check_fraction("tolerance", tolerance)

    @property
    def likelihood(self) -> Likelihood:
        """The kind of likelihood of `log_det`."""
        return self.log_det.likelihood

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        with _in_full_precision(x):
            x, contraction = self._given(x, context)
            change, ladj = self.log_det(contraction, x, generator=generator)
            return x + change, ladj

    def _to_base_value(
        self, x: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        with _in_full_precision(x):
            x, contraction = self._given(x, context)
            return x + contraction(x)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        x = self._to_data_value(z, context, generator)
        return x, -self._to_base(x, context, generator)[1]

    def _to_data_value(
        self, z: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        refuse_transformed_functions("the way of a ResidualFlow to the data")
        with _in_full_precision(z):
            z, contraction = self._given(z, context)
            with torch.no_grad():
                x = self._solve(lambda x: z - contraction(x), z)
            return self._with_gradient(x, z, contraction)

    def _given(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Map]:
        context = None if context is None else usable_by_autograd(context)
        return usable_by_autograd(x), self.network.given(context)

    def _solve(self, update: Map, start: Tensor) -> Tensor:
        coefficient = self.network.coefficient
        return fixed_point(update, start, coefficient=coefficient, tolerance=self.tolerance)

    def _with_gradient(self, x: Tensor, z: Tensor, contraction: Map) -> Tensor:
        r"""Return the solution `x` with its gradient in z, the parameters and the context.

        One more step of the iteration has the gradient of z - g at a fixed x. The gradient of the
        solution is :math:`(I + J)^{-\top}` times this one, which is a fixed point, too.
        """
        point = x.requires_grad_()
        change = contraction(point)
        solution = z - change

        def solved(gradient: Tensor | None) -> Tensor | None:
            if gradient is None:  # nothing depends on the solution
                return None
            if torch.is_grad_enabled():
                raise RuntimeError("the way of a ResidualFlow to the data has no second derivative")
            return self._solve(
                lambda v: gradient - vector_jacobian_product(change, point, v, False), gradient
            )

        if solution.requires_grad:
            solution.register_hook(solved)
        return solution


def _warn_of_infinite_variance(log_det: LogDet, coefficient: float) -> None:
    if isinstance(log_det, RussianRoulette) and not log_det.has_finite_variance(coefficient):
        warn(
            f"the log-determinant has infinite variance where the network comes near to its "
            f"coefficient, {coefficient}: give a RussianRoulette with a probability less than "
            f"{1 - coefficient**2:.3g}, in place of {log_det.probability}, or a network with a "
            f"coefficient less than {(1 - log_det.probability) ** 0.5:.3g}."
        )


@contextmanager
def _in_full_precision(x: Tensor) -> Iterator[None]:
    """Turn autocast off, whose rounding breaks a contraction, and autograd on in inference mode."""
    with outside_inference_mode(), torch.autocast(x.device.type, enabled=False):
        yield
