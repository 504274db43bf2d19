"""Laws of energy-based models: their integral, and which term trains what."""

import math

import pytest
import torch
from torch import nn
from zoo import perturbed, seeded

from cnf import CNF, Flow, ReverseKL
from cnf.flows import EnergyModel
from cnf.objectives import EnergyObjective
from cnf.transforms import Affine, Augment, Logit


class Quadratic(nn.Module):
    """Minus half of a square, in units of a width: Z is known."""

    def __init__(self, log_width: float = 0.0) -> None:
        super().__init__()
        self.log_width = nn.Parameter(torch.tensor(log_width))

    def forward(self, x):
        return -0.5 * (x * (-self.log_width).exp()).square().sum(-1)


class Pole(nn.Module):
    """Infinite where x is 1."""

    def forward(self, x):
        return -(x - 1).abs().log().sum(-1)


def model(log_width: float = -0.2) -> EnergyModel:
    return EnergyModel(Quadratic(log_width), perturbed(Flow([Affine(2)]), 0.1))


def test_the_integral_is_right_within_its_error_and_its_log_is_too_small_on_average():
    """At 4 standard errors over 300 repetitions: 6e-5."""
    made, generator = model(), seeded()
    log_z = math.log(2 * math.pi) - 0.4
    found = [made.estimate_normalizer(200, generator=generator) for _ in range(300)]
    logs = torch.stack([each.log_z for each in found])
    relative = (logs - log_z).exp() - 1
    assert abs(relative.mean()) < 4 * relative.std() / 300**0.5
    assert logs.mean() < log_z + 4 * logs.std() / 300**0.5
    mean_error = torch.stack([each.standard_error for each in found]).mean()
    assert mean_error == pytest.approx(float(logs.std()), rel=0.2)
    torch.testing.assert_close(made.log_prob(torch.zeros(2)), -found[-1].log_z, rtol=0, atol=1e-12)


def test_each_term_trains_its_own_part():
    made = model()
    objective = EnergyObjective(made, draws=50)
    x = torch.randn(20, 2)
    objective(x, generator=seeded()).backward()
    flow_gradients = [parameter.grad.clone() for parameter in made.proposal.parameters()]
    slope = made.energy.log_width.grad.clone()

    objective.zero_grad()
    ReverseKL(made.proposal, made.energy, draws=50)(generator=seeded()).backward()
    for found, parameter in zip(flow_gradients, made.proposal.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)

    with torch.no_grad():
        drawn, log_q = made.proposal.rsample_and_log_prob(50, generator=seeded())
        shares = (made.energy(drawn) - log_q).softmax(0)
    # The derivative of D in the log of its width is the square.
    squares = [part.square().sum(-1) * math.exp(0.4) for part in (drawn, x)]
    torch.testing.assert_close(slope, (shares * squares[0]).sum() - squares[1].mean())


def test_a_network_learns_the_width_of_the_data():
    made = EnergyModel(Quadratic(), Flow([Affine(1)]))
    objective = EnergyObjective(made, draws=256)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.03)
    x = 2 * torch.randn(1000, 1)
    for _ in range(200):
        optimizer.zero_grad()
        objective(x).backward()
        optimizer.step()
    expected = math.log(float(x.square().mean().sqrt()))
    assert made.energy.log_width.item() == pytest.approx(expected, abs=0.05)
    assert made.proposal.transforms[0].log_scale.item() == pytest.approx(expected, abs=0.1)
    found = made.estimate_normalizer(2000)
    assert found.effective_sample_size > 1500


def test_weights_of_rows_multiply():
    objective = EnergyObjective(model(), draws=8)
    x = torch.randn(3, 2)
    weighted = objective(x, weight=torch.tensor([1.0, 0.0, 2.0]), generator=seeded())
    repeated = objective(x[[0, 2, 2]], generator=seeded())
    torch.testing.assert_close(weighted, repeated)


def test_there_is_no_density_outside_of_the_support_of_the_proposal():
    """Of the uniform density on the unit square; the energy is not asked there."""

    class Square(nn.Module):
        def forward(self, x):
            assert ((x > 0) & (x < 1)).all()
            return 0 * x.sum(-1)

    made = EnergyModel(Square(), Flow([Logit(2, alpha=0.0)]))
    found = made.estimate_normalizer(4000, generator=seeded())
    x = torch.tensor([[[0.5, 0.5], [0.5, 2.0]], [[-1.0, 0.5], [0.1, 0.9]]])
    expected = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    error = 4 * float(found.standard_error)  # 4 standard errors: 6e-5
    torch.testing.assert_close(made.log_prob(x), expected, rtol=0, atol=error)
    assert made.log_prob(x[0, 1]) == -math.inf


def test_there_is_no_density_before_the_integral():
    made = model()
    assert made.likelihood == "biased_estimate"
    with pytest.raises(ValueError, match=r"call model\.estimate_normalizer\(\) first"):
        made.log_prob(torch.zeros(2))
    made.estimate_normalizer(100)
    other = model()
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(other.log_prob(torch.ones(3, 2)), made.log_prob(torch.ones(3, 2)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EnergyModel(lambda x: x.sum(-1), CNF(2)), TypeError, "energy must be"),
        (lambda: EnergyModel(Quadratic(), Affine(2)), TypeError, "proposal must be"),
        (lambda: EnergyModel(Quadratic(), CNF(2, 3)), ValueError, "no context"),
        (
            lambda: EnergyModel(Quadratic(), Flow([Augment(2, 1), Affine(3)])),
            ValueError,
            "'lower_bound'",
        ),
        (lambda: EnergyObjective(Quadratic()), TypeError, "model must be"),
        (lambda: EnergyObjective(model(), draws=1), ValueError, "draws must be at least 2"),
        (lambda: model().log_density(torch.zeros(3)), ValueError, "x must have"),
        (
            lambda: EnergyModel(nn.Identity(), CNF(2)).log_density(torch.zeros(3, 2)),
            ValueError,
            r"energy must return shape \(3,\)",
        ),
        (
            lambda: EnergyObjective(EnergyModel(Pole(), Flow([Affine(1)])))(torch.ones(3, 1)),
            ValueError,
            "energy must be finite or -inf at every point; got other values in rows 0, 1, 2",
        ),
    ],
)
@pytest.mark.usefixtures("shapes_unchecked")
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
