"""Laws of trajectories: they pass through the points that the maps give."""

import pytest
import torch
from zoo import EVERY_FLOW, FLOWS, PRECISE, cnf, perturbed, rows_for, seeded

from cnf import Flow, Standardize
from cnf.transforms import Affine, ContinuousTransform
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

FOLLOWED = {
    name: make for name, make in FLOWS.items() if isinstance(make().chain[-1], ContinuousTransform)
}
"""Flows with an ODE at the base."""

every_flow = pytest.mark.parametrize("make", FOLLOWED.values(), ids=FOLLOWED)


@every_flow
def test_a_path_from_the_base_ends_at_to_data(make):
    flow = make()
    z, context = rows_for(flow, 3)
    states = flow.trajectory(z, torch.tensor([0.0, 0.3, 0.8, 1.0]), context)
    assert states.shape == (4, 3, 2)
    torch.testing.assert_close(states[-1], flow.to_data(z, context), rtol=0, atol=1e-6)


@every_flow
def test_a_path_from_the_data_is_the_same_path_backwards(make):
    flow = make()
    z, context = rows_for(flow, 3)
    times = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0])
    there = flow.trajectory(z, times, context)
    back = flow.trajectory(there[-1], times.flip(0), context)
    torch.testing.assert_close(back.flip(0), there, rtol=0, atol=1e-6)


@pytest.mark.parametrize("end", [0.25, 0.5, 0.6, 1.0])
def test_states_are_those_of_the_linear_field(end):
    first, second = (perturbed(LinearField(2), 0.5) for _ in range(2))
    flow = Flow([ContinuousTransform(field, solver=PRECISE) for field in (first, second)])
    z = torch.randn(3, 2)

    states = flow.trajectory(z, torch.tensor([0.0, end]))

    # The second block is the one beside the base, and each takes half of the time.
    expected, _ = second.solution(z, start=0.0, end=min(1.0, 2 * end))
    if end > 0.5:
        expected, _ = first.solution(expected, start=0.0, end=2 * end - 1)
    torch.testing.assert_close(states[-1], expected, rtol=0, atol=1e-6)


def test_states_are_in_the_units_of_the_data():
    standardize = Standardize.from_data(5 + 3 * torch.randn(100, 2))
    flow = cnf(transforms=[standardize])
    z = torch.randn(4, 2)
    states = flow.trajectory(z, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(states[0], standardize.to_data(z))


def test_the_path_follows_the_field():
    """Central differences of the path are the velocity there."""
    flow = cnf()
    field = flow.chain[0].vector_field
    step = 1e-4
    for t in (0.2, 0.5, 0.9):
        times = torch.tensor([0.0, t - step, t, t + step])
        _, before, here, after = flow.trajectory(torch.randn(3, 2), times)
        velocity = field(torch.tensor(t), here)
        torch.testing.assert_close((after - before) / (2 * step), velocity, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("times", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "times must be a Tensor; got list"),
        (torch.tensor(1.0), ValueError, r"1-D with at least 2 times; got \(\)"),
        (torch.tensor([0.0]), ValueError, "at least 2 times"),
        (torch.tensor([0.0, 0.5, 0.5]), ValueError, "strictly increasing or strictly decreasing"),
        (torch.tensor([0.0, torch.nan]), ValueError, "strictly increasing"),
        (torch.tensor([0.1, 1.0]), ValueError, "start at 0 .base. or 1"),
        (torch.tensor([0.0, 1.5]), ValueError, r"stay within \[0, 1\]; they go from 0.0 to 1.5"),
    ],
)
def test_bad_times_are_refused(times, error, message):
    with pytest.raises(error, match=message):
        cnf().trajectory(torch.zeros(1, 2), times)


@pytest.mark.parametrize("position", [0, 1])
def test_a_flow_without_a_path_is_refused(position):
    continuous = ContinuousTransform(LinearField(2))
    chains = [[Affine(2)], [continuous, Affine(2)]]
    with pytest.raises(ValueError, match="on its base side, in its continuous transforms"):
        Flow(chains[position]).trajectory(torch.zeros(1, 2), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("name", ["image", "dequantized image", "augmented with context"])
def test_a_path_has_events_of_the_data_at_each_time(name):
    flow = EVERY_FLOW[name]()
    x, context = rows_for(flow, 3)
    back = flow.trajectory(x, torch.tensor([1.0, 0.5, 0.0]), context, generator=seeded())
    assert back.shape == (3, 3, *flow.event_shape)
    torch.testing.assert_close(back[0], x)
    z = torch.randn(3, flow.base.features)
    forth = flow.trajectory(z, torch.tensor([0.0, 0.5, 1.0]), context)
    assert forth.shape == (3, 3, *flow.event_shape)
    torch.testing.assert_close(forth[-1], flow.to_data(z, context), rtol=0, atol=1e-6)
