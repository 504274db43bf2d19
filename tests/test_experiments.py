"""Every experiment runs in its quick form and writes what it promises."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from cnf import History, load
from cnf.data.toy import TOY_NAMES, toy_density
from experiments import anode, toy2d


@pytest.fixture(autouse=True)
def _single_precision():
    """As a user runs them."""
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOY_NAMES)
def test_toy2d(name, tmp_path, capsys):
    settings = toy2d.Settings(data=name, quick=True, out=tmp_path, progress=False)
    metrics = toy2d.main(settings)

    folder = tmp_path / name
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "metrics.json").read_text())["kl_gap"] == metrics.kl_gap
    assert f"{metrics.kl_gap:.4f}" in capsys.readouterr().out
    history = History.load(folder / "history.csv")
    assert history.loss[-1] < history.loss[0]
    held_out = toy_density(name).sample(1000, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        nll = -load(folder / "model.safetensors").log_prob(held_out).mean()
    assert abs(float(nll) - metrics.nll) < 8 * metrics.nll_standard_error
    assert metrics.kl_gap == pytest.approx(metrics.nll - toy_density(name).entropy())
    assert metrics.likelihood == "exact"


@pytest.mark.slow
def test_toy2d_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "experiments.toy2d", "--quick", "--data", "moons"]
    settings = {"cwd": Path(__file__).parents[1], "capture_output": True, "text": True}
    run = subprocess.run([*command, "--out", str(tmp_path)], check=True, timeout=120, **settings)
    assert "KL gap" in run.stdout
    assert (tmp_path / "moons" / "figure.png").is_file()
    refused = subprocess.run([*command, "--data", "mooons"], check=False, timeout=120, **settings)
    assert refused.returncode != 0
    assert "pinwheel" in refused.stderr


@pytest.mark.slow
def test_anode(tmp_path, capsys):
    results = anode.main(anode.Settings(quick=True, out=tmp_path))

    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "metrics.json").read_text()) == list(map(asdict, results))
    found = {(result.task, result.augment): result for result in results}
    assert set(found) == {("swap", 0), ("swap", 1), ("annuli", 0), ("annuli", 1)}
    printed = capsys.readouterr().out
    assert all(f"{result.loss:.6g}" in printed for result in results)
    # The bound of an increasing map, up to the error of the solver.
    assert found["swap", 1].loss < 0.1 < 1 - 1e-3 < found["swap", 0].loss
    assert found["swap", 0].accuracy <= 0.5
    assert found["swap", 1].accuracy == 1
    assert all(found["annuli", augment].loss < math.log(2) for augment in (0, 1))


def test_the_annuli_are_a_ball_and_a_ring_of_equal_weight():
    x, target = anode.annuli(20_000, torch.Generator().manual_seed(0))
    radius, outside = x.norm(dim=-1), target[:, 0] > 0
    assert radius[~outside].max() <= 0.5
    assert (radius[outside] >= 1 - 1e-6).all()
    assert radius[outside].max() <= 1.5 + 1e-6
    assert abs(float(outside.double().mean()) - 0.5) < 4 * 0.5 / 20_000**0.5
    # Uniform on the disc and on the ring: the mean squared radius is the middle of its range.
    torch.testing.assert_close(radius[~outside].square().mean().item(), 0.125, rtol=0.03, atol=0)
    torch.testing.assert_close(radius[outside].square().mean().item(), 1.625, rtol=0.03, atol=0)
    assert x.mean(0).abs().max() < 4 / 20_000**0.5


def test_anode_refuses_counts_that_measure_nothing():
    with pytest.raises(ValueError, match="seeds must be at least 1; got 0"):
        anode.Settings(seeds=0)
