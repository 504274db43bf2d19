"""The stable target: the mean velocity through a state, over the rows of a minibatch."""

import math

import pytest
import torch

from cnf import CNF, Flow, FlowMatching
from cnf.objectives import LinearPath, OptimalTransport, VariancePreservingPath
from cnf.objectives.stable_target import mean_velocity
from cnf.transforms import Affine, ContinuousTransform
from cnf.vector_fields import LinearField


def paths(rows, features=2, sigma_min=0.0, seed=0, dtype=torch.float64, t=None):
    generator = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(2, rows, features, generator=generator, dtype=dtype)
    t = torch.rand(rows, generator=generator, dtype=dtype) if t is None else t
    state, velocity = LinearPath(sigma_min).state_and_velocity(t, x0, x1)
    return velocity, state, x1, t


def by_definition(state, x1, t, sigma_min, context, weight):
    """The mean over rows j of the velocity of the path that leads from j's end through the state,
    weighted by the density of its start and by the weight of j."""
    targets = []
    for i, point in enumerate(state):
        start = (point - t[i] * x1) / (1 - (1 - sigma_min) * t[i])
        velocity = x1 - (1 - sigma_min) * start
        chances = torch.exp(-0.5 * start.square().sum(-1)) * weight
        if context is not None:
            chances = chances * (context == context[i]).all(-1)
        targets.append((chances.unsqueeze(-1) * velocity).sum(0) / chances.sum())
    return torch.stack(targets)


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 7, 128, 259])
@pytest.mark.parametrize("given", ["nothing", "labels", "weights", "both"])
def test_the_target_is_the_mean_velocity_through_the_state(sigma_min, rows, given):
    generator = torch.Generator().manual_seed(1)
    velocity, state, x1, t = paths(rows, sigma_min=sigma_min)
    context = weight = None
    if given in ("labels", "both"):
        context = torch.randint(0, 2, (rows, 2), generator=generator).double()
    if given in ("weights", "both"):
        weight = torch.rand(rows, generator=generator, dtype=torch.float64)
    found = mean_velocity(velocity, state, x1, t, sigma_min, context=context, weight=weight)

    size = rows // math.ceil(rows / 128)
    for start in range(0, rows - rows % size, size):
        block = slice(start, start + size)
        expected = by_definition(
            state[block],
            x1[block],
            t[block],
            sigma_min,
            None if context is None else context[block],
            torch.ones(size) if weight is None else weight[block],
        )
        torch.testing.assert_close(found[block], expected)
    rest = slice(rows - rows % size, None)
    torch.testing.assert_close(found[rest], velocity[rest])


def test_rows_with_contexts_of_their_own_keep_their_velocities():
    velocity, state, x1, t = paths(50)
    context = torch.linspace(0, 1, 50, dtype=torch.float64).unsqueeze(-1)
    found = mean_velocity(velocity, state, x1, t, 0.0, context=context, weight=None)
    torch.testing.assert_close(found, velocity)


def test_a_row_of_weight_zero_does_not_count():
    velocity, state, x1, t = paths(20)
    weight = torch.ones(20, dtype=torch.float64)
    weight[5:] = 0
    found = mean_velocity(velocity, state, x1, t, 0.0, context=None, weight=weight)
    few = mean_velocity(
        *(part[:5] for part in (velocity, state, x1, t)), 0.0, context=None, weight=None
    )
    torch.testing.assert_close(found[:5], few)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_close_to_the_data_it_is_the_drawn_velocity(shift):
    t = 1 - torch.logspace(-8, -2, 60, dtype=torch.float32)
    velocity, state, x1, _ = paths(60, dtype=torch.float32, t=t)
    x1 = x1 + shift
    velocity, state = velocity + shift, state + t.unsqueeze(-1) * shift
    found = mean_velocity(velocity, state, x1, t, 0.0, context=None, weight=None)
    torch.testing.assert_close(found, velocity, rtol=0, atol=0.05)


def test_it_gives_the_same_mean_gradient_with_less_noise():
    """4.5 standard errors for each of six numbers: a false alarm in 1 of 20 000 runs."""
    torch.manual_seed(0)
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0], [-0.5, 1.0]], dtype=torch.float64)
    x = x.repeat(8, 1)[torch.randperm(32)]
    flow = Flow([ContinuousTransform(LinearField(2))]).double()
    gradients = {}
    for target in ("pair", "stable"):
        generator = torch.Generator().manual_seed(2)
        objective = FlowMatching(flow, target=target)
        found = []
        for _ in range(1000):
            loss = objective(x, generator=generator)
            parts = torch.autograd.grad(loss, list(flow.parameters()))
            found.append(torch.cat([part.flatten() for part in parts]))
        gradients[target] = torch.stack(found)
    means = [found.mean(0) for found in gradients.values()]
    error = sum(found.var(0) / len(found) for found in gradients.values()).sqrt()
    assert ((means[0] - means[1]).abs() < 4.5 * error).all()
    assert (gradients["stable"].var(0) < gradients["pair"].var(0)).all()


def test_the_default_is_stable_where_the_mean_has_a_closed_form():
    assert FlowMatching(CNF(2)).target == "stable"
    assert FlowMatching(CNF(2), LinearPath(0.1)).target == "stable"
    assert FlowMatching(CNF(2), target="pair").target == "pair"


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: FlowMatching(CNF(2), VariancePreservingPath(), **options),
        lambda **options: FlowMatching(CNF(2), pairing=OptimalTransport(), **options),
        lambda **options: FlowMatching(
            Flow([ContinuousTransform(LinearField(2)), Affine(2)]), **options
        ),
    ],
    ids=["path", "pairing", "start"],
)
def test_elsewhere_it_is_the_drawn_velocity(make):
    assert make().target == "pair"
    with pytest.raises(ValueError, match="target must be 'pair'"):
        make(target="stable")


@pytest.mark.usefixtures("shapes_unchecked")
def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target must be one of"):
        FlowMatching(CNF(2), target="steady")


def test_a_row_far_away_does_not_change_the_others():
    """At later times; at the first ones, a path through a state may well lead there."""
    velocity, state, x1, t = paths(20, dtype=torch.float32, t=torch.linspace(0.3, 0.9, 20).float())
    others = torch.arange(20) != 7
    alone = (part[others] for part in (velocity, state, x1, t))
    expected = mean_velocity(*alone, 0.0, context=None, weight=None)
    for far in (1e4, 1e20, 3e38):
        x1[7] = far
        state[7], velocity[7] = far, far
        found = mean_velocity(velocity, state, x1, t, 0.0, context=None, weight=None)
        torch.testing.assert_close(found[others], expected, rtol=1e-3, atol=1e-3)


def test_autocast_does_not_round_the_target():
    velocity, state, x1, t = paths(64, dtype=torch.float32)
    expected = mean_velocity(velocity, state, x1, t, 0.0, context=None, weight=None)
    with torch.autocast("cpu", torch.bfloat16):
        found = mean_velocity(velocity, state, x1, t, 0.0, context=None, weight=None)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("target", [0, "", False])
def test_what_is_false_is_no_target(target):
    with pytest.raises(ValueError, match="target must be one of"):
        FlowMatching(CNF(2), target=target)
