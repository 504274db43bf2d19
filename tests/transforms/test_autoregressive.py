"""Laws of the autoregressive network: what is given for a feature sees those before it alone."""

import pytest
import torch
from zoo import perturbed

from cnf.transforms.autoregressive import AutoregressiveNetwork


@pytest.mark.parametrize("hidden_features", [(), (12,), (7, 9), (2, 30)], ids=str)
@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("features", [1, 2, 5])
def test_no_output_sees_its_own_feature_or_a_later_one(features, context_features, hidden_features):
    network = perturbed(
        AutoregressiveNetwork(
            features, context_features, outputs=3, hidden_features=hidden_features
        )
    )
    x = torch.randn(features)
    context = torch.randn(context_features) if context_features else None
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, context), x)
    assert jacobian.shape == (features, 3, features)
    for output in jacobian.unbind(1):
        assert (output.triu() == 0).all()


@pytest.mark.parametrize("context_features", [0, 2])
def test_every_output_sees_all_features_before_its_own_and_all_of_the_context(context_features):
    network = perturbed(
        AutoregressiveNetwork(4, context_features, outputs=2, hidden_features=(8, 12))
    )
    inputs = torch.randn(4 + context_features)

    def outputs(inputs):
        return network(inputs[:4], inputs[4:] if context_features else None)

    jacobian = torch.autograd.functional.jacobian(outputs, inputs)
    before = torch.ones(4, 4).tril(-1).bool()
    for output in jacobian.unbind(1):
        assert (output[:, :4][before] != 0).all()
        assert (output[:, 4:] != 0).all()


def test_the_first_feature_depends_on_the_context_through_hidden_layers():
    network = perturbed(AutoregressiveNetwork(3, 1, outputs=1, hidden_features=(9,)))
    contexts = torch.linspace(-2, 2, 5).unsqueeze(-1)
    first = network(torch.zeros(5, 3), contexts)[:, 0, 0]
    assert first.diff().diff().abs().max() > 1e-3


def test_a_context_broadcasts_and_a_new_network_gives_zeros():
    network = AutoregressiveNetwork(2, 3, outputs=4, hidden_features=(8,))
    found = network(torch.randn(5, 6, 2), torch.randn(6, 3))
    assert torch.equal(found, torch.zeros(5, 6, 2, 4))
    perturbed(network)
    x, context = torch.randn(5, 6, 2), torch.randn(3)
    expected = network(x, context.expand(5, 6, 3))
    torch.testing.assert_close(network(x, context), expected)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"outputs": 0}, ValueError, r"outputs must be at least 1; got 0"),
        ({"hidden_features": 8}, TypeError, r"hidden_features must be widths .*; got 8"),
        ({"hidden_features": (8, 0)}, ValueError, r"each of hidden_features must be at least 1"),
    ],
)
def test_a_bad_argument_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        AutoregressiveNetwork(2, **{"outputs": 1, "hidden_features": (8,), **settings})
