"""What the parts of a chain must agree on."""

import itertools
from collections.abc import Sequence

from torch import nn

from cnf.transforms.base import Transform


def check_one_dtype(parts: Sequence[nn.Module]) -> None:
    """Refuse parts of different dtypes.

    Raises:
        ValueError: If there are several.
    """
    tensors = itertools.chain(*((*part.parameters(), *part.buffers()) for part in parts))
    dtypes = {str(tensor.dtype) for tensor in tensors if tensor.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(
            f"transforms and base must have one dtype; got {', '.join(sorted(dtypes))}. Convert "
            "a part with part.to(torch.float32), or the data that Standardize.from_data is given."
        )


def agreed_context_features(transforms: Sequence[Transform]) -> int:
    """Size of the context that the transforms take; 0 if none takes one.

    Raises:
        ValueError: If they take contexts of different sizes.
    """
    sizes = {transform.context_features for transform in transforms} - {0}
    if len(sizes) > 1:
        raise ValueError(f"transforms must agree on context_features; got {sorted(sizes)}.")
    return sizes.pop() if sizes else 0
