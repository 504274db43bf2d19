"""Laws of flowification: the flow computes what the network does, and counts every dimension."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from zoo import perturbed, seeded

from cnf import Flow
from cnf.transforms import (
    FlowifiedConv2d,
    FlowifiedLinear,
    LeakyReLU,
    Orthogonal,
    Planar,
    Unfold,
    flowify,
)


def images(*batch):
    return torch.randn(*batch, 1, 4, 4)


EXACT = {
    "square": (nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.3)), [4]),
    "narrow": (nn.Sequential(nn.Linear(6, 4), nn.LeakyReLU(0.3), nn.Linear(4, 1)), [6]),
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(1, 3, 2, stride=2),
            nn.LeakyReLU(0.2),
            nn.Sequential(nn.Conv2d(3, 5, 2, stride=2, bias=False), nn.Flatten()),
            nn.Linear(5, 2),
        ),
        [1, 4, 4],
    ),
    "nothing": (nn.Sequential(nn.Identity()), [3]),
}


@pytest.mark.parametrize(("network", "shape"), EXACT.values(), ids=EXACT)
def test_without_noise_the_flow_computes_what_the_network_does(network, shape):
    network = network.double()
    chain = flowify(network, shape)
    x = torch.randn(5, *shape)
    torch.testing.assert_close(chain.to_base(x), network(x).flatten(1), rtol=0, atol=1e-9)
    assert chain.likelihood == "exact"


@pytest.mark.parametrize("layer", [nn.Linear(3, 5), nn.Conv2d(1, 2, 3, padding=1)], ids=str)
def test_with_noise_it_does_so_on_average_and_undoes_it(layer):
    layer, shape = layer.double(), [3] if isinstance(layer, nn.Linear) else [1, 4, 4]
    chain = flowify(nn.Sequential(layer), shape)
    x = torch.randn(*shape)
    draws = chain.to_base(x.expand(20_000, *shape), generator=seeded())
    expected = layer(x).flatten()
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() < 4.5 * error).all()  # of 32: 2e-4
    assert chain.likelihood == "lower_bound"
    if isinstance(layer, nn.Linear):
        torch.testing.assert_close(chain.to_data(draws[:3]), x.expand(3, 3), rtol=0, atol=1e-9)


def test_patches_without_noise_are_those_of_a_convolution():
    patches = Unfold((2, 4, 4), 3, stride=1, padding=1)
    with torch.no_grad():
        patches.log_std.fill_(-40.0)
    x = torch.randn(3, 2, 4, 4)
    expected = nn.functional.unfold(x, 3, padding=1).flatten(1)
    torch.testing.assert_close(patches.to_base(x.flatten(1)), expected, rtol=0, atol=1e-12)


def test_the_noise_of_patches_is_orthogonal_to_the_copies():
    patches = perturbed(Unfold((1, 4, 4), 2, stride=1))
    x = torch.randn(3, 16)
    z = patches.to_base(x)
    u = z - patches._unfold(x.reshape(-1, 1, 4, 4))
    assert u.abs().max() > 0.1
    torch.testing.assert_close(patches._fold(u), torch.zeros(3, 1, 4, 4), rtol=0, atol=1e-12)


def test_the_contribution_of_copies_is_that_of_their_square_map():
    """One pixel of three is in two patches: (x, u) goes to z, with u along the unit (1, -1)."""
    patches = perturbed(Unfold((1, 1, 1), 1))
    assert patches.likelihood == "exact"
    patches = perturbed(Unfold((1, 3, 3), 2, stride=1))
    x = torch.randn(9)
    z, ladj = patches.to_base_and_ladj(x)
    spread = torch.autograd.functional.jacobian(lambda x: patches._unfold(x.view(1, 1, 3, 3))[0], x)
    basis = torch.linalg.svd(spread.T).Vh[9:]  # orthonormal directions of u
    square = torch.cat([spread, basis.T], 1)
    u = basis @ z
    std = patches.log_std.exp().detach()
    log_q = MultivariateNormal(torch.zeros(7), std**2 * torch.eye(7)).log_prob(u)
    expected = torch.linalg.slogdet(square).logabsdet - log_q
    torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-9)


def test_a_narrow_layer_has_the_jacobian_of_its_square_map():
    layer = perturbed(FlowifiedLinear(4, 2, hidden_features=(3,)))
    turn, slice_, mix = layer
    x = torch.randn(4)
    z, ladj = layer.to_base_and_ladj(x)
    turned = turn.to_base(x)
    expected = mix.matrix.log_abs_det() + slice_.dropped.log_prob(turned[2:], turned[:2])
    torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-9)
    again = layer.to_base(layer.to_data(z))
    torch.testing.assert_close(again, z, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "make",
    [lambda: FlowifiedLinear(1, 3), lambda: FlowifiedConv2d((1, 1, 2), 4, 2, stride=1, padding=1)],
    ids=["linear", "convolution"],
)
def test_the_bound_lies_below_the_marginal_and_rises(make):
    """The flow is linear, and x a function of z, so that x is Gaussian."""
    torch.manual_seed(0)
    flow = Flow([perturbed(make(), 0.1)])
    z = torch.zeros(flow.base.features)
    matrix = torch.autograd.functional.jacobian(flow.to_data, z)
    truth = MultivariateNormal(flow.to_data(z).detach(), matrix @ matrix.T)
    x, gaps = truth.mean + 0.5, []
    for count in (1, 32):
        with torch.no_grad():
            bound = flow.log_prob(x.expand(4000, -1), importance_samples=count, generator=seeded())
        gap = truth.log_prob(x) - bound
        assert gap.mean() > -4 * gap.std() / 4000**0.5  # 4 standard errors: 3e-5
        gaps.append(gap.mean())
    assert gaps[1] < 0.7 * gaps[0]


def test_transforms_are_taken_as_activations():
    chain = flowify(nn.Sequential(nn.Linear(3, 2), Planar(2)).double(), [3])
    assert [type(part).__name__ for part in chain] == ["FlowifiedLinear", "Planar"]
    assert LeakyReLU(2).is_bijective


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("layers", "shape", "message"),
    [
        ([nn.Linear(3, 2), nn.ReLU()], [3], r"network\[1\] is ReLU\(\). Take nn.LeakyReLU"),
        ([nn.Sequential(nn.Dropout())], [3], r"network\[0\]\[0\] is Dropout"),
        ([nn.MaxPool2d(2)], [1, 4, 4], r"network\[0\] is MaxPool2d"),
        ([nn.Linear(3, 2)], [4], r"network\[0\] must get the shape \(3,\); got \(4,\)"),
        ([nn.Conv2d(1, 2, 2)], [4], r"must get images of 1 channels; got \(4,\)"),
        ([nn.Conv2d(2, 2, 2, groups=2)], [2, 4, 4], "without groups and dilation"),
        (
            [nn.Conv2d(1, 2, 2, stride=3)],
            [1, 4, 4],
            r"network\[0\] .*stride must be at most 2; got 3",
        ),
        ([nn.Conv2d(1, 2, 2, stride=2)], [1, 3, 3], r"network\[0\] .*patches cover to the end"),
        ([nn.Linear(3, 2), Planar(3)], [3], r"network\[1\] must get the 3 features .* got \(2,\)"),
    ],
)
def test_a_layer_without_likelihood_is_refused_by_name(layers, shape, message):
    with pytest.raises(ValueError, match=message):
        flowify(nn.Sequential(*layers), shape)


def test_dropped_coordinates_do_not_explode_far_from_the_data():
    """Their standard deviation is at most exp(3), however far z is."""
    layer = perturbed(FlowifiedLinear(3, 1, hidden_features=(4,)), 2.0)
    for far in (1e4, -1e4):
        draws = layer.to_data(torch.full((4000, 1), far), generator=seeded())
        # Rotated, and so in one direction at most as wide as in all.
        spread = torch.linalg.svdvals((draws - draws.mean(0)) / 4000**0.5)
        assert spread[0] < 1.1 * math.exp(3.0)


def test_a_weight_without_full_rank_is_refused():
    network = nn.Sequential(nn.Linear(3, 2))
    nn.init.ones_(network[0].weight)
    with pytest.raises(ValueError, match=r"network\[0\] has no likelihood: .* full rank 2"):
        flowify(network, [3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: FlowifiedLinear(3, 2).set_to(torch.eye(3)[:, :2], torch.zeros(2)),
            r"shapes \(2, 3\) and \(2,\); got \(3, 2\) and \(2,\)",
        ),
        (lambda: FlowifiedLinear(3, 2).set_to(torch.eye(3)[:2], torch.zeros(1)), r"got .* \(1,\)"),
        (
            lambda: FlowifiedLinear(3, 2).set_to(torch.full((2, 3), torch.nan), torch.zeros(2)),
            "must be finite",
        ),
        (
            lambda: FlowifiedConv2d((1, 4, 4), 2, 2).set_to(torch.ones(2, 4), torch.zeros(2)),
            r"shapes \(2, 1, 2, 2\)",
        ),
        (lambda: Orthogonal(3).set_to(torch.ones(3), torch.zeros(3)), r"shapes \(3, 3\)"),
        (lambda: Orthogonal(3).set_to(torch.eye(3), torch.zeros(())), r"got \(3, 3\) and \(\)"),
        (lambda: Orthogonal(2).set_to(2 * torch.eye(2), torch.zeros(2)), "off the identity by 3"),
        (
            lambda: Orthogonal(2).set_to(torch.full((2, 2), torch.nan), torch.zeros(2)),
            "must be orthogonal",
        ),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_volume_of_many_copies_is_right_in_double_precision():
    """Of 34 x 34 pixels of 3 channels, each in up to nine patches."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        patches = Unfold((3, 32, 32), 3, stride=1, padding=1).double()
    finally:
        torch.set_default_dtype(default)
    along = [1, 2, *[3] * 30, 2, 1]
    expected = 0.5 * 3 * sum(math.log(first * second) for first in along for second in along)
    # Without noise, x is copied, and the rest of the ladj is the density of the noise at zero.
    numbers = patches.base_features - patches.features
    _, ladj = patches.to_data_and_ladj(torch.zeros(patches.base_features))
    found = -ladj.item() - 0.5 * numbers * math.log(2 * math.pi)
    assert found == pytest.approx(expected, rel=1e-12)
