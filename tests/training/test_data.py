"""Laws of the data that training takes: whatever form they come in, the same rows are learnt."""

import copy
import functools
import math
import pickle
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
)
from training_runs import CHEAP, affine_flow, assert_same, config, weights

from cnf import CNF, Flow, Standardize, fit
from cnf.data import NpyRows
from cnf.objectives import MaximumLikelihood, Objective, weighted_mean
from cnf.training.data import as_rows
from cnf.training.initialization import sample_of
from cnf.transforms import Affine, Logit

KINDS_OF_NUMBERS = (np.float32, np.float64, np.array, torch.tensor)


class Weighted(MaximumLikelihood):
    """The weighted mean of the negative log-likelihood."""

    def _loss(self, x, context, weight, draws, generator):
        flow = self.flow.using(solver=CHEAP)
        nll = -flow.log_prob(x, context, generator=generator)
        return (nll if weight is None else weight * nll).mean()


def conditional_flow():
    torch.manual_seed(0)
    return CNF(2, 3, hidden_features=(4, 4), solver=CHEAP, skip=False)


class Listed(Dataset):
    """Items of any form, and a record of which were asked for."""

    def __init__(self, items):
        self.items, self.asked = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.items[index]


def forms(x, context, weight):
    """The same rows in every form that carries all of them."""
    named = {"x": x, "context": context, "weight": weight}
    rows = list(zip(x, context, weight, strict=True))
    return {
        "dict": named,
        "dataset of dicts": Listed([dict(zip(named, row, strict=True)) for row in rows]),
        "stacked datasets": StackDataset(**named),
        "part of a dataset": Subset(StackDataset(**named), range(len(x))),
    }


