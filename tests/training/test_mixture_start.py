"""A trained flow against a Gaussian mixture, and the initial weights against trained ones."""

import pytest
import torch
from training_runs import affine_flow, config, small_cnf
from zoo import perturbed

from cnf import (
    CNF,
    Checkpoints,
    FlowMatching,
    MaximumLikelihood,
    ODESolver,
    TrainingConfig,
    fit,
    load,
    recipe,
    save,
)
from cnf.bases import GaussianMixtureBase, StandardNormal
from cnf.flows.mixture_start import WeightedRows, become_mixture_if_better

pytestmark = pytest.mark.usefixtures("shapes_unchecked", "quick_calibration")  # whole trainings


def two_clusters(rows, seed=0):
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed))
    x[::3] += 8
    return 100 * x + 7


def quick_recipe(monkeypatch, steps=3):
    phases = recipe(matching_steps=steps, likelihood_steps=1, progress=False)
    monkeypatch.setattr("cnf.training.phases.recipe", lambda *rows, **options: phases)


def test_few_rows_end_as_a_mixture_with_a_zero_field(monkeypatch, tmp_path):
    quick_recipe(monkeypatch)
    x, held_out = two_clusters(60), two_clusters(300, seed=1)
    flow = CNF(2, hidden_features=(8, 8))
    fit(flow, x)
    assert isinstance(flow.base, GaussianMixtureBase)
    assert flow.likelihood == "exact"
    z = flow.transforms[0].to_base(held_out)
    assert torch.equal(flow.to_base(held_out), z)
    mixture = GaussianMixtureBase.from_data(flow.transforms[0].to_base(x))
    expected = mixture.log_prob(z) - flow.transforms[0].log_std.sum()
    # Of all rows, those held out come last.
    assert float((flow.log_prob(held_out) - expected).detach().mean()) == pytest.approx(0, abs=0.05)
    assert ((flow.sample(50) > x.amin(0) - 500) & (flow.sample(50) < x.amax(0) + 500)).all()
    fresh = CNF(2, hidden_features=(8, 8))
    fresh.load_state_dict(flow.state_dict())
    save(flow, tmp_path / "flow.safetensors")
    for other in (fresh, load(tmp_path / "flow.safetensors")):
        torch.testing.assert_close(other.log_prob(x), flow.log_prob(x))


def test_of_two_that_are_as_good_by_many_rows_the_flow_stays():
    x, few, many = (torch.randn(rows, 2) for rows in (2000, 20, 10_000))
    for held_out, base in ((few, GaussianMixtureBase), (many, StandardNormal)):
        flow = CNF(2, hidden_features=(8, 8)).double()
        flow.initialize(1.05 * x)
        flow.only_ode.vector_field.zero_()  # a normal density, 0.005 nats worse than the best one
        become_mixture_if_better(flow, WeightedRows(x), WeightedRows(held_out), refit=False)
        assert isinstance(flow.base, base)


def test_a_mixture_is_not_exchanged_for_a_worse_fit_of_more_rows(monkeypatch):
    good = GaussianMixtureBase.from_data

    def fitted_badly(z, **options):
        return good(z if len(z) == 200 else 3 * z, **options)

    monkeypatch.setattr(GaussianMixtureBase, "from_data", fitted_badly)
    x, held_out = two_clusters(200).double(), two_clusters(50, seed=1).double()
    flow = CNF(2, hidden_features=(8, 8)).double()
    flow.initialize(x)
    become_mixture_if_better(flow, WeightedRows(x), WeightedRows(held_out), refit=True)
    expected = good(flow.transforms[0].to_base(x))
    torch.testing.assert_close(flow.base.means, expected.means)


@pytest.mark.parametrize(
    ("rows", "held_out", "base"),
    [
        (6, 0.1, StandardNormal),  # two rows alone would have a singular covariance
        (30, 0.1, GaussianMixtureBase),
        (30, 3, GaussianMixtureBase),
        (80, 3, StandardNormal),
    ],
)
def test_without_a_comparison_only_few_rows_end_as_a_mixture(rows, held_out, base, monkeypatch):
    quick_recipe(monkeypatch)
    flow = CNF(2, hidden_features=(8, 8))
    validation = two_clusters(held_out, seed=1) if isinstance(held_out, int) else held_out
    fit(flow, two_clusters(rows), validation=validation, accuracy=None)
    assert isinstance(flow.base, base)


def test_a_mixture_is_chosen_again_by_the_next_fit_and_left_by_an_older_state(
    monkeypatch, tmp_path
):
    quick_recipe(monkeypatch)
    x = two_clusters(60)
    flow = CNF(2, hidden_features=(8, 8))
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    checkpoints = Checkpoints(folder=tmp_path / "run")
    with torch.inference_mode():
        fit(flow, x, checkpoints=checkpoints)
    flow.log_prob(x).sum().backward()
    first = flow.log_prob(x).detach()
    flow.zero_grad()
    history = fit(flow, x, checkpoints=checkpoints, resume=True)
    assert len(history.step) == 4
    torch.testing.assert_close(flow.log_prob(x).detach(), first)
    with pytest.raises(ValueError, match=r"NaN|finite"):
        fit(flow, x * torch.nan)
    torch.testing.assert_close(flow.log_prob(x).detach(), first)
    flow.load_state_dict(before)
    assert isinstance(flow.base, StandardNormal)
    assert flow.only_ode.solver == ODESolver()


