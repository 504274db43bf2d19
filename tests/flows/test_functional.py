"""Laws of torch.func: functions of a flow are mapped, differentiated and given parameters."""

import copy

import pytest
import torch
from test_gradient_modes import KINDS
from torch import func, nn
from torch.autograd import forward_ad
from zoo import (
    BIJECTIONS,
    ESTIMATES,
    TRANSFORMS,
    UserNetwork,
    base_rows_for,
    cnf,
    mlp,
    perturbed,
    rows_for,
)

from cnf import Flow, Hutchinson, ModuleField, ODEError, ODESolver, Standardize
from cnf.transforms import Affine, ContinuousTransform, Unconstrain
from cnf.transforms.continuous import map_continuous
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # which cannot read hidden numbers

GRID = ODESolver(method="rk4", steps=2, gradient="backprop")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


class LogProb(nn.Module):
    """`log_prob` as the forward of a module, for `functional_call`."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, context=None):
        return self.flow.log_prob(x, context)


class ToData(nn.Module):
    """`to_data` as the forward of a module, for `torch.export`."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, z):
        return self.flow.to_data(z)


def user_flow(solver=GRID):
    return Flow(
        [
            perturbed(Affine(2)),
            ContinuousTransform(perturbed(ModuleField(UserNetwork(2), 2)), solver=solver),
        ]
    )


def learnt_end_time():
    part = ContinuousTransform(mlp(), solver=GRID, end_time=0.8, learn_end_time=True)
    return Flow([part])


def scores(flow, x, context):
    """Gradients of the log-density in x and the parameters, by autograd."""
    x = x.clone().requires_grad_()
    parameters = dict(flow.named_parameters())
    inputs = [x, *parameters.values()]
    found = torch.autograd.grad(flow.log_prob(x, context).sum(), inputs, materialize_grads=True)
    return found[0], dict(zip(parameters, found[1:], strict=True))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_flow_along_a_field_is_mapped_and_differentiated_as_by_autograd(make):
    flow = Flow([ContinuousTransform(make(), solver=GRID)])
    x, context = rows_for(flow, 3)
    expected, of_parameters = scores(flow, x, context)

    def log_prob(row, context):
        return flow.log_prob(row, context)

    in_rows = (0, None if context is None else 0)
    mapped = func.vmap(log_prob, in_rows)(x, context)
    torch.testing.assert_close(mapped, flow.log_prob(x, context), **CLOSE)
    found = func.vmap(func.grad(log_prob), in_rows)(x, context)
    torch.testing.assert_close(found, expected, **CLOSE)
    first = None if context is None else context[0]
    for jacobian in (func.jacrev, func.jacfwd):
        torch.testing.assert_close(jacobian(log_prob)(x[0], first), expected[0], **CLOSE)
    _, slope = func.jvp(lambda x: flow.log_prob(x, context), (x,), (x,))
    torch.testing.assert_close(slope, (expected * x).sum(-1), **CLOSE)

    def total(parameters):
        return func.functional_call(LogProb(flow), parameters, (x, context)).sum()

    named = {f"flow.{name}": value.detach() for name, value in flow.named_parameters()}
    found = func.grad(total)(named)
    expected = {f"flow.{name}": value for name, value in of_parameters.items()}
    torch.testing.assert_close(found, expected, **CLOSE)


def test_forward_mode_gives_the_slope_of_autograd():
    """Also where no parameter asks for a gradient, so that none is tracked."""
    flow, x = user_flow().requires_grad_(requires_grad=False), torch.randn(3, 2)
    expected, _ = scores(flow.requires_grad_(), x, None)
    flow.requires_grad_(requires_grad=False)
    with forward_ad.dual_level():
        value = flow.log_prob(forward_ad.make_dual(x, x))
        slope = forward_ad.unpack_dual(value).tangent
    torch.testing.assert_close(slope, (expected * x).sum(-1), **CLOSE)


@pytest.mark.parametrize("make", [user_flow, lambda: cnf(solver=GRID), learnt_end_time])
def test_an_ensemble_of_parameters_is_mapped_as_one_after_the_other(make):
    members = [LogProb(perturbed(make())) for _ in range(3)]
    x = torch.randn(4, 2)
    parameters, buffers = func.stack_module_state(members)

    def log_prob(parameters, buffers):
        return func.functional_call(copy.deepcopy(members[0]), (parameters, buffers), (x,))

    expected = torch.stack([member(x) for member in members])
    torch.testing.assert_close(func.vmap(log_prob)(parameters, buffers), expected, **CLOSE)
    slopes = func.vmap(func.grad(lambda p, b: log_prob(p, b).sum()))(parameters, buffers)
    for i, member in enumerate(members):
        _, of_parameters = scores(member.flow, x, None)
        for name, value in of_parameters.items():
            torch.testing.assert_close(slopes[f"flow.{name}"][i], value, **CLOSE)


