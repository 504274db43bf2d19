"""Variational autoencoder as a stochastic transform."""

from torch import Generator, Tensor
from torch.distributions import constraints

from cnf._checks import check_type
from cnf.bases import Base, Likelihood, weakest
from cnf.transforms.base import Transform, WithLadj
from cnf.vector_fields.conditioning import ContextScaling, beside, scaled_context


class VAE(Transform):
    r"""Variational autoencoder: z is drawn from an encoder, and x from a decoder.

    The rest of the flow is the prior of z. The likelihood is the lower bound of the VAE:

    .. math:: \log p(x) \ge \mathbb{E}_{q(z|x)} [\log p(z) + \log p(x | z) - \log q(z | x)]

    Draws are reparameterised. With `importance_samples` it is the bound of importance-weighted
    autoencoders.

    Args:
        encoder: Distribution q(z | x). Its context is x, followed by the context if there is one.
        decoder: Distribution p(x | z). Its context is z, followed by the context if there is one.

    Raises:
        TypeError: If an argument is not a base.
        ValueError: If the sizes do not fit together, or a likelihood is not exact.

    References:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes. https://arxiv.org/abs/1312.6114
        Nielsen et al. (2020), SurVAE Flows. https://arxiv.org/abs/2007.02731

    Example:
        >>> import torch
        >>> from cnf.bases import ConditionalNormal
        >>> vae = VAE(ConditionalNormal(1, 3), ConditionalNormal(3, 1))
        >>> vae.to_base(torch.zeros(5, 3)).shape, vae.to_data(torch.zeros(5, 1)).shape
        (torch.Size([5, 1]), torch.Size([5, 3]))
    """

    stochastic_to_base = True
    stochastic_to_data = True

    def __init__(self, encoder: Base, decoder: Base) -> None:
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            check_type(name, part, Base, "use ConditionalNormal, or TransformedBase for a flow")
            if part.likelihood != "exact":
                raise ValueError(
                    f"{name} must have an exact likelihood; got one that is {part.likelihood!r}."
                )
        context_features = encoder.context_features - decoder.features
        if context_features < 0 or decoder.context_features != encoder.features + context_features:
            raise ValueError(
                "encoder and decoder must each have the features of the other as context_features, "
                "and those of the context; got "
                f"{encoder.features} given {encoder.context_features}, and "
                f"{decoder.features} given {decoder.context_features}."
            )
        super().__init__(decoder.features, context_features)
        self.encoder = encoder
        self.decoder = decoder
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)

    @property
    def base_features(self) -> int:
        """Number of entries of z."""
        return self.encoder.features

    @property
    def support(self) -> constraints.Constraint:
        """Support of the decoder."""
        return self.decoder.support

    @property
    def codomain(self) -> constraints.Constraint:
        """Support of the encoder."""
        return self.encoder.support

    @property
    def likelihood(self) -> Likelihood:
        """A lower bound."""
        return weakest([super().likelihood, self.encoder.likelihood, self.decoder.likelihood])

    @property
    def needs_initialization(self) -> bool:
        """Whether the scaling of the context, the encoder or the decoder is to be set."""
        scaling: ContextScaling | None = getattr(self, "context_scaling", None)
        own = scaling is not None and scaling.needs_initialization
        parts = (self.encoder, self.decoder)
        return own or any(part.needs_initialization for part in parts)

    def _initialize(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> None:
        if self.context_features:
            self.context_scaling.initialize(context)
        context = scaled_context(self, context)
        z = self.encoder.rsample(x.shape[:-1], beside(x, context), generator=generator)
        self.encoder.initialize(z, beside(x, context), generator=generator)
        self.decoder.initialize(x, beside(z, context), generator=generator)

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        context = scaled_context(self, context)
        z = self.encoder.rsample(x.shape[:-1], beside(x, context), generator=generator)
        return z, self._ladj(x, z, context)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        context = scaled_context(self, context)
        x = self.decoder.rsample(z.shape[:-1], beside(z, context), generator=generator)
        return x, -self._ladj(x, z, context)

    def _ladj(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        likelihood = self.decoder.log_prob(x, beside(z, context))
        return likelihood - self.encoder.log_prob(z, beside(x, context))
