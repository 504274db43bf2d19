"""Adapters change no value, either way, and guard against what the other libraries do silently."""

import copy
import math
import pickle
import sys
import threading

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import normflows.distributions.base as nf_bases
import numpy as np
import pytest
import torch
import zuko
from torch import nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    ExpTransform,
    Gamma,
    Independent,
    MixtureSameFamily,
    Normal,
    StickBreakingTransform,
    TransformedDistribution,
)
from torch.distributions.transforms import AbsTransform, SigmoidTransform
from zoo import BOUNDS, cnf, perturbed, seeded

from cnf import (
    Flow,
    MaximumLikelihood,
    ODEError,
    ODESolver,
    ReverseKL,
    Standardize,
    TrainingConfig,
    count_evaluations,
    fit,
)
from cnf.adapters import (
    FromNflows,
    FromNormflows,
    FromTorch,
    FromZuko,
    TorchBase,
    from_nflows,
    from_normflows,
    from_torch,
    from_zuko,
    to_nflows_transform,
    to_normflows_flow,
    to_pyro,
    to_zuko,
)
from cnf.baselines import build
from cnf.bases import StandardNormal

pytestmark = [
    pytest.mark.usefixtures("shapes_unchecked"),  # whole solves
    # By normflows and by nflows.
    pytest.mark.filterwarnings("ignore:torch.lu is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated"),
]

SMALL = {"hidden_features": (8, 8)}

ZUKO = {
    "maf": lambda c: zuko.flows.MAF(3, c, transforms=2, **SMALL),
    "nsf": lambda c: zuko.flows.NSF(3, c, transforms=2, **SMALL),
    "realnvp": lambda c: zuko.flows.RealNVP(3, c, transforms=2, **SMALL),
    "naf": lambda c: zuko.flows.NAF(3, c, transforms=2, **SMALL),
    "unaf": lambda c: zuko.flows.UNAF(3, c, transforms=2, **SMALL),
    "gf": lambda c: zuko.flows.GF(3, c, transforms=2),
    "bpf": lambda c: zuko.flows.BPF(3, c, transforms=2, **SMALL),
    "inverse": lambda c: zuko.flows.Flow(
        zuko.flows.MAF(3, c, transforms=2, **SMALL).transform.inv, zuko.flows.MAF(3).base
    ),
}


def spline_layers(context=None):
    """Layers of nflows, with weights away from their start."""
    return nflows.transforms.CompositeTransform(
        [
            nflows.transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                features=3,
                hidden_features=8,
                context_features=context,
                num_blocks=1,
                tails="linear",
                tail_bound=4.0,
                dropout_probability=0.5,
            ),
            nflows.transforms.ReversePermutation(3),
            nflows.transforms.LULinear(3),
        ]
    )


def nflows_flow(context=None, embedding=None):
    """A flow of nflows."""
    base = nflows.distributions.StandardNormal([3])
    theirs = nflows.flows.Flow(spline_layers(context), base, embedding)
    return perturbed(theirs.double(), 0.1).eval()


def normflows_flow():
    """A flow of normflows."""
    layers = [
        normflows.flows.CoupledRationalQuadraticSpline(3, 1, 8),
        normflows.flows.LULinearPermute(3),
        normflows.flows.AutoregressiveRationalQuadraticSpline(3, 1, 8),
    ]
    theirs = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(3), layers)
    return perturbed(theirs.double(), 0.1).eval()


def residual(features=3, **settings):
    """A residual layer of normflows that contracts by about a half in each direction."""
    inner, outer = nn.Linear(features, 16), nn.Linear(16, features)
    nn.init.orthogonal_(inner.weight, gain=0.8)
    with torch.no_grad():
        outer.weight.copy_(inner.weight.T)
    return normflows.flows.Residual(nn.Sequential(inner, nn.Tanh(), outer), **settings).double()


def gradients_agree(first, second, module):
    """The gradients of two values in every parameter of a module are the same."""
    found = [
        torch.autograd.grad(value.sum(), list(module.parameters()), allow_unused=True)
        for value in (first, second)
    ]
    assert any(gradient is not None for gradient in found[0])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("make", ZUKO.values(), ids=ZUKO)
def test_a_flow_of_zuko_keeps_its_values_draws_and_gradients(make, context):
    theirs = make(context)
    ours = from_zuko(theirs, context)
    x, c = torch.randn(4, 3), torch.randn(4, context) if context else None
    expected = theirs(c).log_prob(x)
    found = ours.log_prob(x, c)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients_agree(found, expected, theirs)
    torch.manual_seed(1)
    drawn = theirs(c).sample((5,))
    torch.manual_seed(1)
    torch.testing.assert_close(ours.sample(5, c), drawn, rtol=1e-12, atol=1e-12)
    assert (ours.likelihood, ours.features) == ("exact", 3)


