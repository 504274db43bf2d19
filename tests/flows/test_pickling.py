"""Law: every public object is pickled, copied and kept by torch.save, and is the same after it."""

import copy
import io
import pickle

import pytest
import torch
from torch.distributions import Independent, Laplace
from zoo import (
    ESTIMATES,
    EVERY_FLOW,
    FIELDS,
    LAYERED,
    MLP_FIELDS,
    NEURAL_ODES,
    TRANSFORMS,
    cnf,
    perturbed,
    rows_for,
    seeded,
)

from cnf import (
    Checkpoints,
    Exact,
    Flow,
    FlowMatching,
    History,
    Hutchinson,
    MaximumLikelihood,
    NeuralODE,
    ODEError,
    ODESolver,
    ReverseKL,
    TrainingConfig,
    TrainingError,
    certify,
)
from cnf.adapters import TorchBase, to_nflows_transform, to_normflows_flow, to_zuko
from cnf.data.toy import Checkerboard, Pinwheel, TwoSpirals
from cnf.diagnostics import check_gradients
from cnf.objectives import (
    IndependentPairing,
    LinearPath,
    OptimalTransport,
    SmoothedPath,
    VariancePreservingPath,
)
from cnf.regularizers import hjb_residual, kinetic_energy
from cnf.transforms import ExactLogDet, RussianRoulette, Transform, TruncatedSeries
from cnf.transforms.continuous import map_continuous

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # for speed

GRID = ODESolver(method="euler", steps=2)


def saved_by_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),  # noqa: S301 - our own
    "copy": copy.deepcopy,
    "torch.save": saved_by_torch,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)

PARTS = {
    **{name: make for name, make in FIELDS.items() if name not in MLP_FIELDS or name in LAYERED},
    **TRANSFORMS,
    **ESTIMATES,
    **{f"flow: {name}": make for name, make in EVERY_FLOW.items()},
    **{f"neural ODE: {name}": make for name, make in NEURAL_ODES.items()},
}


def value_of(part):
    """What a part makes of rows."""
    torch.manual_seed(1)
    x, context = rows_for(part, 2)
    if isinstance(part, NeuralODE):
        part.solver = GRID
        return part(x, context)
    if isinstance(part, Flow):
        return part.using(solver=GRID).log_prob(x, context, generator=seeded())
    if isinstance(part, Transform):
        part = map_continuous(part, lambda inner: inner.using(solver=GRID))
        return part.to_base_and_ladj(x, context, generator=seeded())
    return part.velocity_and_divergence(torch.tensor(0.3), x, context)


@every_way
@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
def test_a_part_of_a_flow_computes_the_same_after_it(make, way):
    part = make()
    torch.testing.assert_close(value_of(way(part)), value_of(part), rtol=1e-12, atol=1e-12)


def target(x):
    """The log-density of a target."""
    return -x.square().sum(-1)


def flow():
    torch.manual_seed(0)
    return cnf(2, solver=GRID)


def loss(objective, *inputs):
    return objective(*inputs, generator=seeded())


X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
OBJECTS = {
    "likelihood": (
        lambda: MaximumLikelihood(flow(), regularizers={kinetic_energy: 0.1}),
        lambda it: loss(it, X),
    ),
    "flow matching": (
        lambda: FlowMatching(flow(), SmoothedPath(0.1), pairing=OptimalTransport()),
        lambda it: loss(it, X),
    ),
    "reverse KL": (lambda: ReverseKL(flow(), target, draws=4), loss),
    "distribution": (lambda: flow()().expand((4,)), lambda it: it.log_prob(X)),
    "conditional distribution": (
        lambda: cnf(2, 1, solver=GRID)(X[:, :1]),
        lambda it: it.log_prob(X),
    ),
    "transform of a distribution": (lambda: flow()().transform, lambda it: it(X)),
    "base": (lambda: flow().base, lambda it: it.log_prob(X)),
    "base of torch": (
        lambda: TorchBase(Independent(Laplace(torch.zeros(2), torch.ones(2)), 1)),
        lambda it: it.log_prob(X),
    ),
    "for zuko": (lambda: to_zuko(flow()), lambda it: it().log_prob(X)),
    "for nflows": (lambda: to_nflows_transform(flow()), lambda it: it(X)),
    "for normflows": (lambda: to_normflows_flow(flow()), lambda it: it(X)),
    "toys": (
        lambda: [Pinwheel(), TwoSpirals(), Checkerboard()],
        lambda it: [part.log_prob(X) for part in it],
    ),
    "settings": (
        lambda: [
            ODESolver(),
            Exact(),
            Hutchinson(probes=2),
            TrainingConfig(),
            Checkpoints(folder="run"),
            ExactLogDet(),
            RussianRoulette(),
            TruncatedSeries(),
            LinearPath(),
            VariancePreservingPath(),
            IndependentPairing(),
        ],
        repr,
    ),
    "regularizers": (lambda: [kinetic_energy, hjb_residual], lambda it: [a.name for a in it]),
    "reports": (lambda: [certify(flow(), X), check_gradients(flow(), X, tolerance=9.0)], str),
    "errors": (
        lambda: [TrainingError("stopped", History()), ODEError("failed")],
        lambda it: [(str(error), str(vars(error))) for error in it],
    ),
}


@every_way
@pytest.mark.parametrize(("make", "value"), OBJECTS.values(), ids=OBJECTS)
def test_an_object_is_the_same_after_it(make, value, way):
    thing = make()
    found, expected = value(way(thing)), value(thing)
    if isinstance(expected, str):
        assert found == expected
    else:
        assert_same(found, expected)


def assert_same(found, expected):
    if isinstance(expected, list) and not isinstance(expected[0], torch.Tensor):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_distribution_keeps_its_parameters_shared_with_its_flow_after_it():
    distribution = copy.deepcopy(flow()())
    before = distribution.log_prob(X)
    perturbed(distribution.flow)
    assert not torch.allclose(distribution.log_prob(X), before)
