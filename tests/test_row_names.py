"""Laws of the rows that an error names: those at fault, as the caller counts them."""

import pytest
import torch

from cnf import Flow, ModuleField, ODEError, ODESolver
from cnf.flows import log_prob_in_chunks
from cnf.ode import methods
from cnf.transforms import Augment, ContinuousTransform, Unconstrain

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

ADAPTIVE = [name for name, kind in methods().items() if kind == "adaptive"]
FAR = 1e4
BUDGET = {"max_evaluations": 60, "rtol": 1e-9, "atol": 1e-9}


class RoughFarAway(torch.nn.Module):
    """A fast and even velocity near the data; far away a slow one, too rough to follow."""

    def forward(self, t, x):
        rough = 20 * torch.sin(400 * t + x)
        return torch.where(x.abs() > 60, rough, 50 * torch.ones_like(x))


def rough_far_away(**settings):
    field = ModuleField(RoughFarAway(), features=2)
    return Flow([ContinuousTransform(field, solver=ODESolver(**BUDGET, **settings))])


def rows_with_one_far(count, far):
    x = torch.randn(count, 2)
    x[far] = FAR
    return x


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("error_norm", ["points", "points_and_ladj"])
def test_a_spent_budget_names_the_row_whose_error_forces_the_steps(method, error_norm):
    flow = rough_far_away(method=method, error_norm=error_norm)
    with pytest.raises(ODEError, match=r"spent its budget .* sets the steps is in row 4\."):
        flow.to_base_and_ladj(rows_with_one_far(6, far=4))


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_steps_too_small_name_the_row_whose_error_forces_them(method):
    def rhs(t, state):
        rate = 50 * torch.ones_like(state[0])
        rate[3] = 1e-3 / (t - 0.3)  # a pole, which no step passes
        return (rate,)

    solver = ODESolver(method=method, rtol=1e-9, atol=1e-9)
    x = torch.randn(6, 2)
    with pytest.raises(ODEError, match=r"too small .* sets the steps is in row 3\."):
        solver.solve(rhs, (x,), torch.tensor([0.0, 1.0]))


def test_a_spent_budget_of_the_adjoint_names_the_row_whose_gradient_is_rough():
    def rhs(t, state):
        (x,) = state
        rough = torch.zeros_like(x)
        rough[2] = 1e-3 * torch.sin(3e3 * x[2])  # rough once it is differentiated
        return (x + rough,)

    x = torch.randn(6, 2, requires_grad=True)
    solver = ODESolver(rtol=1e-2, atol=1e-2, gradient="adjoint", max_evaluations=60)
    (states,) = solver.solve(rhs, (x,), torch.tensor([0.0, 1.0]))
    what = r"the backward solve .* spent its budget .* sets the steps is in row 2\."
    with pytest.raises(ODEError, match=what):
        states[-1].sum().backward()


def test_in_chunks_the_rows_are_the_callers():
    x = rows_with_one_far(10, far=7)
    with pytest.raises(ODEError, match=r"in rows 6 to 8: .* sets the steps is in row 7\."):
        log_prob_in_chunks(rough_far_away(), x, chunk_size=3)


def test_rows_beyond_the_support_do_not_shift_the_names_of_others():
    flow = Flow([Unconstrain(["positive", "positive"]), *rough_far_away().chain])
    x = torch.randn(3, 4, 2).exp()
    x[0, 1] = -1.0
    x[2, 0] = -1.0
    x[2, 1] = 1e35
    what = r"sets the steps is in row \(2, 1\)\."
    with pytest.raises(ODEError, match=what):
        flow.log_prob(x)
    with pytest.raises(ODEError, match=what):
        flow.log_prob_and_error(x)
    flat = x.reshape(12, 2)
    with pytest.raises(ODEError, match=r"in rows 8 to 11: .* sets the steps is in row 9\."):
        log_prob_in_chunks(flow, flat, chunk_size=4)


def test_importance_samples_do_not_change_the_names():
    flow = Flow([Augment(1, 1), *rough_far_away().chain])
    x = torch.zeros(4, 1)
    x[2] = FAR
    with pytest.raises(ODEError, match=r"sets the steps is in row 2\."):
        flow.log_prob(x, importance_samples=3)