def test_a_lazy_distribution_without_transforms_is_a_base():
    theirs = zuko.mixtures.GMM(2, components=3)
    ours = from_zuko(theirs)
    x = torch.randn(5, 2)
    torch.testing.assert_close(ours.log_prob(x), theirs().log_prob(x))
    assert {id(p) for p in ours.parameters()} == {id(p) for p in theirs.parameters()}
    assert ours.sample((3, 2), generator=seeded()).shape == (3, 2, 2)
    with pytest.raises(NotImplementedError, match="Mixture cannot be drawn from differentiably"):
        ours.rsample(3)


@pytest.mark.parametrize("context", [0, 2, "embedded"])
def test_a_flow_of_nflows_keeps_its_values_draws_and_gradients(context):
    embedding = nn.Linear(4, 2) if context == "embedded" else None
    theirs = nflows_flow(2 if context else None, embedding)
    size = 4 if embedding else context
    ours = from_nflows(theirs, size)
    x, c = torch.randn(4, 3), torch.randn(4, size) if size else None
    expected = theirs.log_prob(x, c)
    found = ours.log_prob(x, c)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients_agree(found, expected, theirs)
    torch.manual_seed(1)
    drawn = theirs.sample(1, c)
    torch.manual_seed(1)
    same = ours.sample(1, c)
    torch.testing.assert_close(same, drawn.transpose(0, 1) if size else drawn)


def test_a_flow_of_normflows_keeps_its_values_draws_and_gradients():
    theirs = normflows_flow()
    ours = from_normflows(theirs)
    x = torch.randn(4, 3)
    expected = theirs.log_prob(x)
    found = ours.log_prob(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients_agree(found, expected, theirs)
    torch.manual_seed(1)
    drawn, log_prob = theirs.sample(5)
    torch.manual_seed(1)
    same = ours.rsample_and_log_prob(5)
    torch.testing.assert_close(same, (drawn, log_prob), rtol=1e-10, atol=1e-10)


def test_a_conditional_flow_of_normflows_keeps_its_values():
    layer = normflows.flows.AutoregressiveRationalQuadraticSpline(3, 1, 8, num_context_channels=2)
    base = normflows.distributions.DiagGaussian(3, trainable=False)
    theirs = perturbed(normflows.ConditionalNormalizingFlow(base, [layer]).double(), 0.1).eval()
    x, context = torch.randn(4, 3), torch.randn(4, 2)
    found = from_normflows(theirs, 2).log_prob(x, context)
    torch.testing.assert_close(found, theirs.log_prob(x, context), rtol=1e-12, atol=1e-12)


def test_images_of_normflows_stay_images():
    block = normflows.flows.GlowBlock(4, 8)
    theirs = normflows.NormalizingFlow(normflows.distributions.DiagGaussian((4, 2, 2)), [block])
    theirs = theirs.double()
    ours = from_normflows(theirs)
    x = torch.randn(6, 4, 2, 2)
    ours.initialize(x)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-10, atol=1e-10)
    assert ours.sample(3).shape == (3, 4, 2, 2)


def test_a_torch_distribution_keeps_its_values_and_draws():
    loc = torch.tensor([0.5, -1.0], requires_grad=True)
    base = Independent(Normal(loc, torch.tensor([1.0, 2.0])), 1)
    theirs = TransformedDistribution(base, [AffineTransform(0.3, 1.5), ExpTransform()])
    ours = from_torch(theirs)
    x = torch.randn(5, 2).exp()
    found, expected = ours.log_prob(x), theirs.log_prob(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(value.sum(), loc)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes)
    torch.manual_seed(1)
    drawn = theirs.sample((5,))
    torch.manual_seed(1)
    torch.testing.assert_close(ours.sample(5), drawn)
    assert ours.log_prob(torch.tensor([-1.0, 1.0])) == -math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bounded", [False, True])
def test_a_torch_distribution_follows_a_move_to_another_dtype(dtype, bounded):
    """Though its own tensors, of float32, stay what they are."""
    one = torch.ones(2, dtype=torch.float32)
    theirs = Independent(Gamma(one, one) if bounded else Normal(0 * one, one), 1)
    flow = from_torch(theirs).to(dtype)
    x, log_prob = flow.sample_and_log_prob(3)
    assert x.dtype == log_prob.dtype == dtype
    mixed = torch.cat([x, -x.abs()])  # outside of the support where it is bounded
    assert flow.log_prob(mixed).dtype == dtype
    torch.testing.assert_close(flow.log_prob(x), theirs.log_prob(x.float()).to(dtype))


MIXTURES = {
    "torch": lambda: from_torch(
        MixtureSameFamily(
            Categorical(torch.ones(3)), Independent(Normal(torch.zeros(3, 2), torch.ones(3, 2)), 1)
        )
    ),
    "zuko": lambda: from_zuko(zuko.mixtures.GMM(2, components=3)),
    "normflows": lambda: from_normflows(
        normflows.NormalizingFlow(normflows.distributions.GaussianMixture(3, 2), [])
    ),
    "named": lambda: build("gmm", 2, size=3),
}


