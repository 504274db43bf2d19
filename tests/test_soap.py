"""Laws of SOAP."""

import copy

import pytest
import torch
from torch import nn

from cnf import CNF, FlowMatching
from cnf.soap import SOAP


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(*shape, steps=60, seed=0):
    """Gradients whose rows and columns are correlated."""
    generator = seeded(seed)
    rows, columns = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in shape)
    noise = torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
    return rows @ noise @ columns


def after(make, weight, gradients):
    """The weight after a step for each gradient, and the optimizer."""
    weight = nn.Parameter(weight.clone())
    optimizer = make([weight], lr=0.1)
    for gradient in gradients:
        weight.grad = gradient.reshape(weight.shape).clone()
        optimizer.step()
    return weight.detach(), optimizer


def adam(parameters, lr):
    return torch.optim.Adam(parameters, lr=lr, betas=(0.95, 0.95), eps=1e-8)


@pytest.mark.parametrize("shape", [(), (5,), (1, 7), (7, 1), (300, 400)], ids=str)
def test_what_has_no_sides_to_rotate_is_optimised_by_adam(shape):
    noise = torch.randn(25, *shape, generator=seeded(), dtype=torch.float64)
    start = torch.ones(shape, dtype=torch.float64)
    torch.testing.assert_close(after(SOAP, start, noise)[0], after(adam, start, noise)[0])


def test_before_the_first_basis_it_is_adam_and_after_it_is_not():
    start, found = torch.zeros(6, 4, dtype=torch.float64), gradients(6, 4)
    torch.testing.assert_close(after(SOAP, start, found[:10])[0], after(adam, start, found[:10])[0])
    changed = after(SOAP, start, found[:11])[0] - after(adam, start, found[:11])[0]
    assert changed.abs().max() > 1e-3


def test_the_bases_become_eigenbases_of_the_averages():
    found = gradients(6, 4, steps=10).repeat(40, 1, 1)  # periodic, so the averages settle
    _, optimizer = after(SOAP, torch.zeros(6, 4, dtype=torch.float64), found)
    (state,) = optimizer.state.values()
    for covariance, basis in zip(state["covariances"], state["bases"], strict=True):
        n = len(basis)
        torch.testing.assert_close(basis.T @ basis, torch.eye(n, dtype=basis.dtype))
        added = 0.01 * covariance.diagonal().mean() * torch.linspace(1, 0, n, dtype=basis.dtype)
        rotated = basis.T @ (covariance + torch.diag(added)) @ basis
        beside = rotated - torch.diag(rotated.diagonal())
        assert beside.abs().max() < 1e-6 * rotated.diagonal().max()


def test_a_kernel_is_a_matrix_of_its_first_side():
    start, found = torch.zeros(6, 2, 2, dtype=torch.float64), gradients(6, 4)
    flat = after(SOAP, start.reshape(6, 4), found)[0]
    torch.testing.assert_close(after(SOAP, start, found)[0].reshape(6, 4), flat)


def test_the_steps_do_not_depend_on_the_scale_of_the_loss():
    start, found = torch.zeros(6, 4, dtype=torch.float64), gradients(6, 4)
    torch.testing.assert_close(
        after(SOAP, start, 1e4 * found)[0], after(SOAP, start, found)[0], rtol=1e-4, atol=1e-6
    )


def test_rounding_of_gradients_of_low_rank_stays_rounding():
    """Rounding alone would choose the eigenvectors of 0, in which later gradients are scaled."""
    start = torch.zeros(20, 30, dtype=torch.float64)
    wide = torch.randn(2, 30, generator=seeded(3), dtype=torch.float64)
    found = torch.cat([gradients(20, 2, steps=30) @ wide, gradients(20, 30, steps=20, seed=1)])
    noise = torch.randn(found.shape, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(
        after(SOAP, start, found * (1 + 1e-7 * noise))[0],
        after(SOAP, start, found)[0],
        rtol=0,
        atol=1e-4,
    )


def test_a_regression_on_correlated_inputs_is_learnt_sooner_than_by_adam():
    turn = torch.linalg.qr(torch.randn(20, 20, generator=seeded(), dtype=torch.float64)).Q
    spread = torch.logspace(0, -2, 20, dtype=torch.float64)[:, None] * turn
    truth = torch.randn(20, 5, generator=seeded(1), dtype=torch.float64)

    def error_after(make):
        weight = nn.Parameter(torch.zeros(20, 5, dtype=torch.float64))
        optimizer = make([weight], lr=0.1)
        noise = seeded(2)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
            x = torch.randn(64, 20, generator=noise, dtype=torch.float64) @ spread
            weight.grad = x.T @ (x @ (weight.detach() - truth)) / 64
            optimizer.step()
        return (spread @ (weight.detach() - truth)).square().sum().item()

    assert error_after(SOAP) < 0.2 * error_after(adam)


def test_a_run_goes_on_from_its_state_bit_for_bit():
    torch.manual_seed(0)
    flow = CNF(2, hidden_features=(8, 8))
    x = torch.randn(64, 2)

    def train(flow, optimizer, steps):
        for seed in steps:
            optimizer.zero_grad()
            FlowMatching(flow)(x, generator=seeded(seed)).backward()
            optimizer.step()

    optimizer = SOAP(flow.parameters())
    train(flow, optimizer, range(15))
    other = copy.deepcopy(flow)
    resumed = SOAP(other.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(flow, optimizer, range(15, 30))
    train(other, resumed, range(15, 30))
    for one, two in zip(flow.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_closure_gives_the_gradient_and_the_loss():
    weight = nn.Parameter(torch.ones(3))
    optimizer = SOAP([weight], lr=0.1)

    def loss_with_gradient():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(loss_with_gradient).item() == 3
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))
    assert optimizer.step() is None


@pytest.mark.parametrize(
    ("rate", "error", "message"),
    [(0.0, ValueError, "positive and finite; got 0"), ("x", TypeError, "lr must be a number")],
)
def test_bad_rates_are_refused(rate, error, message):
    with pytest.raises(error, match=message):
        SOAP([nn.Parameter(torch.zeros(2))], lr=rate)
