"""Laws of what a transform and a base say of themselves: kinds of likelihood, supports, draws."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import HalfNormal, Independent, Normal, TanhTransform, Uniform, constraints
from zoo import (
    BASES,
    ESTIMATES,
    EVERY_FLOW,
    FIELDS,
    TRANSFORMS,
    WITHOUT_DENSITY,
    base_rows_for,
    cnf,
    mlp,
    rows_for,
    seeded,
)

from cnf import Exact, Flow, Hutchinson, Standardize
from cnf.adapters import FromTorch, TorchBase
from cnf.bases import Base, ConditionalNormal, OrderedNormal, StandardNormal, UniformOnManifold
from cnf.flows import MixtureOfFlows
from cnf.manifolds import Product, Sphere
from cnf.saving.description import FAMILIES, own_classes
from cnf.transforms import (
    Abs,
    ActNorm,
    Affine,
    Augment,
    Chain,
    ContinuousTransform,
    FactorOut,
    Flatten,
    LogGaps,
    Logit,
    Permute,
    Round,
    Sort,
    StochasticPermutation,
    Transform,
    TransformedBase,
    Unconstrain,
)
from cnf.transforms.continuous import map_continuous
from cnf.transforms.coupling import Coupling
from cnf.transforms.support.constraints import covers


class Circle(Transform):
    """The unit circle in the plane, by its angle."""

    def __init__(self):
        super().__init__(2)

    base_features = 1
    codomain = constraints.independent(constraints.interval(-math.pi, math.pi), 1)

    def _to_base(self, x, context, generator):
        return torch.atan2(x[..., 1:], x[..., :1]), x.new_zeros(x.shape[:-1])

    def _to_data(self, z, context, generator):
        return torch.cat([z.cos(), z.sin()], -1), z.new_zeros(z.shape[:-1])


class Holding(Base):
    """A base that holds a flow, and passes everything on."""

    def __init__(self, flow):
        super().__init__(flow.features, flow.context_features)
        self.flow = flow

    def _log_prob(self, z, context, generator):
        return self.flow.log_prob(z, context, generator=generator)

    def _rsample(self, shape, context, generator):
        return self.flow.rsample(() if context is not None else shape, context, generator=generator)


def half_normal(features):
    return TorchBase(Independent(HalfNormal(torch.ones(features)), 1))


@torch.no_grad()
def mass(flow, reach=8.0):
    """The integral of the density over a square."""
    side = torch.linspace(-reach, reach, 401)
    x = torch.cartesian_prod(side, side)
    return float(flow.log_prob(x).exp().sum() * (side[1] - side[0]) ** 2)


def test_absolute_values_of_a_normal_are_refused():
    message = r"base must have its density within the codomain of Abs.* such as HalfNormal"
    with pytest.raises(ValueError, match=message):
        Flow([Abs(2)])
    with pytest.raises(ValueError, match=r"Choose OrderedNormal as base, or put LogGaps"):
        Flow([Sort(2)])
    with pytest.raises(ValueError, match=r"the codomain of Round"):
        Flow([Round(2)])
    with pytest.raises(
        ValueError, match=r"Affine must have its density within the codomain of Abs"
    ):
        Flow([Abs(2), Affine(2)])
    with pytest.raises(ValueError, match=r"within the codomain of FromTorch"):
        Flow([FromTorch(TanhTransform().inv, 2)])


def test_a_surjection_on_its_own_half_is_exact_and_has_the_mass_one():
    flow = Flow([Abs(2)], half_normal(2))
    assert flow.likelihood == "exact"
    assert not flow.chain.is_bijective
    assert mass(flow) == pytest.approx(1, abs=1e-3)
    x = torch.randn(50, 2)
    torch.testing.assert_close(flow.log_prob(x), StandardNormal(2).log_prob(x).to(x))


def test_a_base_smaller_than_what_is_reached_is_exact():
    flow = Flow([Affine(2)], TorchBase(Independent(Uniform(-torch.ones(2), torch.ones(2)), 1)))
    assert flow.likelihood == "exact"
    assert mass(flow, 2.0) == pytest.approx(1, abs=0.02)


def test_a_circle_in_the_plane_has_a_density_on_the_circle_alone():
    base = TorchBase(Independent(Uniform(*(torch.tensor([s * math.pi]) for s in (-1.0, 1.0))), 1))
    assert Flow([Circle()], base).likelihood == "on_manifold"
    with pytest.raises(
        ValueError, match="base must have its density within the codomain of Circle"
    ):
        Flow([Circle()])


@pytest.mark.parametrize("as_base", [lambda flow: flow, Holding], ids=["flow", "base"])
def test_a_flow_inside_of_a_base_is_no_more_exact_than_it_is(as_base):
    inner = Flow([ContinuousTransform(mlp(), divergence=Hutchinson())])
    flow = Flow([Affine(2)], as_base(inner))
    assert flow.likelihood == "estimate"

    exact = flow.using(divergence=Exact())
    assert (exact.likelihood, flow.likelihood) == ("exact", "estimate")
    x = torch.randn(5, 2)
    torch.testing.assert_close(exact.log_prob(x), inner.using(divergence=Exact()).log_prob(x))
    assert {id(p) for p in exact.parameters()} == {id(p) for p in flow.parameters()}
    one, other = (flow.log_prob(x, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("as_base", [lambda flow: flow, Holding], ids=["flow", "base"])
def test_the_context_reaches_into_a_base(as_base):
    inner = Flow([ContinuousTransform(mlp(context_features=3))])
    flow = Flow([Affine(2)], as_base(inner))
    assert flow.context_features == 3
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    torch.testing.assert_close(flow.log_prob(x, context), inner.log_prob(x, context))
    draws = (part.sample(context=context, generator=seeded()) for part in (flow, inner))
    torch.testing.assert_close(*draws)
    with pytest.raises(ValueError, match="transforms and base must agree on context_features"):
        Flow([ContinuousTransform(mlp(context_features=2))], as_base(inner))


def test_the_standard_error_of_an_estimate_in_a_base_is_not_left_out():
    by_probes = Flow([ContinuousTransform(mlp(), divergence=Hutchinson(probes=4))])
    flow = Flow(by_probes.chain, Holding(by_probes))
    x = torch.randn(5, 2)
    assert (Flow(by_probes.chain).log_prob_and_error(x)[1] > 0).all()
    with pytest.raises(ValueError, match=r"base must be exact .* 'estimate'"):
        flow.log_prob_and_error(x)
    assert (flow.using(divergence=Exact()).log_prob_and_error(x)[1] == 0).all()


def test_a_lower_bound_inside_of_a_base_is_one():
    flow = Flow([Affine(2)], Flow([Augment(2, 1)]))
    assert flow.likelihood == "lower_bound"
    assert flow.log_prob(torch.zeros(3, 2), importance_samples=4).shape == (3,)


def test_a_final_method_of_a_base_is_refused():
    with pytest.raises(TypeError, match=r"override log_prob, which is final; write _log_prob"):
        type("Mine", (Base,), {"log_prob": lambda self, z: z})


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_draws_where_it_says_so(make):
    transform = make()
    context = torch.randn(transform.context_features) if transform.context_features else None
    z = base_rows_for(transform, 20)

    x, again = (transform.to_data(z, context, generator=seeded()) for _ in range(2))
    torch.testing.assert_close(x, again)
    drawn = [transform.to_base(x, context, generator=g) for g in (seeded(), torch.Generator())]
    differs = not torch.allclose(*drawn)
    assert differs == transform.stochastic_to_base
    if transform.is_bijective:
        assert transform.base_features == transform.features
    if transform.support is not None:
        assert transform.support.check(x).all()
    if transform.codomain is not None:
        assert transform.codomain.check(drawn[0]).all()


class Nested(nn.Module):
    """A module that nobody has told how to change its parts."""

    def __init__(self, part):
        super().__init__()
        self.inner = nn.ModuleDict({"part": part, "other": nn.Linear(2, 2)})


def test_continuous_parts_are_changed_wherever_they_are():
    module = Nested(FactorOut([ContinuousTransform(mlp())], 4))
    changed = map_continuous(module, lambda part: part.using(divergence=Hutchinson()))

    assert changed.inner["part"].likelihood == "estimate"
    assert module.inner["part"].likelihood == "exact"
    assert changed.inner["other"] is module.inner["other"]
    assert map_continuous(module.inner["other"], pytest.fail) is module.inner["other"]
    with pytest.raises(ValueError, match="change must keep the 2 features"):
        map_continuous(module, lambda _: ContinuousTransform(mlp(3)))
    with pytest.raises(TypeError, match="change must be a"):
        map_continuous(module, lambda _: None)


R, POSITIVE = constraints.real, constraints.positive


@pytest.mark.parametrize(
    ("larger", "smaller", "does"),
    [
        (R, POSITIVE, True),
        (POSITIVE, R, False),
        (constraints.real_vector, R, True),
        (constraints.nonnegative, POSITIVE, True),
        (constraints.unit_interval, constraints.interval(0.2, 0.8), True),
        (constraints.unit_interval, constraints.interval(0.2, 1.8), False),
        (constraints.nonnegative_integer, POSITIVE, False),
        (R, constraints.simplex, False),
        (constraints.simplex, constraints.simplex, True),
        (constraints.cat([R, POSITIVE], lengths=[1, 2]), POSITIVE, True),
        (constraints.cat([R, POSITIVE], lengths=[1, 2]), R, False),
        (R, constraints.independent(constraints.cat([R, POSITIVE]), 1), True),
    ],
    ids=str,
)
def test_one_constraint_covers_another(larger, smaller, does):
    assert covers(larger, smaller) is does


def test_permutations_pass_a_support_on():
    flow = Flow([Permute([1, 0]), Unconstrain(["positive", "positive"])])
    assert flow.likelihood == "exact"
    with pytest.raises(ValueError, match="within the codomain of Abs"):
        Flow([Abs(2), Permute([1, 0])])
    assert Chain([Permute([1, 0])]).codomain is None
    assert Flow([Logit(2)]).chain.codomain is constraints.real_vector


@pytest.mark.parametrize(
    ("parts", "base"),
    [
        ([Permute([1, 0]), Unconstrain(["positive", "real"])], None),
        ([Chain([Permute([1, 0])]), Unconstrain(["positive", "real"])], None),
        ([StochasticPermutation(2), Unconstrain(["positive", "real"])], None),
        ([StochasticPermutation(4, point_features=2), LogGaps(4, point_features=2)], None),
        ([Sort(2), Permute([1, 0])], OrderedNormal(2)),
        ([Permute([1, 2, 0, 3, 4, 5])], UniformOnManifold(Product([Sphere(3), Sphere(3)]))),
    ],
    ids=str,
)
def test_a_permutation_passes_no_support_on_that_tells_features_apart(parts, base):
    with pytest.raises(ValueError, match=r"same support in all features behind (Stoch|Permute)"):
        Flow(parts, base)


def test_a_permutation_of_points_passes_on_a_support_of_points():
    columns = ["positive", "real"]
    flow = Flow([StochasticPermutation(4, point_features=2), Unconstrain(columns * 2)])
    x = torch.tensor([[1.0, -1.0, 2.0, -3.0], [-1.0, 1.0, 2.0, -3.0]])
    found = flow.log_prob(x)
    assert found[0].isfinite()
    assert found[1] == -math.inf
    assert Flow([Flatten((2,)), Unconstrain(columns)]).log_prob(x[0, :2]).isfinite()


def test_the_support_of_a_flow_without_opinion_is_the_support_of_its_base():
    flow = Flow([Permute([1, 0])], half_normal(2))
    outside: Tensor = flow.log_prob(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    assert outside[0] == -math.inf
    assert outside[1].isfinite()


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_contributions_of_features_sum_to_the_ladj(make):
    transform = make()
    x, context = rows_for(transform, 7)
    try:
        contributions = transform.contributions(x, context)
    except NotImplementedError:
        assert not isinstance(transform, Affine | Standardize | ActNorm | Logit | Coupling)
        return
    assert contributions.shape == transform.to_base(x, context).shape
    torch.testing.assert_close(contributions.sum(-1), transform.to_base_and_ladj(x, context)[1])


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_a_base_draws_from_its_density(make):
    base = make()
    with torch.no_grad():
        draws = base.rsample(torch.Size([20_000]), generator=seeded())
        again = base.rsample(torch.Size([20_000]), generator=seeded())
    torch.testing.assert_close(draws, again)
    assert base.support.check(draws).all()
    assert base.likelihood == "exact"

    # E[q / p] = 1 under p for a density q: here a narrow normal where the draws are, and uniform on
    # compact manifolds.
    def log_q(factor, part):
        if getattr(factor, "log_volume", math.inf) < math.inf:
            return part.new_full(part.shape[:-1], -factor.log_volume)
        return Independent(Normal(part.mean(0), part.std(0) / 2), 1).log_prob(part)

    manifold = getattr(base.support, "manifold", None)
    factors = getattr(manifold, "factors", [manifold])
    parts = manifold.split(draws) if len(factors) > 1 else [draws]
    ratio = (sum(map(log_q, factors, parts)) - base.log_prob(draws)).exp()
    error = ratio.std() / len(ratio) ** 0.5
    assert abs(ratio.mean() - 1) < 4 * error + 1e-3  # 4 standard errors: 6e-5


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_a_base_has_no_density_outside_of_its_support(make):
    base = make()
    z = torch.randn(2, 40, base.features)
    inside = base.support.check(z)
    with torch.no_grad():
        assert ((base.log_prob(z) > -math.inf) == inside).all()


CONDITIONAL_BASES = {
    "conditional normal": lambda: ConditionalNormal(2, 3),
    "transformed": lambda: TransformedBase([Affine(2)], ConditionalNormal(2, 3)),
    "mixture of flows": lambda: MixtureOfFlows([cnf(2, 3)]),
}


@pytest.mark.parametrize("make", CONDITIONAL_BASES.values(), ids=CONDITIONAL_BASES)
def test_rows_with_contexts_of_their_own_share_no_draw(make):
    base, context = make(), torch.zeros(4, 3)
    with torch.no_grad():
        draws = base.rsample(torch.Size([5, 4]), context)
        assert len(set(draws[..., 0].flatten().tolist())) == 20
        assert base.rsample(torch.Size([5, 4]), context[:1]).shape == (5, 4, 2)
        for shape in ((), (3,), (4, 1)):
            with pytest.raises(ValueError, match=r"end in the batch shape \(4,\) of context"):
                base.rsample(torch.Size(shape), context)


def test_every_class_that_a_flow_may_have_as_a_part_is_in_the_zoo():
    found = set()
    for zoo in (FIELDS, TRANSFORMS, ESTIMATES, BASES, EVERY_FLOW, WITHOUT_DENSITY):
        for part in itertools.chain(*(make().modules() for make in zoo.values())):
            found |= {type(part), *map(type, vars(part).values())}
    missing = {name for name, cls in own_classes().items() if cls not in found}
    assert missing <= {"Exact", "Hutchinson"}  # which every flow takes: tests/test_divergence.py


def test_names_that_a_file_keeps_are_told_apart():
    def classes(family):
        for cls in family.__subclasses__():
            yield cls
            yield from classes(cls)

    named = {cls for family in FAMILIES for cls in [family, *classes(family)]}
    own = [cls.__name__ for cls in named if cls.__module__.startswith("cnf.")]
    assert len(own) == len(set(own))