@pytest.mark.parametrize("shape", [0, (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("make", MIXTURES.values(), ids=MIXTURES)
def test_no_draws_from_a_mixture_are_an_empty_tensor(make, shape):
    flow = make()
    x, log_prob = flow.sample_and_log_prob(shape)
    assert x.shape == (*torch.empty(shape).shape, 2)
    assert log_prob.shape == x.shape[:-1]
    assert x.dtype == flow.sample(1).dtype


@pytest.mark.parametrize("make", MIXTURES.values(), ids=MIXTURES)
def test_draws_from_a_mixture_have_no_gradient(make):
    flow = make()
    assert not flow.base.has_rsample
    with pytest.raises(NotImplementedError, match=r"Mixture\w* cannot be drawn from"):
        flow.rsample(3)


CONDITIONAL_BASES = {
    "context": lambda: nf_bases.ConditionalDiagGaussian(2, nn.Linear(3, 4)),
    "class": lambda: nf_bases.ClassCondDiagGaussian(2, 3),
    "class of glow": lambda: nf_bases.GlowBase((2, 2, 2), num_classes=3),
    "class of an affine map": lambda: nf_bases.AffineGaussian((2, 2, 2), (2, 1, 1), 3),
}


@pytest.mark.parametrize("make", CONDITIONAL_BASES.values(), ids=CONDITIONAL_BASES)
def test_a_conditional_base_of_normflows_is_refused(make):
    with pytest.raises(TypeError, match=r"no context or class of its own; got .* of normflows"):
        from_normflows(normflows.NormalizingFlow(make(), []))


def test_a_base_of_normflows_whose_density_is_not_of_its_draws_is_refused():
    theirs = nf_bases.GaussianPCA(1, 1, sigma=1.0)
    x = torch.linspace(-20, 20, 4001).unsqueeze(1)
    assert theirs.log_prob(x).exp().sum() * 0.01 > 2  # of what is to be 1
    with pytest.raises(TypeError, match="GaussianPCA of normflows cannot be a base"):
        from_normflows(normflows.NormalizingFlow(theirs, []))


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_base_of_normflows_without_tensors_has_draws_and_follows_a_move(dtype):
    theirs = nf_bases.Uniform(2, low=-1.0, high=3.0)
    flow = from_normflows(normflows.NormalizingFlow(theirs, [])).to(dtype)
    x, log_prob = flow.sample_and_log_prob(100, generator=seeded())
    assert x.dtype == log_prob.dtype == dtype
    assert x.min() < 0
    assert x.max() > 2
    torch.testing.assert_close(log_prob, torch.full_like(log_prob, -2 * math.log(4)))
    assert flow.log_prob(torch.tensor([4.0, 0.0], dtype=dtype)) == -math.inf


def test_a_torch_distribution_on_part_of_the_line_is_a_base():
    theirs = Independent(Gamma(torch.full((2,), 2.0), torch.ones(2)), 1)
    ours = from_torch(theirs)
    x = torch.tensor([[1.0, 2.0], [-1.0, 2.0]])
    torch.testing.assert_close(ours.log_prob(x)[0], theirs.log_prob(x[0]))
    assert ours.log_prob(x)[1] == -math.inf
    torch.testing.assert_close(ours(None).base.log_prob(x[0]), theirs.log_prob(x[0]))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FromTorch(AbsTransform(), 2), ValueError, "bijection between vectors of 2"),
        (lambda: FromTorch(StickBreakingTransform(), 2), ValueError, "bijection between vectors"),
        (lambda: FromTorch(nn.Linear(2, 2), 2), TypeError, "must be a Transform; got Linear"),
        (lambda: from_torch(Normal(0.0, 1.0)), ValueError, r"got \(\) and \(\).*Independent"),
        (lambda: from_torch(nn.Linear(2, 2)), TypeError, "Distribution; got Linear"),
        (lambda: TorchBase(3), TypeError, "got int"),
        (lambda: from_nflows(nn.Linear(2, 2)), TypeError, "flow of nflows; got Linear"),
        (lambda: from_normflows(nn.Linear(2, 2)), TypeError, "of normflows; got Linear"),
        (lambda: to_zuko(nn.Linear(2, 2)), TypeError, "flow must be a Flow; got Linear"),
        (
            lambda: FromNormflows(normflows.flows.BatchNorm(), 2),
            TypeError,
            "BatchNorm of normflows cannot be wrapped: it normalises each batch",
        ),
        (
            lambda: FromNflows(nflows.transforms.LULinear(4), 4, latent_shape=(2, 3)),
            ValueError,
            r"latent_shape must have as many entries as shape; got \(2, 3\) and \(4,\)",
        ),
        (
            lambda: FromNflows(nflows.transforms.SqueezeTransform(3), (1, 3, 3)),
            ValueError,
            r"must have an even factor; got 3.* Use cnf.transforms.Squeeze",
        ),
        (
            lambda: from_nflows(
                nflows.flows.Flow(
                    nflows.transforms.LULinear(2), nflows.distributions.DiagonalNormal([2])
                )
            ),
            TypeError,
            "StandardNormal of nflows; got DiagonalNormal",
        ),
    ],
)
def test_what_cannot_be_wrapped_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_squeezing_by_two_is_undone():
    squeeze = nflows.transforms.SqueezeTransform(2)
    base = nflows.distributions.StandardNormal([4, 2, 2])
    theirs = nflows.flows.Flow(squeeze, base)
    ours = from_nflows(theirs, shape=(1, 4, 4))
    x = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.to_data(ours.to_base(x)), x)


