"""Flow whose base point is a code and a small remainder."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from cnf._checks import check_vectors, reference_tensor
from cnf._shapes import Context, Events, Rows
from cnf.bases import NarrowNormal
from cnf.flows.flow import Flow
from cnf.transforms import Transform
from cnf.transforms.chain import as_list


class PseudoInvertibleEncoder(Flow):
    """Pseudo-invertible encoder (PIE): a flow that is an autoencoder too.

    The base is a `NarrowNormal`: the first features of z are the code, and the others a remainder
    that training drives towards zero. `encode` drops the remainder, and `decode` puts zeros in its
    place. The likelihood is exact, in all of space, for any `std`. A small `std` weighs
    reconstruction more, but its gradients are large, as 1 / std²; with an `std` of 1 the flow is an
    ordinary one, whose code has no preference. Likelihoods with different `std` rank nothing but
    how well the model fits, not its reconstructions.

    Args:
        transforms: Transforms from data to base, with as many features at the base as in the data.
        code_features: Number of features of the code.
        std: Standard deviation of the remainder at the base.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the transforms do not fit together, or a number is out of range.

    References:
        Beitler, Sosnovik & Smeulders (2018), PIE: Pseudo-Invertible Encoder.
        https://arxiv.org/abs/2111.00619

    Example:
        >>> from cnf.transforms import AffineCoupling
        >>> flow = PseudoInvertibleEncoder([AffineCoupling(5)], code_features=2)
        >>> flow.encode(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).tolist()
        [1.0, 2.0]
        >>> flow.decode(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0, 0.0, 0.0, 0.0]
    """

    base: NarrowNormal

    def __init__(
        self, transforms: Iterable[Transform], code_features: int, *, std: float = 0.1
    ) -> None:
        parts = as_list(transforms)
        if not parts:
            raise ValueError("transforms must hold at least one transform; got none.")
        sizes = math.prod(parts[0].event_shape), parts[-1].base_features
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"transforms must give as many features as the {sizes[0]} of the data, as code "
                f"and remainder are all of them; got {sizes[1]}. Leave out a Slice or Augment."
            )
        base = NarrowNormal(parts[-1].base_features, code_features, std=std)
        super().__init__(parts, base.to(reference_tensor(torch.nn.ModuleList(parts))))

    def encode(
        self, x: Events, context: Context | None = None, *, generator: Generator | None = None
    ) -> Float[Tensor, "*joint_batch code_features"]:
        """Return the code of each row, the first features of its base point."""
        z = self.to_base(x, context, generator=generator)
        return z[..., : self.base.code_features]

    def decode(
        self, code: Rows, context: Context | None = None, *, generator: Generator | None = None
    ) -> Float[Tensor, "*joint_batch_and_event"]:
        """Return the point of a code whose remainder is zero."""
        check_vectors("code", code, self.base.code_features, like=reference_tensor(self))
        rest = self.base.features - self.base.code_features
        z = torch.cat([code, code.new_zeros(*code.shape[:-1], rest)], -1)
        return self.to_data(z, context, generator=generator)
