"""Laws of flows that are autoencoders: codes, and what is lost by them."""

import pytest
import torch
from torch.distributions import MultivariateNormal
from zoo import autoencoder, couplings, perturbed

from cnf import Flow, MaximumLikelihood, Standardize, load, save
from cnf.bases import NarrowNormal, StandardNormal
from cnf.flows import PseudoInvertibleEncoder
from cnf.transforms import Augment, AutoencoderCoupling, FactorOut, MLPConditioner, Permute, Slice


def encoder(std=0.1):
    torch.manual_seed(0)
    return perturbed(PseudoInvertibleEncoder(couplings(), 1, std=std), 0.2)


def test_the_base_is_a_normal_of_two_widths():
    base = NarrowNormal(3, 2, std=0.25)
    z = torch.randn(10, 3)
    covariance = torch.diag(torch.tensor([1.0, 1.0, 0.0625]))
    expected = MultivariateNormal(torch.zeros(3), covariance).log_prob(z)
    torch.testing.assert_close(base.log_prob(z), expected)


def test_a_point_without_remainder_is_the_decoding_of_its_code():
    flow = encoder()
    code = torch.randn(6, 1)
    x = flow.decode(code)
    torch.testing.assert_close(flow.encode(x), code, rtol=0, atol=1e-9)
    z = flow.to_base(x)
    torch.testing.assert_close(z[:, 1:], torch.zeros(6, 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(flow.decode(flow.encode(x)), x, rtol=0, atol=1e-9)


def test_its_likelihood_is_exact_and_has_the_mass_one():
    flow = encoder(std=0.5)
    assert flow.likelihood == "exact"
    side = torch.linspace(-12, 12, 801)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(side, side)).exp()
    assert float(density.sum() * 0.03**2) == pytest.approx(1, abs=1e-3)


def test_a_loaded_encoder_encodes(tmp_path):
    flow = encoder(std=0.3)
    save(flow, tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors")
    x = torch.randn(4, 2)
    assert isinstance(again, PseudoInvertibleEncoder)
    torch.testing.assert_close(again.encode(x), flow.encode(x))
    torch.testing.assert_close(again.log_prob(x), flow.log_prob(x))


@pytest.mark.slow
def test_reconstructions_of_a_noisy_circle_are_nearer_with_a_narrower_base():
    angle = torch.rand(400) * 4
    x = torch.stack([angle.cos(), angle.sin()], -1) + 0.02 * torch.randn(400, 2)
    errors = []
    for std in (1.0, 0.1):
        torch.manual_seed(0)
        flow = PseudoInvertibleEncoder([Standardize.from_data(x), *couplings(), *couplings()], 1)
        flow = PseudoInvertibleEncoder(flow.transforms, 1, std=std)
        objective = MaximumLikelihood(flow)
        optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
        for _ in range(300):
            optimizer.zero_grad()
            objective(x).backward()
            optimizer.step()
        with torch.no_grad():
            errors.append(float((flow.decode(flow.encode(x)) - x).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_an_autoencoder_coupling_decodes_its_code():
    coupling = autoencoder()
    code = torch.randn(4, 2)
    torch.testing.assert_close(coupling.encode(coupling.decode(code)), code)
    x = coupling.decode(code)
    prediction = coupling.decoder(code)[:, :3]
    torch.testing.assert_close(x[:, 2:], prediction)


def test_an_autoencoder_of_a_linear_gaussian_has_its_likelihood():
    """The core c ~ N(0, 1) is the code, and the shell is w c + b + s noise."""
    decoder = MLPConditioner(1, 2, hidden_features=())
    with torch.no_grad():
        decoder.layers[0].weight.copy_(torch.tensor([[0.7], [0.0]]))
        decoder.layers[0].bias.copy_(torch.tensor([0.3, -0.5]))
    flow = Flow([AutoencoderCoupling(2, 1, decoder=decoder)])
    noise = 2 * (3 * torch.tensor(-0.5 / 3).tanh()).exp().square() / 2
    covariance = torch.tensor([[1.0, 0.7], [0.7, 0.49]]) + torch.diag(
        torch.stack([torch.zeros(()), noise])
    )
    x = torch.randn(8, 2)
    expected = MultivariateNormal(torch.tensor([0.0, 0.3]), covariance).log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), expected)


@torch.no_grad()
def test_the_extended_form_is_a_bound_with_a_drawn_core_that_importance_samples_close():
    """Core and shell are a drawn w and all of x; log p(x) is the integral over w."""
    torch.manual_seed(0)
    augment = perturbed(Augment(2, 1, hidden_features=(4,)))
    joint = [
        Permute([2, 0, 1]),
        perturbed(AutoencoderCoupling(3, 1), 0.2),
        FactorOut([Standardize.from_data(torch.randn(50, 1))], 3),
    ]
    flow = Flow([augment, *joint])
    assert flow.likelihood == "lower_bound"
    x = torch.randn(4, 2)
    side = torch.linspace(-30, 30, 20_001)
    rows = torch.cat([x[:, None].expand(4, 20_001, 2), side[:, None].expand(4, 20_001, 1)], -1)
    density = Flow(joint, StandardNormal(3)).log_prob(rows).exp()
    expected = torch.trapezoid(density, side).log()
    found = flow.log_prob(x, importance_samples=20_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PseudoInvertibleEncoder(couplings(), 2), "code_features must be .* 1; got 2"),
        (lambda: PseudoInvertibleEncoder(couplings(), 1, std=0.0), "std must be positive"),
        (lambda: PseudoInvertibleEncoder([], 1), "transforms must hold at least one"),
        (lambda: PseudoInvertibleEncoder([Slice(5, 3)], 2), "as many .* the 5 of .* got 3"),
        (lambda: PseudoInvertibleEncoder([Augment(3, 2)], 2), "as many .* the 3 of .* got 5"),
        (lambda: encoder().decode(torch.zeros(3, 2)), "code must have shape"),
        (lambda: AutoencoderCoupling(2, 2), "core_features must be .* 1; got 2"),
        (
            lambda: AutoencoderCoupling(3, 1, encoder=torch.nn.Linear(2, 3)).to_base(
                torch.zeros(1, 3, dtype=torch.get_default_dtype())
            ),
            "encoder must return 2 numbers",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