def test_squeezed_images_of_normflows_keep_their_values():
    base = normflows.distributions.DiagGaussian((4, 2, 2))
    theirs = normflows.NormalizingFlow(base, [normflows.flows.Squeeze()])
    ours = from_normflows(theirs, shape=(1, 4, 4))
    x = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.to_data(ours.to_base(x)), x)


def determinant(layer, x):
    """The log-determinant of a residual layer at rows `x`, by brute force."""
    rows = [
        torch.autograd.functional.jacobian(layer.iresblock.nnet, row, create_graph=True)
        for row in x
    ]
    return torch.linalg.slogdet(torch.eye(x.shape[-1]) + torch.stack(rows)).logabsdet


TERMS = {"unbiased": {}, "poisson": {"n_dist": "poisson"}, "truncated": {"n_power_series": 1}}
every_number_of_terms = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)


@pytest.mark.parametrize("mode", [True, False])
@every_number_of_terms
def test_a_residual_layer_is_as_in_the_evaluation_mode_of_normflows(mode, terms):
    layer = residual(**terms)
    x = torch.randn(5, 3)
    torch.manual_seed(1)
    np.random.seed(1)
    expected = layer.eval().inverse(x)
    torch.manual_seed(1)
    np.random.seed(1)
    transform = FromNormflows(layer, 3).train(mode)
    torch.testing.assert_close(transform.to_base_and_ladj(x), expected, rtol=0, atol=1e-12)


@every_number_of_terms
def test_a_residual_layer_estimates_its_log_determinant_and_gradient_without_bias(terms):
    """Within 4 standard errors over calls."""
    layer = residual(**terms)
    transform = FromNormflows(layer, 3)
    x = torch.randn(1, 3)
    weight = layer.iresblock.nnet[0].weight
    exact = determinant(layer, x)
    exact = torch.cat([exact, torch.autograd.grad(exact.sum(), weight)[0].flatten()[:3]])
    generator, draws = seeded(), []
    for _ in range(60):
        ladj = transform.to_base_and_ladj(x.expand(20, 3), generator=generator)[1].mean()
        slope = torch.autograd.grad(ladj, weight)[0].flatten()[:3]
        draws.append(torch.cat([ladj.detach().reshape(1), slope]))
    draws = torch.stack(draws)
    assert ((draws.mean(0) - exact).abs() < 4 * draws.std(0) / len(draws) ** 0.5).all()
    assert transform.likelihood == "estimate"


def test_normflows_itself_returns_another_number_in_training_mode():
    """By more than 4 standard errors over calls; the guard against it goes when this fails."""
    layer, x = residual().train(), torch.randn(1, 3)
    np.random.seed(0)
    draws = torch.stack([layer.inverse(x.expand(20, 3))[1].mean() for _ in range(500)]).detach()
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - determinant(layer, x)) > 4 * error


@pytest.mark.parametrize("mode", [True, False])
def test_a_residual_layer_has_a_gradient_and_follows_the_generator_in_either_mode(mode):
    layer = residual()
    flow = Flow([FromNormflows(layer, 3)]).train(mode)
    x = torch.randn(4, 3)
    state = np.random.get_state()[1].tolist()
    first, second = (flow.log_prob(x, generator=seeded()) for _ in range(2))
    assert torch.equal(first, second)
    assert np.random.get_state()[1].tolist() == state
    ladj = flow.to_base_and_ladj(x)[1]
    weights = [p for name, p in layer.named_parameters() if name.endswith("weight")]
    for gradient in torch.autograd.grad(ladj.sum(), weights):
        assert gradient.abs().max() > 1e-6
    assert layer.iresblock.neumann_grad
    assert layer.training == mode


@pytest.mark.parametrize("mode", [True, False])
@every_number_of_terms
def test_a_residual_layer_of_the_plane_is_exact(mode, terms):
    layer = residual(2, **terms)
    transform = FromNormflows(layer, 2).train(mode)
    x = torch.randn(5, 2)
    assert transform.likelihood == "exact"
    found, exact = transform.to_base_and_ladj(x)[1], determinant(layer, x)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    gradients_agree(found, exact, layer.iresblock.nnet)


