"""Markov kernels: what they leave invariant, and the weights of their paths."""

import math

import pytest
import torch
from scipy.stats import kstest, norm
from torch.distributions import MultivariateNormal, Normal
from zoo import KERNELS, annealed, mlp, perturbed, rows_for, seeded

from cnf import Flow, ModuleField
from cnf.bases import StandardNormal
from cnf.transforms import (
    AdjustedLangevin,
    Affine,
    AnnealedDensity,
    Diffusion,
    HamiltonianMonteCarlo,
    Langevin,
    MetropolisHastings,
)
from cnf.vector_fields import LinearField

WIDE = Normal(1.0, 2.0)


def wide(x):
    """An unnormalised normal density with mean 1 and standard deviation 2."""
    return WIDE.log_prob(x).sum(-1) + 3.0


REVERSIBLE = {
    "metropolis hastings": lambda density: MetropolisHastings(1, density, steps=4, scale=2.0),
    "adjusted langevin": lambda density: AdjustedLangevin(1, density, steps=3, step_size=1.5),
    "hamiltonian": lambda density: HamiltonianMonteCarlo(1, density, leapfrogs=2, step_size=3.0),
}
"""Steps so large that many are rejected."""
EVERY = {
    **REVERSIBLE,
    "langevin": lambda density: Langevin(1, density, steps=3, step_size=0.5),
    "diffusion": lambda _: Diffusion(perturbed(LinearField(1)), mlp(1), steps=3),
}
reversible = pytest.mark.parametrize("make", REVERSIBLE.values(), ids=REVERSIBLE)
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


@reversible
def test_the_density_stays_invariant(make):
    """By Kolmogorov and Smirnov, at a significance of 1e-4.

    A factor of 0.8 in the acceptance of a step, or of 1.2 in a half step, gives 1e-10.
    """
    start = WIDE.sample((40_000, 1))
    generator = torch.Generator().manual_seed(9)  # not that of the start
    for way in ("to_base", "to_data"):
        moved = getattr(make(wide), way)(start, generator=generator)
        assert (moved != start).double().mean() > 0.5
        assert kstest(moved.flatten().numpy(), norm(1, 2).cdf).pvalue > 1e-4


@reversible
def test_the_contribution_telescopes(make):
    start = 3 * torch.randn(50, 1)
    for way in ("to_base_and_ladj", "to_data_and_ladj"):
        moved, contribution = getattr(make(wide), way)(start)
        torch.testing.assert_close(contribution, wide(start) - wide(moved))


@every
def test_weights_of_paths_average_to_the_normalizer(make):
    """For any base, and deterministic steps before and after the kernel.

    At 4 standard errors, by chance in 6e-5 of the seeds.
    """
    generator = seeded()
    flow = Flow([perturbed(Affine(1)), make(wide), perturbed(Affine(1))])
    target = Normal(0.3, 0.6)
    with torch.no_grad():
        z = flow.base.rsample(torch.Size([40_000]), generator=generator)
        x, ladj = flow.to_data_and_ladj(z, generator=generator)
        log_weight = target.log_prob(x).sum(-1) - flow.base.log_prob(z) + ladj
    weight = log_weight.exp()
    assert abs(weight.mean() - 1) < 4 * weight.std() / len(weight) ** 0.5
    share = (weight * x.squeeze(-1)).mean() / weight.mean()
    assert share == pytest.approx(0.3, abs=0.1)


@every
def test_the_density_of_data_is_bounded_from_below(make):
    """E[exp(log p(z) + contributions)] over paths from x is the density of x."""
    flow = Flow([make(wide)])
    x = torch.tensor([0.5])
    with torch.no_grad():
        one = flow.log_prob(x.expand(20_000, 1), generator=seeded())
        density = one.exp().mean()
        error = one.exp().std() / len(one) ** 0.5
        draws = flow.sample((200_000,), generator=seeded())
    near = ((draws - x).abs() < 0.1).double().mean() / 0.2
    spread = (near / 0.2 / len(draws)).sqrt()
    assert abs(near - density) < 4 * (error + spread) + 0.01 * density  # of the finite width
    assert one.mean() < density.log() + 4 * one.std() / len(one) ** 0.5
    many = flow.log_prob(x.expand(500, 1), importance_samples=20, generator=seeded())
    assert many.mean() > one.mean()


