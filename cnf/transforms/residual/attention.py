"""Lipschitz self-attention, a contraction."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cnf._checks import check_count
from cnf._shapes import Context
from cnf.transforms.residual.contractions import ContractiveNetwork
from cnf.transforms.residual.spectral_layers import Map, rescale_to_norm, spectral_norm


class LipschitzAttention(ContractiveNetwork):
    r"""Self-attention by the L2 distance of queries, with a bounded Lipschitz constant.

    x is the tokens one after the other. Head h turns token i into a query :math:`q_i = W_h^\top
    x_i` of size m, averages the queries with weights that fall with the distance, and maps the
    mean:

    .. math:: p_{ij} \propto \exp(-\|q_i - q_j\|^2 / \sqrt m), \qquad
        f_{h,i} = V_h^\top W_h \, {\textstyle\sum_j} p_{ij} q_j / \sqrt m

    and an output matrix U mixes the heads. (Dot-product attention has no Lipschitz constant: its
    slopes grow with its inputs.) The map is equivariant to permutations of the tokens.

    *The bound.* The mean of the queries has the derivative

    .. math:: {\textstyle\sum_j} p_{ij} \, dq_j + \frac{2}{\sqrt m} \, C_i \, dq_i
        - \frac{2}{\sqrt m} {\textstyle\sum_j} p_{ij} (q_j - \bar q_i)(q_j - q_i)^\top dq_j

    with the mean :math:`\bar q_i` and covariance :math:`C_i` of the queries by the weights of
    token i. For n tokens, :math:`\sum_j p_{ij} \|q_j - q_i\|^2 \le \sqrt m \, \varphi` with
    :math:`\varphi \, e^{\varphi + 1} = n - 1`. So the second part, of a token's own place, has a
    norm of at most :math:`2 \varphi`. The other two are blocks for the pairs of tokens, whose norms
    have sums over j of at most :math:`1 + 2 \varphi`, and over i of at most
    :math:`1 + (n - 1) c`: for :math:`i \ne j` and :math:`s = \|q_i - q_j\|^2 / \sqrt m` a block has
    :math:`p_{ij} \le 1 / (1 + e^s)` and a norm of at most

    .. math:: p_{ij} (1 + 2 \sqrt s (\sqrt s + \sqrt \varphi)) \le
        \frac{1 + \varphi + 3 s}{1 + e^s} \le c = 3 \, W(e^{(\varphi - 2) / 3})

    with Lambert's W. By Schur's test the norm of these blocks together is at most the geometric
    mean of both sums, and so the network has a Lipschitz constant of at most

    .. math:: \frac{2 \varphi + \sqrt{(1 + 2 \varphi) (1 + (n - 1) c)}}{\sqrt m} \,
        \sqrt{{\textstyle\sum_h} \|W_h\|^2 \, \|W_h^\top V_h\|^2} \; \|U\|

    in spectral norms, computed at each evaluation; where the bound exceeds the `coefficient`, the
    result is scaled down. (The derivative is as in Kim et al., whose constant is
    :math:`\sqrt n (4 \varphi + 1)` in place of the first numerator.)

    The output matrix starts at zero, so that a new residual flow is the identity.

    Args:
        tokens: Number n of tokens.
        width: Size of a token; `features` is the product of both.
        heads: Number of heads, each with queries of the size m = width / heads.
        coefficient: Bound of the Lipschitz constant in x.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If an argument is out of range, or `heads` does not divide `width`.

    References:
        Kim, Papamakarios & Mnih (2021), The Lipschitz Constant of Self-Attention.
        https://arxiv.org/abs/2006.04710
        Mukherjee, Patro & Namboodiri (2021), Attentive Contractive Flow.
        https://arxiv.org/abs/2109.12135

    Example:
        >>> network = LipschitzAttention(5, 4, heads=2)
        >>> network(torch.randn(3, 20)).shape
        torch.Size([3, 20])
    """

    def __init__(
        self, tokens: int, width: int, *, heads: int = 1, coefficient: float = 0.97
    ) -> None:
        features = check_count("tokens", tokens) * check_count("width", width)
        super().__init__(features, coefficient=coefficient)
        self.tokens = int(tokens)
        self.width = int(width)
        self.heads = check_count("heads", heads)
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width {width}; got {heads}.")
        size = self.width // self.heads
        # W and V of each head, with queries of about the size of the tokens.
        scale = 1 / math.sqrt(self.width)
        self.query = nn.Parameter(scale * torch.randn(self.heads, self.width, size))
        self.value = nn.Parameter(scale * torch.randn(self.heads, self.width, size))
        self.output = nn.Parameter(torch.zeros(self.width, self.width))

    def given(self, context: Context | None) -> Map:
        """Return the map of x; there is no context."""
        mixed = self.query.mT @ self.value
        output = rescale_to_norm(self.output, self._bound(mixed), self.coefficient)
        scale = math.sqrt(self.query.shape[-1])

        def attended(x: Tensor) -> Tensor:
            queries = x.unflatten(-1, (self.tokens, self.width)).unsqueeze(-3) @ self.query
            # From differences: rounding of products of queries far from 0 exceeds the distances.
            apart = queries.unsqueeze(-3) - queries.unsqueeze(-2)
            weights = (-apart.square().sum(-1) / scale).softmax(-1)
            means = queries + (weights.unsqueeze(-1) * apart).sum(-2)
            heads = means @ mixed / scale
            mixture: Tensor = heads.transpose(-3, -2).flatten(-2) @ output
            return mixture.flatten(-2)

        return attended

    def _bound(self, mixed: Tensor) -> Float[Tensor, ""]:
        """Return the bound of the Lipschitz constant before the output is scaled down."""
        spread, others = largest_spread(self.tokens), self.tokens - 1
        steepest = 3 * lambert_w(math.exp((spread - 2) / 3))
        pairs = math.sqrt((1 + 2 * spread) * (1 + others * steepest))
        averaging = (2 * spread + pairs) / math.sqrt(self.query.shape[-1])
        heads = torch.linalg.vector_norm(spectral_norm(self.query) * spectral_norm(mixed))
        bound: Tensor = averaging * heads * spectral_norm(self.output)
        return bound


def largest_spread(tokens: int) -> float:
    r"""Return the largest weighted mean of squared distances :math:`s_j`, weights :math:`e^{-s_j}`.

    One of the distances, of a token to itself, is 0. The mean is largest where the others are
    equal: it is then the solution c of :math:`c \, e^{c + 1} = n - 1` for n `tokens`.

    Example:
        >>> round(largest_spread(2), 4)
        0.2785
    """
    return lambert_w((tokens - 1) / math.e)


def lambert_w(value: float) -> float:
    r"""Return Lambert's W of a `value` of at least 0: the solution w of :math:`w \, e^w` = `value`.

    By Newton's method from above.

    Example:
        >>> lambert_w(math.e)
        1.0
    """
    w = math.log1p(value)
    for _ in range(50):
        growth = math.exp(w)
        w -= (w * growth - value) / (growth * (1 + w))
    return w