def test_the_settings_of_a_residual_layer_are_put_back():
    layer = residual(n_power_series=3, n_exact_terms=1)
    names = ("n_power_series", "n_exact_terms", "brute_force", "grad_in_forward", "training")
    before = [getattr(layer.iresblock, name) for name in names]
    FromNormflows(layer, 3).to_base(torch.randn(5, 3))
    assert [getattr(layer.iresblock, name) for name in names] == before


ACTNORMS = {
    "nflows ActNorm": lambda: FromNflows(nflows.transforms.ActNorm(2), 2),
    "nflows BatchNorm": lambda: FromNflows(nflows.transforms.BatchNorm(2, eps=1e-9), 2),
    "normflows ActNorm": lambda: FromNormflows(normflows.flows.ActNorm(2).double(), 2),
}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("make", ACTNORMS.values(), ids=ACTNORMS)
def test_what_starts_from_data_does_so_in_initialize_only(make, mode):
    transform = make().train(mode)
    flow = Flow([transform])
    x = torch.tensor([5.0, -3.0]) + torch.tensor([2.0, 0.1]) * torch.randn(100, 2)
    before = copy.deepcopy(transform.state_dict())

    for call in (flow.log_prob, flow.to_data):
        with pytest.raises(RuntimeError, match=r"must be initialised from data; call flow\.init"):
            call(x)
    with pytest.raises(ValueError, match="at least 2 rows"):
        flow.initialize(x[:1])
    assert all(torch.equal(value, before[name]) for name, value in transform.state_dict().items())

    flow.initialize(x)
    z, ladj = flow.to_base_and_ladj(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std(0), torch.ones(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(ladj[0], -x.std(0).log().sum(), rtol=0, atol=1e-4)
    torch.testing.assert_close(flow.to_data(z), x, rtol=0, atol=1e-9)

    kept = copy.deepcopy(transform.state_dict())
    flow.initialize(3 * x)
    flow.log_prob(2 * x)
    assert all(torch.equal(value, kept[name]) for name, value in transform.state_dict().items())
    assert transform.training == mode


def test_fit_starts_what_starts_from_data():
    flow = Flow([ACTNORMS["normflows ActNorm"]()])
    x = 5 + 2 * torch.randn(200, 2)
    fit(flow, x, TrainingConfig(steps=2, progress=False))
    assert not flow.chain[-1].needs_initialization


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_does_nothing_and_modes_are_put_back(mode):
    theirs = nflows_flow()
    ours = from_nflows(theirs).train(mode)
    x = torch.randn(4, 3)
    assert torch.equal(ours.log_prob(x), ours.log_prob(x))
    assert all(part.training == mode for part in theirs._transform.modules())
    with pytest.raises(ValueError, match="FromNflows returns finite numbers"):
        ours.chain[0].to_base(torch.full((2, 3), torch.nan))
    assert all(part.training == mode for part in ours.modules())


def test_a_ladj_has_the_dtype_of_the_rows_whatever_the_default():
    torch.set_default_dtype(torch.float32)
    for layer in (nflows.transforms.LeakyReLU(), nflows.transforms.Sigmoid()):
        x = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
        z, ladj = FromNflows(layer, 2).to_base_and_ladj(x)
        assert z.dtype == ladj.dtype == torch.float64


def test_an_inverse_autoregressive_flow_by_the_name_of_a_masked_one_is_told_of():
    layer = normflows.flows.MaskedAffineAutoregressive(3, 8).double()
    calls = []
    layer.autoregressive_net.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match="is an inverse autoregressive flow.*Reverse"):
        FromNormflows(layer, 3).to_base(x)
    assert len(calls) == 3
    FromNormflows(normflows.flows.Reverse(layer), 3).to_base(x)
    assert len(calls) == 4


def test_a_planar_layer_without_inverse_samples_and_is_trained_by_reverse_kl():
    flow = Flow([FromNormflows(normflows.flows.Planar((2,)).double(), 2)])
    with pytest.raises(NotImplementedError, match="Planar of normflows has one direction only"):
        flow.log_prob(torch.zeros(2))
    target = Independent(Normal(torch.ones(2), torch.ones(2)), 1)
    ReverseKL(flow, target.log_prob)().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in flow.parameters())


def test_what_comes_out_as_inf_is_refused():
    layer = normflows.flows.Planar((2,), u=torch.full((1, 2), 500.0), w=torch.ones(1, 2)).double()
    with pytest.raises(ValueError, match="where FromNormflows returns finite numbers"):
        Flow([FromNormflows(layer, 2)]).sample(3)


def zuko_cnf(**settings):
    """A CNF of zuko whose field is far from 0."""
    return perturbed(zuko.flows.CNF(2, hidden_features=(8,), **settings), 0.3)


