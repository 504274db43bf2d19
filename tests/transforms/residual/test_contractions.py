"""Laws of contractive networks: their bound holds, is reached, and is made without a trace."""

import math

import pytest
import torch
from scipy.special import lambertw
from zoo import lipschitz_attention, lipschitz_conv, lipschitz_mlp, rows_for

from cnf.transforms import ContractiveNetwork, LipschitzAttention, LipschitzConv, LipschitzMLP
from cnf.transforms.residual.attention import lambert_w, largest_spread
from cnf.transforms.residual.spectral_layers import BoundedConvolution, BoundedLinear, LipSwish

NETWORKS = {
    "lipswish": lambda: lipschitz_mlp(4, hidden_features=(6, 5)),
    "elu with context": lambda: lipschitz_mlp(4, 3, activation="elu", coefficient=0.3),
    "convolutional with context": lambda: lipschitz_conv(3, coefficient=0.8),
    "attentive": lambda: lipschitz_attention(5, 4, heads=2),
    "attentive with one token": lambda: lipschitz_attention(1, 4, coefficient=0.5),
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def scaled(network, scale):
    """The network with every weight multiplied: far beyond its bound."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    return network


def norm_of_jacobian(network, x, context=None):
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, context), x)
    return float(torch.linalg.matrix_norm(jacobian, 2))


@every_network
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_any_two_points_come_closer(make, scale):
    network = scaled(make(), scale)
    x, context = rows_for(network, 10_000)
    y = torch.cat([torch.randn_like(x[:5000]), x[5000:] + 1e-3 * torch.randn_like(x[5000:])])
    ratio = (network(x, context) - network(y, context)).norm(dim=-1) / (x - y).norm(dim=-1)
    assert 0 < ratio.max() <= network.coefficient * (1 + 1e-6)


@every_network
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0, 100.0])
def test_the_jacobian_is_within_the_bound_wherever_the_inputs_are(make, spread):
    for scale in (1.0, 30.0):
        network = scaled(make(), scale)
        x, context = rows_for(network)
        assert norm_of_jacobian(network, spread * x, context) <= network.coefficient + 1e-9


def test_a_perceptron_reaches_its_bound_where_it_is_linear():
    network = LipschitzMLP(3, hidden_features=(3, 3), activation="elu", coefficient=0.9)
    with torch.no_grad():
        for layer in network.layers:
            layer.weight.copy_(7 * torch.eye(3))
            layer.bias.fill_(50.0)
    assert norm_of_jacobian(network, torch.randn(3)) == pytest.approx(0.9)


def test_attention_reaches_its_bound_for_one_token():
    """All that is left is a product of matrices: squares of the query matrix, not itself."""
    network = LipschitzAttention(1, 3, coefficient=0.9)
    with torch.no_grad():
        network.query.copy_(20 * torch.eye(3))
        network.value.copy_(torch.eye(3))
        network.output.copy_(torch.eye(3))
    x = torch.randn(3)
    torch.testing.assert_close(network(x), 0.9 * x)


def steepest_found(network):
    """The largest |f(x) - f(y)| / |x - y| that gradient ascent finds from 64 pairs."""
    x, apart = torch.randn(64, network.features) / 2, 0.1 * torch.randn(64, network.features)
    optimizer = torch.optim.Adam([x.requires_grad_(), apart.requires_grad_()], lr=0.05)
    largest = 0.0
    for _ in range(80):
        optimizer.zero_grad()
        ratio = (network(x + apart) - network(x)).norm(dim=-1) / apart.norm(dim=-1)
        largest = max(largest, ratio.max().item())
        (-ratio.sum()).backward()
        optimizer.step()
    return largest


@pytest.mark.parametrize(("tokens", "share"), [(1, 1.0), (2, 0.670), (3, 0.557), (5, 0.421)])
def test_attention_keeps_its_bound_and_the_distance_to_it_where_it_is_steepest(tokens, share):
    """The share of the bound that ascent reaches was found in 200 steps: it tells of any other."""
    network = LipschitzAttention(tokens, 2, coefficient=0.9)
    with torch.no_grad():
        network.query.copy_(2 * torch.eye(2))
        network.value.copy_(torch.eye(2))
        network.output.copy_(torch.eye(2))
    found = steepest_found(network)
    assert found <= 0.9 * (1 + 1e-9)
    assert found == pytest.approx(share * 0.9, rel=0.02)


def test_a_weight_within_its_bound_is_left_as_it_is():
    layer = BoundedLinear(3, 2, 0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3, 0.0, 0.0], [0.0, 0.4, 0.0]]))
    x = torch.randn(5, 3)
    expected = x @ layer.weight.T + layer.bias
    torch.testing.assert_close(
        layer.with_spectral_norm(0.5, None)(x), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("image", "size"), [((3, 4), 3), ((5, 3), 1), ((3, 3), 3), ((6, 5), 5)])
def test_the_norm_of_a_convolution_is_that_of_its_matrix(image, size):
    layer = BoundedConvolution(2, 3, 0, size, image)
    shape = (2, *image)
    basis = torch.eye(math.prod(shape)).unflatten(-1, shape)
    zero = torch.zeros(3)
    matrix = layer.mapped(basis, layer.weight, zero).flatten(1)
    assert layer.norm().item() == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item())


@pytest.mark.parametrize("steepness", [-3.0, 0.5, 20.0])
def test_lipswish_has_slopes_of_at_most_1_and_nearly_so(steepness):
    activation = LipSwish()
    with torch.no_grad():
        activation.steepness.fill_(steepness)
    x = torch.linspace(-80, 80, 100_001, requires_grad=True)
    (slopes,) = torch.autograd.grad(activation(x).sum(), x)
    assert 0.999 < slopes.max() <= 1
    assert slopes.min() >= -0.1


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [2, 8, 30, 1000])
def test_the_bound_of_attention_holds_for_rows_and_columns_of_its_derivative(tokens):
    """Sums of norms of the blocks of queries are within the two sums whose mean is the bound."""
    spread = largest_spread(tokens)
    steepest = 3 * lambert_w(math.exp((spread - 2) / 3))
    for size in (0.1, 0.5, 1.0, 2.0):
        queries = size * torch.randn(tokens, 3)
        queries[1:] += queries[0]
        apart = queries.unsqueeze(1) - queries
        weights = (-apart.square().sum(-1)).softmax(-1)
        from_mean = queries - (weights @ queries).unsqueeze(1)
        blocks = torch.eye(3) - 2 * from_mean.unsqueeze(-1) * -apart.unsqueeze(-2)
        norms = weights * torch.linalg.matrix_norm(blocks, 2)
        assert norms.sum(1).max() <= 1 + 2 * spread
        assert norms.fill_diagonal_(0.0).max() <= steepest
        own = (weights[..., None, None] * from_mean[..., None] * from_mean[..., None, :]).sum(1)
        assert torch.linalg.matrix_norm(own, 2).max() <= spread


@pytest.mark.parametrize("tokens", [1, 2, 3, 10, 1000])
def test_the_largest_spread_is_that_of_equal_distances_by_lambert_w(tokens):
    found = largest_spread(tokens)
    assert found == pytest.approx(float(lambertw((tokens - 1) / math.e).real), abs=1e-12)
    distances = torch.cat([torch.zeros(1), torch.full((tokens - 1,), found + 1)])
    assert float((distances * (-distances).softmax(0)).sum()) == pytest.approx(found, abs=1e-12)
    others = torch.cat([torch.zeros(1000, 1), 3 * torch.rand(1000, tokens - 1) * (found + 1)], -1)
    assert (others * (-others).softmax(-1)).sum(-1).max() <= found + 1e-12


def test_attention_treats_all_tokens_alike():
    network = scaled(lipschitz_attention(5, 4, heads=2), 3.0)
    x = torch.randn(7, 5, 4)
    order = torch.randperm(5)
    permuted = network(x[:, order].flatten(1)).unflatten(-1, (5, 4))
    expected = network(x.flatten(1)).unflatten(-1, (5, 4))[:, order]
    torch.testing.assert_close(permuted, expected, rtol=0, atol=1e-12)
    assert (expected - expected.mean(1, keepdim=True)).abs().max() > 1e-3


def test_a_new_lipswish_is_on_or_off_within_half_a_standard_deviation():
    x = torch.tensor([-0.5, 0.5], requires_grad=True)
    (slopes,) = torch.autograd.grad(LipSwish()(x).sum(), x)
    torch.testing.assert_close(slopes, torch.tensor([0.0, 1 / 1.1]), rtol=0, atol=0.03)


def test_an_activation_of_before_keeps_its_steepness():
    activation = LipSwish()
    activation.load_state_dict({"steepness": torch.tensor(0.5)})
    x = torch.linspace(-3, 3, 7)
    expected = x / (1 + torch.exp(-math.log1p(math.exp(0.5)) * x)) / 1.1
    torch.testing.assert_close(activation(x), expected, rtol=0, atol=1e-12)


def test_attention_is_the_average_by_distances_of_queries():
    network = lipschitz_attention(4, 6, heads=2)
    x = torch.randn(4, 6)
    heads = []
    for query, value in zip(network.query, network.value, strict=True):
        queries = x @ query
        weights = (-torch.cdist(queries, queries).square() / math.sqrt(3)).softmax(-1)
        heads.append(weights @ x @ query @ query.T / math.sqrt(3) @ value)
    expected = torch.cat(heads, -1) @ network.output
    found = network(x.flatten()).unflatten(-1, (4, 6))
    scale = (found / expected).mean()
    assert 0 < scale <= 1
    torch.testing.assert_close(found, scale * expected, rtol=0, atol=1e-12)


@every_network
def test_a_new_network_is_zero_and_can_learn(make):
    network = make()
    settings = {name: getattr(network, name) for name in ("coefficient",)}
    new = {
        LipschitzMLP: lambda: LipschitzMLP(4, network.context_features, **settings),
        LipschitzConv: lambda: LipschitzConv((1, 3, 3), network.context_features, **settings),
        LipschitzAttention: lambda: LipschitzAttention(network.features, 1, **settings),
    }[type(network)]()
    x, context = rows_for(new, 6)
    value = new(x, context)
    assert torch.equal(value, torch.zeros_like(x))
    value.sum().backward()
    slopes = [parameter.grad for parameter in new.parameters()]
    assert all(slope.isfinite().all() for slope in slopes)
    assert any(slope.abs().max() > 0 for slope in slopes)


def hidden_jacobians(network, x):
    """Jacobians of the hidden layers, each scaled to its norm, and the bound of their norms."""
    norm = network.coefficient ** (1 / len(network.layers))
    *layers, _ = [layer.with_spectral_norm(norm, None) for layer in network.layers]

    def hidden(x):
        for layer, activation in zip(layers, network.activations, strict=True):
            x = activation(layer(x))
        return x

    return torch.func.vmap(torch.func.jacrev(hidden))(x).detach(), norm ** len(layers)


@pytest.mark.parametrize("features", [2, 8, 32])
@pytest.mark.parametrize("width", [16, 64])
def test_the_hidden_layers_of_a_new_perceptron_use_their_bound_and_bend(features, width):
    """For normalised data. With half its units on, a layer divides a norm by 1.1 sqrt(2)."""
    shares, bends = [], []
    for seed in range(6):
        torch.manual_seed(seed)
        network = LipschitzMLP(features, hidden_features=(width, width))
        jacobians, bound = hidden_jacobians(network, torch.randn(200, features))
        shares.append(torch.linalg.matrix_norm(jacobians, 2).mean() / bound)
        varying = (jacobians - jacobians.mean(0)).square().sum()
        bends.append((varying / jacobians.square().sum()).sqrt())
    assert torch.stack(shares).mean() > 1 / (1.1**2 * 2)
    assert torch.stack(bends).mean() > 0.4


@every_network
def test_a_call_leaves_nothing_behind_and_the_mode_does_not_matter(make):
    network = scaled(make(), 3.0)
    x, context = rows_for(network, 3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trained = network.train()(x, context)
    assert torch.equal(network.eval()(x, context), trained)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_network
def test_the_bound_follows_the_weights(make):
    """After a step that makes every weight large, the next evaluation is within the bound."""
    network = make()
    x, context = rows_for(network)
    network(x, context)
    scaled(network, 1e3)
    assert norm_of_jacobian(network, x, context) <= network.coefficient + 1e-9


def test_the_context_matters():
    for network in (lipschitz_mlp(2, 3), lipschitz_conv(3)):
        x, context = rows_for(network, 4)
        assert (network(x, context) - network(x, context + 1)).abs().min() > 1e-6


class Forgetful(ContractiveNetwork):
    """A network without `given`."""


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Forgetful(2), TypeError, "abstract"),
        (lambda: LipschitzMLP(0), ValueError, "features must be at least 1; got 0"),
        (lambda: LipschitzMLP(2, coefficient=1.0), ValueError, "between 0 and 1; got 1.0"),
        (lambda: LipschitzMLP(2, coefficient=0.0), ValueError, "between 0 and 1; got 0.0"),
        (lambda: LipschitzMLP(2, activation="relu"), ValueError, "one of lipswish, elu; got 'relu"),
        (lambda: LipschitzMLP(2, hidden_features=()), ValueError, "at least one hidden layer"),
        (lambda: LipschitzConv((3, 3)), ValueError, "channels, height, width"),
        (lambda: LipschitzConv((1, 3, 3), kernel_size=2), ValueError, "kernel_size must be odd"),
        (lambda: LipschitzConv((1, 4, 3), kernel_size=5), ValueError, "no larger than .* 4 x 3"),
        (lambda: LipschitzAttention(0, 2), ValueError, "tokens must be at least 1; got 0"),
        (lambda: LipschitzAttention(2, 1.5), TypeError, "width must be an int; got 1.5"),
        (lambda: LipschitzAttention(2, 4, heads=3), ValueError, "divide the width 4; got 3"),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()
