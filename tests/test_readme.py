"""What the README says is so."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_ten_lines_of_use_run(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    names = {}
    exec(code, names)  # noqa: S102 - our own text
    assert names["log_prob"].shape == (10,)
    assert names["samples"].shape == (1000, 3)
    assert (tmp_path / "flow.safetensors").is_file()
    normal = torch.distributions.MultivariateNormal(names["data"].mean(0), names["data"].T.cov())
    error = names["log_prob"] - normal.log_prob(names["data"][:10])
    assert error.abs().mean() < 0.5


def test_the_map_of_the_parts_names_what_exists():
    import cnf  # noqa: PLC0415

    chapters = (cnf, cnf.transforms, cnf.vector_fields, cnf.objectives, cnf.flows)
    offered = {name for chapter in chapters for name in chapter.__all__}
    table = README.read_text().split("## The parts")[1].split("## ")[0]
    named = set(re.findall(r"`([A-Z]\w+)`", table))
    assert named <= offered
    assert {"CNF", "Flow", "MaximumLikelihood"} <= named