def test_the_ladj_of_a_cnf_of_zuko_is_as_precise_as_its_path():
    theirs = zuko_cnf()
    ours = from_zuko(theirs)
    x = torch.randn(3, 2)
    jacobian = torch.autograd.functional.jacobian
    precise = zuko.flows.CNF(2, hidden_features=(8,), atol=1e-9, rtol=1e-9)
    precise.load_state_dict(theirs.state_dict())
    to_base = from_zuko(precise).to_base
    exact = torch.stack([torch.linalg.slogdet(jacobian(to_base, row)).logabsdet for row in x])
    error = (ours.to_base_and_ladj(x)[1] - exact).abs().max()
    loose = (theirs().transform.call_and_ladj(x)[1] - exact).abs().max()
    assert error < 2e-4 < loose
    z = ours.to_base(x)
    error = (ours.to_data_and_ladj(z)[1] + exact).abs().max()
    assert error < 2e-4


def test_a_row_of_a_cnf_of_zuko_changes_less_with_its_batch():
    theirs = zuko_cnf()
    x = torch.cat([torch.randn(5, 2), torch.full((1, 2), 3.0)])

    def change(log_prob):
        return (log_prob(x) - torch.stack([log_prob(row) for row in x])).abs().max()

    assert change(from_zuko(theirs).log_prob) < change(theirs().log_prob) / 2


@pytest.mark.parametrize("make", [zuko_cnf, lambda: zuko.flows.NAF(2, transforms=1)])
def test_gradients_of_zuko_are_the_same_in_evaluation_mode(make):
    flow = from_zuko(make())
    x = torch.randn(4, 2)
    for call in (flow.log_prob, flow.to_data):
        found = []
        for mode in (True, False):
            flow.train(mode)
            found.append(torch.autograd.grad(call(x).sum(), list(flow.parameters())))
        for first, second in zip(*found, strict=True):
            assert torch.equal(first, second)


def test_an_estimate_of_zuko_is_called_so_and_follows_the_generator():
    flow = from_zuko(zuko_cnf(exact=False))
    x = torch.randn(4, 2)
    before = torch.get_rng_state()
    first, second = (flow.log_prob(x, generator=seeded()) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(flow.log_prob(x), first)
    assert flow.likelihood == "estimate"
    assert from_zuko(zuko_cnf()).likelihood == "exact"


def test_works_in_inference_mode():
    flow = from_zuko(zuko_cnf())
    x = torch.randn(4, 2)
    expected = flow.log_prob(x).detach()
    with torch.inference_mode():
        found = flow.log_prob(x.clone())
    torch.testing.assert_close(found.clone(), expected)
    with torch.no_grad():
        assert not flow.log_prob(x).requires_grad


def test_a_wrapped_flow_is_copied_with_its_parameters():
    flow = from_zuko(zuko.flows.MAF(2, **SMALL))
    other = copy.deepcopy(flow)
    x = torch.randn(3, 2)
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    perturbed(other)
    assert not torch.equal(other.log_prob(x), flow.log_prob(x))


@pytest.mark.slow
def test_a_discrete_layer_and_a_cnf_in_one_flow_are_trained():
    x = torch.randn(300, 2).exp()
    layer = FromZuko(zuko.flows.MAF(2, transforms=1, **SMALL).transform, 2)
    solver = ODESolver(method="rk4", steps=2, gradient="backprop")
    flow = Flow([Standardize.from_data(x), layer, *cnf(solver=solver).chain])
    start = MaximumLikelihood(flow)(x).item()
    fit(flow, x, TrainingConfig(steps=60, batch_size=64, learning_rate=1e-2, progress=False))
    assert MaximumLikelihood(flow)(x).item() < start - 0.2


@pytest.mark.parametrize("context", [0, 3])
def test_as_a_flow_of_zuko(context):
    flow = cnf(2, context)
    theirs = to_zuko(flow)
    assert isinstance(theirs, zuko.flows.Flow)
    assert isinstance(theirs, zuko.lazy.LazyDistribution)
    c = torch.randn(4, context) if context else None
    x = torch.randn(4, 2)
    distribution = theirs(c)
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x, c))
    drawn, log_prob = distribution.rsample_and_log_prob((5,))
    assert drawn.shape == ((5, 4, 2) if context else (5, 2))
    torch.testing.assert_close(log_prob, flow.log_prob(drawn, c), rtol=0, atol=1e-6)
    z, ladj = theirs.transform(c).call_and_ladj(x)
    torch.testing.assert_close(theirs.base(c).log_prob(z) + ladj, distribution.log_prob(x))
    back, ladj_back = theirs(c).transform.inv.call_and_ladj(z)
    torch.testing.assert_close((back, ladj_back), (x, -ladj), rtol=0, atol=1e-6)
    assert {id(p) for p in theirs.parameters()} == {id(p) for p in flow.parameters()}
    same = pickle.loads(pickle.dumps(theirs))  # noqa: S301 - our own
    torch.testing.assert_close(same(c).log_prob(x), distribution.log_prob(x))


def test_to_zuko_and_back():
    flow = cnf()
    x = torch.randn(3, 2)
    torch.testing.assert_close(from_zuko(to_zuko(flow)).log_prob(x), flow.log_prob(x))


