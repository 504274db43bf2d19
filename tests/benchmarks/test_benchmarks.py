"""Every benchmark runs in its quick form and writes what it measured; no time is judged."""

import json
import math
import time

import pytest
import torch
from zoo import mlp

from benchmarks import divergence, quality, timing, trace
from benchmarks.peers import OURS
from cnf import Hutchinson
from cnf.data.toy import toy_density
from cnf.vector_fields.layers import LAYERS

pytestmark = pytest.mark.usefixtures("quick_calibration")


@pytest.fixture(autouse=True)
def _single_precision():
    """As a user runs them."""
    torch.set_default_dtype(torch.float32)


def cells_of(markdown):
    """The cells of each line of the tables, headings included."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def numbers(cells):
    return [float(cell) for cell in cells]


def test_divergence(tmp_path, capsys):
    content = divergence.main(divergence.Settings(quick=True, out=tmp_path))

    read = json.loads((tmp_path / "results.json").read_text())
    assert read["records"] == json.loads(json.dumps(content["records"]))
    written = (tmp_path / "table.md").read_text()
    assert written in capsys.readouterr().out
    assert {(each["field"], each["layer"], each["mode"]) for each in content["records"]} == {
        (field, layer, mode)
        for field in ("MLPField", "PotentialField")
        for layer in LAYERS
        for mode in ("training step", "value only")
    }
    cells = cells_of(written)
    rows = [row for row in cells if row[1] in LAYERS]
    training_first = sorted(content["records"], key=lambda record: record["mode"])
    for record, row in zip(training_first, rows, strict=True):
        assert row[:2] == [record["field"], record["layer"]]
        medians = [record["milliseconds"][way]["median"] for way in divergence.WAYS]
        assert numbers(row[2:7]) == pytest.approx(medians, rel=0.01)
        _, closed, forward, reverse, basis = medians
        ratios = [closed / forward, closed / reverse, basis / forward]
        assert numbers(row[7:]) == pytest.approx(ratios, abs=0.006)
    for row in (row for row in cells if row[1] in ("training step", "value only")):
        own = [each for each in rows if each[0] == row[0]]
        own = own[: len(LAYERS)] if row[1] == "training step" else own[len(LAYERS) :]
        for worst, column in ((row[2], 7), (row[3], 8)):
            ratio, layer = worst.removesuffix(")").split(" (")
            assert float(ratio) == max(float(each[column]) for each in own)
            assert ratio in {each[column] for each in own if each[1] == layer}


def test_the_ways_to_the_divergence_agree_where_they_are_exact():
    settings = divergence.Settings(quick=True, features=3, hidden=8, batch=5)
    for field in divergence.fields(settings):
        x = torch.randn(5, 3)
        ways = divergence.evaluations_of(field, torch.tensor(0.3), x)
        outputs = {name: evaluate() for name, evaluate in ways.items()}
        assert tuple(outputs) == divergence.WAYS
        for velocity, *_ in outputs.values():
            torch.testing.assert_close(velocity, field(torch.tensor(0.3), x))
        assert len(outputs["velocity"]) == 1
        # One probe is the same in either mode, and not the divergence.
        torch.testing.assert_close(outputs["forward probe"][1], outputs["reverse probe"][1])
        torch.testing.assert_close(outputs["closed form"][1], outputs["basis"][1])
        assert (outputs["forward probe"][1] - outputs["basis"][1]).abs().max() > 1e-3


@pytest.mark.slow
def test_trace(tmp_path, capsys):
    content = trace.main(trace.Settings(quick=True, out=tmp_path))

    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    read = json.loads((tmp_path / "results.json").read_text())
    for part in ("spread", "cost"):
        assert read[part] == json.loads(json.dumps(content[part]))
    written = (tmp_path / "table.md").read_text()
    assert written in capsys.readouterr().out
    cells = cells_of(written)
    spreads, costs = ([row for row in cells if len(row) == n and row[0].isdigit()] for n in (8, 7))
    assert len(spreads) * 4 == len(content["spread"])
    for i, record in enumerate(content["spread"]):
        row = spreads[i // 4]
        assert row[:3] == [str(record["features"]), record["field"], record["probes_at"]]
        measured, theory = row[4 + i % 4].removesuffix(")").split(" (")
        expected = [record[key] for key in ("divergence", "measured", "theory")]
        assert numbers([row[3], measured, theory]) == pytest.approx(expected, rel=0.01)
    for row, record in zip(costs, content["cost"], strict=True):
        assert record["features"] == int(row[0])
        times = {name: each["median"] for name, each in record["milliseconds"].items()}
        relative = [
            times["wide: basis"] / times["wide: velocity"],
            times["wide: 8 probes"] / times["wide: velocity"],
            times["wide: 1 probe"] / times["wide: velocity"],
            times["narrow: 1 probe at x"] / times["narrow: velocity"],
            times["narrow: 1 probe at the bottleneck"] / times["narrow: velocity"],
            times["two layers: closed form"] / times["two layers: velocity"],
        ]
        assert numbers(row[1:]) == pytest.approx(relative, abs=0.006)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_what_the_trace_benchmark_measures_is_its_theory(noise, bottleneck):
    torch.set_default_dtype(torch.float64)
    field = mlp(6, hidden_features=(8, 3, 8), activation="tanh")
    t, x, draws = torch.tensor(0.5), torch.randn(60, 6), 100
    estimator = Hutchinson(noise=noise, bottleneck=bottleneck)
    with torch.no_grad():
        matrix = trace.matrices(field, t, x, bottleneck=bottleneck)
        exact = field.velocity_and_divergence(t, x)[1]
        measured = trace.measured_deviation(estimator, field, t, x, draws)
    torch.testing.assert_close(matrix.diagonal(dim1=-2, dim2=-1).sum(-1), exact)
    one, eight = (trace.theoretical_deviation(matrix, noise, probes) for probes in (1, 8))
    assert one == pytest.approx(8**0.5 * eight)
    # Four standard errors for a kurtosis of at most 15, that of a squared normal.
    assert measured == pytest.approx(one, rel=4 * math.sqrt(14 / (60 * draws)) / 2)


def test_medians_are_of_each_way_alone_and_rare_ways_are_rare(monkeypatch):
    clock = 0.0
    calls = {"one": 0, "slow": 0, "rare": 0}

    def way(name, seconds):
        def run():
            nonlocal clock
            clock += seconds * (1, 2, 6)[calls[name] % 3]
            calls[name] += 1

        return run

    monkeypatch.setattr(time, "process_time", lambda: clock)
    ways = {"one": way("one", 1.0), "slow": way("slow", 10.0), "rare": way("rare", 100.0)}
    times = timing.measure(ways, 30, rare=["rare"])
    assert calls == {"one": 31, "slow": 31, "rare": 4}  # one each to warm up
    assert {name: each.calls for name, each in times.items()} == {"one": 30, "slow": 30, "rare": 3}
    medians = {name: each.median for name, each in times.items()}
    assert medians == pytest.approx({"one": 2e3, "slow": 20e3, "rare": 200e3})
    assert times["one"].quartiles == pytest.approx((1e3, 6e3))


def test_threads_are_as_they_were_after_measuring():
    torch.set_num_threads(2)
    seen = []
    timing.measure({"way": lambda: seen.append(torch.get_num_threads())}, 2)
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("settings", [divergence.Settings, trace.Settings])
def test_counts_that_measure_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="rounds must be at least 1; got 0"):
        settings(rounds=0)


def test_a_bottleneck_takes_two_features():
    with pytest.raises(ValueError, match="features must be at least 2; got 1"):
        trace.Settings(features=(4, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["divergence", "trace"])
def test_from_the_command_line(name, run_program, tmp_path, capsys):
    run_program(f"benchmarks.{name}", "--quick", "--out", tmp_path)
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_program(f"benchmarks.{name}", "--quick", "--rounds", 0)
    assert "rounds must be at least 1" in capsys.readouterr().err


def test_a_stopwatch_stands_still_while_it_looks(monkeypatch):
    clock = 0.0
    monkeypatch.setattr(time, "process_time", lambda: clock)
    truth = toy_density("moons")
    held_out = truth.sample(100, generator=torch.Generator().manual_seed(0))
    asked = []
    watch = quality.Stopwatch(truth, held_out, 4.0, rows_before=50)

    def log_prob(x):
        nonlocal clock
        clock += 100.0
        asked.append(len(x))
        return truth.log_prob(x) - 0.5

    over = []
    for _ in range(6):
        clock += 0.9
        over.append(watch(log_prob))
    watch.finish()
    assert over == [False] * 4 + [True] * 2
    seconds = [look["seconds"] for look in watch.record]
    assert seconds == pytest.approx([0.9, 1.8, 2.7, 3.6, 5.4])
    assert [look["steps"] for look in watch.record] == [1, 2, 3, 4, 6]
    assert [look["gap"] for look in watch.record] == pytest.approx([0.5] * 5)
    assert watch.record[0]["nll"] == pytest.approx(truth.entropy() + 0.5)
    assert asked == [50] * 4 + [100]


def test_a_time_is_that_of_the_first_look_which_reached_it():
    record = [{"seconds": t, "gap": gap} for t, gap in [(1.0, 0.9), (2.0, 0.2), (3.0, 0.3)]]
    assert quality.time_to("gap", 0.2, record) == 2.0
    assert quality.time_to("gap", 0.9, record) == 1.0
    assert quality.time_to("gap", 0.1, record) == math.inf


@pytest.mark.slow
def test_quality_from_the_command_line(run_program, tmp_path, capsys):
    run_program("benchmarks.quality", "--quick", "--out", tmp_path)
    said = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in said
    assert all(f"| {way} |" in said for way in quality.ways())
    with pytest.raises(SystemExit):
        run_program("benchmarks.quality", "--quick", "--data", "cats")
    assert "data must be among" in capsys.readouterr().err


@pytest.mark.slow
def test_qualities_are_measured_in_processes_of_their_own(tmp_path):
    content = quality.main(quality.Settings(quick=True, ways=(OURS,), jobs=2, out=tmp_path))
    assert [(each["way"], each["seed"]) for each in content["runs"]] == [(OURS, 0)]
    assert content["runs"][0]["record"][-1]["seconds"] > 0
