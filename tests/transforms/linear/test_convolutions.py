"""Laws of invertible convolutions: those of torch, triangular in the order of pixels, undone."""

import pytest
import torch
from laws import ladj_is_slogdet_of_the_jacobian, to_data_undoes_to_base
from torch.nn import functional
from training_runs import config
from zoo import perturbed, rows_for

from cnf import Flow, fit
from cnf.transforms import EmergingConv, Flatten, PeriodicConv, WoodburyConv

SHAPES = [(3, 4, 5), (3, 4, 6), (1, 1, 3)]
MAKERS = {
    "emerging": lambda shape: EmergingConv(shape, 3),
    "wide emerging": lambda shape: EmergingConv(shape, 5),
    "emerging of one pixel": lambda shape: EmergingConv(shape, 1),
    "periodic": lambda shape: PeriodicConv(shape, min(3, *shape[1:])),
    "even periodic": lambda shape: PeriodicConv(shape, min(2, *shape[1:])),
    "periodic of one pixel": lambda shape: PeriodicConv(shape, 1),
    "woodbury": lambda shape: WoodburyConv(shape, 2, 3),
}
every_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def matrix_of(part):
    """The matrix of a linear map, for columns of features."""
    return part.to_base(torch.eye(part.features)).detach().mT


def images(part, rows=4):
    return torch.randn(rows, *part.shape)


@every_kind
@every_shape
def test_the_map_is_undone_and_its_ladj_is_that_of_its_jacobian(make, shape):
    part = perturbed(make(shape), 0.1)
    x, _ = rows_for(part, 2)
    to_data_undoes_to_base(part, x, None, atol=1e-10)
    ladj_is_slogdet_of_the_jacobian(part, x[:1], None, atol=1e-9)


@every_kind
@every_shape
def test_float32_is_undone_to_its_digits(make, shape):
    part = perturbed(make(shape), 0.1)
    x, _ = rows_for(part, 5)
    exact = part.to_base_and_ladj(x)
    part, x = part.float(), x.float()
    z, ladj = part.to_base_and_ladj(x)
    torch.testing.assert_close((z.double(), ladj.double()), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(part.to_data(z), x, rtol=0, atol=1e-4)


@every_kind
def test_autocast_loses_no_digits(make):
    part = perturbed(make((2, 3, 4)), 0.1).float()
    x = rows_for(part, 3)[0].float()
    expected = part.to_base_and_ladj(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = part.to_base_and_ladj(x)
        back = part.to_data(found[0])
    assert all(map(torch.equal, found, expected))
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)


@every_kind
@pytest.mark.parametrize("call", ["to_base_and_ladj", "to_data_and_ladj"])
def test_gradcheck(make, call):
    part = perturbed(make((2, 2, 3)), 0.1)
    x = torch.randn(1, part.features, requires_grad=True)

    def moved(x, *_):  # the parameters are perturbed in place
        return getattr(part, call)(x)

    assert torch.autograd.gradcheck(moved, (x, *part.parameters()))


@every_kind
def test_a_new_one_is_near_the_identity(make):
    part = make((3, 4, 5))
    torch.testing.assert_close(matrix_of(part), torch.eye(60), rtol=0, atol=0.12)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_the_half_of_an_emerging_convolution_is_one_of_torch_with_a_masked_kernel(kernel_size):
    part = perturbed(EmergingConv((3, 4, 5), kernel_size))
    centre = kernel_size // 2
    kernel = torch.zeros(3, 3, kernel_size, kernel_size)
    for out, into, row, column in torch.cartesian_prod(*map(torch.arange, kernel.shape)).tolist():
        if (row, column, into) < (centre, centre, out):
            kernel[out, into, row, column] = part.weight[0, out, into, row, column]
    for channel in range(3):
        kernel[channel, channel, centre, centre] = part.log_scale[channel].exp()
    with torch.no_grad():
        part.weight[1] = 0
    x = images(part)
    expected = functional.conv2d(x, kernel, padding=centre)
    torch.testing.assert_close(part.to_base(x.flatten(1)), expected.flatten(1))


@pytest.mark.parametrize("half", [0, 1])
def test_each_half_of_an_emerging_convolution_is_triangular_in_the_order_of_pixels(half):
    part = perturbed(EmergingConv((3, 4, 5), 3))
    with torch.no_grad():
        part.weight[1 - half] = 0
    order = torch.arange(60).reshape(3, 20).mT.flatten()  # pixels, and channels within a pixel
    matrix = matrix_of(part)[order][:, order]
    matrix = matrix.mT if half else matrix
    assert (matrix.triu(1) == 0).all()
    assert (matrix.tril(-1) != 0).any()


def test_an_emerging_convolution_reaches_to_all_sides():
    part = perturbed(EmergingConv((1, 5, 5), 3))
    seen = matrix_of(part)[12].reshape(5, 5)  # by the pixel in the middle
    assert (seen[1:4, 1:4] != 0).all()


def test_an_emerging_convolution_of_one_pixel_multiplies_channels_by_two_triangular_matrices():
    part = perturbed(EmergingConv((3, 4, 5), 1))
    lower, upper = (weight.squeeze().tril(-1) for weight in part.weight.detach())
    lower = lower + part.log_scale.detach().exp().diag()
    weight = (upper + torch.eye(3)).flip((0, 1)) @ lower
    x = images(part)
    expected = torch.einsum("oi,bihw->bohw", weight, x)
    z, ladj = part.to_base_and_ladj(x.flatten(1))
    torch.testing.assert_close(z, expected.flatten(1))
    torch.testing.assert_close(ladj, (20 * weight.det().abs().log()).expand(4))


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [5, 6])
def test_a_periodic_convolution_is_one_of_torch_on_an_image_that_goes_round(kernel_size, width):
    part = perturbed(PeriodicConv((3, 4, width), kernel_size))
    before = kernel_size // 2
    after = kernel_size - 1 - before
    x = images(part)
    round_about = functional.pad(x, (before, after, before, after), mode="circular")
    expected = functional.conv2d(round_about, part.weight).flatten(1)
    torch.testing.assert_close(part.to_base(x.flatten(1)), expected)


