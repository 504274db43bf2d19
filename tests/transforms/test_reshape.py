"""Laws of rearrangements: each entry goes where the definition says."""

import itertools

import pytest
import torch
from torch.nn.functional import pixel_unshuffle

from cnf.transforms import Flatten, Permute, Squeeze


def test_squeeze_is_the_direct_definition():
    channels, height, width = 2, 4, 6
    image = torch.randn(3, channels, height, width)
    squeeze = Squeeze((channels, height, width))

    squeezed = squeeze.to_base(image.flatten(1)).reshape(3, *squeeze.squeezed_shape)

    assert torch.equal(squeezed, pixel_unshuffle(image, 2))
    for c, i, j in itertools.product(range(channels), range(2), range(2)):
        assert torch.equal(squeezed[:, 4 * c + 2 * i + j], image[:, c, i::2, j::2])


def test_squeeze_twice_gives_shapes_that_fit():
    first = Squeeze((1, 8, 4))
    second = Squeeze(first.squeezed_shape)
    assert (first.squeezed_shape, second.squeezed_shape) == ((4, 4, 2), (16, 2, 1))
    assert first.features == second.features == 32


def test_flatten_counts_the_last_axis_fastest():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(Flatten((2, 3, 4)).to_base(x), torch.arange(24.0))


def test_permute_takes_the_features_in_its_order():
    order = torch.randperm(5).tolist()
    x = torch.randn(3, 5)
    z = Permute(order).to_base(x)
    for place, taken in enumerate(order):
        assert torch.equal(z[:, place], x[:, taken])


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Flatten(()), ValueError, r"shape must have at least one size; got \(\)"),
        (lambda: Flatten(4), TypeError, "sizes such as .*; got 4"),
        (lambda: Flatten((3, 0)), ValueError, "each of shape must be at least 1; got 0"),
        (lambda: Flatten((3, 2.0)), TypeError, "each of shape must be an int; got 2.0"),
        (lambda: Squeeze((3, 5, 4)), ValueError, r"the last two even; got \(3, 5, 4\)"),
        (lambda: Squeeze((3, 4, 7)), ValueError, r"the last two even; got \(3, 4, 7\)"),
        (lambda: Squeeze((4, 4)), ValueError, r"\(channels, height, width\).*got \(4, 4\)"),
        (lambda: Permute([]), ValueError, r"once; got \[\]"),
        (lambda: Permute([0, 2]), ValueError, r"once; got \[0, 2\]"),
        (lambda: Permute([0, 1, 1]), ValueError, r"once; got \[0, 1, 1\]"),
        (lambda: Permute([0.0, 1.0]), TypeError, "each of order must be an int"),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()
