"""Laws of compiled flows: the same numbers and gradients, from few programs, and never a crash.

They run where `test_compiled` starts them: jaxtyping's wrappers, which are around every function of
the package while tests run, are more than the compiler can look through.
"""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from zoo import UserNetwork, conv, mlp, perturbed, potential, residual, rows_for

from cnf import (
    CNF,
    Flow,
    FlowMatching,
    Hutchinson,
    MaximumLikelihood,
    ModuleField,
    ODEError,
    ODESolver,
    VectorField,
    count_evaluations,
    load,
    save,
)
from cnf.regularizers import jacobian_frobenius, kinetic_energy
from cnf.training.optimization import Average
from cnf.transforms import ActNorm, ContinuousTransform
from cnf.vector_fields import LinearField

# torch's own, of which the first is hidden, but not from those who make errors of warnings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]

STEPPING = ("euler", "midpoint", "heun2", "heun3", "rk4")
BACKPROP = ODESolver(method="midpoint", steps=2, gradient="backprop")
ADJOINT = ODESolver(method="midpoint", steps=2, gradient="adjoint")
ONE_STEP = ODESolver(method="euler", steps=1, gradient="backprop")
"""The smallest program."""

FIELDS = {
    "mlp with context": lambda: mlp(2, 3, layer="film", time_features=1),
    "deep mlp": lambda: mlp(3, hidden_features=(8, 2, 6), activation="tanh"),
    "residual": residual,
    "conv with context": lambda: conv((1, 2, 3), 2),
    "potential with context": lambda: potential(3, 2),
    "linear with context": lambda: perturbed(LinearField(2, 3)),
    "user with context": lambda: perturbed(ModuleField(UserNetwork(2, 3), 2, 3)),
}


class Programs:
    """Counts the programs made from here on; a field that splits into several makes several."""

    def __init__(self):
        self.before = 0
        self.before = self.number

    @property
    def number(self):
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] - self.before


@pytest.fixture(autouse=True)
def _forget_programs():
    yield
    torch._dynamo.reset()


def flow_along(field, solver=BACKPROP, **settings):
    return Flow([ContinuousTransform(field, solver=solver, **settings)])


def compiled(flow, backend="eager"):
    """A copy that runs compiled, and what counts its programs."""
    copied = copy.deepcopy(flow)
    copied.compile(backend=backend)
    return copied, Programs()


def loss_and_gradients(flow, objective, *inputs):
    loss = objective(flow)(*inputs, generator=torch.Generator().manual_seed(0))
    return loss, *torch.autograd.grad(loss, list(flow.parameters()))


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", FIELDS)
def test_a_compiled_field_gives_the_same_numbers_and_gradients(name):
    field = FIELDS[name]()
    x, context = rows_for(field, 5)
    t, probes = torch.rand(()), torch.randn(2, *x.shape)
    once = copy.deepcopy(field)
    # The gradient is a program too where it takes its time for one field alone.
    once.compile(backend="aot_eager" if name == "linear with context" else "eager")

    def everything(field):
        point = x.clone().requires_grad_()
        outputs = [
            field(t, point, context),
            *field.velocity_and_divergence(t, point, context),
            *field.velocity_and_products(t, point, probes, context),
        ]
        if field.bottleneck is not None:
            narrow = probes[..., : field.bottleneck]
            outputs += field.velocity_and_bottleneck_products(t, point, narrow, context)
        total = sum((output * output).sum() for output in outputs)
        return *outputs, *torch.autograd.grad(total, [point, *field.parameters()])

    assert_same(everything(once), everything(field))


@pytest.mark.parametrize("solver", [BACKPROP, ADJOINT], ids=["backprop", "adjoint"])
def test_the_compiled_density_and_its_gradient_are_those_of_the_flow(solver):
    flow = flow_along(mlp(2, 3), solver)
    once, _ = compiled(flow)
    x, context = torch.randn(4, 2), torch.randn(4, 3)

    def everything(flow):
        point, condition = (part.clone().requires_grad_() for part in (x, context))
        log_prob = flow.log_prob(point, condition)
        inputs = [point, condition, *flow.parameters()]
        # Twice, for a graph may be kept.
        first = torch.autograd.grad(log_prob.sum(), inputs, retain_graph=True)
        return log_prob, *first, *torch.autograd.grad(log_prob.square().sum(), inputs)

    assert_same(everything(once), everything(flow))


