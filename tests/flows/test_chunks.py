"""Laws of evaluation in chunks: the same numbers, within a limit of memory."""

import itertools
import math

import numpy as np
import pytest
import torch
from zoo import BOUNDS, EXACT_FLOWS, cnf, in_turn, perturbed, rows_for, seeded

from cnf import Flow, ODESolver
from cnf._memory import LiveBytes
from cnf.flows import log_prob_in_chunks, sample_in_chunks
from cnf.flows.chunks import in_chunks
from cnf.transforms import AffineCoupling, MLPConditioner, Permute

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

GRID = ODESolver(method="rk4", steps=3)


def couplings(context_features=0):
    """A cheap flow."""
    conditioner = MLPConditioner(1, 2, context_features, hidden_features=(16,))
    coupling = perturbed(AffineCoupling(2, context_features, conditioner=conditioner))
    return Flow([coupling, Permute([1, 0])])


@pytest.mark.parametrize(
    ("name", "chunk_size"), in_turn(EXACT_FLOWS, [3, "100 kB", 3, 100]), ids=str
)
def test_chunks_change_no_density(name, chunk_size):
    flow = EXACT_FLOWS[name]().using(solver=GRID)
    x, context = rows_for(flow, 8)
    found = log_prob_in_chunks(flow, x, context, chunk_size=chunk_size)
    torch.testing.assert_close(found, flow.log_prob(x, context), rtol=0, atol=1e-11)
    assert not found.requires_grad


def test_with_an_adaptive_solver_chunks_agree_up_to_its_tolerance():
    x = torch.randn(20, 2)
    for tolerance in (1e-3, 1e-7):
        flow = cnf(solver=ODESolver(rtol=tolerance, atol=tolerance))
        found = log_prob_in_chunks(flow, x, chunk_size=1)
        torch.testing.assert_close(found, flow.log_prob(x).detach(), rtol=0, atol=30 * tolerance)
        assert not torch.equal(found, flow.log_prob(x))


@pytest.mark.parametrize("make", [BOUNDS["integer column"], BOUNDS["augmented with context"]])
def test_what_is_drawn_is_what_the_chunks_draw_one_after_the_other(make):
    flow = make().using(solver=GRID)
    x, context = rows_for(flow, 8)
    given = [None, None] if context is None else [context[:5], context[5:]]
    generator = seeded()
    options = {"importance_samples": 4, "generator": generator}
    parts = [flow.log_prob(x[:5], given[0], **options), flow.log_prob(x[5:], given[1], **options)]
    found = log_prob_in_chunks(
        flow, x, context, chunk_size=5, importance_samples=4, generator=seeded()
    )
    torch.testing.assert_close(found, torch.cat(parts).detach(), rtol=1e-12, atol=1e-12)

    context = None if context is None else context[0]
    generator = seeded()
    parts = [flow.sample(size, context, generator=generator) for size in (5, 3)]
    found = sample_in_chunks(flow, 8, context, chunk_size=5, generator=seeded())
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-12, atol=1e-12)


def test_the_same_generator_and_limit_give_the_same_draws():
    draws = [
        sample_in_chunks(couplings_, 3000, chunk_size="100 kB", generator=seeded())
        for couplings_ in [couplings()] * 2
    ]
    assert torch.equal(*draws)
    assert draws[0].unique(dim=0).shape == (3000, 2)


def test_each_draw_has_its_context():
    flow, context, generator = couplings(1), torch.randn(7, 1), seeded()
    parts = [
        flow.sample((), context[rows], generator=generator) for rows in (slice(4), slice(4, 7))
    ]
    found = sample_in_chunks(flow, 7, context.numpy(), chunk_size=4, generator=seeded())
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-12, atol=1e-12)


def test_one_context_serves_all_rows():
    flow, x, context = couplings(3), torch.randn(10, 2), torch.randn(3)
    found = log_prob_in_chunks(flow, x, context, chunk_size=4)
    torch.testing.assert_close(found, flow.log_prob(x, context).detach())
    assert torch.equal(found, log_prob_in_chunks(flow, x, context.numpy(), chunk_size=4))


