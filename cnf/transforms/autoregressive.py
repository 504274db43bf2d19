"""A network whose outputs for each feature see the features before it only."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cnf._checks import check_count
from cnf._shapes import Context, Rows
from cnf.vector_fields.conditioning import ContextScaling, scaled_context


class AutoregressiveNetwork(nn.Module):
    """Perceptron with masked weights: what it gives for feature i depends on features before i.

    Every output may depend on the context. A new one gives zeros.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.
        outputs: How many numbers it gives for each feature.
        hidden_features: Widths of the hidden layers; ``()`` for an affine map. Some of the units
            see the first feature only, some the first two, and so on, in equal parts.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range.

    References:
        Germain et al. (2015), MADE: Masked Autoencoder for Distribution Estimation.
        https://arxiv.org/abs/1502.03509

    Example:
        >>> network = AutoregressiveNetwork(2, 0, outputs=3, hidden_features=(64,))
        >>> network(torch.randn(5, 2)).shape
        torch.Size([5, 2, 3])
    """

    def __init__(
        self,
        features: int,
        context_features: int = 0,
        *,
        outputs: int,
        hidden_features: Sequence[int],
    ) -> None:
        super().__init__()
        self.features = check_count("features", features)
        self.context_features = check_count("context_features", context_features, least=0)
        self.outputs = check_count("outputs", outputs)
        if not isinstance(hidden_features, Sequence):
            raise TypeError(f"hidden_features must be widths; got {hidden_features!r}.")
        widths = [check_count("each of hidden_features", width) for width in hidden_features]
        self.hidden_features = tuple(widths)
        sees = [self._inputs_are(), *map(self._hidden_units_see, widths)]
        self.hidden = nn.ModuleList(
            _MaskedLinear(after.unsqueeze(-1) >= before)
            for before, after in itertools.pairwise(sees)
        )
        of_feature = torch.arange(1, self.features + 1).repeat_interleave(self.outputs)
        self.last = _MaskedLinear(of_feature.unsqueeze(-1) > sees[-1])
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)

    def forward(
        self, x: Rows, context: Context | None = None
    ) -> Float[Tensor, "*batch features outputs"]:
        """The numbers for each feature."""
        context = scaled_context(self, context)
        if context is not None:
            x = torch.cat([x, context.expand(*x.shape[:-1], self.context_features)], -1)
        for layer in self.hidden:
            x = functional.silu(layer(x))
        found: Tensor = self.last(x).unflatten(-1, (self.features, self.outputs))
        return found

    def _inputs_are(self) -> Tensor:
        """Number of each input: features from 1 on; 0 is for the context, which all may see."""
        return torch.cat([torch.arange(1, self.features + 1), torch.zeros(self.context_features)])

    def _hidden_units_see(self, width: int) -> Tensor:
        """Up to which feature each of the units sees; up to 0 is of use with a context only."""
        least = 0 if self.context_features or self.features == 1 else 1
        return least + torch.arange(width) * (self.features - least) // width


class _MaskedLinear(nn.Linear):
    """A linear layer without the weights where the mask ``(outputs, inputs)`` is false."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("_mask", mask, persistent=False)
        self._mask: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch names it
        return functional.linear(input, self.weight * self._mask, self.bias)
