"""What surrounds a call changes none of its numbers: grad mode, inference mode, default dtype."""

from contextlib import contextmanager

import pytest
import torch

from cnf import CNF, ODESolver, Standardize, TrainingConfig, certify, fit, load, save
from cnf.tables.estimator import CNFDensity
from cnf.tables.fit import DensitySettings, TableRows, fit_density

pytestmark = pytest.mark.usefixtures("shapes_unchecked")


@pytest.fixture(autouse=True)
def _single_precision():
    """As a user runs it."""
    torch.set_default_dtype(torch.float32)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SMALL = {"matching_steps": 3, "likelihood_steps": 1, "hidden_features": (8, 8), "accuracy": 0.1}
AMBIENTS = {
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "double precision": lambda: default_dtype(torch.float64),
    "half precision": lambda: default_dtype(torch.bfloat16),
}


def rows():
    x = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return 3 + 2 * x


def made_elsewhere(build):
    """What `build` makes in the usual surroundings."""
    with torch.inference_mode(False), default_dtype(torch.float32):
        torch.manual_seed(0)
        return build()


def small_flow():
    return made_elsewhere(
        lambda: CNF(2, hidden_features=(8, 8), solver=ODESolver(method="rk4", steps=4))
    )


def estimator(folder):
    x = rows().numpy()
    model = CNFDensity(**SMALL, random_state=0).fit(x).partial_fit(x)
    scores = torch.from_numpy(model.score_samples(x))
    drawn = torch.from_numpy(model.sample(5, random_state=0)).flatten()
    return model.flow_, torch.cat(
        [scores, drawn, torch.tensor(model.history_.loss, dtype=torch.float64)]
    )


def density(folder):
    standardize = made_elsewhere(lambda: Standardize.from_data(rows()))
    flow, _ = fit_density([standardize], TableRows(rows()), settings=DensitySettings(**SMALL))
    return flow, flow.log_prob(rows())


def training(folder):
    flow = small_flow()
    fit(flow, rows().float(), TrainingConfig(steps=3, batch_size=20, progress=False))
    return flow, flow.log_prob(rows().float())


def loading(folder):
    save(small_flow(), folder / "flow.safetensors")
    flow = load(folder / "flow.safetensors")
    return flow, flow.log_prob(rows().float())


def certifying(folder):
    flow = made_elsewhere(lambda: small_flow().double())
    report = certify(flow, rows(), generator=torch.Generator().manual_seed(0))
    values = [check.value for check in report.checks if check.verdict != "skip"]
    return flow, torch.tensor(values, dtype=torch.float64)


@pytest.fixture(
    scope="module",
    params=[estimator, density, training, loading, certifying],
    ids=lambda f: f.__name__,
)
def call_and_values(request, tmp_path_factory):
    """A call, and its numbers in the usual surroundings."""
    with default_dtype(torch.float32):
        return request.param, request.param(tmp_path_factory.mktemp("usual"))[1]


@pytest.mark.slow
@pytest.mark.parametrize("ambient", AMBIENTS)
def test_surroundings_change_no_number(tmp_path, call_and_values, ambient):
    call, expected = call_and_values
    with AMBIENTS[ambient]():
        before = (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
        flow, values = call(tmp_path)
        after = (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
    assert after == before
    torch.testing.assert_close(values.clone(), expected)
    # What was made there can be trained on and differentiated.
    x = rows().to(next(flow.parameters()).dtype).requires_grad_()
    flow.log_prob(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad is not None for parameter in flow.parameters())