def test_files_are_read_and_written_a_chunk_at_a_time(tmp_path):
    """Pixels of 8 bits, contexts of single precision, for a flow of double precision."""
    flow = BOUNDS["dequantized image"]().using(solver=GRID)
    images = np.random.default_rng(0).integers(0, 3, (9, 1, 2, 2), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    rows = np.load(tmp_path / "images.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", shape=(9,))
    found = log_prob_in_chunks(flow, rows, chunk_size=4, generator=seeded(), out=out)
    x = torch.from_numpy(images).double()
    expected = log_prob_in_chunks(flow, x, chunk_size=4, generator=seeded())
    assert torch.equal(found, expected)
    out.flush()
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected.numpy())

    drawn = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (6, 1, 2, 2))
    sample_in_chunks(flow, 6, chunk_size=4, generator=seeded(), out=drawn)
    expected = sample_in_chunks(flow, 6, chunk_size=4, generator=seeded())
    assert np.array_equal(drawn, expected.float().numpy())


def test_an_array_is_put_into_the_dtype_of_the_flow():
    flow, x = couplings().float(), np.random.default_rng(0).normal(size=(5, 2))
    found = log_prob_in_chunks(flow, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, flow.log_prob(torch.tensor(x).float()).detach())
    with pytest.raises(ValueError, match=r"x must have the model's dtype torch\.float32"):
        log_prob_in_chunks(flow, torch.tensor(x))


