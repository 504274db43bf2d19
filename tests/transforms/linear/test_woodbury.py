"""Laws of the Woodbury convolution: the product of two matrices near the identity."""

import pytest
import torch
from zoo import perturbed

from cnf.transforms import WoodburyConv


def test_it_is_the_product_of_a_matrix_of_channels_and_one_of_pixels():
    part = perturbed(WoodburyConv((3, 2, 2), 2, 1))
    of_channels = torch.eye(3) + part.channels_out @ part.channels_in
    of_space = torch.eye(4) + part.space_out @ part.space_in
    x = torch.randn(5, 12)
    z, ladj = part.to_base_and_ladj(x)
    torch.testing.assert_close(z, x @ torch.kron(of_channels, of_space).mT)
    expected = 4 * of_channels.det().abs().log() + 3 * of_space.det().abs().log()
    torch.testing.assert_close(ladj, expected.expand(5))


def test_a_new_one_is_the_identity_and_learns():
    part = WoodburyConv((3, 2, 2), 2, 1)
    x = torch.randn(5, 12)
    z, ladj = part.to_base_and_ladj(x)
    assert torch.equal(z, x)
    assert torch.equal(ladj, torch.zeros(5))
    (z.square().sum() - ladj.sum()).backward()
    assert part.channels_out.grad.abs().max() > 1e-3
    assert part.space_out.grad.abs().max() > 1e-3


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((3, 4), 1, 1), ValueError, r"\(channels, height, width\); got \(3, 4\)"),
        (((3, 4, 4), 0, 1), ValueError, r"rank_channels must be at least 1; got 0"),
        (((3, 4, 4), 1, 1.5), TypeError, r"rank_space must be an int; got 1\.5"),
    ],
)
def test_a_bad_argument_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        WoodburyConv(*arguments)