@pytest.mark.filterwarnings("ignore:log_prob of the trained flow")  # of rows 1000 nats away
@pytest.mark.parametrize("objective", [MaximumLikelihood, FlowMatching])
def test_a_mixture_trained_further_has_samples_of_its_log_prob(objective, monkeypatch):
    quick_recipe(monkeypatch)
    flow = CNF(2, hidden_features=(8, 8)).double()
    x = two_clusters(60).double()
    fit(flow, x)
    phase = TrainingConfig(objective=objective, steps=10, learning_rate=0.02, progress=False)
    fit(flow, torch.stack([x[:, 0], x[:, 0].square() / 100], -1), phase, validation=None)
    z = flow.base.rsample(torch.Size([50]), generator=torch.Generator().manual_seed(0))
    precise = flow.using(solver=ODESolver(rtol=1e-8, atol=1e-8))
    error = (flow.to_data(z) - precise.to_data(z)) / flow.transforms[0].log_std.exp()
    assert float(error.detach().abs().max()) < 0.05


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"config": config(1)}),
        ({}, {"validation": None}),
        ({}, {"validation": 0}),
        ({"context_features": 1}, {}),
        ({"augment": 1}, {}),
    ],
    ids=str,
)
def test_a_flow_stays_by_settings_without_validation_and_where_it_cannot_be_compared(
    settings, options, monkeypatch
):
    quick_recipe(monkeypatch)
    flow = small_cnf(**settings)
    x = two_clusters(40)
    context = torch.randn(40, 1)
    fit(flow, (x, context) if flow.context_features else x, **options, accuracy=None)
    assert isinstance(flow.base, StandardNormal)


def test_the_better_density_of_held_out_rows_wins():
    truth = perturbed(small_cnf(), 1.0)
    for part in truth.transforms[:-1]:
        part.keep_identity()
    generator = torch.Generator().manual_seed(0)
    rows, held_out = (
        WeightedRows(truth.sample(150, generator=generator).detach()) for _ in range(2)
    )
    become_mixture_if_better(truth, rows, held_out, refit=False)
    assert isinstance(truth.base, StandardNormal)

    wrong = perturbed(small_cnf(), 1.0)
    become_mixture_if_better(wrong, rows, held_out, refit=False)
    assert isinstance(wrong.base, GaussianMixtureBase)
    assert (truth.log_prob(held_out.x) - wrong.log_prob(held_out.x)).mean() < 0.5

    # The rows that the truth explains best count for nothing.
    gain = truth.log_prob(held_out.x) - wrong.log_prob(held_out.x)
    worst = WeightedRows(held_out.x, (gain < gain.median()).to(gain))
    become_mixture_if_better(truth, rows, worst, refit=False)
    assert isinstance(truth.base, GaussianMixtureBase)


def test_only_a_part_of_the_data_is_fitted_to_after_the_comparison(monkeypatch):
    quick_recipe(monkeypatch)
    x, others = two_clusters(80), two_clusters(20, seed=1)
    flow = CNF(2, hidden_features=(8, 8))
    fit(flow, x, validation=others)
    mixture = GaussianMixtureBase.from_data(flow.transforms[0].to_base(x))
    assert torch.equal(flow.base.means, mixture.means)
    flow = CNF(2, hidden_features=(8, 8))
    fit(flow, x, validation=0.25)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    z = flow.transforms[0].to_base(x[order[20:]]), flow.transforms[0].to_base(x[order[:20]])
    assert torch.equal(flow.base.means, GaussianMixtureBase.from_data(torch.cat(z)).means)


def test_rows_count_by_weight(monkeypatch):
    quick_recipe(monkeypatch)
    x = two_clusters(120)
    weight = torch.ones(120)
    weight[::3] = 1e-3
    flow = CNF(2, hidden_features=(8, 8))
    fit(flow, {"x": x, "weight": weight})
    assert isinstance(flow.base, GaussianMixtureBase)
    drawn = flow.sample(1000, generator=torch.Generator().manual_seed(0))
    assert float((drawn.mean(-1) > 400).double().mean()) < 0.05


def test_training_that_makes_the_validation_worse_ends_where_it_began():
    x = torch.randn(40, 2)
    flow = affine_flow()
    start = -flow.log_prob(x).mean().item()
    history = fit(flow, x + 5, config(3, learning_rate=5.0, gradient_clip=None), validation=x)
    assert min(history.validation[-1:]) > start
    assert -flow.log_prob(x).mean().item() == pytest.approx(start)