def test_a_langevin_step_of_a_normal_has_its_closed_form():
    step = 0.3
    kernel = Langevin(1, StandardNormal(1), steps=1, step_size=step)
    z = torch.randn(5, 1)
    x, contribution = kernel.to_data_and_ladj(z)

    def log_kernel(start, end):
        return Normal((1 - step) * start, math.sqrt(2 * step)).log_prob(end).squeeze(-1)

    torch.testing.assert_close(contribution, log_kernel(x, z) - log_kernel(z, x))


def test_a_diffusion_step_is_the_ratio_of_two_normals_with_drifts_at_its_two_ends():
    """Towards the data from f at the base's time; the way back from g at the data's; both ways."""

    class Timed(torch.nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = slope

        def forward(self, t, x, context=None):
            return self.slope * (1 + t.unsqueeze(-1)) * x.cos()

    there, back = 0.7, -1.3
    fields = (ModuleField(Timed(slope), 1) for slope in (there, back))
    kernel = Diffusion(*fields, steps=1, noise=0.8)

    def to_data(z, x):
        return Normal(z + there * z.cos(), 0.8).log_prob(x).squeeze(-1)

    def to_base(x, z):
        return Normal(x + 2 * back * x.cos(), 0.8).log_prob(z).squeeze(-1)

    z = torch.randn(5, 1)
    x, contribution = kernel.to_data_and_ladj(z)
    torch.testing.assert_close(contribution, to_base(x, z) - to_data(z, x))
    x = torch.randn(5, 1)
    z, contribution = kernel.to_base_and_ladj(x)
    torch.testing.assert_close(contribution, to_data(z, x) - to_base(x, z))


def test_a_diffusion_with_the_drift_of_time_reversal_is_nearly_exact():
    """Brownian noise from a normal with variance 1 to 2; the drift back is that of the score."""

    class Score(torch.nn.Module):
        def forward(self, t, x, context=None):
            return -x / (1 + t.unsqueeze(-1))

    still = LinearField(1)
    errors = []
    for steps in (4, 16, 64):
        back = ModuleField(Score(), 1)
        flow = Flow([Diffusion(still, back, steps=steps)])
        x = torch.randn(4000, 1, generator=seeded()) * 2**0.5
        found = flow.log_prob(x, generator=torch.Generator().manual_seed(1)).detach()
        expected = Normal(0.0, 2**0.5).log_prob(x).squeeze(-1)
        errors.append(float((expected - found).mean()))
        assert errors[-1] > -4 * float((expected - found).std()) / 4000**0.5
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.01


def test_gradients_of_unadjusted_steps_are_right():
    flow = Flow([Langevin(2, annealed(), steps=2), Diffusion(mlp(), mlp(), steps=2)])
    x = torch.randn(2, 2, requires_grad=True)

    def log_prob(x):
        return flow.log_prob(x, generator=seeded())

    assert torch.autograd.gradcheck(log_prob, (x,))


def test_an_annealed_density_interpolates():
    density = AnnealedDensity(StandardNormal(2), wide, share=0.25)
    x = torch.randn(4, 2)
    expected = 0.75 * StandardNormal(2).log_prob(x) + 0.25 * wide(x)
    torch.testing.assert_close(density(x), expected)
    outside = AnnealedDensity(StandardNormal(2), lambda x: x.new_full(x.shape[:-1], -math.inf), 0.0)
    assert outside(x).isfinite().all()  # a density without a share takes no part


def test_a_walk_leaves_where_the_density_is_zero_with_weight_zero():
    def half(x):
        return torch.where(x.squeeze(-1) > 0, -x.squeeze(-1), -math.inf)

    start = torch.full((200, 1), -0.1)
    moved, contribution = MetropolisHastings(1, half, steps=1).to_data_and_ladj(start)
    has_left = moved.squeeze(-1) > 0
    assert 0 < has_left.double().mean() < 1
    assert (contribution[has_left] == -math.inf).all()
    assert (contribution[~has_left] == 0).all()
    inside, contribution = MetropolisHastings(1, half, steps=5).to_data_and_ladj(-start)
    assert (inside > 0).all()
    assert contribution.isfinite().all()


def test_a_trajectory_that_overflows_is_rejected():
    def steep(x):
        assert x.isfinite().all()
        quartic = x.square().square().sum(-1)
        return torch.where(quartic < 1e20, -quartic, math.nan)

    kernel = HamiltonianMonteCarlo(1, steep, steps=1, leapfrogs=20, step_size=5.0)
    x = torch.randn(100, 1)
    moved, contribution = kernel.to_data_and_ladj(x)
    assert torch.equal(moved, x)
    assert (contribution == 0).all()


def test_gradients_are_finite_beside_trajectories_that_diverge():
    def steep(x):
        return -x.square().square().sum(-1)

    kernel = HamiltonianMonteCarlo(1, steep, steps=3, leapfrogs=10, step_size=0.3)
    x = torch.linspace(-1, 20, 200).unsqueeze(-1).requires_grad_()
    moved, contribution = kernel.to_data_and_ladj(x, generator=seeded())
    assert 0.1 < (moved == x).double().mean() < 0.9
    (moved.sum() + contribution.sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
def test_the_same_generator_gives_the_same_path(make):
    kernel = make()
    x, context = rows_for(kernel, 5)
    paths = [kernel.to_base(x, context, generator=seeded()) for _ in range(2)]
    torch.testing.assert_close(*paths, rtol=0, atol=0)
    other = torch.Generator().manual_seed(9)
    assert not torch.equal(paths[0], kernel.to_base(x, context, generator=other))


@pytest.mark.parametrize("kernel", [MetropolisHastings, Langevin, AdjustedLangevin])
def test_results_have_the_dtype_of_the_points_and_not_of_the_density(kernel):
    mean = torch.zeros(2, dtype=torch.float64)
    part = kernel(2, lambda x: -(x - mean).square().sum(-1))
    for found in part.to_base_and_ladj(torch.randn(3, 2, dtype=torch.float32)):
        assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (lambda x: x, r"a number for each row, of shape \(3,\); got \(3, 2\)"),
        (lambda x: 1.0, "got float"),
        (lambda x: x.sum(-1) * math.nan, "log_density must be finite or -inf"),
        (lambda x: x.new_full(x.shape[:-1], math.inf), "log_density must be finite or -inf"),
        (lambda x: (x > 0).sum(-1), r"floating-point numbers; got torch.int64.*\.to\(x.dtype\)"),
    ],
)
def test_a_bad_density_is_refused(density, message):
    for kernel in (MetropolisHastings(2, density), Langevin(2, density)):
        with pytest.raises(ValueError, match=message):
            kernel.to_base(torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MetropolisHastings(2, wide, steps=0), ValueError, "steps must be at least 1"),
        (lambda: MetropolisHastings(2, wide, scale=0.0), ValueError, "scale must be positive"),
        (lambda: Langevin(2, wide, step_size=-1.0), ValueError, "step_size must be positive"),
        (lambda: HamiltonianMonteCarlo(2, wide, leapfrogs=0), ValueError, "leapfrogs must be"),
        (lambda: AdjustedLangevin(2, 3), TypeError, "log_density must be a function"),
        (lambda: AnnealedDensity(wide, wide, 1.5), ValueError, "share must be from 0 to 1"),
        (lambda: AnnealedDensity(wide, None, 0.5), TypeError, "target must be a function"),
        (lambda: Diffusion(mlp(2), mlp(3)), ValueError, "reverse_drift must have the 2 features"),
        (lambda: Diffusion(mlp(2), mlp(2), noise=0.0), ValueError, "noise must be positive"),
        (lambda: Diffusion(mlp(2), torch.nn.Linear(2, 2)), TypeError, "reverse_drift must be"),
    ],
)
@pytest.mark.usefixtures("shapes_unchecked")
def test_bad_settings_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_normal_target_is_reached_from_another():
    """What the layers are for: annealed steps bring mass to where the base has none."""
    generator = seeded()
    base, target = StandardNormal(2), MultivariateNormal(torch.tensor([4.0, 0.0]), torch.eye(2))
    kernels = [
        AdjustedLangevin(2, AnnealedDensity(base, target.log_prob, share), steps=5, step_size=0.4)
        for share in torch.linspace(1, 0.1, 10).tolist()
    ]
    with torch.no_grad():
        z = base.rsample(torch.Size([2000]), generator=generator)
        x, ladj = Flow(kernels).to_data_and_ladj(z, generator=generator)
        plain = (target.log_prob(z) - base.log_prob(z)).exp()
        weight = (target.log_prob(x) - base.log_prob(z) + ladj).exp()
    assert weight.mean() == pytest.approx(1, abs=4 * float(weight.std()) / 2000**0.5)
    share = [float(w.sum().square() / w.square().sum() / 2000) for w in (plain, weight)]
    assert share[0] < 0.01
    assert share[1] > 0.1
