"""Laws of Glow: every level starts from the data, and the density is a product over levels."""

import pytest
import torch
from laws import ladj_is_slogdet_of_the_jacobian, to_data_undoes_to_base
from torch.distributions import Independent, MultivariateNormal, Normal
from torch.nn.functional import one_hot
from training_runs import config
from zoo import perturbed, rows_for

from cnf import Flow, fit
from cnf.baselines import glow
from cnf.transforms import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Chain,
    ConditionalAffine,
    Conv1x1,
    FactorOut,
    Logit,
)


def small(shape=(1, 4, 4), context_features=0, **settings):
    settings = {"levels": 2, "steps": 2, "hidden_channels": (4, 4), **settings}
    return Flow(glow(shape, context_features, **settings))


def results(transforms, x, context=None):
    """Each transform, nested ones included, with what it makes of the rows."""
    for part in transforms:
        if isinstance(part, FactorOut):
            yield from results(part.chain, x[:, : part.kept], context)
        x = part.to_base(x, context if part.context_features else None)
        yield part, x


@pytest.mark.parametrize("coupling", ["affine", "additive"])
@pytest.mark.parametrize("lu", [True, False], ids=["lu", "dense"])
@pytest.mark.parametrize("levels", [1, 2])
def test_it_is_a_bijection_with_its_ladj_in_every_variant(coupling, lu, levels):
    flow = perturbed(small(coupling=coupling, lu=lu, levels=levels, steps=1), 0.1)
    assert flow.likelihood == "exact"
    x, context = rows_for(flow, 2)
    to_data_undoes_to_base(flow, x, context, atol=1e-9)
    ladj_is_slogdet_of_the_jacobian(flow, x, context, atol=1e-9)


def test_a_new_one_rotates():
    flow = small((2, 4, 8), levels=2)
    x = torch.randn(3, 2, 4, 8)
    z, ladj = flow.to_base_and_ladj(x)
    torch.testing.assert_close(ladj, torch.zeros(3), rtol=0, atol=1e-11)
    torch.testing.assert_close(z.norm(dim=-1), x.flatten(1).norm(dim=-1), rtol=0, atol=1e-11)
    assert flow.base.features == 64


@pytest.mark.parametrize("context_features", [0, 3])
def test_after_the_first_rows_every_actnorm_gives_mean_0_and_standard_deviation_1(context_features):
    flow = small((2, 4, 4), context_features)
    for part in flow.modules():  # far from the identity, but for what starts from data
        if isinstance(part, Conv1x1 | AffineCoupling | ConditionalAffine):
            perturbed(part, 0.1)
    x = 5 + 3 * torch.randn(20, 2, 4, 4).exp()
    context = torch.randn(20, context_features) if context_features else None
    flow.initialize(x, context)
    found = [
        z.unflatten(-1, (len(part.loc), -1)).movedim(1, 0).flatten(1)
        for part, z in results(flow.chain, x, context)
        if isinstance(part, ActNorm)
    ]
    assert len(found) == (4 if context_features else 5)
    for channels in found:
        std, mean = torch.std_mean(channels, 1, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-9)


def test_the_density_is_that_of_the_first_half_times_a_normal_of_the_last_given_it():
    flow = perturbed(small((1, 4, 4), 3), 0.1)
    x, context = rows_for(flow, 5)
    *steps, prior, factor_out = flow.chain
    y, ladj = Chain(steps).to_base_and_ladj(x, context)
    kept, rest = y.chunk(2, -1)

    loc, raw = prior.conditioner(kept, context).chunk(2, -1)
    normal = Independent(Normal(loc, (3 * (raw / 3).tanh()).exp()), 1)
    expected = normal.log_prob(rest) + Flow(factor_out.chain).log_prob(kept, context) + ladj

    torch.testing.assert_close(flow.log_prob(x, context), expected, rtol=0, atol=1e-10)


def test_at_the_end_each_channel_has_a_scale_and_shift_by_the_context_or_learned():
    for context_features, kind in ((3, ConditionalAffine), (0, ActNorm)):
        top = small((1, 4, 4), context_features).chain[-1].chain[-1]
        assert type(top) is kind
        assert top.shape == (8, 1, 1)


def test_each_level_has_its_steps():
    flow = small((1, 8, 8), levels=3, steps=2, coupling="additive")
    counts = [
        sum(type(part) is kind for part in flow.modules())
        for kind in (ActNorm, Conv1x1, AdditiveCoupling, AffineCoupling, FactorOut)
    ]
    assert counts == [2 * 3 + 1, 2 * 3, 2 * 3, 2, 2]


def test_samples_follow_the_density():
    """The mean of q(x) / p(x) over draws from p is 1, for a density q inside p (4 std. errors)."""
    flow = perturbed(small((2, 2, 2), levels=1), 0.1)
    x, log_prob = flow.sample_and_log_prob(20_000)
    rows = x.flatten(1)
    other = MultivariateNormal(rows.mean(0), 0.4 * rows.T.cov())
    ratio = (other.log_prob(rows) - log_prob).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5
    assert ratio.std() / len(ratio) ** 0.5 < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("context_features", [0, 2])
def test_fit_lowers_the_negative_log_likelihood(context_features):
    labels = torch.arange(200) % 2
    stripes = torch.stack([torch.eye(4), torch.eye(4).flip(0)])[labels].unsqueeze(1)
    images = (0.2 + 0.6 * stripes + 0.15 * torch.rand(200, 1, 4, 4)).clamp(0.01, 0.99)
    context = one_hot(labels).double() if context_features else None
    flatten, *others = glow((1, 4, 4), context_features, levels=2, steps=2, hidden_channels=(8, 8))
    flow = Flow([flatten, Logit(16), *others])
    flow.initialize(images, context)
    before = -flow.log_prob(images, context).mean().item()
    data = images if context is None else (images, context)
    fit(flow, data, config(60, learning_rate=1e-2))
    assert -flow.log_prob(images, context).mean().item() < before - 2


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: glow((1, 4, 6), levels=2), ValueError, r"multiples of 4 .* got \(1, 4, 6\)"),
        (lambda: glow((3, 8)), ValueError, r"\(channels, height, width\); got \(3, 8\)"),
        (lambda: glow((1, 4, 4), levels=0), ValueError, "levels must be at least 1; got 0"),
        (lambda: glow((1, 4, 4), steps=0), ValueError, "steps must be at least 1; got 0"),
        (lambda: glow((1, 4, 4), -1), ValueError, "context_features must be at least 0; got -1"),
        (
            lambda: glow((1, 4, 4), coupling="spline"),
            ValueError,
            "coupling must be one of affine, additive; got 'spline'",
        ),
    ],
)
def test_it_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
