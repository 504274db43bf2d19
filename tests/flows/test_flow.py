"""Laws of flows: the likelihood is right, differentiable, reproducible, and refuses bad input."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from laws import (
    every_parameter_matters,
    gradients,
    ladj_is_slogdet_of_the_jacobian,
    to_data_undoes_to_base,
)
from torch.distributions import MultivariateNormal
from zoo import (
    COARSE,
    EVERY_FLOW,
    EXACT_FLOWS,
    FLOWS,
    PRECISE,
    UNDONE_FLOWS,
    cnf,
    in_turn,
    mlp,
    perturbed,
    rows_for,
    seeded,
)

from cnf import CNF, Exact, Flow, Hutchinson, ODESolver, Standardize
from cnf.bases import Base, StandardNormal
from cnf.transforms import Affine, ContinuousTransform, FactorOut, Flatten
from cnf.vector_fields import LinearField

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

flow_of_the_plane = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
exact_flow = pytest.mark.parametrize("make", EXACT_FLOWS.values(), ids=EXACT_FLOWS)
every_flow = pytest.mark.parametrize("make", EVERY_FLOW.values(), ids=EVERY_FLOW)
ADJOINT = replace(PRECISE, gradient="adjoint")


@pytest.mark.parametrize("features", range(1, 7))
def test_a_linear_field_gives_its_gaussian(features):
    field = perturbed(LinearField(features), 0.5)
    flow = Flow([ContinuousTransform(field, solver=PRECISE)])
    scale = torch.linalg.matrix_exp(field.weight)
    loc, _ = field.solution(torch.zeros(features), start=0.0, end=1.0)
    x = torch.randn(7, features)

    expected = MultivariateNormal(loc, scale @ scale.T).log_prob(x)

    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("features", [1, 2, 3, 5])
def test_log_prob_is_that_of_the_brute_force_change_of_variables(features):
    flow = cnf(features, frequency=2.0)
    x = torch.randn(3, features)
    ladj_is_slogdet_of_the_jacobian(flow, x, None, atol=1e-6)
    z, ladj = flow.to_base_and_ladj(x)
    normal = MultivariateNormal(torch.zeros(features), torch.eye(features))
    torch.testing.assert_close(flow.log_prob(x), normal.log_prob(z) + ladj, rtol=0, atol=1e-9)


@exact_flow
def test_ladj_is_slogdet_of_the_jacobian(make):
    flow = make()
    ladj_is_slogdet_of_the_jacobian(flow, *rows_for(flow, 2), atol=1e-6)


@pytest.mark.parametrize(("name", "batch"), in_turn(UNDONE_FLOWS, [(), (4,), (2, 3)]), ids=str)
def test_to_data_undoes_to_base(name, batch):
    flow = UNDONE_FLOWS[name]()
    to_data_undoes_to_base(flow, *rows_for(flow, *batch), atol=1e-6)


@flow_of_the_plane
def test_density_integrates_to_one(make):
    flow = make()
    flow = flow.using(solver=ODESolver(rtol=1e-5, atol=1e-5))
    centre = flow.to_data(torch.zeros(1, 2), rows_for(flow, 1)[1]).detach()
    axis = torch.linspace(-14, 14, 85)
    grid = torch.cartesian_prod(axis, axis) + centre
    context = rows_for(flow, 1)[1]
    with torch.no_grad():
        density = flow.log_prob(grid, context).exp().reshape(85, 85)
    mass = torch.trapezoid(torch.trapezoid(density, axis), axis)
    assert abs(float(mass) - 1) < 1e-3


@exact_flow
@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
def test_gradients_of_log_prob_and_rsample_reach_everything(make, gradient):
    flow = make().using(solver=replace(COARSE, gradient=gradient))
    x, context = rows_for(flow, 3)
    inputs = (
        [x.requires_grad_()] if context is None else [x.requires_grad_(), context.requires_grad_()]
    )

    every_parameter_matters(flow, flow.log_prob(*inputs))
    assert all(tensor.grad.abs().min() > 0 for tensor in inputs)

    every_parameter_matters(flow, flow.rsample(3, context).exp())


@pytest.mark.parametrize(
    "name", ["cnf with context", "two blocks", "user", "learnt affine with context"]
)
@pytest.mark.parametrize("call", ["log_prob", "rsample"])
def test_adjoint_and_backprop_give_the_same_gradient(name, call):
    flow = FLOWS[name]()
    x, context = rows_for(flow, 3)
    found = []
    for solver in (ADJOINT, PRECISE):
        part = flow.using(solver=solver)
        inputs = [tensor.clone().requires_grad_() for tensor in (x, context) if tensor is not None]
        if call == "log_prob":
            value = part.log_prob(*inputs)
        else:
            generator = torch.Generator().manual_seed(3)
            inputs = inputs[1:]
            value = part.rsample(4, *inputs, generator=generator).sin()
        found.append(gradients(part, value, *inputs))
    for adjoint, backprop in zip(*found, strict=True):
        torch.testing.assert_close(adjoint, backprop, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", [ADJOINT, COARSE], ids=["adjoint", "backprop"])
def test_gradcheck(solver):
    flow = cnf(2, 1, hidden_features=(3, 3)).using(solver=solver)
    x, context = rows_for(flow, 2)
    parameter = flow.chain[0].vector_field.layers[1].linear.weight

    def log_prob(x, context, _):  # the weight is perturbed in place, in the flow
        return flow.log_prob(x, context)

    inputs = (x.requires_grad_(), context.requires_grad_(), parameter)
    assert torch.autograd.gradcheck(log_prob, inputs, eps=1e-6, atol=1e-5)


@every_flow
def test_train_and_eval_mode_give_the_same_value_and_gradient(make):
    flow = make().using(solver=COARSE)
    x, context = rows_for(flow, 3)
    found = []
    for mode in (flow.train, flow.eval):
        mode()
        value = flow.log_prob(x, context, generator=seeded())
        found.append((value, *gradients(flow, value)))
    for train, evaluated in zip(*found, strict=True):
        assert torch.equal(train, evaluated)


@exact_flow
def test_the_value_of_a_row_does_not_depend_on_its_batch(make):
    flow = make().using(solver=COARSE)
    x, context = rows_for(flow, 3)
    together = flow.log_prob(x, context)
    for row in range(3):
        c = None if context is None else context[row]
        torch.testing.assert_close(flow.log_prob(x[row], c), together[row], rtol=0, atol=1e-6)


@exact_flow
def test_sampled_and_evaluated_log_prob_agree(make):
    flow = make()
    context = rows_for(flow, 2)[1]
    x, log_prob = flow.sample_and_log_prob(3, context)
    torch.testing.assert_close(log_prob, flow.log_prob(x, context), rtol=0, atol=1e-6)


@flow_of_the_plane
def test_samples_follow_the_density(make):
    """The mean of q(x) / p(x) over draws from p is 1, for a density q inside p (4 std. errors)."""
    flow = make().using(solver=ODESolver(rtol=1e-5, atol=1e-5))
    context = rows_for(flow, 1)[1]
    x, log_prob = flow.sample_and_log_prob(4000, context)
    centre, spread = x.mean((0, 1)) if x.ndim == 3 else x.mean(0), 0.5 * x.reshape(-1, 2).std(0)
    other = MultivariateNormal(centre, torch.diag(spread.square()))
    ratio = (other.log_prob(x) - log_prob).exp().flatten()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5


@every_flow
def test_a_generator_fixes_the_draws_and_leaves_the_global_one(make):
    flow = make().using(solver=COARSE)
    context = rows_for(flow, 2)[1]
    before = torch.get_rng_state()
    first, second = (flow.sample_and_log_prob((3,), context, generator=seeded()) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert torch.equal(torch.get_rng_state(), before)


@every_flow
def test_a_call_leaves_nothing_behind(make):
    flow = make().using(solver=COARSE)
    x, context = rows_for(flow, 2)
    before = {name: (id(part), sorted(vars(part))) for name, part in flow.named_modules()}
    flow.log_prob(x, context).sum().backward()
    flow.sample(2, context)
    assert before == {name: (id(part), sorted(vars(part))) for name, part in flow.named_modules()}


@every_flow
@pytest.mark.parametrize("sample_shape", [(), (2, 3)], ids=str)
def test_draws_have_the_shape_of_events_and_can_be_asked_about(make, sample_shape):
    flow = make().using(solver=COARSE)
    x, context = rows_for(flow, 4)
    batch = () if context is None else (4,)
    drawn, log_prob = flow.sample_and_log_prob(sample_shape, context)
    assert drawn.shape == (*sample_shape, *batch, *flow.event_shape)
    assert log_prob.shape == flow.log_prob(drawn, context).shape == (*sample_shape, *batch)
    assert flow.log_prob(x[:1].expand(2, 4, *flow.event_shape), context).shape == (2, 4)


@pytest.mark.parametrize(
    ("x_batch", "context_batch", "joint"),
    [((), (), ()), ((4,), (), (4,)), ((), (4,), (4,)), ((3, 1), (2,), (3, 2)), ((5,), (1,), (5,))],
    ids=str,
)
def test_rows_and_contexts_broadcast(x_batch, context_batch, joint):
    flow = cnf(2, 3)
    x, context = torch.randn(*x_batch, 2), torch.randn(*context_batch, 3)

    log_prob = flow.log_prob(x, context)

    rows = x.expand(*joint, 2).reshape(-1, 2)
    contexts = context.expand(*joint, 3).reshape(-1, 3)
    expected = flow.log_prob(rows, contexts).reshape(joint)
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sample_shape", [(), 3, (3,), (2, 3)], ids=str)
def test_draws_have_sample_shape_then_batch_then_features(sample_shape):
    sizes = (sample_shape,) if isinstance(sample_shape, int) else sample_shape
    assert CNF(2).sample(sample_shape).shape == (*sizes, 2)
    context = torch.randn(5, 4, 3)
    assert CNF(2, 3).sample(sample_shape, context).shape == (*sizes, 5, 4, 2)
    x, log_prob = CNF(2, 3).sample_and_log_prob(sample_shape, context)
    assert (x.shape, log_prob.shape) == ((*sizes, 5, 4, 2), (*sizes, 5, 4))


def test_sample_has_no_gradient_and_rsample_has():
    flow = cnf()
    assert not flow.sample(2).requires_grad
    assert not flow.sample_and_log_prob(2)[1].requires_grad
    assert flow.rsample(2).requires_grad
    assert flow.rsample_and_log_prob(2)[1].requires_grad


def test_a_new_flow_is_the_identity():
    x = torch.randn(4, 3)
    log_prob = -0.5 * x.square().sum(-1) - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(CNF(3, skip=False).log_prob(x), log_prob, rtol=0, atol=1e-12)
    precise = CNF(3, solver=PRECISE)
    torch.testing.assert_close(precise.log_prob(x), log_prob, rtol=0, atol=1e-6)


def test_an_empty_batch_gives_an_empty_result():
    assert CNF(2).log_prob(torch.zeros(0, 2)).shape == (0,)
    assert CNF(2).sample(0).shape == (0, 2)
    assert CNF(2, 1).log_prob(torch.zeros(3, 0, 2), torch.zeros(1)).shape == (3, 0)


@pytest.mark.parametrize("context", [False, True])
def test_works_in_inference_mode(context):
    flow = FLOWS["cnf with context" if context else "user"]()
    x, c = rows_for(flow, 3)
    expected = flow.log_prob(x, c).detach()
    with torch.inference_mode():
        torch.testing.assert_close(flow.log_prob(x.clone(), c), expected, rtol=0, atol=1e-12)


def test_likelihood_is_the_weakest_of_the_parts():
    exact = ContinuousTransform(mlp())
    estimate = ContinuousTransform(mlp(), divergence=Hutchinson())
    assert Flow([exact, Affine(2)]).likelihood == "exact"
    assert Flow([exact, estimate, exact]).likelihood == "estimate"
    assert Flow([], StandardNormal(2)).likelihood == "exact"
    assert CNF(2).using(divergence=Hutchinson()).likelihood == "estimate"


def ode(features=2):
    return ContinuousTransform(LinearField(features))


class FromAFlow(StandardNormal):
    """A base with a flow inside."""

    def __init__(self, features):
        super().__init__(features)
        self.flow = Flow([ode(features)])


SHARED = ode()


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: [ode()], 0),
        (lambda: [Affine(2), ode(), Affine(2)], 1),
        (lambda: [Affine(2)], None),
        (lambda: [ode(), ode()], None),
        (lambda: [SHARED, SHARED], None),
        (lambda: [FactorOut([ode()], 3)], None),
        (lambda: [ode(3), FactorOut([ode()], 3)], None),
    ],
    ids=["alone", "between", "none", "two", "twice the same", "nested", "one and a nested one"],
)
def test_the_only_ode_is_the_one_of_its_transforms_if_there_is_no_other(make, place):
    flow = Flow(make())
    assert flow.only_ode is (None if place is None else flow.chain[place])


def test_an_ode_in_the_base_is_another_one():
    assert Flow([ode()], FromAFlow(2)).only_ode is None


def test_using_keeps_the_class_and_shares_the_parameters():
    flow = CNF(2, solver=PRECISE, divergence=Exact())
    other = flow.using(solver=ADJOINT)
    assert type(other) is CNF
    assert [id(p) for p in other.parameters()] == [id(p) for p in flow.parameters()]
    assert (flow.chain[-1].solver, other.chain[-1].solver) == (PRECISE, ADJOINT)


def test_a_flow_on_another_dtype_says_how_to_convert():
    flow = CNF(2).float()
    assert flow.sample(3).dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype torch.float32; got torch.float64.*x.to\("):
        flow.log_prob(torch.randn(3, 2))


BAD_ROWS = [
    (torch.full((3, 2), torch.nan), ValueError, "x must be finite; got NaN or inf in rows 0, 1, 2"),
    (torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]), ValueError, "NaN or inf in row 1"),
    (torch.full((9, 2), torch.nan), ValueError, r"rows 0, 1, 2, 3, 4, … \(9 of 9\)"),
    (torch.full((2, 2, 2), torch.nan), ValueError, r"rows \(0, 0\), \(0, 1\)"),
    (torch.tensor([torch.nan, 0.0]), ValueError, "the only row"),
    (torch.randn(4, 3), ValueError, r"x must have shape \(\*batch, 2\); got \(4, 3\)"),
    (torch.tensor(1.0), ValueError, r"got \(\)"),
    (torch.ones(4, 2, dtype=torch.int64), ValueError, "floating dtype; got torch.int64"),
    ([[0.0, 0.0]], TypeError, "x must be a torch.Tensor; got list"),
    (torch.zeros(1, 2, device="meta"), ValueError, "hold numbers; got a tensor on the device meta"),
]


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("x", "error", "message"), BAD_ROWS)
@pytest.mark.parametrize("call", ["log_prob", "to_base", "to_base_and_ladj"])
def test_bad_rows_are_refused(x, error, message, call):
    with pytest.raises(error, match=message):
        getattr(CNF(2).float(), call)(x)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 4), r"x must have shape \(\*batch, 1, 2, 2\); got \(3, 4\)"),
        (torch.zeros(2, 2), r"got \(2, 2\)"),
        (torch.full((3, 1, 2, 2), torch.nan), "NaN or inf in rows 0, 1, 2"),
        (torch.full((1, 2, 2), torch.inf), "NaN or inf in the only row"),
    ],
)
def test_bad_images_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        EXACT_FLOWS["image"]().float().log_prob(x.float())
    with pytest.raises(ValueError, match=r"z must have shape \(\*batch, 4\); got \(3, 1, 2, 2\)"):
        EXACT_FLOWS["image"]().to_data(torch.zeros(3, 1, 2, 2))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("features", "context", "message"),
    [
        (0, torch.zeros(3, 1), "context must be None.*context_features=0"),
        (1, None, r"context must have shape \(\*batch, 1\).*conditional; got None"),
        (1, torch.zeros(3, 2), r"context must have shape \(\*batch, 1\); got \(3, 2\)"),
        (1, torch.full((3, 1), torch.nan), "context must be finite"),
        (1, torch.zeros(4, 1), r"must broadcast; got x \(3, 2\) and context \(4, 1\)"),
    ],
)
def test_bad_contexts_are_refused(features, context, message):
    with pytest.raises(ValueError, match=message):
        CNF(2, features).float().log_prob(torch.zeros(3, 2).float(), context)


@pytest.mark.usefixtures("shapes_unchecked")
def test_bad_sample_shapes_are_refused():
    with pytest.raises(ValueError, match="sample_shape must not be negative; got -1"):
        CNF(2).sample(-1)
    with pytest.raises(TypeError, match=r"an int or a shape of ints; got 2\.5"):
        CNF(2).sample(2.5)
    with pytest.raises(TypeError, match="int or a shape of ints"):
        CNF(2).sample((2.0,))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Flow([]), ValueError, "transforms must not be empty when base is None"),
        (lambda: Flow([torch.nn.ReLU()]), TypeError, "cnf transforms; got ReLU"),
        (lambda: Flow([Affine(2)], base="normal"), TypeError, "such as StandardNormal; got str"),
        (lambda: Flow([Affine(2), Affine(3)]), ValueError, "Affine gives 2 and Affine takes 3"),
        (
            lambda: CNF(2, base=StandardNormal(3)),
            ValueError,
            "ContinuousTransform gives 2, and base has 3",
        ),
        (
            lambda: Flow([Affine(4), Flatten((2, 2))]),
            ValueError,
            r"only the first .* Flatten takes \(2, 2\) and comes after Affine",
        ),
        (lambda: CNF(2, blocks=0), ValueError, "blocks must be at least 1; got 0"),
        (
            lambda: Flow([ContinuousTransform(mlp(2, 1)), ContinuousTransform(mlp(2, 3))]),
            ValueError,
            r"agree on context_features; got \[1, 3\]",
        ),
        (lambda: StandardNormal(0), ValueError, "features must be at least 1"),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_standardization_changes_the_density_by_its_scale():
    x = 5 + 2 * torch.randn(100, 2)
    flow = cnf()
    standardize = Standardize.from_data(x)
    standardized = Flow([standardize, *flow.chain])
    expected = flow.log_prob((x - x.mean(0)) / x.std(0)) - x.std(0).log().sum()
    torch.testing.assert_close(standardized.log_prob(x), expected, rtol=0, atol=1e-6)


@every_flow
def test_every_call_takes_an_empty_batch_and_keeps_its_graph(make):
    flow = make().using(solver=COARSE)
    x, context = rows_for(flow, 0)
    times = torch.tensor([0.0, 0.5, 1.0])
    z = flow.to_base(x, context)
    assert z.shape == (0, flow.base.features)
    assert flow.to_data(z, context).shape == (0, *flow.event_shape)
    if isinstance(flow.chain[-1], ContinuousTransform):
        assert flow.trajectory(z, times, context).shape == (3, 0, *flow.event_shape)
    assert flow.sample_and_log_prob(3, context)[1].shape[-1] in (0, 3)
    flow.log_prob(x, context).sum().backward()
    flow.to_base(x, context).sum().backward()
    assert all(parameter.grad.abs().sum() == 0 for parameter in flow.parameters())


@pytest.mark.usefixtures("shapes_unchecked")
def test_integers_of_numpy_are_integers():
    flow = CNF(np.int64(2), hidden_features=(np.int64(4), 4))
    assert flow.sample(np.int64(3)).shape == flow.sample((np.int64(3),)).shape == (3, 2)
    assert isinstance(flow.features, int)
    with pytest.raises(TypeError, match="an int or a shape of ints; got True"):
        flow.sample(True)


def test_a_flow_without_tensors_is_checked_against_the_default_dtype():
    class Uniform(Base):
        def _log_prob(self, z, context, generator):
            return torch.where((z.abs() < 1).all(-1), -self.features * math.log(2), -torch.inf)

        def _rsample(self, shape, context, generator):
            return 2 * torch.rand(*shape, self.features, generator=generator) - 1

    flow = Flow([], Uniform(2))
    torch.testing.assert_close(flow.log_prob(torch.zeros(3, 2)), torch.full((3,), -math.log(4)))
    with pytest.raises(ValueError, match=r"dtype torch.float64; got torch.float32"):
        flow.log_prob(torch.zeros(3, 2, dtype=torch.float32))


@pytest.mark.usefixtures("shapes_unchecked")
def test_parts_that_do_not_fit_are_refused_when_the_flow_is_made():
    single = Standardize.from_data(torch.randn(9, 2).float())
    with pytest.raises(ValueError, match=r"one dtype; got torch\.float32, torch\.float64"):
        CNF(2, transforms=[single])
    for make in (Flow, lambda part: CNF(2, transforms=part)):
        with pytest.raises(TypeError, match="put the single transform in brackets"):
            make(single)
    assert Flow([ContinuousTransform(mlp().float())]).base.loc.dtype == torch.float32