def test_as_a_transform_of_nflows():
    flow = cnf(2, 3)
    theirs = nflows.flows.Flow(to_nflows_transform(flow), nflows.distributions.StandardNormal([2]))
    x, context = torch.randn(4, 2), torch.randn(4, 3)
    torch.testing.assert_close(theirs.log_prob(x, context), flow.log_prob(x, context))
    drawn, log_prob = theirs.sample_and_log_prob(2, context)
    expected = flow.log_prob(drawn.transpose(0, 1), context).T
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-6)


def test_as_a_layer_of_normflows():
    flow = cnf()
    base = normflows.distributions.DiagGaussian(2, trainable=False).double()
    theirs = normflows.NormalizingFlow(base, [to_normflows_flow(flow)])
    x = torch.randn(4, 2)
    torch.testing.assert_close(theirs.log_prob(x), flow.log_prob(x))
    drawn, log_prob = theirs.sample(4)
    torch.testing.assert_close(log_prob, flow.log_prob(drawn), rtol=0, atol=1e-6)
    with pytest.raises(NotImplementedError, match="NormflowsBase is no torch distribution"):
        _ = from_normflows(theirs)(None).base


@pytest.mark.parametrize("adapt", [to_nflows_transform, to_normflows_flow])
@pytest.mark.parametrize("make", BOUNDS.values(), ids=BOUNDS)
def test_what_is_no_bijection_is_no_transform_of_other_libraries(adapt, make):
    with pytest.raises(ValueError, match="flow must be a bijection; got one with"):
        adapt(make())


def test_as_a_distribution_of_pyro():
    pyro = pytest.importorskip("pyro")
    flow = cnf(2, 3)
    context = torch.randn(4, 3)

    def model():
        with pyro.plate("rows", 4):
            return pyro.sample("x", to_pyro(flow, context))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert site["value"].shape == (4, 2)
    expected = flow.log_prob(site["value"], context)
    torch.testing.assert_close(site["log_prob"], expected, rtol=0, atol=1e-8)
    wide = to_pyro(flow, context).expand((5, 4))
    assert wide.rsample().shape == (5, 4, 2)


def test_a_site_of_pyro_whose_draws_have_no_gradient():
    pyro = pytest.importorskip("pyro")
    flow = from_zuko(zuko.mixtures.GMM(2, components=3))
    assert not to_pyro(flow).has_rsample
    assert pyro.sample("x", to_pyro(flow).expand((4,))).shape == (4, 2)


@pytest.mark.parametrize(
    ("call", "library", "package"), [(to_zuko, "zuko", "zuko"), (to_pyro, "pyro", "pyro-ppl")]
)
def test_a_missing_library_is_named_with_the_remedy(call, library, package, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"{library} is not installed; try pip install {package}"):
        call(Flow([], StandardNormal(2)))


def test_sigmoids_have_their_unit_interval_as_support():
    transform = FromTorch(SigmoidTransform(), 2)
    flow = Flow([transform])
    assert flow.log_prob(torch.tensor([0.5, 1.5])) == -math.inf
    z = torch.randn(3, 2)
    torch.testing.assert_close(transform.to_data(z), z.sigmoid())


def tolerant_zuko_cnf(**tolerances):
    torch.manual_seed(0)
    return zuko.flows.CNF(2, hidden_features=(8,), **tolerances)