ITERATED = {name: make for name, make in BIJECTIONS.items() if "residual flow" in name}
MAPPED = {name: make for name, make in TRANSFORMS.items() if name not in ITERATED}


@pytest.mark.parametrize("make", MAPPED.values(), ids=MAPPED)
def test_a_transform_is_mapped_over_rows(make):
    transform = map_continuous(make(), lambda part: part.using(solver=GRID))
    x, context = rows_for(transform, 3)
    z = base_rows_for(transform, 3)
    in_rows = (0, None if context is None else 0)
    for call, rows, draws in (
        (transform.to_base_and_ladj, x, transform.stochastic_to_base),
        (transform.to_data_and_ladj, z, transform.stochastic_to_data),
    ):
        found = func.vmap(call, in_rows, randomness="different")(rows, context)
        if not draws:
            torch.testing.assert_close(found, call(rows, context), **CLOSE)


REFUSED = {**ITERATED, **ESTIMATES}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_a_residual_flow_is_refused_where_its_iterations_cannot_go(make):
    transform = make()
    x, context = rows_for(transform, 3)
    in_rows = (0, None if context is None else 0)
    for call in (transform.to_base_and_ladj, transform.to_data):
        with pytest.raises(RuntimeError, match=r"cannot be computed within torch\.func"):
            func.vmap(call, in_rows, randomness="different")(x, context)


def test_rows_outside_of_the_support_have_no_density_within_vmap_either():
    flow = cnf(transforms=[Unconstrain(["positive", "real"])], solver=GRID)
    x = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [0.5, 0.0]])
    torch.testing.assert_close(func.vmap(flow.log_prob)(x), flow.log_prob(x), **CLOSE)


def test_probes_are_drawn_for_each_row_within_vmap():
    field = LinearField(2)
    nn.init.eye_(field.weight)  # whose trace any probe of signs gives
    flow = Flow([ContinuousTransform(field, solver=GRID, divergence=Hutchinson())])
    x = torch.randn(3, 2)
    found = func.vmap(flow.log_prob, randomness="different")(x)
    torch.testing.assert_close(found, flow.log_prob(x), **CLOSE)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize("make", [user_flow, lambda solver: cnf(solver=solver)])
def test_other_ways_to_a_gradient_are_refused_with_the_remedy(make, gradient):
    flow = make(solver=ODESolver(method="rk4", steps=2, gradient=gradient))
    x = torch.randn(3, 2)
    remedy = rf"gradient='{gradient}' .* ODESolver\(method='rk4', steps=\.\.\., gradient='backprop'"
    for call in (
        lambda: func.grad(lambda x: flow.log_prob(x).sum())(x),
        lambda: func.jacrev(flow.log_prob)(x),
        lambda: func.jvp(flow.log_prob, (x,), (x,)),
        lambda: func.vmap(flow.log_prob)(x),
    ):
        with pytest.raises(ODEError, match=remedy):
            call()
    with torch.no_grad():  # where nothing asks for a gradient
        torch.testing.assert_close(func.vmap(flow.log_prob)(x), flow.log_prob(x), **CLOSE)


@pytest.mark.parametrize("method", ["dopri5", "implicit_adams", "scipy_solver"])
def test_other_methods_are_refused_within_vmap_with_the_remedy(method):
    steps = {"steps": 8} if method == "implicit_adams" else {}
    gradient = "adjoint" if method == "scipy_solver" else "backprop"
    solver = ODESolver(method=method, gradient=gradient, **steps)
    flow, x = user_flow(solver), torch.randn(3, 2)
    with (
        torch.no_grad(),
        pytest.raises(ODEError, match=rf"'{method}' .* use ODESolver\(method='rk4'"),
    ):
        func.vmap(flow.log_prob)(x)


def test_an_adaptive_solve_is_differentiated_where_its_numbers_can_be_read():
    flow, x = user_flow(ODESolver(gradient="backprop")), torch.randn(3, 2)
    found = func.grad(lambda x: flow.log_prob(x).sum())(x)
    torch.testing.assert_close(found, scores(flow, x, None)[0], **CLOSE)


