"""Every experiment runs in its quick form and writes what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cnf import History, load
from cnf.data.toy import TOY_NAMES, toy_density
from experiments import toy2d


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