def test_a_periodic_convolution_of_one_pixel_is_a_product_with_a_matrix_of_channels():
    part = perturbed(PeriodicConv((3, 4, 5), 1))
    weight, x = part.weight.detach().squeeze(), images(part)
    z, ladj = part.to_base_and_ladj(x.flatten(1))
    torch.testing.assert_close(z, torch.einsum("oi,bihw->bohw", weight, x).flatten(1))
    torch.testing.assert_close(ladj, (20 * weight.det().abs().log()).expand(4))


@pytest.mark.slow
@every_kind
def test_fit_lowers_the_loss(make):
    shape = (2, 3, 3)
    rows = torch.randn(300, *shape)
    smooth = rows + rows.roll(1, -1) + rows.roll(1, -2) + 0.5 * rows.flip(1)
    flow = Flow([Flatten(shape), make(shape)])
    start = -flow.log_prob(smooth).mean()
    fit(flow, smooth, config(60, learning_rate=0.05))
    assert -flow.log_prob(smooth).mean() < start - 1


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EmergingConv((3, 4), 3), ValueError, r"\(channels, height, width\); got \(3, 4\)"),
        (lambda: EmergingConv(12, 3), TypeError, r"shape must be sizes such as .*; got 12"),
        (lambda: EmergingConv((3, 4, 4), 2), ValueError, r"kernel_size must be odd; got 2"),
        (lambda: EmergingConv((3, 4, 4), 3.0), TypeError, r"kernel_size must be an int; got 3\.0"),
        (
            lambda: PeriodicConv((3, 4, 2), 3),
            ValueError,
            r"kernel_size must be at most the height and width of the image, \(4, 2\); got 3",
        ),
        (lambda: PeriodicConv((3, 4, 4), 0), ValueError, r"kernel_size must be at least 1; got 0"),
    ],
)
def test_a_bad_argument_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
