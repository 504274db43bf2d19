"""Laws of the conditional affine transform: given the context, a normal distribution."""

import pytest
import torch
from torch.distributions import Independent, Normal
from zoo import perturbed

from cnf import Flow
from cnf.transforms import ConditionalAffine


def test_a_flow_of_it_is_normal_with_moments_affine_in_the_context():
    transform = perturbed(ConditionalAffine((2, 1, 3), 4), 0.5)
    flow = Flow([transform])
    x, context = torch.randn(5, 3, 6), torch.randn(3, 4)
    loc, log_scale = (context @ transform.layer.weight.T + transform.layer.bias).chunk(2, -1)
    images = x.view(5, 3, 2, 3)
    normal = Independent(Normal(loc[..., None], log_scale.exp()[..., None]), 2)
    torch.testing.assert_close(
        flow.log_prob(x, context), normal.log_prob(images), rtol=0, atol=1e-12
    )


def test_classes_in_one_hot_form_have_a_mean_and_scale_each():
    transform = ConditionalAffine(2, 3)
    with torch.no_grad():
        transform.layer.weight.copy_(torch.arange(12.0).view(4, 3).div(10))
    z, classes = torch.randn(3, 2), torch.eye(3)
    x, ladj = transform.to_data_and_ladj(z, classes)
    for row in range(3):
        loc = torch.tensor([0.0 + row, 3.0 + row]) / 10
        log_scale = torch.tensor([6.0 + row, 9.0 + row]) / 10
        torch.testing.assert_close(x[row], loc + log_scale.exp() * z[row], rtol=0, atol=1e-12)
        torch.testing.assert_close(ladj[row], log_scale.sum(), rtol=0, atol=1e-12)


def test_a_new_one_is_the_identity():
    x = torch.randn(3, 2)
    z, ladj = ConditionalAffine(2, 1).to_base_and_ladj(x, torch.randn(3, 1))
    assert torch.equal(z, x)
    assert (ladj == 0).all()


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConditionalAffine(2, 0), ValueError, "context_features must be at least 1; got 0"),
        (lambda: ConditionalAffine(0, 1), ValueError, "shape must be at least 1; got 0"),
        (lambda: ConditionalAffine((1, 2), 1), ValueError, r"\(channels, height, width\)"),
    ],
)
def test_constructor_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
