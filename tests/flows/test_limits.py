"""Laws of what asks for more than there is: it is refused before it costs anything."""

import pytest
import torch

from cnf import CNF, Flow, Hutchinson, NeuralODE, ODEError, ODESolver, ReverseKL, count_evaluations
from cnf._memory import LiveBytes
from cnf.flows import sample_in_chunks
from cnf.ode import methods
from cnf.ode.torchdiffeq_door import evaluations_per_step
from cnf.transforms import Augment, ContinuousTransform
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

KINDS = methods()
FIXED = [name for name, kind in KINDS.items() if kind == "fixed"]
MANY = 10**6
HUGE = 10**12


def costs_nothing(call, error, message):
    with LiveBytes() as live, pytest.raises(error, match=message):
        call()
    assert live.peak < 2**20


def moving(**settings):
    return ContinuousTransform(LinearField(2), solver=ODESolver(**settings))


@pytest.mark.parametrize("gradient", ["adjoint", "backprop", "checkpoint"])
@pytest.mark.parametrize("method", FIXED)
def test_a_grid_beyond_the_budget_is_refused_before_the_first_evaluation(method, gradient):
    if gradient == "checkpoint" and "adams" in method:
        pytest.skip("refused already")
    transform = moving(method=method, steps=MANY, gradient=gradient)
    x = torch.randn(3, 2, requires_grad=True)
    message = rf"needs at least \d+ evaluations, for {MANY} steps, more than max_evaluations=10000"
    for move in (transform.to_base, transform.to_data_and_ladj):
        with count_evaluations(transform) as nfe:
            costs_nothing(lambda move=move: move(x), ODEError, message)
        assert nfe.value == 0


@pytest.mark.parametrize("method", [name for name in FIXED if "adams" not in name])
def test_a_grid_of_exactly_the_budget_is_taken(method):
    x = torch.randn(3, 2)
    with count_evaluations(transform := moving(method=method, steps=4)) as nfe:
        transform.to_base(x)
    moving(method=method, steps=4, max_evaluations=nfe.value).to_base(x)
    with pytest.raises(ODEError, match=f"needs at least {nfe.value} evaluations"):
        moving(method=method, steps=4, max_evaluations=nfe.value - 1).to_base(x)


@pytest.mark.parametrize("method", KINDS)
def test_a_step_takes_at_least_the_evaluations_that_are_foreseen(method):
    steps = {"steps": 5} if KINDS[method] == "fixed" else {"rtol": 1e-1, "atol": 1e-1}
    gradient = "adjoint" if KINDS[method] == "external" else "backprop"
    transform = moving(method=method, gradient=gradient, **steps)
    with count_evaluations(transform) as nfe:
        transform.trajectory(torch.randn(3, 2), torch.linspace(0, 1, 6))
    needless = method in ("dopri5", "scipy_solver")  # steps pass over times
    assert nfe.value >= evaluations_per_step(method) * (1 if needless else 5)


@pytest.mark.parametrize("method", ["euler", "rk4", "bosh3", "dopri8"])
def test_more_times_than_evaluations_are_refused_before_the_first(method):
    solver = ODESolver(method=method, **({"steps": 4} if KINDS[method] == "fixed" else {}))
    times = torch.linspace(0, 1, MANY)
    x = torch.randn(3, 2)
    message = "more than max_evaluations=10000; take fewer steps or times"
    for model in (CNF(2, solver=solver), NeuralODE(LinearField(2), solver=solver)):
        with count_evaluations(model) as nfe, pytest.raises(ODEError, match=message):
            model.trajectory(x, times)
        assert nfe.value == 0


HUGE_CALLS = {
    "sample": (lambda: CNF(2).sample((HUGE,)), "sample_shape"),
    "rsample": (lambda: CNF(2).rsample((10**7, 10**7)), "sample_shape"),
    "more than an index": (lambda: CNF(2).sample(10**30), "sample_shape"),
    "a distribution": (lambda: CNF(2)().expand((MANY,)).sample((MANY,)), "sample_shape"),
    "draws and densities": (lambda: CNF(2).sample_and_log_prob(HUGE), "sample_shape"),
    "probes": (
        lambda: CNF(2, divergence=Hutchinson(probes=HUGE)).log_prob(torch.zeros(3, 2)),
        "probes",
    ),
    "importance samples": (
        lambda: Flow([Augment(1, 1)]).log_prob(torch.zeros(3, 1), importance_samples=HUGE),
        "importance_samples",
    ),
    "times": (lambda: CNF(2).trajectory(torch.zeros(MANY, 2), torch.linspace(0, 1, MANY)), "times"),
    "draws of an objective": (lambda: ReverseKL(CNF(2), torch.sum, draws=HUGE), "draws"),
    "draws in chunks": (lambda: sample_in_chunks(CNF(2), HUGE), "count"),
}


@pytest.mark.parametrize(("call", "name"), HUGE_CALLS.values(), ids=HUGE_CALLS)
def test_what_no_memory_holds_is_refused_in_words(call, name):
    with pytest.raises(
        ValueError, match=rf"{name} must be (small enough for the memory|less than|(of )?at most)"
    ):
        call()
