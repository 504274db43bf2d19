"""Parts of a table: all rows, each once, always the same."""

import numpy as np
import pytest

from cnf.data.splits import Splits, split_rows


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(("rows", "sizes"), [(5, [3, 1, 1]), (109, [90, 9, 10]), (19, [17, 1, 1])])
def test_every_row_is_in_one_part(seed, rows, sizes):
    x = np.arange(2.0 * rows).reshape(rows, 2)
    splits = split_rows(x, seed=seed)
    assert [len(part) for part in splits] == sizes
    together = np.concatenate(splits)
    assert (np.sort(together, 0) == x).all()
    assert (together == x).all() == (seed is None)
    again = split_rows(x, seed=seed)
    assert all((a == b).all() for a, b in zip(splits, again, strict=True))


def test_another_seed_is_another_order():
    x = np.arange(50.0)[:, None]
    assert (split_rows(x, seed=0).train != split_rows(x, seed=1).train).any()


def test_standardised_by_train_and_validation_together():
    rng = np.random.default_rng(0)
    splits = split_rows(rng.normal(3, 2, (200, 3)), validation=0.3, test=0.25)
    assert [len(part) for part in splits] == [105, 45, 50]
    after = splits.standardized()
    known = np.concatenate(after[:2])
    assert known.mean(0) == pytest.approx(np.zeros(3), abs=1e-12)
    assert known.std(0) == pytest.approx(np.ones(3), abs=1e-12)
    ratio = (splits.test[1] - splits.test[0]) / (after.test[1] - after.test[0])
    assert ratio == pytest.approx(np.concatenate(splits[:2]).std(0))


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match=r"test must be more than 0 and less than 1; got 1\.0"):
        split_rows(np.zeros((9, 1)), test=1.0)
    with pytest.raises(ValueError, match=r"validation must be more than 0 .* got nan"):
        split_rows(np.zeros((9, 1)), validation=float("nan"))
    with pytest.raises(ValueError, match="rows for three parts; got 2"):
        split_rows(np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"constant are \[1\]"):
        Splits(
            np.array([[0.0, 1.0]]), np.array([[2.0, 1.0]]), np.array([[2.0, 3.0]])
        ).standardized()