def test_a_distribution_keeps_the_parameters_that_it_was_made_with():
    """Those of another flow, that `functional_call` exchanges for the time of the call."""
    flow, other = (cnf(2, 1, solver=GRID) for _ in range(2))
    x, context = torch.randn(3, 2), torch.randn(3, 1)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    made = func.functional_call(flow, tensors, (context,))
    plain = flow(context)
    for ours, theirs in ((made, other(context)), (made.expand((2, 3)), other(context))):
        torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x).expand(ours.batch_shape))
    torch.manual_seed(1)
    drawn = made.sample((4,))
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, other(context).sample((4,)))
    torch.testing.assert_close(made.transform(x), other.to_base(x, context))
    torch.testing.assert_close(made.transform.inv(x), other.to_data(x, context))
    torch.testing.assert_close(plain.log_prob(x), flow.log_prob(x, context))
    assert dict(flow.named_parameters()).keys() == dict(other.named_parameters()).keys()
    slope = torch.autograd.grad(made.log_prob(x).sum(), list(other.parameters()))
    expected = torch.autograd.grad(other.log_prob(x, context).sum(), list(other.parameters()))
    torch.testing.assert_close(slope, expected)


def test_a_distribution_follows_what_changes_in_place():
    flow = cnf(solver=GRID)
    x, distribution = torch.randn(3, 2), flow()
    before = distribution.log_prob(x)
    perturbed(flow)
    assert not torch.allclose(distribution.log_prob(x), before)
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x))
    flow.float()
    torch.testing.assert_close(distribution.log_prob(x.float()), flow.log_prob(x.float()))


def _loaded(flow, **how):
    flow.load_state_dict(perturbed(scaled_flow()).state_dict(), **how)


CHANGES = {
    "half and back": lambda flow: flow.half().double(),
    "float": lambda flow: flow.float(),
    "float and back": lambda flow: flow.float().double(),
    "a part, float and back": lambda flow: flow.chain[0].float().double(),
    "load_state_dict": _loaded,
    "load_state_dict, assigned": lambda flow: _loaded(flow, assign=True),
    "a step in place": perturbed,
    "a new buffer": lambda flow: setattr(flow.chain[0], "mean", torch.ones(2)),
}


def scaled_flow():
    """With buffers whose values matter, and that single precision rounds."""
    flow = cnf(2, solver=GRID)
    return Flow([Standardize.from_data(3 + 2 * torch.randn(50, 2)), *flow.chain], flow.base)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_distribution_follows_the_flow_however_it_changes(change):
    flow = scaled_flow()
    distribution = flow()
    transform = distribution.transform
    change(flow)
    x = torch.randn(3, 2).to(next(flow.parameters()).dtype)
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x), rtol=0, atol=0)
    torch.testing.assert_close(transform(x), flow.to_base(x), rtol=0, atol=0)


@pytest.mark.parametrize("change", ["half", "float"])
def test_what_functional_call_gave_outlives_a_change_of_the_flow(change):
    """Its parameters and buffers, not those that the flow has had before or after."""
    flow, other, x = scaled_flow(), perturbed(scaled_flow()), torch.randn(3, 2)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    made, expected = func.functional_call(flow, tensors, ()), other.log_prob(x)
    getattr(flow, change)()
    with pytest.raises(RuntimeError, match=r"was changed after .* Make the distribution anew"):
        made.log_prob(x)
    flow.double()
    torch.testing.assert_close(made.log_prob(x), expected, rtol=0, atol=0)


class Asks(nn.Module):
    """Asks a distribution that it was given, within a `functional_call`."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, distribution, x):
        return distribution.log_prob(x), self.flow().log_prob(x)


def test_a_distribution_made_before_a_functional_call_follows_its_flow_within():
    flow, other, x = scaled_flow(), perturbed(scaled_flow()), torch.randn(3, 2)
    made = flow()
    tensors = {f"flow.{name}": value for name, value in other.state_dict().items()}
    earlier, within = func.functional_call(Asks(flow), tensors, (made, x))
    torch.testing.assert_close(earlier, other.log_prob(x), rtol=0, atol=0)
    torch.testing.assert_close(within, other.log_prob(x), rtol=0, atol=0)
    torch.testing.assert_close(made.log_prob(x), flow.log_prob(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_log_density_on_a_grid_is_exported():
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("this torch cannot tell that it exports")
    flow = cnf(2, 3, solver=GRID)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        LogProb(flow), rows_for(flow, 5), dynamic_shapes=({0: rows}, {0: rows})
    )
    x, context = rows_for(flow, 7)
    torch.testing.assert_close(program.module()(x, context), flow.log_prob(x, context), **CLOSE)
    own = user_flow()
    with pytest.raises(RuntimeError, match=r"takes backward passes; export to_data"):
        torch.export.export(LogProb(own), (x,))
    program = torch.export.export(ToData(own), (x,))
    torch.testing.assert_close(program.module()(x), own.to_data(x), **CLOSE)


def test_within_vmap_a_row_of_nan_has_no_density():
    flow = Flow([ContinuousTransform(mlp(), solver=GRID)])
    x = torch.randn(3, 2)
    x[1, 0] = torch.nan
    found = func.vmap(flow.log_prob)(x)
    assert found.isnan().tolist() == [False, True, False]
