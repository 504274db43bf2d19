"""Masked autoregressive network (MADE)."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cnf._checks import check_count, check_widths
from cnf._shapes import Context, Rows
from cnf.vector_fields.conditioning import ContextScaling, scaled_context


class AutoregressiveNetwork(nn.Module):
    """Masked perceptron: the outputs for feature i depend on the features before i alone.

    Every output may depend on the context. The initial outputs are zero.

    Args:
        features: Size of x.
        context_features: Size of the context; 0 for none.
        outputs: Number of outputs for each feature.
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
        self.hidden_features = check_widths("hidden_features", hidden_features, least=0)
        degrees = [self._input_degrees(), *map(self._hidden_degrees, self.hidden_features)]
        self.hidden = nn.ModuleList(
            _MaskedLinear(after.unsqueeze(-1) >= before)
            for before, after in itertools.pairwise(degrees)
        )
        output_degrees = torch.arange(1, self.features + 1).repeat_interleave(self.outputs)
        self.last = _MaskedLinear(output_degrees.unsqueeze(-1) > degrees[-1])
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        if self.context_features:
            self.context_scaling = ContextScaling(self.context_features)

    def forward(
        self, x: Rows, context: Context | None = None
    ) -> Float[Tensor, "*batch features outputs"]:
        """Return the outputs for each feature."""
        context = scaled_context(self, context)
        if context is not None:
            x = torch.cat([x, context.expand(*x.shape[:-1], self.context_features)], -1)
        for layer in self.hidden:
            x = functional.silu(layer(x))
        outputs: Tensor = self.last(x).unflatten(-1, (self.features, self.outputs))
        return outputs

    def _input_degrees(self) -> Tensor:
        """Return the MADE degrees of the inputs: 1, 2, … for features, 0 for the context."""
        return torch.cat([torch.arange(1, self.features + 1), torch.zeros(self.context_features)])

    def _hidden_degrees(self, width: int) -> Tensor:
        """Return the number of the last feature that each unit sees; 0 for the context alone."""
        least = 0 if self.context_features or self.features == 1 else 1
        return least + torch.arange(width) * (self.features - least) // width


class _MaskedLinear(nn.Linear):
    """Linear layer whose weights are zero where the mask ``(outputs, inputs)`` is false."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("_mask", mask, persistent=False)
        self._mask: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch names it
        return functional.linear(input, self.weight * self._mask, self.bias)
