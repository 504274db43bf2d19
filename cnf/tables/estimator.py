"""Density estimator for scikit-learn; the only module that imports it.

Install scikit-learn with ``pip install 'cnf-flows[sklearn]'``.
"""

import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.random import RandomState
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from cnf._checks import check_count
from cnf.data.cells import Table, refuse_unless_numbers
from cnf.data.degeneracy import DegenerateDataWarning, check_columns
from cnf.data.names import shortened
from cnf.data.table_files import check_for_training, warn_of_fill_values
from cnf.tables import fit as density
from cnf.tables.fit import DensitySettings, TableRows, continue_density, fit_density, hold_out
from cnf.training import History
from cnf.transforms import Standardize

_SEEDS = 2**31 - 1
_SETTINGS = [field.name for field in fields(DensitySettings) if field.name != "seed"]
"""Parameters with the same names in `DensitySettings`; the seed comes from `random_state`."""
_LEAST_ROWS = 2  # for a standard deviation


class CNFDensity(DensityMixin, BaseEstimator):
    """Density estimation by a continuous normalizing flow, with `KernelDensity`'s interface.

    Columns are standardised, and may become normal scores, as `fit_density` says. Log-densities are
    in nats, computed in float64 by steps that are as fine as the `accuracy` of each row needs, so
    the score of a row does not depend on the others.

    Args:
        matching_steps: Steps of flow matching of each `fit`; None for a number that depends on the
            rows, as in `cnf.recipe`.
        likelihood_steps: Steps of maximum likelihood after them, and of each `partial_fit`; None
            likewise.
        batch_size: Rows of a minibatch; all rows if there are fewer.
        learning_rate: Peak learning rate of flow matching; maximum likelihood has a twentieth of
            it.
        hidden_features: Widths of the hidden layers of the network; None for the default of
            `cnf.CNF`.
        validation_fraction: Fraction of the rows held out for validation, to keep the best weights.
            With 0, or too few rows, the last weights are kept.
        accuracy: Largest estimated error of the log-density of a row, in nats, as in
            `Flow.calibrate`.
        random_state: Seed, `RandomState` or None (numpy's global one), of the held-out rows, the
            initial weights and the training.
        verbose: Whether to show a progress bar.

    Attributes:
        flow_: The fitted `Flow`, in float64.
        history_: History of the training by all calls since `fit`, with losses of the standardised
            rows.
        n_features_in_: Number of columns.
        feature_names_in_: Names of the columns, if X had names that are strings.

    References:
        Chen et al. (2018), Neural Ordinary Differential Equations.
        https://arxiv.org/abs/1806.07366

    Example:
        >>> X = np.random.RandomState(0).normal(5, 2, size=(300, 2))
        >>> model = CNFDensity(matching_steps=20, likelihood_steps=2, random_state=0).fit(X)
        >>> model.score_samples(X[:3]).shape
        (3,)
        >>> model.sample(10, random_state=0).shape
        (10, 2)
    """

    def __init__(  # noqa: PLR0913 - scikit-learn wants every setting as an argument
        self,
        *,
        matching_steps: int | None = DensitySettings.matching_steps,
        likelihood_steps: int | None = DensitySettings.likelihood_steps,
        batch_size: int = DensitySettings.batch_size,
        learning_rate: float = DensitySettings.learning_rate,
        hidden_features: Sequence[int] | None = DensitySettings.hidden_features,
        validation_fraction: float = DensitySettings.validation_fraction,
        accuracy: float = DensitySettings.accuracy,
        random_state: int | RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.matching_steps = matching_steps
        self.likelihood_steps = likelihood_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.hidden_features = hidden_features
        self.validation_fraction = validation_fraction
        self.accuracy = accuracy
        self.random_state = random_state
        self.verbose = verbose

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled estimator; settings that it does not have get their defaults."""
        defaults = {name: getattr(DensitySettings, name) for name in _SETTINGS}
        super().__setstate__({**defaults, **state})

    @torch.inference_mode(False)
    def fit(
        self, X: ArrayLike, y: Any = None, sample_weight: ArrayLike | None = None
    ) -> "CNFDensity":
        """Fit a new flow.

        Args:
            X: Rows (n_samples, n_features), at least two.
            y: Ignored.
            sample_weight: Weight of each row.

        Raises:
            TypeError: If X is sparse, or a parameter has the wrong type.
            ValueError: If X has NaN, infinity, masked values, dates, text, a constant column or
                less than two rows, or a parameter is out of range.
            TrainingError: If training cannot go on.
        """
        rows = self._rows(X, sample_weight, first=True)
        names = getattr(self, "feature_names_in_", range(self.n_features_in_))
        table = Table(rows.x.numpy(), tuple(map(str, names)))
        check_for_training(table, "X")
        warn_of_fill_values(table, "X")
        check_columns("X", rows.x, table.columns)
        settings = self._settings()
        training, held_out = hold_out(rows, settings)
        if len(training.x) < _LEAST_ROWS:
            raise ValueError(
                f"X must leave at least {_LEAST_ROWS} rows to train on; got {len(rows.x)}, and "
                f"validation_fraction={self.validation_fraction} leaves {len(training.x)}."
            )
        standardize = Standardize.from_data(rows.x, weight=rows.weight)
        with warnings.catch_warnings():  # check_columns warned of them above
            warnings.simplefilter("ignore", DegenerateDataWarning)
            self.flow_, self.history_ = fit_density(
                [standardize], training, held_out, settings=settings, progress=self.verbose
            )
        return self

    def partial_fit(
        self, X: ArrayLike, y: Any = None, sample_weight: ArrayLike | None = None
    ) -> "CNFDensity":
        """Train the fitted flow further, on these rows alone; without a flow, `fit`.

        The standardisation does not change. The flow gradually forgets rows that are not given
        again. Arguments and errors are as in `fit`, but one row is enough, columns may be constant,
        and `likelihood_steps` must not be 0.
        """
        if not hasattr(self, "flow_"):
            return self.fit(X, y, sample_weight)
        rows = self._rows(X, sample_weight, first=False)
        settings = self._settings()
        self.flow_, history = continue_density(
            self.flow_, *hold_out(rows, settings), settings=settings, progress=self.verbose
        )
        self.history_ = _concatenate(self.history_, history)
        return self

    def score_samples(self, X: ArrayLike) -> Float[np.ndarray, " n_samples"]:
        """Return the log-density of each row, in nats.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If X has NaN or infinity, or does not fit.
        """
        check_is_fitted(self)
        rows = self._rows(X, None, first=False)
        return density.log_prob(self.flow_, rows, progress=self.verbose).numpy()

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Return the total log-density of the rows, in nats; see `score_samples`."""
        return float(self.score_samples(X).sum())

    def sample(
        self, n_samples: int = 1, random_state: int | RandomState | None = None
    ) -> Float[np.ndarray, "n_samples n_features"]:
        """Draw rows.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If `n_samples` is less than 1.
        """
        check_is_fitted(self)
        check_count("n_samples", n_samples)
        seed = _seed(random_state)
        return density.sample(self.flow_, n_samples, seed=seed, progress=self.verbose).numpy()

    def _settings(self) -> DensitySettings:
        given = {name: getattr(self, name) for name in _SETTINGS}
        return DensitySettings(**given, seed=_seed(self.random_state))

    def _rows(self, X: ArrayLike, sample_weight: ArrayLike | None, *, first: bool) -> TableRows:
        """Return the checked rows of positive weight."""
        least = _LEAST_ROWS if first else 1
        refuse_unless_numbers("X", X)
        values = validate_data(self, X, dtype=np.float64, reset=first, ensure_all_finite=False)
        _refuse_not_finite(values, getattr(self, "feature_names_in_", None))
        if len(values) < least:  # scikit-learn's tests match these words
            raise ValueError(f"X must have at least {least} rows; got 1 sample.")
        x = _as_tensor(values)
        if sample_weight is None:
            return TableRows(x)
        refuse_unless_numbers("sample_weight", sample_weight)
        weight = _checked_weight(sample_weight, len(values))
        counted = (weight > 0).nonzero().flatten()
        if len(counted) < least:
            raise ValueError(
                f"sample_weight must be positive for at least {least} rows; got {len(counted)}, "
                "and zero for the others."
            )
        return TableRows(x, weight=weight).take(counted)


def _refuse_not_finite(X: Float[np.ndarray, "rows columns"], names: ArrayLike | None) -> None:
    bad = np.argwhere(~np.isfinite(X))
    if len(bad):
        row, column = map(int, bad[0])
        name = column if names is None else shortened(str(np.asarray(names)[column]))
        kind = "NaN, a missing value," if np.isnan(X[row, column]) else str(X[row, column])
        raise ValueError(
            f"X must be finite; got {kind} in row {row} (from 0), column {name!r}; {len(bad)} in "
            "all. Fill these values or drop the rows."
        )


def _as_tensor(values: np.ndarray) -> Tensor:
    """Copy to float64, from an array that may be read-only, with any strides and byte order."""
    return torch.from_numpy(np.array(values, dtype=np.float64, order="C"))


def _checked_weight(sample_weight: ArrayLike, rows: int) -> Float[Tensor, " rows"]:
    weight = check_array(
        sample_weight, ensure_2d=False, dtype=np.float64, input_name="sample_weight"
    )
    if weight.shape != (rows,):
        raise ValueError(
            f"sample_weight must have shape ({rows},), a weight for each row; got {weight.shape}."
        )
    if (weight < 0).any():
        raise ValueError(f"sample_weight must not be negative; got {weight.min():g}.")
    return _as_tensor(weight)


def _seed(random_state: int | RandomState | None) -> int:
    """Draw a seed for torch, as scikit-learn does."""
    return int(check_random_state(random_state).randint(_SEEDS))


def _concatenate(first: History, then: History) -> History:
    """Concatenate two histories, with steps, phases and seconds counted on."""
    columns = {name: values + then.columns[name] for name, values in first.columns.items()}
    for name in ("step", "phase", "seconds"):
        passed = first.columns[name][-1]
        columns[name][len(first.step) :] = [passed + value for value in then.columns[name]]
    return History(**columns)
