"""Laws of contexts: whatever their unit, each part of a flow sees them scaled."""

import pickle

import pytest
import torch
from zoo import (
    ESTIMATES,
    EVERY_FLOW,
    FIELDS,
    TRANSFORMS,
    UserNetwork,
    fitting_flow,
    perturbed,
    rows_for,
    seeded,
)

from cnf import Flow, ModuleField, ODESolver, load, save
from cnf.transforms import ContinuousTransform
from cnf.vector_fields import LinearField
from cnf.vector_fields.conditioning import ContextScaling, context_scalings

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

GRID = ODESolver(method="rk4", steps=2, gradient="backprop")
UNITS = [(1e-3, 2000.0), (1.0, 2000.0), (1e3, 0.0)]

OF_OTHERS = {
    "user with context": "a network of the user may look classes up by the context",
    "zuko with context": "a flow of zuko may have been trained already",
    "nflows with context": "a flow of nflows may have been trained already",
}
"""What sees the context as it comes, and why."""

SPECIMENS = {
    **{
        name: lambda make=make: Flow([ContinuousTransform(make(), solver=GRID)])
        for name, make in FIELDS.items()
    },
    **{
        name: lambda make=make: fitting_flow(make()).using(solver=GRID)
        for name, make in {**TRANSFORMS, **ESTIMATES}.items()
    },
    **{
        f"flow: {name}": lambda make=make: make().using(solver=GRID)
        for name, make in EVERY_FLOW.items()
    },
}
CONDITIONAL = {
    name: make
    for name, make in SPECIMENS.items()
    if ("context" in name or "conditional" in name) and name not in OF_OTHERS
}


def awaiting(make):
    """A specimen whose scalings of the context are still to be set."""
    torch.manual_seed(0)
    flow = make()
    for scaling in context_scalings(flow):
        scaling.is_initialized.fill_(False)
    return flow


def results(flow, x, context):
    z = torch.randn(len(x), flow.base.features, generator=seeded())
    return (
        flow.log_prob(x, context, generator=seeded()),
        flow.to_data(z, context, generator=seeded()),
    )


def test_the_names_of_specimens_tell_which_take_a_context():
    for name, make in SPECIMENS.items():
        takes_one = name in CONDITIONAL or name in OF_OTHERS
        flow = make()
        assert takes_one == bool(flow.context_features), name
        if not takes_one or name in OF_OTHERS:
            assert not context_scalings(flow), name


@pytest.mark.parametrize("make", CONDITIONAL.values(), ids=CONDITIONAL)
@torch.no_grad()
def test_no_part_of_a_flow_sees_a_raw_context(make):
    flow = awaiting(make)
    assert flow.context_features
    x, context = rows_for(flow, 5)
    flow.initialize(x, context, generator=seeded())
    expected = results(flow, x, context)
    for k, m in UNITS:
        other = awaiting(make)
        other.initialize(x, k * context + m, generator=seeded())
        found = results(other, x, k * context + m)
        # 2000 + 1e-3 c has 4e-10 of rounding in c, which steep fields make 1e4 times as large.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def without_scalings(flow):
    """The flow as it was pickled before there were scalings of the context."""
    for part in flow.modules():
        part._modules.pop("context_scaling", None)
    return pickle.loads(pickle.dumps(flow))  # noqa: S301 - of our own making


@pytest.mark.parametrize("make", CONDITIONAL.values(), ids=CONDITIONAL)
@torch.no_grad()
def test_what_was_kept_before_there_were_scalings_gives_the_same_numbers(make, tmp_path):
    flow = awaiting(make)
    for scaling in context_scalings(flow):
        scaling.set(torch.zeros_like(scaling.mean), torch.ones_like(scaling.mean))
    x, context = rows_for(flow, 5)
    expected = results(flow, x, context)
    old = without_scalings(awaiting(make))
    assert not context_scalings(old)
    save(old, tmp_path / "old.safetensors")
    given = awaiting(make)
    given.load_state_dict(old.state_dict())
    for found in (old, load(tmp_path / "old.safetensors"), given):
        assert not any(scaling.needs_initialization for scaling in context_scalings(found))
        torch.testing.assert_close(results(found, x, context), expected, rtol=0, atol=0)


def test_the_solution_of_a_linear_field_is_that_of_the_scaled_context():
    field = perturbed(LinearField(2, 3))
    x, context = rows_for(field, 5)
    transform = ContinuousTransform(field, solver=ODESolver(rtol=1e-9, atol=1e-9))
    transform.initialize(x, 50 * context + 7)
    solution, _ = field.solution(x, 50 * context + 7, start=0.0, end=1.0)
    torch.testing.assert_close(transform.to_data(x, 50 * context + 7), solution)


class ScalingNetwork(UserNetwork):
    """A network of a user that scales its context."""

    def __init__(self):
        super().__init__(2, 3)
        self.scaling = ContextScaling(3)

    def forward(self, t, x, context=None):
        return super().forward(t, x, self.scaling(context))


@pytest.mark.parametrize("network", [ScalingNetwork, lambda: UserNetwork(2, 3)])
def test_the_context_of_a_network_of_the_user_is_scaled_where_it_asks_for_it(network):
    transform = ContinuousTransform(ModuleField(network(), 2, 3), solver=GRID)
    seen = []
    transform.vector_field.network.inner.register_forward_pre_hook(
        lambda layer, inputs: seen.append(inputs[0][..., -3:])
    )
    x, context = rows_for(transform, 50)
    transform.initialize(x, 50 * context + 7)
    transform.to_base(x, 50 * context + 7)
    scaled = network is ScalingNetwork
    expected = (context - context.mean(0)) / context.std(0) if scaled else 50 * context + 7
    torch.testing.assert_close(seen[0], expected)
