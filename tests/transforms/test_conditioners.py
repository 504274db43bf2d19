"""Laws of conditioners: zero at first, row by row, and local where they are convolutions."""

import itertools

import pytest
import torch
from torch import nn
from zoo import perturbed

from cnf.transforms import ConvConditioner, MLPConditioner

CONDITIONERS = {
    "mlp": lambda context: MLPConditioner(4, 5, context, hidden_features=(6, 7)),
    "affine": lambda context: MLPConditioner(4, 5, context, hidden_features=()),
    "conv": lambda context: ConvConditioner((1, 2, 2), 3, context, hidden_channels=(6, 7)),
    "shallow conv": lambda context: ConvConditioner((1, 2, 2), 3, context, hidden_channels=(6,)),
    "one conv": lambda context: ConvConditioner((1, 2, 2), 3, context, hidden_channels=()),
}
every_conditioner = pytest.mark.parametrize("make", CONDITIONERS.values(), ids=CONDITIONERS)


def inputs(context_features, *batch):
    context = torch.randn(*batch, context_features) if context_features else None
    return torch.randn(*batch, 4), context


@every_conditioner
@pytest.mark.parametrize("context_features", [0, 2])
def test_a_new_conditioner_gives_zeros_and_learns_from_every_part(make, context_features):
    conditioner = make(context_features)
    x, context = inputs(context_features, 3)
    assert (conditioner(x, context) == 0).all()
    perturbed(conditioner)(x, context).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in conditioner.parameters())


@every_conditioner
@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("batch", [(), (3,), (3, 2), (0,)], ids=str)
def test_each_row_is_read_alone(make, context_features, batch):
    conditioner = perturbed(make(context_features))
    x, context = inputs(context_features, *batch)
    numbers = conditioner(x, context)
    assert numbers.shape[:-1] == batch
    for row in itertools.product(*map(range, batch)):
        alone = conditioner(x[row], None if context is None else context[row])
        torch.testing.assert_close(numbers[row], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("hidden_channels", "reach"), [((), 1), ((2,), 2), ((9, 9), 2), ((9, 9, 9), 2)]
)
def test_a_pixel_depends_on_those_within_reach_and_on_no_others(hidden_channels, reach):
    conditioner = perturbed(ConvConditioner((1, 9, 8), 2, hidden_channels=hidden_channels))
    if hidden_channels:
        nn.init.constant_(conditioner.layers[0].bias, 100.0)  # so that no ReLU is closed
    jacobian = torch.autograd.functional.jacobian(conditioner, torch.randn(72))
    influence = jacobian.view(2, 9, 8, 9, 8).abs()[:, 4, 4].amax(0)
    rows, columns = torch.arange(9).sub(4).abs(), torch.arange(8).sub(4).abs()
    assert torch.equal(influence > 0, (rows[:, None] <= reach) & (columns <= reach))


def test_a_context_shifts_all_pixels_of_a_channel_alike():
    conditioner = perturbed(ConvConditioner((2, 3, 3), 4, 2, hidden_channels=()))
    x = torch.randn(18)
    shift = conditioner(x, torch.randn(2)) - conditioner(x, torch.zeros(2))
    each = shift.view(4, 9)
    torch.testing.assert_close(each, each[:, :1].expand(4, 9), rtol=0, atol=1e-12)
    assert (each[:, 0] != 0).all()


@pytest.mark.parametrize("hidden_channels", [(), (5, 5)])
def test_the_learned_factor_of_a_channel_is_the_cube_of_an_exponential(hidden_channels):
    conditioner = perturbed(ConvConditioner((2, 2, 2), 2, hidden_channels=hidden_channels))
    x = torch.randn(4, 8)
    before = conditioner(x)
    with torch.no_grad():
        conditioner.log_scale[1] += torch.tensor(2.0).log()
    expected = before.view(4, 2, 4) * torch.tensor([1.0, 8.0])[:, None]
    torch.testing.assert_close(conditioner(x), expected.flatten(1), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MLPConditioner(0, 1), ValueError, "features must be at least 1; got 0"),
        (lambda: MLPConditioner(1, 0), ValueError, "outputs must be at least 1; got 0"),
        (lambda: MLPConditioner(1, 1, -1), ValueError, "context_features must be at least 0"),
        (lambda: MLPConditioner(1, 1, hidden_features=3), TypeError, r"\(128, 128\); got 3"),
        (lambda: MLPConditioner(1, 1, hidden_features=(0,)), ValueError, "each of hidden_features"),
        (lambda: ConvConditioner((2, 2), 1), ValueError, r"\(channels, height, width\); got"),
        (lambda: ConvConditioner(4, 1), TypeError, "shape must be sizes such as"),
        (
            lambda: ConvConditioner((1, 2, 2), 1, hidden_channels=(2.5,)),
            TypeError,
            "each of hidden_channels must be an int; got 2.5",
        ),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()
