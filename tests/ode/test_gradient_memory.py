"""Laws of memory: what grows with the evaluations of a solve, by the way its gradient is made."""

import functools

import pytest
import torch
from zoo import UserNetwork, cnf, perturbed

from cnf import CNF, Flow, ModuleField, ODESolver, count_evaluations
from cnf._memory import LiveBytes
from cnf.transforms import ContinuousTransform

EVERY = pytest.mark.parametrize("name", ["closed form", "forward mode", "reverse mode"])
ROWS, FEW, MANY = 200, 2, 20
FLOWS = {
    "closed form": lambda: perturbed(CNF(2, hidden_features=(16, 16))),
    "forward mode": lambda: perturbed(CNF(2, hidden_features=(16, 16, 16), activation="tanh")),
    "reverse mode": lambda: Flow([ContinuousTransform(perturbed(ModuleField(UserNetwork(2), 2)))]),
}


def peak_of_a_training_step(flow, x):
    """Most bytes alive at once, of the loss and its gradient."""
    with LiveBytes() as live:
        flow.log_prob(x).mean().backward()
    return live.peak


@functools.cache
def peaks(name, gradient):
    """The peaks at 8 and at 80 evaluations, and as many back."""
    found = []
    for steps in (FEW, MANY):
        solver = ODESolver(method="rk4", steps=steps, gradient=gradient)
        flow = FLOWS[name]().using(solver=solver)
        found.append(peak_of_a_training_step(flow, torch.randn(ROWS, 2)))
    return found


@EVERY
@pytest.mark.slow
def test_the_memory_of_the_adjoint_does_not_grow_with_the_evaluations(name):
    few, many = peaks(name, "adjoint")
    assert many <= 1.2 * few


@EVERY
@pytest.mark.slow
def test_the_memory_of_checkpoint_grows_by_the_state_of_each_step_alone(name):
    few, many = peaks(name, "checkpoint")
    state = ROWS * (2 + 1) * 8
    assert (MANY - FEW) * state <= many - few <= 1.5 * (MANY - FEW) * state


@EVERY
@pytest.mark.slow
def test_the_memory_of_backprop_grows_with_each_evaluation(name):
    few, many = peaks(name, "backprop")
    assert many > 7 * few
    assert many > 10 * peaks(name, "checkpoint")[1]


@pytest.mark.slow
def test_an_adaptive_checkpoint_keeps_a_state_and_its_rates_for_each_step():
    flow, x = cnf(), torch.randn(ROWS, 2)

    def solved(tolerance):
        solver = ODESolver(rtol=tolerance, atol=tolerance, gradient="checkpoint")
        tried = flow.using(solver=solver)
        with torch.no_grad(), count_evaluations(tried) as nfe:
            tried.log_prob(x)
        return nfe.value, peak_of_a_training_step(tried, x)

    (_, few), (nfe, many) = solved(1e-2), solved(1e-11)
    assert nfe > 60
    assert many - few < 1.5 * nfe / 6 * 2 * ROWS * (2 + 1) * 8