OBJECTIVES = {
    "likelihood by backprop": lambda flow: MaximumLikelihood(flow, solver=BACKPROP),
    "likelihood by adjoint": lambda flow: MaximumLikelihood(flow, solver=ADJOINT),
    "regularised estimate": lambda flow: MaximumLikelihood(
        flow,
        {kinetic_energy: 0.1, jacobian_frobenius: 0.1},
        solver=BACKPROP,
        divergence=Hutchinson(probes=2),
    ),
    "flow matching": FlowMatching,
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("name", ["mlp with context", "user with context"])
def test_every_objective_trains_a_compiled_flow_alike(objective, name):
    flow = flow_along(FIELDS[name]())
    once, programs = compiled(flow)
    rows = [torch.randn(6, 2), *([torch.randn(6, 3)] if flow.context_features else [])]

    assert_same(
        loss_and_gradients(once, objective, *rows), loss_and_gradients(flow, objective, *rows)
    )

    by_reverse_mode = name.startswith("user") and objective is not FlowMatching
    assert (programs.number == 0) == by_reverse_mode


def test_batches_of_every_size_and_all_times_share_one_program():
    flow, programs = compiled(flow_along(mlp()))
    with torch.no_grad():
        for rows, steps in [(5, 2), (7, 3), (64, 1)]:
            solver = ODESolver(method="midpoint", steps=steps)
            flow.using(solver=solver).log_prob(torch.randn(rows, 2))
    assert programs.number == 1
    flow.sample(5)
    flow.sample(9)
    assert programs.number == 2


@pytest.mark.parametrize(
    ("solver", "kinds"), [(BACKPROP, 1), (ADJOINT, 2)], ids=["backprop", "adjoint"]
)
def test_training_takes_one_program_for_each_kind_of_evaluation(solver, kinds):
    flow, programs = compiled(flow_along(mlp()))
    objective = MaximumLikelihood(flow, solver=solver)
    for rows in (4, 6, 9):
        objective(torch.randn(rows, 2)).backward()
    assert programs.number == kinds


def test_blocks_and_copies_that_follow_share_their_programs():
    flow, programs = compiled(CNF(2, hidden_features=(8, 8), blocks=3, solver=BACKPROP).double())
    average = Average(flow, decay=0.9)
    with torch.no_grad():
        flow.log_prob(torch.randn(4, 2))
        average.module.log_prob(torch.randn(4, 2))
    assert programs.number == 1


def test_flows_do_not_use_up_the_programs_of_one_another():
    x = torch.randn(4, 2)
    with torch._dynamo.config.patch(cache_size_limit=2):  # programs of one function
        for width in range(3, 7):
            flow, programs = compiled(flow_along(mlp(hidden_features=(width,)), ONE_STEP))
            with torch.no_grad():
                flow.log_prob(x)
            assert programs.number == 1


@pytest.mark.parametrize("name", ["deep mlp", "linear with context", "user with context"])
def test_compiled_evaluations_are_counted_once(name):
    flow = flow_along(FIELDS[name](), ADJOINT)
    once = copy.deepcopy(flow)
    once.compile(backend="eager")
    counts = []
    x, context = rows_for(flow.transforms[0].vector_field, 3)
    for each in (flow, once):
        with count_evaluations(each) as nfe:
            each.log_prob(x, context).sum().backward()
            each.sample(2, context)
        counts.append(nfe.value)
    assert counts[0] == counts[1] > 0


def test_counting_takes_no_further_program():
    flow, programs = compiled(flow_along(mlp()))
    with torch.no_grad():
        flow.log_prob(torch.randn(3, 2))
        with count_evaluations(flow):
            flow.log_prob(torch.randn(3, 2))
    assert programs.number == 1


COPIES = {
    "deepcopy": lambda flow, path: copy.deepcopy(flow),
    "copy": lambda flow, path: copy.copy(flow.transforms[0].vector_field),
    "pickle": lambda flow, path: pickle.loads(pickle.dumps(flow)),  # noqa: S301
    "load": lambda flow, path: (save(flow, path), load(path))[1],
}


def test_what_is_copied_or_saved_is_as_if_never_compiled(tmp_path):
    plain = flow_along(mlp())
    flow, programs = compiled(plain)
    t, x = torch.rand(()), torch.randn(3, 2)
    with torch.no_grad():
        flow.log_prob(x)
        made = programs.number
        expected = plain.transforms[0].vector_field.velocity_and_divergence(t, x)
        for make in COPIES.values():
            copied = make(flow, tmp_path / "flow.safetensors")
            field = next(part for part in copied.modules() if isinstance(part, VectorField))
            assert_same(field.velocity_and_divergence(t, x), expected)
            assert programs.number == made
            assert not any(callable(value) for value in vars(field).values())


def test_compiling_leaves_the_state_as_it_is():
    flow = flow_along(mlp())
    names = list(flow.state_dict())
    assert flow.compile(backend="eager") is None
    assert list(flow.state_dict()) == names
    flow.load_state_dict(flow.state_dict())


def test_new_weights_are_used_at_once():
    flow, programs = compiled(flow_along(mlp()))
    x = torch.randn(3, 2)
    before = flow.log_prob(x)
    perturbed(flow)
    assert_same([flow.log_prob(x)], [copy.deepcopy(flow).log_prob(x)])
    assert not torch.allclose(flow.log_prob(x), before)
    assert programs.number == 1


def test_functional_transforms_run_uncompiled():
    flow, programs = compiled(flow_along(mlp()))
    x = torch.randn(2)
    jacobian = torch.func.jacrev(flow.log_prob)(x)
    acceleration = flow.transforms[0].vector_field.velocity_derivative(
        torch.rand(()), x, 1.0, torch.ones(2)
    )
    assert programs.number == 0
    point = x.clone().requires_grad_()
    assert_same([jacobian], torch.autograd.grad(flow.log_prob(point), point))
    assert acceleration.shape == (2,)


@pytest.fixture
def by_steps_alone(monkeypatch):
    """A function after which every solve must run whole steps as programs."""

    def refuse(*_, **__):
        raise AssertionError("a solve went evaluation by evaluation")

    return lambda: monkeypatch.setattr("cnf.ode.solver.solvers", lambda: (refuse, refuse))


def stepping(method="midpoint", steps=3, **settings):
    return ODESolver(method=method, steps=steps, gradient="backprop", **settings)


@pytest.mark.parametrize("method", STEPPING)
def test_compiled_steps_give_the_same_density_gradient_and_count(method, by_steps_alone):
    flow = flow_along(mlp(2, 1), stepping(method), learn_end_time=True)
    once, programs = compiled(flow, backend="eager")
    x, context = torch.randn(4, 2), torch.randn(4, 1)

    def everything(flow):
        point, condition = (part.clone().requires_grad_() for part in (x, context))
        with count_evaluations(flow) as nfe:
            log_prob = flow.log_prob(point, condition)
        inputs = [point, condition, *flow.parameters()]
        gradient = torch.autograd.grad(log_prob.square().sum(), inputs)
        return log_prob, *gradient, torch.tensor(nfe.value)

    expected = everything(flow)
    by_steps_alone()
    assert_same(everything(once), expected)
    assert expected[-1] > 0
    assert programs.number == 1


@pytest.mark.parametrize("bottleneck", [False, True])
def test_compiled_steps_estimate_with_the_same_probes(bottleneck, by_steps_alone):
    divergence = Hutchinson(probes=2, bottleneck=bottleneck)
    flow = flow_along(mlp(3, hidden_features=(8, 2)), stepping(), divergence=divergence)
    once, _ = compiled(flow)
    objective = OBJECTIVES["likelihood by backprop"]
    x = torch.randn(4, 3)
    expected = loss_and_gradients(flow, objective, x)
    by_steps_alone()
    assert_same(loss_and_gradients(once, objective, x), expected)


def test_compiled_steps_meet_the_times_of_a_trajectory(by_steps_alone):
    flow = flow_along(mlp(), stepping())
    once, _ = compiled(flow, backend="eager")
    x, times = torch.randn(4, 2), torch.tensor([1.0, 0.9, 0.5, 0.45, 0.0])
    expected = flow.transforms[0].trajectory(x, times)
    by_steps_alone()
    assert_same(once.transforms[0].trajectory(x, times), expected)


def test_compiled_steps_take_points_of_single_and_times_of_double_precision(by_steps_alone):
    flow = flow_along(mlp(), stepping()).float()
    once, _ = compiled(flow, backend="eager")
    x, times = torch.randn(4, 2, dtype=torch.float32), torch.tensor([1.0, 0.5, 0.0]).double()
    expected = flow.transforms[0].trajectory(x, times)
    by_steps_alone()
    found = once.transforms[0].trajectory(x, times)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", [False, True], ids=["without gradient", "with gradient"])
def test_one_program_serves_every_number_of_steps_batch_size_and_time(gradient, by_steps_alone):
    by_steps_alone()
    flow, programs = compiled(flow_along(mlp(), start_time=0.1), backend="eager")
    with torch.set_grad_enabled(gradient):
        for rows, steps in [(5, 4), (7, 30), (64, 1)]:
            flow.using(solver=stepping(steps=steps)).log_prob(torch.randn(rows, 2))
    assert programs.number == 1


def test_a_hook_sees_the_points_of_every_evaluation():
    flow = flow_along(mlp(), stepping())
    once, _ = compiled(flow, backend="eager")
    x = torch.randn(3, 2)
    seen = []
    for each in (flow, once):
        points = []
        field = each.transforms[0].vector_field
        field.register_forward_pre_hook(lambda _, inputs, points=points: points.append(inputs[1]))
        each.log_prob(x)
        seen.append(points)
    assert_same(*seen)


FAILURES = {
    "budget": (stepping(max_evaluations=5), 1.0),
    "not a number": (stepping(), torch.nan),
    "infinity": (stepping(), torch.inf),
    "too many steps": (stepping(steps=4000), 1.0),
}


@pytest.mark.parametrize(("solver", "weight"), FAILURES.values(), ids=FAILURES)
def test_compiled_steps_fail_with_the_same_message_and_count(solver, weight):
    flow = flow_along(mlp(), solver)
    with torch.no_grad():
        flow.transforms[0].vector_field.layers[-1].linear.bias.fill_(weight)
    once, _ = compiled(flow, backend="eager")
    dtype = torch.float16 if solver.steps > 10**3 else torch.float64
    flow.to(dtype), once.to(dtype)
    x = torch.randn(3, 2, dtype=dtype)
    failures = []
    for each in (flow, once):
        with count_evaluations(each) as nfe, pytest.raises(ODEError) as raised, torch.no_grad():
            each.log_prob(x)
        failures.append((str(raised.value), nfe.value))
    assert failures[0] == failures[1]


def test_where_a_step_cannot_be_compiled_its_evaluations_are():
    calls = []

    def broken_at_first(graph, inputs):
        calls.append(graph)
        if len(calls) == 1:
            raise RuntimeError("Too much at once.")
        return graph

    flow = flow_along(mlp())
    once, _ = compiled(flow, backend=broken_at_first)
    x = torch.randn(3, 2)
    with pytest.warns(UserWarning, match=r"failed on a whole step") as warned:
        assert_same([once.log_prob(x)], [flow.log_prob(x)])
    assert "Too much at once" in str(warned[0].message)
    assert_same([once.log_prob(x)], [flow.log_prob(x)])  # and warns no more
    assert len(calls) == 2


def test_a_step_with_wrong_inputs_is_not_blamed_on_the_compiler(by_steps_alone):
    transform = ContinuousTransform(mlp(2, 3), solver=stepping())
    transform.vector_field.compile(backend="eager")
    x = torch.randn(4, 2)
    with pytest.raises(RuntimeError, match=r"shape|must match the size"):
        transform.to_base(x, torch.randn(4, 5))
    by_steps_alone()
    transform.to_base(x, torch.randn(4, 3))


def test_gradients_of_gradients_of_a_compiled_flow_are_refused():
    flow, _ = compiled(flow_along(mlp(), ONE_STEP), backend="aot_eager")
    x = torch.randn(3, 2, requires_grad=True)
    (score,) = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward"):
        score.square().sum().backward()


def broken(graph, inputs):
    raise RuntimeError("No working C++ compiler found\nand more.")


def test_a_flow_that_cannot_be_compiled_says_so_once_and_goes_on():
    flow = flow_along(CNF(2, hidden_features=(8, 8)).double().transforms[-1].vector_field)
    once = copy.deepcopy(flow)
    once.compile(backend=broken)
    x = torch.randn(3, 2)
    with (
        pytest.warns(UserWarning, match=r"install g\+\+") as warned,
        count_evaluations(once) as nfe,
    ):
        log_prob = once.log_prob(x)
    assert "No working C++ compiler found" in str(warned[0].message)
    assert len(warned) == 1
    assert nfe.value == 4
    assert_same([log_prob, once.sample(3).mean() * 0], [flow.log_prob(x), torch.zeros(())])


def test_what_the_user_got_wrong_is_not_blamed_on_the_compiler():
    field = mlp(2, 3)
    field.compile(backend="eager")
    programs = Programs()
    t, x = torch.rand(()), torch.randn(4, 2)
    with pytest.raises(RuntimeError, match=r"shape|must match the size"):
        field.velocity_and_divergence(t, x, torch.randn(4, 5))
    field.velocity_and_divergence(t, x, torch.randn(4, 3))
    assert programs.number == 1


class Printing(nn.Module):
    """A network with something that no program can hold."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, t, x):
        return self.linear(x) * len(str(x.sum().item()))


def test_a_network_that_cannot_be_one_program_still_gives_its_numbers():
    flow = flow_along(ModuleField(Printing(), 2))
    once, _ = compiled(flow)
    z = torch.randn(3, 2)
    assert_same([once.to_data(z)], [flow.to_data(z)])


def test_a_flow_without_a_field_has_nothing_to_compile():
    with pytest.raises(ValueError, match=r"flow must have a vector field"):
        Flow([ActNorm(2)]).compile()


def test_an_unknown_backend_is_refused_at_once():
    with pytest.raises(RuntimeError, match=r"nonsense"):
        flow_along(mlp()).compile(backend="nonsense")


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])  # whole steps, evaluations
def test_inductor_gives_the_same_density_and_gradient(gradient):
    # A fixed grid: an adaptive one itself varies with rounding.
    solver = ODESolver(method="euler", steps=2, gradient=gradient)
    # Few loops, for each takes the compiler a second.
    flow = flow_along(mlp(2, 1, hidden_features=(4,), layer="concat", activation="tanh"))
    once = copy.deepcopy(flow)
    once.compile()
    objective = partial(MaximumLikelihood, solver=solver)
    rows = torch.randn(6, 2), torch.randn(6, 1)

    expected = loss_and_gradients(flow, objective, *rows)
    assert_same(loss_and_gradients(once, objective, *rows), expected)


def test_without_a_cpp_compiler_inductor_is_done_without():
    import torch._inductor.config as inductor  # noqa: PLC0415 - takes seconds

    flow = flow_along(mlp(), ONE_STEP)
    once = copy.deepcopy(flow)
    once.compile()
    x = torch.randn(3, 2)
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}),
        pytest.warns(UserWarning, match=r"torch.compile failed .* install g\+\+"),
        torch.no_grad(),
    ):
        log_prob = once.log_prob(x)
    assert_same([log_prob], [flow.log_prob(x)])