def test_a_solve_of_zuko_that_would_never_end_is_an_error(monkeypatch):
    monkeypatch.setattr("cnf.adapters.bounded_solve._BUDGET", 500)
    flow = from_zuko(tolerant_zuko_cnf(atol=2e-7, rtol=1e-9).float())
    x = 10 * torch.randn(50, 2, dtype=torch.float32)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(20.0)
    for call in (flow.log_prob, flow.to_data):
        with pytest.raises(ODEError, match=r"zuko's odeint .* atol=2e-07 and rtol=1e-09 may be"):
            call(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tolerances_of_zuko_finer_than_the_dtype_are_refused(dtype):
    finest = torch.finfo(dtype).eps / 2
    flow = from_zuko(tolerant_zuko_cnf(atol=finest, rtol=finest).to(dtype))
    for call in (flow.log_prob, flow.to_base, flow.to_data):
        with pytest.raises(ValueError, match=r"atol and rtol of zuko's CNF must not both be finer"):
            call(torch.randn(3, 2, dtype=dtype))


def test_a_bounded_solve_has_the_gradients_of_zukos_own():
    theirs = tolerant_zuko_cnf(atol=1e-7, rtol=1e-7)
    transform, x = theirs.transform(), torch.randn(4, 2)
    transform.trace_scale = 1.0
    ours = FromTorch(transform.inv, 2)
    parameters = list(theirs.parameters())
    expected = torch.autograd.grad(
        sum(made.sum() for made in transform.call_and_ladj(x)), parameters
    )
    for _ in range(2):
        z, ladj = ours.to_base_and_ladj(x)
        found = torch.autograd.grad(z.sum() + ladj.sum(), parameters)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def evaluations(flow, call):
    with count_evaluations(flow) as nfe:
        call()
    return nfe.value


def test_both_ways_of_a_torch_transform_give_their_ladj_in_one_solve():
    flow = cnf(solver=ODESolver(method="rk4", steps=3))
    transform, x = flow().transform, torch.randn(4, 2)
    assert transform.inv.inv is transform
    once = evaluations(flow, lambda: flow.to_base(x))
    z, ladj = transform.call_and_ladj(x)
    back, ladj_back = transform.inv.call_and_ladj(z)
    assert evaluations(flow, lambda: transform.call_and_ladj(x)) == once
    assert evaluations(flow, lambda: transform.inv.call_and_ladj(z)) == once
    torch.testing.assert_close(
        (back, ladj_back), flow.to_data_and_ladj(z.detach()), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(z, x), -ladj)

    theirs = to_zuko(flow)
    assert evaluations(flow, lambda: theirs.transform().inv.call_and_ladj(z)) == once
    assert evaluations(flow, lambda: theirs().rsample_and_log_prob((4,))) == once


def test_with_a_cache_a_transformed_distribution_takes_one_solve():
    flow = cnf(solver=ODESolver(method="rk4", steps=3))
    x = torch.randn(4, 2)
    once = evaluations(flow, lambda: flow.to_base(x))
    base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    towards_data = TransformedDistribution(base, [flow().transform.with_cache().inv])
    torch.testing.assert_close(towards_data.log_prob(x), flow.log_prob(x))
    assert evaluations(flow, lambda: towards_data.log_prob(x)) <= once
    drawn = []
    assert evaluations(flow, lambda: drawn.append(towards_data.rsample((4,)))) == once
    found = []
    assert evaluations(flow, lambda: found.append(towards_data.log_prob(drawn[0]))) == 0
    torch.testing.assert_close(found[0], flow.log_prob(drawn[0]), rtol=0, atol=1e-2)
    assert copy.deepcopy(towards_data).log_prob(x).shape == (4,)
    assert towards_data.transforms[0].inv.with_cache(0).inv.inv._cache_size == 0


def test_pyro_draws_and_scores_in_one_solve_and_never_by_other_parameters():
    flow = cnf(solver=ODESolver(method="rk4", steps=3))
    once = evaluations(flow, lambda: flow.sample(4))
    site = to_pyro(flow).expand((4,))
    found = []
    assert evaluations(flow, lambda: found.append(site.rsample())) == once
    assert evaluations(flow, lambda: found.append(site.log_prob(found[0]))) == 0
    torch.testing.assert_close(found[1], flow.log_prob(found[0]), rtol=0, atol=1e-2)
    assert copy.deepcopy(site).log_prob(found[0]).shape == (4,)
    x = site.rsample()
    with torch.no_grad():
        next(flow.parameters()).add_(0.5)
    torch.testing.assert_close(site.log_prob(x), flow.log_prob(x), rtol=0, atol=1e-12)
    with torch.no_grad():
        x = site.rsample()
    assert site.log_prob(x).requires_grad


class Drawing(Normal):
    """A normal distribution that another thread asks something while it draws."""

    def __init__(self, loc, scale, ask):
        super().__init__(loc, scale)
        self.ask = ask

    def expand(self, batch_shape, _instance=None):
        return Drawing(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.ask)

    def rsample(self, sample_shape=()):
        elsewhere(self.ask)
        return super().rsample(sample_shape)


def elsewhere(ask):
    """Ask in another thread."""
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()


def foreign_draws(ask):
    """Calls that draw from a generator in parts of other libraries, while another thread asks."""
    base = TorchBase(Independent(Drawing(torch.zeros(2), torch.ones(2), ask), 1))
    layer = residual()
    layer.iresblock.nnet[0].register_forward_pre_hook(lambda *_: elsewhere(ask))
    flow = Flow([FromNormflows(layer, 3)])
    x = torch.randn(4, 3)
    return {
        "a base": lambda: base.rsample(torch.Size([5]), generator=seeded()),
        "a layer": lambda: flow.log_prob(x, generator=seeded()),
    }


@pytest.mark.parametrize("part", ["a base", "a layer"])
def test_other_threads_draw_as_ever_while_a_foreign_part_follows_a_generator(part):
    found = []
    call = foreign_draws(lambda: found.append((torch.rand(()).item(), np.random.rand())))[part]
    torch.manual_seed(3)
    np.random.seed(3)
    first, second = call(), call()
    assert torch.equal(first, second)
    torch.manual_seed(3)
    np.random.seed(3)
    assert found == [(torch.rand(()).item(), np.random.rand()) for _ in found]
    assert len(found) >= 2
    after = torch.get_rng_state(), np.random.get_state()[1].tolist()
    call = foreign_draws(lambda: None)[part]
    torch.set_rng_state(after[0])
    call()
    assert torch.equal(torch.get_rng_state(), after[0])
    assert np.random.get_state()[1].tolist() == after[1]
