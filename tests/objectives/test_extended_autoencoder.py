"""The extended form of an autoencoder within a flow: no likelihood, and its estimate of one."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from zoo import cnf, perturbed, seeded

from cnf import Flow, TrainingConfig, fit
from cnf.objectives import ExtendedAutoencoder
from cnf.transforms import (
    Affine,
    AffineCoupling,
    Augment,
    AutoencoderCoupling,
    MLPConditioner,
    Permute,
)


class Given(nn.Module):
    """A network as a conditioner."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, context):
        return self.network(x)


def toy():
    """An autoencoder of two numbers with a core of one."""
    sizes = {"encoder": (2, 2), "decoder": (1, 4)}
    networks = {
        name: perturbed(MLPConditioner(*size, hidden_features=(8,))) for name, size in sizes.items()
    }
    coupling = AutoencoderCoupling(3, 1, **networks)
    return ExtendedAutoencoder(Flow([Augment(2, 1), Permute([2, 0, 1]), coupling]))


def integral_over_the_core(objective, x):
    """The log-density of rows by quadrature, over the core behind the `Augment`."""
    grid = torch.linspace(-60, 60, 24_001).unsqueeze(-1)
    joint = Flow(objective.flow.transforms[1:], objective.flow.base)
    with torch.no_grad():
        density = [
            joint.log_prob(torch.cat([row.expand(len(grid), -1), grid], -1)).exp() for row in x
        ]
    return torch.trapezoid(torch.stack(density), grid[:, 0]).log()


@pytest.mark.slow
def test_the_estimate_is_the_integral_over_the_core():
    objective = toy()
    x = torch.randn(8, 2)
    truth = integral_over_the_core(objective, x)
    for std in (1.0, 2.0):
        with torch.no_grad():
            estimates = objective.estimate(x, 20_000, std=std, generator=seeded())
            few = objective.estimate(x.expand(400, 8, 2), 3, std=std, generator=seeded())
        torch.testing.assert_close(estimates, truth, rtol=0, atol=0.1)
        weights = few.exp()
        assert ((weights.mean(0) - truth.exp()).abs() < 5 * weights.std(0) / 20).all()
        assert (few.mean(0) < truth + 4 * few.std(0) / 20).all()


def test_draws_from_the_law_of_the_core_leave_no_error():
    """With w given x normal about 3 x, and draws from there, each weight is the density of x."""
    around = nn.Linear(1, 2)
    nn.init.constant_(around.weight, 0.0)
    with torch.no_grad():
        around.weight[0] = 3.0
        around.bias.copy_(torch.tensor([0.0, -0.5]))
    coupling = AffineCoupling(2, conditioner=Given(around), mask="first", bound=100.0)
    objective = ExtendedAutoencoder(Flow([Augment(1, 1), coupling]))
    nn.init.constant_(objective.projection.weight, 3.0)
    x = torch.randn(20, 1)
    with torch.no_grad():
        found = objective.estimate(x, 2, std=math.exp(-0.5), generator=seeded())
    torch.testing.assert_close(found, Normal(0.0, 1.0).log_prob(x)[:, 0], rtol=0, atol=1e-4)


def test_the_surrogate_is_no_density_of_the_data_and_no_bound():
    """A core that is independent of the data, of standard deviation 0.1, at 0 and far out."""
    affine = Affine(2)
    nn.init.constant_(affine.log_scale[1], math.log(0.1))
    objective = ExtendedAutoencoder(Flow([Augment(1, 1), affine]))
    x = torch.randn(6, 1)
    truth = Normal(0.0, 1.0).log_prob(x).mean()
    for slope, is_above in ((0.0, True), (2.0, False)):
        nn.init.constant_(objective.projection.weight, slope)
        with torch.no_grad():
            surrogate = -objective(x)
            estimate = objective.estimate(x, 100_000, std=max(1.0, 2 * slope), generator=seeded())
        expected = truth + Normal(0.0, 0.1).log_prob(slope * x).mean()
        torch.testing.assert_close(surrogate, expected)
        assert (surrogate > truth) == is_above
        torch.testing.assert_close(estimate.mean(), truth, rtol=0, atol=0.05)
    assert not hasattr(objective, "log_prob")


@pytest.mark.slow
def test_it_trains_by_fit_and_learns_the_core():
    generator = seeded()
    code = torch.randn(400, 1, generator=generator)
    x = torch.cat([code, -code], -1) + 0.1 * torch.randn(400, 2, generator=generator)
    objective = toy()
    before = objective.projection.weight.clone()
    config = TrainingConfig(steps=150, batch_size=100, learning_rate=1e-2, progress=False)
    fit(objective, x, config)
    assert not torch.equal(objective.projection.weight, before)
    coupling = objective.flow.transforms[-1]
    with torch.no_grad():
        made = coupling.decode(coupling.encode(torch.cat([objective.core(x), x], -1)))[:, 1:]
    assert (made - x).square().mean().sqrt() < 0.15


@pytest.mark.slow
def test_an_objective_with_own_parameters_is_validated_and_kept_whole():
    """The log-density of the flow falls in this training, so the flow alone would never change."""
    generator = seeded()
    x = torch.randn(200, 2, generator=generator)
    objective = toy()
    before = objective(x).item()
    config = TrainingConfig(steps=40, learning_rate=1e-2, validate_every=5, progress=False)
    history = fit(objective, x[:150], config, validation=x[150:])
    with torch.no_grad():
        after = objective(x[150:]).item()
    assert after < before - 1
    best = min(loss for loss in history.validation if not math.isnan(loss))
    assert abs(after - best) < 1e-9
    with pytest.raises(ValueError, match="has parameters of its own, and must be given in place"):
        fit(objective.flow, x, TrainingConfig(objective=ExtendedAutoencoder, progress=False))


def test_gradients_and_batch_shapes():
    objective = toy()
    x = torch.randn(3, 4, 2)
    assert objective.estimate(x, 5).shape == (3, 4)
    assert objective.estimate(x[:0], 5).shape == (0, 4)
    assert objective.core(x).shape == (3, 4, 1)
    rows = torch.randn(5, 2, requires_grad=True)
    assert torch.autograd.gradcheck(objective, (rows,))
    assert torch.autograd.gradcheck(lambda y: objective.estimate(y, 3, generator=seeded()), (rows,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExtendedAutoencoder(Flow([Affine(2)])), "must be an Augment"),
        (lambda: ExtendedAutoencoder(cnf(2, 1, augment=1)), "must be an Augment"),
        (lambda: ExtendedAutoencoder(Flow([Augment(2, 1), Augment(3, 1)])), "must be an Augment"),
        (lambda: toy().estimate(torch.zeros(1, 2), 0), "samples must be at least 1"),
        (lambda: toy().estimate(torch.zeros(1, 2), std=0.0), "std must be positive"),
        (lambda: toy().estimate(torch.zeros(1, 3)), "x must"),
    ],
)
def test_bad_input_is_refused(make, message, shapes_unchecked):
    with pytest.raises(ValueError, match=message):
        make()
