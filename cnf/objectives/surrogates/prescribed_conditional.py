"""Conditional density by a joint flow that is to copy the condition."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.distributions import constraints

from cnf._checks import (
    check_count,
    check_generator,
    check_number,
    check_sample_shape,
    check_vectors,
    reference_tensor,
    refuse_rows,
)
from cnf._shapes import Context, Rows
from cnf.bases import StandardNormal
from cnf.flows.flow import Flow
from cnf.objectives.base import Objective, weighted_mean
from cnf.transforms.support.constraints import covers

_COPIED = 1e-3
"""Largest error of a copied condition, and of its volume in nats, with which the surrogate is a
likelihood."""


class PrescribedConditional(Objective):
    r"""Surrogate for a conditional density: one flow of data and condition, which it is to copy.

    The rows are data and condition side by side, :math:`(x, y')`, and the flow maps them to
    :math:`(z, y)`. The loss of a row is

    .. math:: -\log p_Z(z) - \log \left| \det \frac{\partial (z, y)}{\partial (x, y')} \right|
        + \lambda \, |y - y'|_1

    with a standard normal :math:`p_Z`, whatever the base of the flow. It is *no* likelihood: the
    last term stands for an unknown density of conditions, and a flow may buy volume by a small
    error. Only where :math:`y = y'` is it :math:`-\log p(x | y')`. A conditional flow,
    ``CNF(features, context_features)``, is one by construction, and the better choice where it can
    be trained.

    Args:
        flow: Flow of data and condition, without a context, that does not scale its rows: give
            standardised rows, and ``standardize=False`` to a `CNF`.
        condition_features: Number of entries of the condition, the last of a row.
        weight: The number :math:`\lambda`, in nats for each unit of the error.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or the flow is conditional, not exact or not
            bijective.

    References:
        Hyatt (2022), Conditional normalizing flows by a prescribed rule.
        https://arxiv.org/abs/2208.11782

    Example:
        >>> from cnf.transforms import Affine
        >>> objective = PrescribedConditional(Flow([Affine(3)]), condition_features=1)
        >>> objective(torch.zeros(4, 3))  # log(2 pi): the identity copies
        tensor(1.8379, grad_fn=<MeanBackward0>)
        >>> objective.sample(torch.tensor([0.5]), 10).shape
        torch.Size([10, 2])
    """

    def __init__(self, flow: Flow, condition_features: int, *, weight: float = 100.0) -> None:
        super().__init__(flow)
        size = check_count("condition_features", condition_features, most=flow.features - 1)
        is_plain = flow.transforms.is_bijective and covers(flow.base.support, constraints.real)
        if (
            not is_plain
            or flow.likelihood != "exact"
            or flow.context_features
            or len(flow.event_shape) != 1
        ):
            raise ValueError(
                "flow must be an exact flow of vectors without a context, of bijections to all "
                "real vectors, because condition and data go through it side by side; got a "
                f"{type(flow).__name__} of {tuple(flow.event_shape)}, likelihood "
                f"{flow.likelihood!r}, context_features={flow.context_features}, bijective "
                f"{flow.transforms.is_bijective}, base on {flow.base.support}."
            )
        self.condition_features = size
        self.data_features = flow.features - size
        self.weight = check_number(
            "weight", weight, "finite and at least 0", lambda number: 0 <= number < math.inf
        )

    def copying_error(self, x: Rows, condition: Context) -> Float[Tensor, "*joint_batch"]:
        """Return the largest error of an entry of the condition after the flow, for each row."""
        rows = self._side_by_side(x, condition)
        return self._errors(rows, self.flow.to_base(rows)).amax(-1)

    def log_prob(self, x: Rows, condition: Context) -> Float[Tensor, "*joint_batch"]:
        r"""Return the log-density of data given a condition, in nats.

        The density of `sample` differs from it by :math:`\log |\det \partial y / \partial y'|`.

        Raises:
            ValueError: If the flow does not copy the condition of a row to 1e-3, or changes its
                volume by more than 1e-3 nats, so that this would be no likelihood; or if the
                arguments do not fit.
        """
        rows = self._side_by_side(x, condition)
        surrogate, errors = self._surrogate(rows, None)
        _refuse_uncopied(errors.detach().amax(-1), "the worst is off by {:.2g}")
        _refuse_uncopied(self._volume(rows), "volume is off by up to {:.2g} nats")
        return surrogate

    @torch.no_grad()
    def sample(
        self,
        condition: Context,
        sample_shape: int | Sequence[int] = (),
        *,
        generator: Generator | None = None,
    ) -> Float[Tensor, "*shape features"]:
        """Draw data given a condition ``(*batch, condition_features)``, which is fixed at the base.

        The shape is ``(*sample_shape, *batch, features)``.
        """
        like = reference_tensor(self.flow)
        check_vectors("condition", condition, self.condition_features, like=like)
        check_generator(generator, like=like)
        shape = check_sample_shape(sample_shape) + condition.shape[:-1]
        base = StandardNormal(self.data_features).to(condition)
        z = base.rsample(shape, generator=generator)
        condition = condition.expand(*shape, -1)
        rows: Tensor = self.flow.to_data(torch.cat([z, condition], -1), generator=generator)
        return rows[..., : self.data_features]

    @property
    def is_kept_whole(self) -> bool:
        """True: the density of data and condition together is not what is trained."""
        return True

    def _loss(
        self,
        x: Tensor,
        context: Tensor | None,
        weight: Tensor | None,
        draws: int | None,
        generator: Generator | None,
    ) -> Tensor:
        surrogate, errors = self._surrogate(x, generator)
        return weighted_mean(self.weight * errors.sum(-1) - surrogate, weight)

    def _surrogate(self, rows: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Return what the log-density is if the condition is copied, and the errors of copying."""
        z, ladj = self.flow.transforms.to_base_and_ladj(rows, generator=generator)
        base = StandardNormal(self.data_features).to(z)
        return base.log_prob(z[..., : self.data_features]) + ladj, self._errors(rows, z)

    def _errors(self, rows: Tensor, z: Tensor) -> Tensor:
        return (z - rows)[..., self.data_features :].abs()

    def _volume(self, rows: Tensor) -> Tensor:
        """Return the change of volume of the condition alone, in nats, with the data held."""
        with torch.inference_mode(False), torch.enable_grad():
            rows = rows.clone().detach().requires_grad_()
            copies = self.flow.to_base(rows)[..., self.data_features :]
            slopes = [
                torch.autograd.grad(copy.sum(), rows, retain_graph=True)[0]
                for copy in copies.unbind(-1)
            ]
        jacobian = torch.stack(slopes, -2)[..., self.data_features :]
        volume: Tensor = torch.linalg.slogdet(jacobian.double()).logabsdet.abs()
        return volume

    def _side_by_side(self, x: Tensor, condition: Tensor) -> Tensor:
        like = reference_tensor(self.flow)
        check_vectors("x", x, self.data_features, like=like)
        check_vectors("condition", condition, self.condition_features, like=like)
        batch = torch.broadcast_shapes(x.shape[:-1], condition.shape[:-1])
        return torch.cat([part.expand(*batch, -1) for part in (x, condition)], -1)


def _refuse_uncopied(error: Tensor, found: str) -> None:
    """Refuse conditions whose copy has too large an error, of which `found` tells the largest."""
    largest = float(error.max()) if error.numel() else 0.0
    refuse_rows(
        "condition",
        error > _COPIED,
        f"copied by the flow to {_COPIED} to have a log-density ({found.format(largest)}; train "
        "longer, with a larger weight)",
    )