@pytest.mark.parametrize("form", forms(*torch.zeros(3, 1)))
def test_data_of_every_form_are_the_same_rows(form):
    x, context = torch.randn(20, 2), torch.randn(20, 3)
    weight = torch.rand(20)
    weight /= weight.mean()
    settings = config(4, batch_size=8, objective=Weighted, validate_every=2)
    validation = {"x": x, "context": context, "weight": weight}
    expected, flow = conditional_flow(), conditional_flow()
    history = fit(expected, validation, settings, validation=validation)
    data = forms(x, context, weight)[form]

    same = fit(flow, data, settings, validation=data)

    # Weights of tensors are divided by their mean once more, which is 1 to rounding.
    assert same.loss == pytest.approx(history.loss, rel=1e-12)
    assert same.validation == pytest.approx(history.validation, rel=1e-12, nan_ok=True)
    torch.testing.assert_close(weights(flow), weights(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [TensorDataset, Listed, lambda x: StackDataset(x=x)])
def test_a_dataset_may_hold_rows_alone(kind):
    x = torch.randn(20, 2)
    flow, expected = affine_flow(), affine_flow()
    history = fit(expected, x, config(5, batch_size=8), validation=None)
    same = fit(flow, kind(x), config(5, batch_size=8), validation=None)
    assert same.loss == history.loss
    assert_same(weights(flow), weights(expected))


def test_a_dataset_may_hold_pairs_of_rows_and_contexts():
    x, context = torch.randn(20, 2), torch.randn(20, 3)
    losses = [
        fit(conditional_flow(), data, config(2, batch_size=8), validation=None).loss
        for data in ((x, context), TensorDataset(x, context))
    ]
    assert losses[0] == losses[1]


class Regression(Objective):
    """The squared distance of the base points from the targets."""

    takes_targets = True

    def _loss(self, x, context, weight, draws, generator, target=None):
        z = self.flow.to_base(x, context, generator=generator)
        return weighted_mean((z - target.reshape(len(z), -1)).square().sum(-1), weight)


def forms_with_targets(x, target):
    """The same rows and targets in every form."""
    return {
        "pair": (x, target),
        "dict": {"x": x, "target": target},
        "tensors": TensorDataset(x, target),
        "pairs": Listed(list(zip(x, target, strict=True))),
        "dataset of dicts": Listed(
            [{"x": row, "target": of} for row, of in zip(x, target, strict=True)]
        ),
        "stacked datasets": StackDataset(x=x, target=target),
        "part of a dataset": Subset(TensorDataset(x, target), range(len(x))),
    }


@pytest.mark.parametrize("form", forms_with_targets(*torch.zeros(2, 1)))
@pytest.mark.parametrize("shape", [(), (2,)], ids=str)
def test_targets_of_every_form_are_the_same(form, shape):
    x, target = torch.randn(20, 2), torch.randn(20, *shape)
    settings = config(4, batch_size=8, validate_every=2)
    expected, flow = affine_flow(), affine_flow()
    history = fit(Regression(expected), (x, target), settings, validation=(x, target))
    data = forms_with_targets(x, target)[form]

    same = fit(Regression(flow), data, settings, validation=data)

    assert same.loss == history.loss
    assert str(same.validation) == str(history.validation)
    assert_same(weights(flow), weights(expected))


def test_labels_of_a_dataset_may_be_python_numbers():
    x, labels = torch.randn(6, 2), [0, 1, 2, 0, 1, 2]
    data = Listed(list(zip(x, labels, strict=True)))
    rows = as_rows("data", data, affine_flow(), targets=True)
    taken = rows.take(torch.tensor([2, 1])).target
    assert taken.dtype == torch.int64
    assert taken.tolist() == [2, 1]


@pytest.mark.slow
def test_targets_never_reach_the_flow():
    """Statistics, the initialisation and the calibration see rows and contexts alone."""
    torch.manual_seed(0)
    flow = CNF(2, 3, hidden_features=(4, 4))
    x, context, target = torch.randn(20, 2), torch.randn(20, 3), torch.randn(20, 2)
    data = {"x": x, "context": context, "target": target}
    fit(Regression(flow), data, config(2))
    assert torch.equal(sample_of(as_rows("data", data, flow, targets=True)).context, context)
    assert flow.log_prob(x, context).isfinite().all()


TARGETS = torch.zeros(5, dtype=torch.int64)
REMEDY = r"takes_targets=True, such as HybridObjective.*context_features"


def test_targets_beside_an_objective_without_are_refused_with_the_remedy():
    x = torch.zeros(5, 2)
    with pytest.raises(ValueError, match=rf"context must be None.*\(5,\).*{REMEDY}"):
        fit(affine_flow(), (x, TARGETS), config(1))
    with pytest.raises(ValueError, match=rf"the key x, and no others .*got x, target.*{REMEDY}"):
        fit(affine_flow(), {"x": x, "target": TARGETS}, config(1))


def bad_targets():
    x = torch.randn(5, 2)
    return {
        "none": (x, r"data must be a pair \(x, target\) or a dict.*objective takes targets"),
        "none by name": ({"x": x}, r"data must have the key x and target"),
        "NaN": ((x, torch.full((5,), math.nan)), r"the targets of data must be finite.*rows 0, 1"),
        "too few": ((x, torch.zeros(4)), r"the targets of data must have one entry for each row"),
        "other dtype": ((x, torch.zeros(5).float()), r"the targets of data must have the model's"),
        "bytes": ((x, TARGETS.byte()), r"the targets of data .*int64.*\.long\(\)"),
    }


@pytest.mark.parametrize("kind", bad_targets())
def test_bad_targets_are_refused(kind):
    data, message = bad_targets()[kind]
    with pytest.raises(ValueError, match=message):
        fit(Regression(affine_flow()), data, config(1))


def test_a_pair_for_a_conditional_flow_says_neither_context_nor_target():
    flow = conditional_flow()
    with pytest.raises(ValueError, match="because the flow takes contexts too; got a pair"):
        fit(Regression(flow), (torch.zeros(5, 2), torch.zeros(5, 3)), config(1))


def test_targets_given_to_an_objective_without_are_refused():
    with pytest.raises(ValueError, match=f"MaximumLikelihood takes no targets.*{REMEDY}"):
        MaximumLikelihood(affine_flow())(torch.zeros(5, 2), target=TARGETS)


def test_a_weight_of_two_counts_as_two_rows():
    x, weight = torch.randn(6, 2), torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0, 1.0])
    repeated = torch.cat([x, x[weight == 2]])
    settings = config(5, batch_size=8, learning_rate=0.1, objective=Weighted, validate_every=1)
    weighted, plain = affine_flow(), affine_flow()

    history = fit(
        weighted, {"x": x, "weight": weight}, settings, validation={"x": x, "weight": 7 * weight}
    )
    expected = fit(plain, repeated, settings, validation=repeated)

    assert history.loss == pytest.approx(expected.loss, rel=1e-12)
    assert history.validation == pytest.approx(expected.validation, rel=1e-12)
    torch.testing.assert_close(weights(weighted), weights(plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_weights_of_tensors_are_relative_to_their_mean(scale):
    x, weight = torch.randn(10, 2), torch.rand(10)
    settings = config(3, batch_size=4, objective=Weighted)
    losses = [
        fit(affine_flow(), {"x": x, "weight": factor * weight}, settings, validation=None).loss
        for factor in (1.0, scale)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def npy(folder, array):
    np.save(folder / "x.npy", array)
    return folder / "x.npy"


def test_rows_of_a_file_are_those_of_the_array(tmp_path):
    array = np.random.default_rng(0).normal(size=(30, 2))
    rows = NpyRows(npy(tmp_path, array))
    expected, flow = affine_flow(), affine_flow()

    history = fit(expected, torch.from_numpy(array), config(4, batch_size=8), validation=None)
    same = fit(flow, rows, config(4, batch_size=8), validation=None)

    assert len(rows) == 30
    assert torch.equal(rows[7], torch.from_numpy(array[7]))
    assert same.loss == history.loss
    assert_same(weights(flow), weights(expected))
    assert NpyRows(rows.path, dtype=torch.float32)[0].dtype == torch.float32


@pytest.mark.parametrize("keep", [lambda rows: pickle.loads(pickle.dumps(rows)), copy.deepcopy])  # noqa: S301
def test_a_copy_of_the_rows_of_a_file_reads_the_file_itself(tmp_path, monkeypatch, keep):
    array = np.random.default_rng(0).normal(size=(1000, 5))
    path = npy(tmp_path, array)
    monkeypatch.chdir(path.parent)
    rows = NpyRows(path.name, dtype=torch.float32)
    monkeypatch.chdir("/")
    assert len(pickle.dumps(rows)) < 1000
    assert torch.equal(keep(rows)[7], rows[7])


@pytest.mark.parametrize("dtype", [">f8", "<f4", ">i8"])
def test_numbers_are_read_in_any_byte_order(tmp_path, dtype):
    values = np.arange(6).reshape(3, 2)
    rows = NpyRows(npy(tmp_path, values.astype(dtype)))
    assert torch.stack([rows[0], rows[2]]).tolist() == [[0, 1], [4, 5]]


def test_numbers_that_torch_has_not_are_refused_at_once(tmp_path):
    path = npy(tmp_path, np.ones((3, 2), "g"))
    with pytest.raises(ValueError, match="dtype that torch has"):
        NpyRows(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cnf.data.degeneracy.DegenerateDataWarning")
def test_a_file_larger_than_memory_would_hold_is_read_row_by_row(tmp_path, monkeypatch):
    rows, features = 2**19, 256  # a gigabyte of zeros, which take no room on the disk
    path = tmp_path / "large.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(rows, features))
    array[:1000] = np.random.default_rng(0).normal(size=(1000, features))
    del array
    asked = []
    getitems = NpyRows.__getitems__
    monkeypatch.setattr(
        NpyRows,
        "__getitems__",
        lambda self, indices: asked.extend(indices) or getitems(self, indices),
    )

    tracemalloc.start()
    fit(affine_flow(features), NpyRows(path), config(5, batch_size=64), validation=None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    looked_at_first = 1 + 10_000
    assert len(asked) == looked_at_first + 5 * 64
    assert peak < 1.5 * looked_at_first * features * 8 < rows * features * 8 / 30


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a .npy file of numbers, or is cut short"),
        (b"1,2\n3,4\n", "is not a .npy file of numbers, or is cut short"),
        (np.array(1.0), "must hold rows of numbers"),
        (np.array(["a", "b"]), "must hold rows of numbers"),
    ],
    ids=["empty", "text", "one number", "strings"],
)
def test_what_is_no_file_of_rows_is_refused(content, message, tmp_path):
    path = tmp_path / "x.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=message):
        NpyRows(path)


def test_a_file_that_is_cut_short_or_holds_objects_is_refused(tmp_path):
    path = npy(tmp_path, np.zeros((100, 2)))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="is cut short"):
        NpyRows(path)
    np.save(path, np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"is not a \.npy file of numbers"):
        NpyRows(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npy"):
        NpyRows(tmp_path / "nowhere.npy")


def with_bad_row(value):
    x = torch.randn(50, 2).sigmoid()
    x[17, 1] = value
    return x


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"data\[17\] must be finite; got NaN or inf in the only row"),
        (1.5, r"data\[17\] must be strictly between .*; got other values in the only row"),
    ],
)
def test_a_bad_row_of_a_dataset_is_named_when_it_is_read(value, message, monkeypatch):
    monkeypatch.setattr("cnf.training.initialization._ROWS", 2)
    flow = Flow([Logit(2), Affine(2)])
    with pytest.raises(ValueError, match=message):
        fit(flow, Listed(with_bad_row(value)), config(100, batch_size=8), validation=None)
    assert all(value.isfinite().all() for value in flow.state_dict().values())


