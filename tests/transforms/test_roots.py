"""Laws of root finding: the root of a closed form, to round-off, and its gradient."""

import pytest
import torch

from cnf.transforms.roots import increasing_root


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_roots_are_those_of_the_closed_form_to_round_off(dtype):
    target = torch.tensor([[1e-6, 0.3, 1.0], [7.0, 50.0, 1e4]], dtype=dtype)

    def excess_and_slope(x):
        return x + x**2 - target, 1 + 2 * x

    root = increasing_root(excess_and_slope, torch.zeros_like(target), target)

    exact = target.double()
    expected = 2 * exact / (1 + (1 + 4 * exact).sqrt())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(root, expected.to(dtype), rtol=4 * eps, atol=4 * eps * 1e-6)


def test_the_gradient_is_that_of_the_implicit_function():
    target = torch.tensor([0.5, 20.0], requires_grad=True)
    root = increasing_root(
        lambda x: (x.sinh() - target, x.cosh()), -target.abs(), target.abs().detach()
    )
    found = torch.autograd.grad(root.sum(), target)[0]
    torch.testing.assert_close(found, (1 + target.detach() ** 2) ** -0.5, rtol=1e-12, atol=0)


def test_a_root_may_lie_at_an_end_of_its_bracket():
    ends = torch.tensor([0.0, 1.0, 2.0])
    low, high = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 2.0])
    root = increasing_root(lambda x: (x**3 + x - ends**3 - ends, 3 * x**2 + 1), low, high)
    torch.testing.assert_close(root, ends, rtol=0, atol=1e-15)
