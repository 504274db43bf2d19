"""Runs the laws of compiled flows, without what wraps the functions of the package in tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_compiled_flows_obey_their_laws(tmp_path):
    laws = Path(__file__).parents[1] / "compiled_laws.py"
    # Coverage and the workers of the outer run are not asked of the inner one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    # Programs that torch keeps on the disk fail under another ATEN_CPU_CAPABILITY.
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # processes would take longer to start
    environment["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # what the processor says is not tried out first
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--override-ini=addopts=", str(laws)],
        capture_output=True,
        text=True,
        check=False,
        cwd=laws.parents[1],
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