def test_a_bad_context_of_a_dataset_is_named_by_its_row():
    context = torch.randn(5, 3)
    context[3, 0] = math.inf
    data = Listed(list(zip(torch.randn(5, 2), context, strict=True)))
    with pytest.raises(ValueError, match=r"the context of data\[3\] must be finite"):
        fit(conditional_flow(), data, config(), validation=None)


def test_a_bad_row_stops_the_training_with_the_last_good_weights(monkeypatch):
    monkeypatch.setattr("cnf.training.initialization._ROWS", 2)
    read = Listed(with_bad_row(math.nan))
    flow, shorter = affine_flow(), affine_flow()
    with pytest.raises(ValueError, match="must be finite"):
        fit(flow, read, config(100, batch_size=4, learning_rate=0.1), validation=None)
    steps = len(read.asked[3:]) // 4 - 2  # the one before the last to come through is good
    assert steps > 0
    monkeypatch.undo()
    clean = with_bad_row(0.5)
    clean[:, 0] = read.items[:, 0]
    clean[:17, 1], clean[18:, 1] = read.items[:17, 1], read.items[18:, 1]
    settings = config(100, batch_size=4, learning_rate=0.1)
    fit(shorter, clean, settings, callbacks=[lambda report: report.step == steps], validation=None)
    assert_same(weights(flow), weights(shorter))