def test_out_may_be_a_tensor():
    flow, x, out = couplings(), torch.randn(5, 2), torch.empty(5)
    assert log_prob_in_chunks(flow, x, out=out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, flow.log_prob(x).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fixed", [0, 100, 50_000])
@pytest.mark.parametrize("each", [1, 7, 30_000])
def test_a_chunk_is_as_large_as_the_limit_allows(fixed, each):
    """Found by trial, for what takes `fixed` numbers and `each` more for a row."""
    largest = 2 ** int(math.log2((4_000_000 / 8 - fixed) / each))
    out, sizes = torch.empty(10 * largest + 500), []

    def of_chunk(rows):
        sizes.append(rows.stop - rows.start)
        held = torch.zeros(fixed), torch.zeros(sizes[-1], each)
        return held[1][:, 0]

    with LiveBytes() as live:
        in_chunks(of_chunk, out, chunk_size="4 MB", progress=False)
    assert live.peak <= 4_000_000
    assert max(sizes) in ((largest, largest // 2) if fixed else (largest,))
    assert all(later <= 16 * size for size, later in itertools.pairwise(sizes))
    assert sum(sizes) == len(out)


def test_chunks_shrink_where_later_rows_take_more():
    """While they are measured: rows outside of the support take nothing, and come first here."""
    sizes = []

    def of_chunk(rows):
        sizes.append(rows.stop - rows.start)
        return torch.zeros(sizes[-1], 1000 if rows.start else 1)[:, 0]

    in_chunks(of_chunk, torch.empty(100), chunk_size="100 kB", progress=False)
    assert sizes[:3] == [1, 16, 8]
    assert set(sizes[2:-1]) == {8}


def test_a_row_that_takes_more_than_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"the memory of a single row, .* KiB; got 1000 B"):
        log_prob_in_chunks(cnf(solver=GRID), torch.randn(3, 2), chunk_size="1 kB")


def test_no_rows_give_no_numbers():
    flow = couplings(1)
    assert log_prob_in_chunks(flow, torch.empty(0, 2), torch.empty(0, 1)).shape == (0,)
    assert sample_in_chunks(flow, 0, torch.randn(1)).shape == (0, 2)
    with pytest.raises(ValueError, match="because the model is conditional; got None"):
        log_prob_in_chunks(flow, torch.empty(0, 2))


def test_a_bad_row_is_named_and_those_before_it_are_done():
    flow, x, out = couplings(), torch.randn(10, 2), torch.zeros(10)
    expected = flow.log_prob(x).detach()
    x[7, 1] = math.nan
    with pytest.raises(ValueError, match=r"in rows 6 to 8: x must be finite; .* row 7\."):
        log_prob_in_chunks(flow, x, chunk_size=3, out=out)
    torch.testing.assert_close(out[:6], expected[:6], rtol=0, atol=1e-12)
    assert not out[6:].any()


def test_a_bar_counts_the_rows(capsys):
    log_prob_in_chunks(couplings(), torch.randn(10, 2), chunk_size=3, progress=True)
    assert "10.0/10.0" in capsys.readouterr().err
    sample_in_chunks(couplings(), 10, chunk_size=3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": [[0.0, 0.0]]}, TypeError, r"x must be a torch.Tensor or a numpy array; got list"),
        ({"x": torch.zeros(4, 3)}, ValueError, r"x must have shape \(rows, 2\); got \(4, 3\)"),
        ({"x": torch.zeros(2)}, ValueError, r"x must have shape \(rows, 2\); got \(2,\)"),
        ({"x": torch.zeros(4, 1, 2)}, ValueError, r"x must have shape \(rows, 2\); got \(4, 1"),
        ({"x": np.zeros((4, 2), complex)}, ValueError, "x must hold real numbers; got complex128"),
        ({"context": torch.zeros(3, 1)}, ValueError, r"shape \(4, 1\), or \(1,\) .*; got \(3, 1\)"),
        ({"x": torch.zeros(4, 2).to_sparse()}, ValueError, "x must be a dense tensor"),
        ({"context": torch.zeros(4, 1).to_sparse()}, ValueError, "context must be a dense tensor"),
        ({"context": 1.0}, TypeError, "context must be a torch.Tensor or a numpy array; got float"),
        ({"context": None}, ValueError, "context must .* the model is conditional; got None"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
        ({"chunk_size": 1.5}, TypeError, "chunk_size must be an int; got 1.5"),
        ({"chunk_size": "many"}, ValueError, "chunk_size must be .* such as '1 GiB'.*; got 'many'"),
        ({"importance_samples": 2}, ValueError, "importance_samples must be 1 unless"),
        ({"out": [0.0] * 4}, TypeError, "out must be a torch.Tensor or a numpy array; got list"),
        ({"out": np.zeros(3)}, ValueError, r"out must .* of shape \(4,\); got .* shape \(3,\)"),
        (
            {"out": np.zeros(4, int)},
            ValueError,
            "out must .* floating numbers; got int64, writable",
        ),
        ({"out": torch.zeros(4, dtype=int)}, ValueError, "out must hold floating .* torch.int64"),
        ({"out": np.broadcast_to(0.0, 4)}, ValueError, "out must be writable .* read-only"),
    ],
)
def test_bad_arguments_are_refused(shapes_unchecked, wrong, error, message):
    given = {"x": torch.zeros(4, 2), "context": torch.zeros(4, 1), **wrong}
    with pytest.raises(error, match=message):
        log_prob_in_chunks(couplings(1), **given)


@pytest.mark.parametrize(
    ("count", "context", "error", "message"),
    [
        (-1, None, ValueError, "count must be at least 0; got -1"),
        (2.0, None, TypeError, "count must be an int; got 2.0"),
        (3, torch.zeros(2, 1), ValueError, r"context must have shape \(3, 1\), or \(1,\)"),
        (3, None, ValueError, "because the model is conditional; got None"),
    ],
)
def test_bad_draws_are_refused(shapes_unchecked, count, context, error, message):
    with pytest.raises(error, match=message):
        sample_in_chunks(couplings(1), count, context)


def test_a_context_too_many_is_refused():
    with pytest.raises(ValueError, match="context must be None"):
        log_prob_in_chunks(couplings(), torch.zeros(4, 2), torch.zeros(4, 1))


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [8192, "4 MiB"])
def test_a_million_rows_take_no_more_memory_than_a_tenth_of_them(tmp_path, chunk_size):
    flow = couplings().float()

    def peak(rows):
        file = {
            name: np.lib.format.open_memmap(tmp_path / name, "w+", np.float32, shape)
            for name, shape in {"x": (rows, 2), "scores": (rows,)}.items()
        }
        with LiveBytes() as live:
            sample_in_chunks(flow, rows, chunk_size=chunk_size, generator=seeded(), out=file["x"])
            log_prob_in_chunks(flow, file["x"], chunk_size=chunk_size, out=file["scores"])
        entropy = -float(file["scores"].mean(dtype=np.float64))
        return live.peak, live.now, entropy

    (few, left, entropy), (many, left_of_many, entropy_of_many) = peak(100_000), peak(1_000_000)
    assert few == many <= 4 * 2**20
    assert left == left_of_many == 0
    assert abs(entropy - entropy_of_many) < 0.02
