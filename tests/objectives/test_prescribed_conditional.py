"""The surrogate for a conditional density: right if the condition is copied, refused if not."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from zoo import perturbed, seeded

from cnf import CNF, Flow
from cnf.bases import HalfNormal
from cnf.objectives import PrescribedConditional
from cnf.transforms import (
    Abs,
    Affine,
    AffineCoupling,
    Augment,
    Conv1x1,
    Inverse,
    Logit,
    MLPConditioner,
    Slice,
    TransformedBase,
)


def bounded():
    """A base on a bounded square."""
    return TransformedBase([Logit(2)])


def copying():
    """A flow of one number given another, which is copied: a conditional normal."""
    conditioner = perturbed(MLPConditioner(1, 2, hidden_features=(6,)))
    coupling = AffineCoupling(2, conditioner=conditioner, mask="last")
    return PrescribedConditional(Flow([coupling]), 1, weight=7.0), conditioner


def test_with_a_copied_condition_it_is_the_conditional_likelihood():
    objective, _ = copying()
    x, y = torch.randn(50, 1), torch.randn(50, 1)
    assert (objective.copying_error(x, y) == 0).all()
    # By its integral over x, and by autograd.
    grid = torch.linspace(-60, 60, 40_001).unsqueeze(-1)
    density = objective.log_prob(grid, y[:1]).exp()
    torch.testing.assert_close(torch.trapezoid(density, grid[:, 0]), torch.tensor(1.0))
    point = x.clone().requires_grad_()
    z = objective.flow.to_base(torch.cat([point, y], -1))[:, :1]
    (slope,) = torch.autograd.grad(z.sum(), point)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z) + slope.abs().log()
    torch.testing.assert_close(objective.log_prob(x, y), expected.squeeze(-1), rtol=0, atol=1e-9)
    loss = objective(torch.cat([x, y], -1))
    torch.testing.assert_close(loss, -expected.mean(), rtol=0, atol=1e-9)


def test_samples_have_the_conditional_density():
    objective, conditioner = copying()
    y = torch.tensor([[0.5], [-1.0]])
    draws = objective.sample(y, (20_000,), generator=seeded())
    assert draws.shape == (20_000, 2, 1)
    with torch.no_grad():
        z = objective.flow.to_base(torch.cat([draws, y.expand(20_000, 2, 1)], -1))[..., :1]
    assert (z.mean(0).abs() < 4 / 20_000**0.5).all()
    assert ((z.square().mean(0) - 1).abs() < 4 * (2 / 20_000) ** 0.5).all()
    assert conditioner(y).shape == (2, 2)


def test_an_error_costs_its_weight_and_is_no_likelihood():
    flow = Flow([Affine(3)])
    nn.init.constant_(flow.transforms[0].loc, 0.25)
    objective = PrescribedConditional(flow, 2, weight=10.0)
    x, y = torch.zeros(4, 1), torch.zeros(4, 2)
    torch.testing.assert_close(objective.copying_error(x, y), torch.full((4,), 0.25))
    normal = 0.5 * torch.tensor(2 * torch.pi).log() + 0.5 * 0.25**2
    torch.testing.assert_close(objective(torch.zeros(4, 3)), normal + 10 * 2 * 0.25)
    with pytest.raises(ValueError, match=r"copied by the flow to 0.001.*off by 0.25"):
        objective.log_prob(x, y)


@pytest.mark.parametrize("entry", [1, 2])
def test_one_entry_of_the_condition_that_is_not_copied_is_enough(entry):
    flow = Flow([Affine(3)])
    with torch.no_grad():
        flow.transforms[0].loc[entry] = 0.25
    objective = PrescribedConditional(flow, 2)
    x, y = torch.zeros(4, 1), torch.zeros(4, 2)
    torch.testing.assert_close(objective.copying_error(x, y), torch.full((4,), 0.25))
    with pytest.raises(ValueError, match=r"off by 0\.25"):
        objective.log_prob(x, y)


def test_a_flow_that_copies_a_row_and_stretches_its_condition_is_no_likelihood():
    """Its draws, of a standard normal number, have another density than its surrogate."""
    flow = Flow([Affine(2)])
    nn.init.constant_(flow.transforms[0].log_scale, 0.25)
    objective = PrescribedConditional(flow, 1, weight=0.0)
    x, y = torch.randn(3, 1), torch.zeros(3, 1)
    assert (objective.copying_error(x, y) == 0).all()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(ValueError, match=r"volume is off by up to 0\.25 nats"):
            objective.log_prob(x, y)


def test_draws_differ_from_the_surrogate_by_the_volume_of_the_condition():
    """By the closed form of a linear flow, which mixes data and condition."""
    matrix = torch.eye(4) + 0.4 * torch.randn(4, 4)
    mix = Conv1x1(4)
    mix.matrix.set_to(matrix)
    objective = PrescribedConditional(Flow([mix]), 2, weight=0.0)
    rows = torch.randn(1, 4)
    z = rows @ matrix.T
    # The draws of x with the condition held at the base.
    back = matrix.inverse()
    mean, factor = z[0, 2:] @ back[:2, 2:].T, back[:2, :2]
    drawn = MultivariateNormal(mean, factor @ factor.T).log_prob(rows[0, :2])
    volume = torch.linalg.slogdet(matrix[2:, 2:]).logabsdet
    torch.testing.assert_close(-objective(rows) - volume, drawn)


def test_a_flow_learns_to_copy():
    objective = PrescribedConditional(perturbed(Flow([Affine(2)])), 1)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    rows = torch.randn(200, 2)
    for _ in range(800):
        optimizer.zero_grad()
        objective(rows).backward()
        optimizer.step()
        schedule.step()
    assert objective.copying_error(rows[:, :1], rows[:, 1:]).max() < 1e-2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PrescribedConditional(CNF(2), 2), "condition_features must be .* 1"),
        (lambda: PrescribedConditional(CNF(2), 0), "condition_features must be"),
        (lambda: PrescribedConditional(CNF(2), 1, weight=-1.0), "weight must be finite"),
        (lambda: PrescribedConditional(CNF(2, 3), 1), "flow must be an exact flow of vectors"),
        (lambda: PrescribedConditional(Flow([Augment(2, 1), Affine(3)]), 1), "'lower_bound'"),
        (lambda: PrescribedConditional(Flow([Abs(3)], HalfNormal(3)), 1), "bijective False"),
        (lambda: PrescribedConditional(Flow([Slice(3, 2)]), 1), "bijective False"),
        (
            lambda: PrescribedConditional(Flow([Inverse(Logit(2))], bounded()), 1),
            "bijections to all real vectors.*OpenInterval",
        ),
        (lambda: PrescribedConditional(CNF(3), 1).sample(torch.zeros(2)), "condition must have"),
        (
            lambda: PrescribedConditional(CNF(3), 1).log_prob(torch.zeros(3), torch.zeros(1)),
            "x must have",
        ),
    ],
)
@pytest.mark.usefixtures("shapes_unchecked")
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_generator_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None; got 3"):
        PrescribedConditional(CNF(3), 1).sample(torch.zeros(1), generator=3)