@pytest.mark.parametrize("rows", [20, 30_000])
@pytest.mark.parametrize("name", ["data", "validation"])
def test_a_dataset_whose_weights_are_all_zero_is_refused(name, rows):
    x = torch.randn(rows, 2)
    good, bad = x, StackDataset(x=x, weight=torch.zeros(rows))
    data = {"data": good, "validation": good} | {name: bad}
    with pytest.raises(ValueError, match=f"the weights of {name} must not all be 0"):
        fit(affine_flow(), data["data"], config(1), validation=data["validation"])


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(2)


zeros = functools.partial(torch.zeros, dtype=torch.float32)


BAD_DATA = {
    "endless": (Endless(), TypeError, "must be a Dataset with a length and an item for each index"),
    "empty dataset": (Listed([]), ValueError, "must have at least one row; got an empty Dataset"),
    "shapes differ": (
        Listed([zeros(2), zeros(3)]),
        ValueError,
        "must have x of the same shape in each row",
    ),
    "width": (
        Listed([zeros(3)] * 2),
        ValueError,
        r"data\[0\] must have shape \(\*batch, 2\); got \(3,",
    ),
    "numpy items": (Listed([np.zeros(2)]), TypeError, "must hold a tensor.* got ndarray for x"),
    "other dtype": (
        Listed([zeros(2).double()]),
        ValueError,
        "must have the model's dtype torch.float32",
    ),
    "weights of some": (
        Listed([{"x": zeros(2)}, {"x": zeros(2), "weight": zeros(())}]),
        ValueError,
        "weight of",
    ),
    "masked": (
        np.ma.masked_equal(np.arange(10.0).reshape(5, 2), 3),
        TypeError,
        r"A tensor has no mask: leave masked rows out, or fill them: data\.filled\(value\)",
    ),
    "dates": (
        np.array([["2020-01-01"]], "datetime64[s]"),
        TypeError,
        r"It must hold real numbers; got datetime64\[s\]",
    ),
    "numbers as text": (np.array([["1", "2"]]), TypeError, "It must hold real numbers; got <U1"),
    "three of a tuple": (
        (zeros(5, 2), zeros(5, 1), zeros(5)),
        ValueError,
        r"got a tuple of 3. Name its parts: \{'x': x, 'context': context, 'weight': weight\}",
    ),
    "three of a dataset": (
        TensorDataset(zeros(5, 2), zeros(5, 1), zeros(5)),
        ValueError,
        "got a tuple of 3. Name its parts",
    ),
    "no x": ({"y": zeros(5, 2)}, ValueError, "key x, and no others than context, weight, x; got y"),
    "unknown key": ({"x": zeros(5, 2), "labels": 1}, ValueError, "key x, .* got x, labels"),
    "too few weights": (
        {"x": zeros(5, 2), "weight": zeros(4)},
        ValueError,
        r"weights of data .*\(5,\); got \(4,",
    ),
    "weights of zero": (
        {"x": zeros(5, 2), "weight": zeros(5)},
        ValueError,
        "weights of data must not all be 0",
    ),
    "negative weight": (
        {"x": zeros(5, 2), "weight": zeros(5) - 1},
        ValueError,
        "weights of data .* at least 0",
    ),
    "infinite weight": (
        {"x": zeros(5, 2), "weight": zeros(5) / 0},
        ValueError,
        "weights of data must be finite",
    ),
    "list of weights": (
        {"x": zeros(5, 2), "weight": [1] * 5},
        TypeError,
        r"weights of data must be a torch\.T",
    ),
}


