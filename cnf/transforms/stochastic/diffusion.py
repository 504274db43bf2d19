"""Diffusion: steps of two stochastic differential equations, one for each direction."""

import itertools
import math

import torch
from torch import Generator, Tensor

from cnf._checks import check_count, check_number, check_type, is_positive
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.stochastic.kernels import normal_like
from cnf.vector_fields import VectorField


class Diffusion(Transform):
    r"""Euler-Maruyama steps of a diffusion, with a drift for each direction.

    .. math:: x_{k+1} = x_k + h \, f(t_k, x_k) + \sigma \sqrt{h} \, \varepsilon, \qquad
        x_k = x_{k+1} + h \, g(t_{k+1}, x_{k+1}) + \sigma \sqrt{h} \, \varepsilon'

    for :math:`t_k = k h` from 0 (base) to 1 (data). The contribution of a step is the log-ratio of
    the two normal densities, :math:`(|\varepsilon|^2 - |\varepsilon'|^2) / 2`: a lower bound of the
    log-density, and a weight of its draws. Draws are reparametrised, and both drifts are trained.

    Args:
        drift: The field f, towards the data.
        reverse_drift: The field g, towards the base, of the same size.
        steps: Number of steps.
        noise: The number sigma, the standard deviation of the noise in unit time.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the fields differ in size or context, or an argument is out of range.

    References:
        Hagemann, Hertrich & Steidl (2022), Stochastic Normalizing Flows for Inverse Problems: a
        Markov Chains Viewpoint, section 4. https://arxiv.org/abs/2109.11375
        Zhang & Chen (2021), Diffusion Normalizing Flow. https://arxiv.org/abs/2110.07579

    Example:
        >>> from cnf import MLPField
        >>> diffusion = Diffusion(MLPField(2), MLPField(2), steps=4)
        >>> z, contribution = diffusion.to_base_and_ladj(torch.zeros(3, 2))
        >>> z.shape, contribution.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    stochastic_to_base = True
    stochastic_to_data = True

    def __init__(
        self, drift: VectorField, reverse_drift: VectorField, *, steps: int = 16, noise: float = 1.0
    ) -> None:
        for name, field in (("drift", drift), ("reverse_drift", reverse_drift)):
            check_type(name, field, VectorField, "wrap a network in ModuleField")
        super().__init__(drift.features, drift.context_features)
        for name in ("features", "context_features"):
            size, other = getattr(drift, name), getattr(reverse_drift, name)
            if size != other:
                raise ValueError(
                    f"reverse_drift must have the {size} {name} of drift; got {other}."
                )
        self.drift = drift
        self.reverse_drift = reverse_drift
        self.steps = check_count("steps", steps)
        self.noise = check_number("noise", noise, "positive and finite", is_positive)

    def extra_repr(self) -> str:
        """Number of steps, and the noise."""
        return f"steps={self.steps}, noise={self.noise}"

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._walk(x, context, generator, (self.reverse_drift, self.drift), backwards=True)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        return self._walk(z, context, generator, (self.drift, self.reverse_drift), backwards=False)

    def _walk(
        self,
        point: Tensor,
        context: Tensor | None,
        generator: Generator | None,
        drifts: tuple[VectorField, VectorField],
        *,
        backwards: bool,
    ) -> WithLadj:
        size = 1 / self.steps
        width = self.noise * math.sqrt(size)
        times = torch.linspace(0, 1, self.steps + 1, dtype=point.dtype, device=point.device)
        if backwards:
            times = times.flip(0)
        there, back = drifts
        total = point.new_zeros(point.shape[:-1])
        for start, end in itertools.pairwise(times):
            noise = normal_like(point, generator)
            moved = point + size * there(start, point, context) + width * noise
            returning = (point - moved - size * back(end, moved, context)) / width
            total = total + 0.5 * (noise.square() - returning.square()).sum(-1)
            point = moved
        return point, total
