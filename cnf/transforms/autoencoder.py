"""Autoencoder as a bijection: two couplings of a core and a shell."""

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from cnf._checks import check_count, check_type
from cnf._shapes import Rows
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.conditioners import MLPConditioner

_BOUND = 3.0
"""Bound on the logarithms of scales, so that they do not explode far from the data."""


class AutoencoderCoupling(Transform):
    r"""Autoencoder within a flow (AEF): an encoder and a decoder that are a bijection together.

    The first features of x are the core c, and the others the shell y. The encoder moves the core,
    given the shell, to the code; the decoder predicts the shell from the code, up to a deviation:

    .. math::
        \mathrm{code} = \mu_e(y) + \sigma_e(y) \, c, \qquad
        \mathrm{deviation} = (y - \mu_d(\mathrm{code})) / \sigma_d(\mathrm{code})

    z is the code, and the deviation behind it. So the likelihood of an autoencoder is exact here,
    with Gaussian noise of scale :math:`\sigma_d` about the decoder. A flow of the code alone, the
    prior, follows as ``FactorOut(prior, features)``. A new one is the identity. Choose the core
    with a `Permute` or an `Orthogonal` before it.

    The paper's extended form has all of x as shell, and a core beside it. If the core is a function
    of x, that is a density of both and not one of x: the objective `ExtendedAutoencoder`. If an
    `Augment` draws it (and a `Permute` puts it first), the likelihood is a lower bound, which
    `importance_samples` make tight.

    Args:
        features: Size of x.
        core_features: Size of the core and of the code.
        encoder: Network from the shell to :math:`\mu_e` and then the raw logarithms r of
            :math:`\sigma_e`, bounded as :math:`\log \sigma_e = 3 \tanh(r / 3)`; None for an
            `MLPConditioner`.
        decoder: Network from the code to :math:`\mu_d` and the raw logarithms of :math:`\sigma_d`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is out of range; when called, if a network returns another number of
            outputs.

    References:
        Silvestri, Roos & Ambrogioni (2022), Deterministic training of generative autoencoders
        using invertible layers. https://arxiv.org/abs/2205.09546

    Example:
        >>> coupling = AutoencoderCoupling(5, core_features=2)
        >>> coupling.encode(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).tolist()
        [1.0, 2.0]
        >>> coupling.decode(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0, 0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        features: int,
        core_features: int,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__(features)
        self.core_features = check_count("core_features", core_features, most=self.features - 1)
        shell = self.features - self.core_features
        if encoder is None:
            encoder = MLPConditioner(shell, 2 * self.core_features)
        if decoder is None:
            decoder = MLPConditioner(self.core_features, 2 * shell)
        for name, network in (("encoder", encoder), ("decoder", decoder)):
            check_type(name, network, nn.Module, "MLPConditioner(2, 4)")
        self.encoder = encoder
        self.decoder = decoder

    def extra_repr(self) -> str:
        """Sizes of x and of the core."""
        return f"{self.features}, core_features={self.core_features}"

    def encode(self, x: Rows) -> Float[Tensor, "*batch core_features"]:
        """Return the code of each row."""
        return self.to_base(x)[..., : self.core_features]

    def decode(self, code: Float[Tensor, "*batch core_features"]) -> Rows:
        """Return the point of a code whose deviation is zero."""
        rest = self.features - self.core_features
        return self.to_data(torch.cat([code, code.new_zeros(*code.shape[:-1], rest)], -1))

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        core, shell = self._split(x)
        mean, log_scale = _outputs("encoder", self.encoder, shell, core)
        code = mean + log_scale.exp() * core
        prediction, log_noise = _outputs("decoder", self.decoder, code, shell)
        deviation = (shell - prediction) * (-log_noise).exp()
        return torch.cat([code, deviation], -1), log_scale.sum(-1) - log_noise.sum(-1)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        code, deviation = self._split(z)
        prediction, log_noise = _outputs("decoder", self.decoder, code, deviation)
        shell = prediction + log_noise.exp() * deviation
        mean, log_scale = _outputs("encoder", self.encoder, shell, code)
        core = (code - mean) * (-log_scale).exp()
        return torch.cat([core, shell], -1), log_noise.sum(-1) - log_scale.sum(-1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : self.core_features], x[..., self.core_features :]


def _outputs(name: str, network: nn.Module, given: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means and the logarithms of the scales, each of the shape of `like`."""
    numbers: Tensor = network(given).to(like.dtype)  # autocast lowers the dtype
    if numbers.shape != (*like.shape[:-1], 2 * like.shape[-1]):
        raise ValueError(
            f"{name} must return {2 * like.shape[-1]} numbers for each row, a mean and a scale for "
            f"each of {like.shape[-1]} features; it returned shape {tuple(numbers.shape)}."
        )
    mean, raw = numbers.chunk(2, -1)
    return mean, _BOUND * (raw / _BOUND).tanh()
