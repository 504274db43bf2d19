"""The benchmarks of whole solves run in their quick form and write what they measured."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro
from zoo import mlp, perturbed

from benchmarks import (
    evaluation,
    flows,
    foreign_loop,
    memory,
    scaling,
    solve_peers,
    solvers,
    solves,
    step,
    timing,
)
from cnf import Exact, Hutchinson, ODESolver
from cnf.vector_fields import LinearField


@pytest.fixture(autouse=True)
def _single_precision():
    """As a user runs them."""
    torch.set_default_dtype(torch.float32)


def tables_of(markdown):
    """The rows of each table, without headings."""
    blocks = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("| ")]
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
        for lines in blocks
    ]


def test_hot_loops_take_turns_and_their_first_calls_do_not_count(monkeypatch):
    clock, log = 0.0, []
    monkeypatch.setattr(time, "process_time", lambda: clock)

    def way(name, seconds):
        def run():
            nonlocal clock
            cold = not log or log[-1] != name
            clock += seconds * (10 if cold else 1)
            log.append(name)

        return timing.hot(run)

    ways = {"one": way("one", 1.0), "two": way("two", 2.0), "rare": way("rare", 100.0)}
    times = timing.measure_hot(ways, 10, calls=3, rare=["rare"])
    assert {name: log.count(name) for name in ways} == {"one": 40, "two": 40, "rare": 1}
    assert {name: each.calls for name, each in times.items()} == {"one": 30, "two": 30, "rare": 1}
    assert times["one"].quartiles == pytest.approx((1e3, 1e3))
    assert times["two"].median == pytest.approx(2e3)
    assert times["rare"].median == pytest.approx(1000e3)


def test_a_way_alone_is_called_until_its_time_is_spent():
    def way(milliseconds):
        return lambda calls: [milliseconds] * calls

    assert timing.measure_alone(way(1000.0), seconds=2.5, most=9).calls == 3
    assert timing.measure_alone(way(9000.0), seconds=2.5, most=9).calls == 1
    assert timing.measure_alone(way(1.0), seconds=2.5, most=9).calls == 9


def records_of(**medians):
    return [{"way": name, "milliseconds": {"median": median}} for name, median in medians.items()]


def test_a_claim_is_about_the_fastest_of_each_side():
    records = records_of(**{"slow": 100.0, "ours, a": 50.0, "ours, b": 20.0, "compiled": 10.0})
    claims = [
        solves.Claim(above="slow", below="ours", text="eager", bound="at least 2"),
        solves.Claim(above="slow", below=("ours", "compiled"), text="best", bound="at least 3"),
        solves.Claim(above="zuko", below="ours", text="absent", bound="at least 5"),
    ]
    assert tables_of(solves.claims_table(claims, records))[0] == [
        ["eager", "5.00", "at least 2"],
        ["best", "10.00", "at least 3"],
        ["absent", "-", "at least 5"],
    ]


def run_quickly(benchmark, folder, capsys):
    """What was measured, and the tables of it, which were printed and written."""
    content = benchmark.main(benchmark.Settings(quick=True, out=folder))
    assert json.loads((folder / "results.json").read_text()).keys() == content.keys()
    written = (folder / "table.md").read_text()
    assert written in capsys.readouterr().out
    return content, tables_of(written)


def check_ways(records, rows, baseline):
    """The rows of a table of ways say what was recorded."""
    medians = {each["way"]: each["milliseconds"]["median"] for each in records}
    for record, row in zip(records, rows, strict=True):
        way = record["way"]
        assert row[0] == way
        assert float(row[1]) == pytest.approx(medians[way], rel=0.01)
        assert int(row[3]) == record["evaluations"] > 0
        assert float(row[4]) == pytest.approx(record["log_likelihood"], abs=1e-4)
        assert float(row[6]) == pytest.approx(medians[baseline] / medians[way], abs=0.006)


def log_likelihoods(records, *starts):
    """Those of the ways whose names start so."""
    return [each["log_likelihood"] for each in records if each["way"].startswith(starts)]


@pytest.mark.slow
def test_step(tmp_path, capsys):
    content, (plane, plane_claims, wide, wide_claims) = run_quickly(step, tmp_path, capsys)
    check_ways(content["plane"], plane, step.SLOW)
    check_ways(content["wide"], wide, step.SLOW)
    assert [row[2] for row in plane_claims] == [claim.bound for claim in step.PLANE_CLAIMS]
    assert [row[2] for row in wide_claims] == [claim.bound for claim in step.WIDE_CLAIMS]
    expected = [step.SLOW, step.REVERSE, *(f"ours, {gradient}" for gradient in flows.gradients())]
    assert [row[0] for row in plane][: len(expected)] == expected
    # Each gradient is that of the same number.
    same = log_likelihoods(content["plane"], step.SLOW, step.REVERSE, "ours")
    assert same == pytest.approx([same[0]] * len(expected), abs=1e-4)
    exact = log_likelihoods(content["wide"], "closed form")
    assert exact == pytest.approx([exact[0]] * len(exact), abs=1e-4)
    # The same probes, by reverse mode and carried forward.
    estimates = log_likelihoods(content["wide"], step.SLOW, "one probe")
    assert estimates == pytest.approx([estimates[0]] * len(estimates), abs=1e-4)


@pytest.mark.slow
def test_evaluation(tmp_path, capsys):
    content, (plane, _, wide, claims) = run_quickly(evaluation, tmp_path, capsys)
    check_ways(content["plane"], plane, evaluation.SLOW)
    check_ways(content["wide"], wide, evaluation.BRUTE[0])
    slow, ours = log_likelihoods(content["plane"], evaluation.SLOW, "ours")
    assert ours == pytest.approx(slow, abs=1e-4)
    closed, *brute = log_likelihoods(content["wide"], "")
    assert brute == pytest.approx([closed] * 2, abs=1e-4)
    medians = {each["way"]: each["milliseconds"]["median"] for each in content["wide"]}
    fastest = min(medians[way] for way in evaluation.BRUTE)
    assert float(claims[0][1]) == pytest.approx(fastest / medians[evaluation.CLOSED], abs=0.006)


@pytest.mark.slow
def test_scaling(tmp_path, capsys):
    content, tables = run_quickly(scaling, tmp_path, capsys)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    for axis, rows in zip(("batch", "features", "width", "tolerance"), tables, strict=True):
        own = [record for record in content["records"] if record["axis"] == axis]
        assert [float(row[0]) for row in rows] == list(dict.fromkeys(each[axis] for each in own))
        cells = iter(cell for row in rows for cell in row[1:])
        written = sorted(zip(map(float, cells), map(int, cells), strict=True))
        measured = [(each["milliseconds"]["median"], each["evaluations"]) for each in own]
        for found, expected in zip(written, sorted(measured), strict=True):
            assert found == pytest.approx(expected, rel=0.01)
    ways = {(each["axis"], each["divergence"]) for each in content["records"]}
    assert ways == {
        *((axis, "closed form") for axis in ("batch", "features", "width", "tolerance")),
        ("features", "one probe"),
        ("features", "basis"),
    }


@pytest.mark.slow
def test_the_foreign_loop_from_the_command_line(run_program, tmp_path, capsys):
    pytest.importorskip("zuko")
    run_program("benchmarks.foreign_loop", "--quick", "--out", tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    written = (tmp_path / "table.md").read_text()
    assert written in capsys.readouterr().out
    (rows,) = tables_of(written)
    flows_seen = [foreign_loop.ZUKO, foreign_loop.OURS, foreign_loop.NARROW]
    assert [row[4] for row in rows] == 4 * flows_seen  # two contexts, at the start and later
    for row, record in zip(rows, content["records"], strict=True):
        assert float(row[7]) == pytest.approx(record["ratio"], abs=0.006)
    with pytest.raises(SystemExit):
        run_program("benchmarks.foreign_loop", "--quick", "--rounds", 0)
    assert "rounds must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_from_the_command_line(run_program, tmp_path, capsys):
    run_program("benchmarks.memory", "--quick", "--out", tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    written = (tmp_path / "table.md").read_text()
    assert written in capsys.readouterr().out
    by_evaluations, by_rows, claims = tables_of(written)
    records = {(each["forward"], each["rows"], each["way"]): each for each in content["records"]}
    for rows, fixed in ((by_evaluations, {"rows": 8}), (by_rows, {"forward": 4})):
        for value, gradient, evaluations, _, peak in rows:
            place = {"forward": int(value), "rows": int(value), **fixed}
            record = records[place["forward"], place["rows"], gradient]
            assert int(evaluations) == record["evaluations"] >= record["forward"]
            assert float(peak) == pytest.approx(record["peak_bytes"] / 2**20, rel=0.01)
    assert {row[1] for row in by_evaluations} == set(flows.gradients())
    growth = records[40, 8, "adjoint"]["peak_bytes"] / records[4, 8, "adjoint"]["peak_bytes"]
    assert claims == [[claims[0][0], f"{growth:.2f}", "at most 1.2"]]
    # Backprop keeps every evaluation: ten times as many, about ten times the memory.
    kept = [records[count, 8, "backprop"]["peak_bytes"] for count in (4, 40)]
    assert kept[1] > 5 * kept[0]


def test_the_peak_is_what_was_held_at_once():
    held = torch.zeros(1000)

    def call():
        first = torch.zeros(1000)  # 4000 bytes
        second = first + held  # 8000
        del first
        third = torch.zeros(500)  # 6000
        del second, third
        for _ in range(9):
            torch.zeros(1500)  # 6000, one after another

    assert memory.peak_bytes(call) == 8000
    assert memory.peak_bytes(lambda: None) == 0


def test_the_peak_of_a_gradient_is_that_of_its_graph():
    x = torch.randn(1000, requires_grad=True)

    def call():
        value = x
        for _ in range(10):
            value = value.sin()  # each kept for its derivative, but the last
        value.sum().backward()
        x.grad = None

    assert 10 * 4000 <= memory.peak_bytes(call) <= 14 * 4000


def test_a_field_over_the_basis_has_the_same_divergence():
    torch.set_default_dtype(torch.float64)
    field, t, x = mlp(4), torch.tensor(0.3), torch.randn(5, 4)
    slow = flows.OverTheBasis(field)
    assert not slow.has_closed_form_divergence
    assert field.has_closed_form_divergence
    for found, expected in zip(
        slow.velocity_and_divergence(t, x), field.velocity_and_divergence(t, x), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_evaluations_are_those_of_the_network_backward_pass_included():
    x = torch.randn(3, 2)
    field = mlp(2).to(x.dtype)
    for gradient, least in (("backprop", 8), ("adjoint", 16)):
        solver = ODESolver(method="rk4", steps=2, gradient=gradient)
        for made in (field, flows.by_reverse_mode(field), flows.OverTheBasis(field)):
            flow = flows.following(made, Exact(), solver)
            assert solves.evaluation(flows.density(flow), x).evaluations == 8
            seen = solves.likelihood_step(flows.density(flow), x).evaluations
            assert seen == 8 if gradient == "backprop" else seen >= least


def test_the_network_as_ffjord_writes_it_has_the_same_velocity_and_divergence():
    torch.set_default_dtype(torch.float64)
    field, t, x = perturbed(flows.ffjord_field(2, (8, 8, 8))), torch.tensor(0.3), torch.randn(5, 2)
    slow = flows.as_ffjord(field)
    for found, expected in zip(
        slow.velocity_and_divergence(t, x), field.velocity_and_divergence(t, x), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_density_has_the_same_probes_in_every_call():
    flow = flows.following(mlp(3).float(), Hutchinson(), ODESolver())
    log_prob = flows.density(flow).log_prob
    x = torch.randn(4, 3)
    assert (log_prob(x) == log_prob(x)).all()


@pytest.mark.slow
def test_a_field_trained_for_a_moment_is_no_longer_at_rest():
    torch.manual_seed(0)
    field, samples = flows.trained(flows.ffjord_field(2, (32, 32, 32)), steps=100, seed=0)
    x = samples.sample(500)
    at_rest = flows.following(LinearField(2), Exact(), ODESolver())
    log_probs = [
        flow.log_prob(x).mean() for flow in (flows.following(field, Exact(), ODESolver()), at_rest)
    ]
    assert log_probs[0] > log_probs[1] + 0.1


def test_a_folder_without_the_code_is_refused(tmp_path):
    field = flows.ffjord_field(2, (4, 4))
    with pytest.raises(ValueError, match=r"ffjord must be a clone of .*; there is no lib/layers"):
        solve_peers.ffjord_density(tmp_path, field, tolerance=1e-3)
    with pytest.raises(ValueError, match=r"otflow must be a clone of .*; there is no src"):
        solve_peers.otflow_density(tmp_path, 2)


def test_a_python_without_diffrax_is_refused():
    if importlib.util.find_spec("diffrax"):
        pytest.skip("this one has it")
    ways = solve_peers.diffrax_ways(
        Path(sys.executable),
        solve_peers.DIFFRAX_EVALUATION,
        flows.ffjord_field(2, (4,)),
        torch.zeros(3, 2),
        tolerance=1e-3,
    )
    with pytest.raises(ValueError, match="diffrax_python must be a Python with jax and diffrax"):
        ways.__enter__()


def test_without_a_python_diffrax_has_no_ways():
    field = flows.ffjord_field(2, (4,))
    with solve_peers.diffrax_ways(
        None, {"a": "b"}, field, torch.zeros(3, 2), tolerance=1e-3
    ) as ways:
        assert ways == {}


def test_evaluations_of_whole_steps_only():
    with pytest.raises(ValueError, match="evaluations must be multiples of 4; got 50"):
        memory.Settings(evaluations=(20, 50))


@pytest.mark.parametrize("benchmark", [step, evaluation, scaling, memory])
def test_settings_are_read_from_the_command_line(benchmark):
    assert tyro.cli(benchmark.Settings, args=[]) == benchmark.Settings()


def test_a_wrong_option_is_answered_by_the_setting(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(memory.Settings, args=["--rounds", "0"])
    assert "rounds must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_solvers(tmp_path, capsys):
    content, (ways, summary) = run_quickly(solvers, tmp_path, capsys)
    records = content["records"]
    assert len(ways) == len(records) == 2 * len(solvers.ADAPTIVE) + 2 * len(solvers.STAGES)
    counts = [record["evaluations"] for record in records]
    assert counts == sorted(counts)
    by_name = {record["solver"]: record for record in records}
    for what in ("gradient", "log_prob"):
        assert by_name["rk4, 6 steps"][what] < by_name["rk4, 3 steps"][what]
    bounds = [bound for each in solvers.PRECISIONS.values() for bound in each]
    for bound, (_, solver, evaluations, error) in zip(bounds, summary, strict=True):
        if solver != "-":
            assert float(error) <= bound
            assert int(evaluations) == by_name[solver]["evaluations"]
    with pytest.raises(ValueError, match="evaluations must be multiples of 12; got 20"):
        solvers.Settings(evaluations=(20,))