class Frame:
    """As pandas and polars have them."""

    def __init__(self, values):
        self.values = values

    def to_numpy(self):
        return self.values


DAYS = 2_461_373.25 + np.arange(20.0)[:, None] / 10
OTHER_FORMS = {
    "loader": (DataLoader(TensorDataset(zeros(5, 2))), r"Try data\.dataset, and batch_size in Tr"),
    "generator": (iter(zeros(5, 2)), r"Try torch\.stack\(list\(data\)\)"),
    "array": (np.zeros((5, 2)), r"Try torch\.as_tensor\(data, dtype=torch\.float32\)\."),
    "list": ([[0.0, 1.0]] * 3, r"Try torch\.as_tensor\(data, dtype=torch\.float32\)\."),
    "tensors": (list(zeros(5, 2)), r"Try torch\.stack\(list\(data\)\)"),
    "frame": (Frame(np.zeros((5, 2))), r"tensor\(data\.to_numpy\(\), dtype=torch\.float32\)\."),
    "days": (DAYS, r"as_tensor\(data, dtype=torch\.float64\), with model\.to\(torch\.float64\)"),
    "text": (np.array([["a", "b"]] * 3), "must hold real numbers; got <U1"),
    "ragged": ([[1.0], [1.0, 2.0], [3.0]], "rows must hold numbers, the same count in each"),
    "string": ("data.csv", r"data must be a torch\.Tensor; got str\."),
}


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("data", "message"), OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_data_of_other_forms_are_refused_with_the_line_that_makes_them_fit(data, message):
    with pytest.raises(TypeError, match=message):
        fit(affine_flow().float(), data, config(1))


def test_the_lines_advised_work():
    x = np.random.RandomState(0).normal(size=(20, 2))
    flow = affine_flow().float()
    for data in (
        torch.as_tensor(x, dtype=torch.float32),
        torch.stack(list(torch.as_tensor(x).float())),
        DataLoader(TensorDataset(torch.as_tensor(x).float())).dataset,
    ):
        fit(flow, data, config(1))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("data", "error", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_data_of_no_form_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        as_rows("data", data, affine_flow().float()).take(torch.arange(len(data)))


def test_standardisation_of_a_dataset_is_that_of_its_rows(monkeypatch):
    monkeypatch.setattr("cnf.training.phases.recipe", lambda *rows, **settings: (config(1),))
    x = 5 + 3 * torch.randn(200, 2)
    flow = CNF(2, hidden_features=(4,), solver=CHEAP)
    fit(flow, TensorDataset(x), validation=None)
    expected = Standardize.from_data(x)  # as of the rows themselves
    assert_same(weights(flow.chain[0]), weights(expected))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("share", "held_out"),
    [(0.25, 5), (0, 0), (0.0, 0), (None, 0), *((kind(0.25), 5) for kind in KINDS_OF_NUMBERS)],
)
def test_a_share_to_hold_out_is_a_number_of_any_kind(share, held_out, monkeypatch):
    kept = []
    loop = sys.modules["cnf.training.fit"]  # by whose name the package offers its function
    monkeypatch.setattr(loop, "check_plan", lambda plan, flow, *rows: kept.extend(rows[:2]))
    fit(affine_flow(), torch.randn(20, 2), config(1, objective=Weighted), validation=share)
    assert len(kept[0]) == 20 - held_out
    assert (0 if kept[1] is None else len(kept[1])) == held_out


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("share", [1, 2, -1, 1.0, math.nan, np.float32(2), torch.tensor(-0.5)])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"validation must be data, or a fraction .* in \[0, 1\)"):
        fit(affine_flow(), torch.randn(20, 2), config(1), validation=share)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("share", [True, False, np.True_])
def test_a_flag_is_no_share_to_hold_out(share):
    with pytest.raises(
        TypeError, match=r"validation must be data, or a fraction .* None for no val"
    ):
        fit(affine_flow(), torch.randn(20, 2), config(1), validation=share)
