"""Laws that every transform and flow obeys, as functions of a specimen of the zoo."""

import torch
from torch import Tensor
from zoo import seeded

from cnf import Flow
from cnf.transforms import Transform


def ladj_is_slogdet_of_the_jacobian(
    part: Transform | Flow, x: Tensor, context: Tensor | None, *, atol: float
) -> None:
    """The ladj of each row is log|det| of the brute-force Jacobian of the whole map."""
    _, ladj = part.to_base_and_ladj(x, context)
    for row in range(len(x)):
        c = None if context is None else context[row]
        jacobian = torch.autograd.functional.jacobian(lambda y, c=c: part.to_base(y, c), x[row])
        expected = torch.linalg.slogdet(jacobian.flatten(1)).logabsdet
        torch.testing.assert_close(ladj[row], expected, rtol=0, atol=atol)


def to_data_undoes_to_base(
    part: Transform | Flow, x: Tensor, context: Tensor | None, *, atol: float
) -> None:
    """The way to the data undoes that to the base, with and without ladj, and the ladjs cancel."""
    z, ladj = part.to_base_and_ladj(x, context, generator=seeded())
    back, ladj_back = part.to_data_and_ladj(z, context)
    torch.testing.assert_close(back, x, rtol=0, atol=atol)
    torch.testing.assert_close(ladj_back, -ladj, rtol=0, atol=atol)
    torch.testing.assert_close(part.to_base(x, context, generator=seeded()), z, rtol=0, atol=atol)
    torch.testing.assert_close(part.to_data(z, context), x, rtol=0, atol=atol)


def gradients(part: torch.nn.Module, value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of ``value.sum()`` in the inputs and every parameter; each must exist."""
    targets = [*inputs, *part.parameters()]
    return torch.autograd.grad(value.sum(), targets)


def every_parameter_matters(part: torch.nn.Module, value: Tensor) -> None:
    """The gradient of ``value.sum()`` reaches every parameter, and is nowhere all zero."""
    part.zero_grad()
    value.sum().backward()
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name
