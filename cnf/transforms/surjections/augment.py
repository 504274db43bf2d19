"""Augmentation: random features are appended to x, so that z is larger than x."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from cnf._checks import check_count, check_widths
from cnf.bases import Base, ConditionalNormal, StandardNormal
from cnf.transforms.base import Transform, WithLadj
from cnf.vector_fields.conditioning import ContextScaling, beside, scaled_context


class Augment(Transform):
    r"""Augmentation by random features e, drawn from q(e | x, context): ``z = (x, e)``.

    The rest of the flow models the joint density of x and e, which bounds the density of x:

    .. math:: \log p(x) \ge \mathbb{E}_q [\log p(x, e) - \log q(e | x)]

    The gap is the Kullback-Leibler divergence of q from the posterior of e under the flow. Draws
    are reparameterised, so that q is trained with the flow. Paths of an ODE that would have to
    cross in the space of x can pass each other in the larger space.

    Args:
        features: Size of x.
        augment: Size of e.
        context_features: Size of the context; 0 for none.
        hidden_features: Widths of the hidden layers of the network that returns the mean and the
            logarithm of the standard deviation of e; ``()`` for an affine map. q starts as the
            standard normal. None for a q that stays standard normal.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range.

    References:
        Huang, Dinh & Courville (2020), Augmented Normalizing Flows.
        https://arxiv.org/abs/2002.07101
        Nielsen et al. (2020), SurVAE Flows. https://arxiv.org/abs/2007.02731
        Dupont, Doucet & Teh (2019), Augmented Neural ODEs. https://arxiv.org/abs/1904.01681

    Example:
        >>> z, ladj = Augment(2, 3, hidden_features=(64,)).to_base_and_ladj(torch.zeros(5, 2))
        >>> z.shape, ladj.shape
        (torch.Size([5, 5]), torch.Size([5]))
    """

    stochastic_to_base = True

    def __init__(
        self,
        features: int,
        augment: int,
        context_features: int = 0,
        *,
        hidden_features: Sequence[int] | None = None,
    ) -> None:
        super().__init__(features, context_features)
        self.augment = check_count("augment", augment)
        self.hidden_features: tuple[int, ...] | None = None
        self.q: Base = StandardNormal(self.augment)
        if hidden_features is not None:
            self.hidden_features = check_widths("hidden_features", hidden_features, least=0)
            self.q = ConditionalNormal(
                self.augment,
                self.features + self.context_features,
                hidden_features=self.hidden_features,
            )
            if self.context_features:
                self.context_scaling = ContextScaling(self.context_features)

    def extra_repr(self) -> str:
        """Sizes of x and e."""
        return f"features={self.features}, augment={self.augment}"

    @property
    def base_features(self) -> int:
        """Size of x and e together."""
        return self.features + self.augment

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        given = self._given(x, context)
        e = self.q.rsample(x.shape[:-1], given, generator=generator)
        return torch.cat([x, e], -1), -self.q.log_prob(e, given)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        x, e = z[..., : self.features], z[..., self.features :]
        return x, self.q.log_prob(e, self._given(x, context))

    def _to_data_value(
        self, z: Tensor, context: Tensor | None, generator: Generator | None
    ) -> Tensor:
        return z[..., : self.features]

    def _given(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        if self.hidden_features is None:
            return None
        return beside(x, scaled_context(self, context))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The network of q was one of this transform's own in older files.
        for name in [name for name in state_dict if name.startswith(f"{prefix}network.")]:
            renamed = name.removeprefix(prefix)
            state_dict[f"{prefix}q.{renamed}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)
