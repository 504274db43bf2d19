r"""Whitening: a linear map to uncorrelated features of variance 1."""

import torch
from torch import Generator, Tensor

from cnf._moments import shrunk_correlation
from cnf.transforms.base import WithLadj
from cnf.transforms.from_data.base import DataTransform


class Whiten(DataTransform):
    r"""Whitening by the Cholesky factor of a shrunk covariance: ``x = mean + scale_tril @ z``.

    The correlations of the rows are shrunk towards zero by the share that minimises the expected
    squared error, so that few rows, or collinear features, still give an invertible map; the
    variances are not shrunk. A flow of this transform alone, with a standard normal base, is the
    normal density of the rows.

    Args:
        features: Size of x.

    Raises:
        TypeError: If `features` is not an int.
        ValueError: If `features` is less than 1.

    References:
        Ledoit and Wolf (2004), A well-conditioned estimator for large-dimensional covariance
        matrices, lemmas 3.2 to 3.4.

    Example:
        >>> x = torch.randn(1000, 1) + 0.1 * torch.randn(1000, 2)
        >>> z = Whiten.from_data(x).to_base(x)
        >>> bool(torch.corrcoef(z.T)[0, 1].abs() < 0.1)
        True
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale_tril", torch.eye(features))
        self.mean: Tensor
        self.scale_tril: Tensor

    def _set(self, rows: Tensor, share: Tensor, mean: Tensor, std: Tensor) -> None:
        scaled = (rows - mean) / std
        scaled = scaled / (share @ scaled.square()).sqrt()  # by the variance without correction
        shrunk = shrunk_correlation(scaled, share)
        self.mean.copy_(mean)
        self.scale_tril.copy_(std.unsqueeze(-1) * torch.linalg.cholesky(shrunk))

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        rows = (x - self.mean).reshape(-1, self.features)
        factor, rows = (part.to(_solvable(x.dtype)) for part in (self.scale_tril, rows))
        z = torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT
        return z.reshape(x.shape).to(x.dtype), -self._log_det.expand(x.shape[:-1])

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        with torch.autocast(z.device.type, enabled=False):  # as precise as the inverse
            return self.mean + z @ self.scale_tril.mT, self._log_det.expand(z.shape[:-1])

    @property
    def _log_det(self) -> Tensor:
        return self.scale_tril.diagonal().log().sum()


def _solvable(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype in which torch solves linear systems."""
    return dtype if dtype == torch.float64 else torch.float32
