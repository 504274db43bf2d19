"""Laws of scale: data and contexts come as they are, and the flow holds what standardises them."""

import copy
import functools
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from torch.utils.data import Dataset, StackDataset
from training_runs import CHEAP, affine_flow, assert_same, config, weights
from zoo import cnf, mlp, potential, residual, rows_for, seeded

from cnf import (
    CNF,
    Checkpoints,
    Flow,
    FlowMatching,
    MaximumLikelihood,
    ODESolver,
    ReverseKL,
    Standardize,
    fit,
    load,
    recipe,
    save,
)
from cnf._moments import column_moments
from cnf.data.degeneracy import DegenerateDataWarning, check_columns
from cnf.training.data import as_rows
from cnf.transforms import (
    Affine,
    AffineCoupling,
    Augment,
    ConditionalAffine,
    ContinuousTransform,
    ExactLipschitz,
    LipschitzMLP,
    Logit,
    ResidualFlow,
)
from cnf.vector_fields.conditioning import ContextScaling

pytestmark = pytest.mark.usefixtures("shapes_unchecked", "quick_calibration")  # whole trainings


class Rowwise(Dataset):
    """Rows by name, one at a time."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["x"])

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


FAIR = ODESolver(method="rk4", steps=20, gradient="backprop")
"""Fine enough that likelihood is not gained by what the steps miss."""


def small(features=2, context_features=0, **settings):
    torch.manual_seed(0)
    return CNF(features, context_features, hidden_features=(16, 16), solver=FAIR, **settings)


def pairs(rows=200):
    """x = c + 0.1 e, whose entropy given c is -0.88 nats."""
    context = torch.randn(rows, 1, generator=seeded())
    return context + 0.1 * torch.randn(rows, 1, generator=seeded().manual_seed(1)), context


def phases(**settings):
    return recipe(learning_rate=2e-2, progress=False, **settings)


PHASES = phases(matching_steps=100, likelihood_steps=1)


def by_likelihood(*parts):
    flow = Flow([Standardize(1), *parts])
    return flow, MaximumLikelihood(flow), config(20, learning_rate=2e-2)


def by_settings():
    flow = small(1, 1)
    return flow, flow, phases(matching_steps=25, likelihood_steps=1)


def by_matching():
    flow = small(1, 1)
    return flow, FlowMatching(flow), config(25, learning_rate=2e-2)


def by_likelihood_of_an_ode():
    flow = CNF(1, 1, hidden_features=(8,), solver=FAIR)
    return flow, MaximumLikelihood(flow), config(6, learning_rate=2e-2)


WAYS = {
    "settings": by_settings,
    "matching": by_matching,
    "likelihood": by_likelihood_of_an_ode,
    "affine": lambda: by_likelihood(ConditionalAffine(1, 1)),
    "exact lipschitz": lambda: by_likelihood(ExactLipschitz(1, 1, hidden_features=(8,))),
    "residual flow": lambda: by_likelihood(ResidualFlow(LipschitzMLP(1, 1, hidden_features=(8,)))),
    "coupling beside a drawn feature": lambda: by_likelihood(
        Augment(1, 1, 1, hidden_features=(8,)), AffineCoupling(2, 1, mask="last")
    ),
}


@functools.cache
def nll_of_training(way, a=1.0, b=0.0, k=1.0, m=0.0):
    """Mean negative log-likelihood, in nats, after training on pairs in other units."""
    x, context = pairs()
    data = a * x + b, k * context + m
    torch.manual_seed(0)
    flow, objective, settings = WAYS[way]()
    fit(objective, data, settings)
    return -flow.log_prob(*data, generator=seeded()).mean().item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("a", "k"), [(1e-3, 1e3), (1.0, 1e-3), (1e3, 1.0)])
def test_the_units_of_data_and_context_change_the_density_by_their_factor_alone(way, a, k):
    found = nll_of_training(way, a, 7 * a + 0.1, k, 3 * k - 2)
    assert found == pytest.approx(nll_of_training(way) + np.log(a), abs=0.02)


def test_a_context_far_from_zero_is_learnt_as_well_as_one_near_it():
    x, context = pairs(1000)
    flow = small(1, 1)
    fit(flow, (x, 2000 + 10 * context), phases(matching_steps=300, likelihood_steps=0))
    truth = -Normal(context, 0.1).log_prob(x).mean().item()
    flow = flow.using(solver=ODESolver(method="rk4", steps=20))
    assert -flow.log_prob(x, 2000 + 10 * context).mean().item() < truth + 0.1
    marginal = -Normal(0, (1 + 0.01) ** 0.5).log_prob(x).mean().item()
    assert truth < marginal - 2


@pytest.mark.parametrize("settings", [None, PHASES, PHASES[:1], config(2)], ids=str)
def test_scaling_and_holding_out_do_not_depend_on_the_settings(settings, monkeypatch):
    monkeypatch.setattr("cnf.training.phases.recipe", lambda *rows, **options: PHASES[1:])
    x = 500 + 100 * torch.randn(100, 2)
    flow = small()
    keys = list(flow.state_dict())
    history = fit(flow, x, settings)
    assert [key for key in flow.state_dict() if not key.startswith("base.")] == keys
    small().load_state_dict(flow.state_dict())
    assert not any(part.needs_initialization for part in flow.chain)
    torch.testing.assert_close(
        flow.chain[0].log_std.exp(), torch.full((2,), 100.0), rtol=0.2, atol=0
    )
    assert np.isfinite(history.validation).any()


def test_scalings_are_set_once_saved_and_loaded(tmp_path):
    x, context = pairs(50)
    flow = small(1, 1)
    fit(flow, (7 * x + 3, 9 * context - 1), config(2))
    before = {name: value for name, value in weights(flow).items() if "log_std" in name}
    fit(flow, (x, context), config(2))
    assert_same({name: flow.state_dict()[name] for name in before}, before)
    save(flow, tmp_path / "flow.safetensors")
    assert_same(weights(load(tmp_path / "flow.safetensors")), weights(flow))


@pytest.mark.parametrize(
    "make",
    [lambda: mlp(2, 3), lambda: potential(2, 3), lambda: residual(2, 3), lambda: small(2, 3)],
    ids=["mlp", "potential", "residual", "cnf"],
)
def test_weights_of_before_there_were_scalings_are_loaded_as_those_of_the_identity(make):
    new, old = make(), make()
    kept = ("mean", "log_std", "is_initialized")
    state = {
        name: value
        for name, value in old.state_dict().items()
        if not (name.endswith(kept) and "context_scaling" in name)
        and not name.endswith("is_initialized")
    }
    new.load_state_dict(state)
    for part in new.modules():
        if isinstance(part, ContextScaling | Standardize):
            assert not part.needs_initialization
    if isinstance(new, Flow):
        x, context = rows_for(new, 5)
        torch.testing.assert_close(new.log_prob(x, context), old.log_prob(x, context))


@pytest.mark.parametrize("settings", [{}, {"blocks": 2}, {"augment": 1}], ids=str)
def test_weights_of_a_cnf_of_before_it_held_a_standardize_are_loaded(settings):
    old = cnf(2, 3, **settings)
    state = {name: v for name, v in old.state_dict().items() if "context_scaling" not in name}
    assert not any(name.endswith("is_initialized") for name in state)
    new = cnf(2, 3, standardize=True, **settings)
    new.load_state_dict(state)
    x, context = rows_for(new, 5)
    found, expected = (flow.log_prob(x, context, generator=seeded()) for flow in (new, old))
    torch.testing.assert_close(found, expected)
    assert not any(part.needs_initialization for part in new.chain)


def test_a_part_of_the_weights_stays_in_its_place():
    flow, other = cnf(standardize=True), cnf(standardize=True)
    other.initialize(3 + 2 * torch.randn(50, 2))
    part = {name: v for name, v in other.state_dict().items() if name.startswith("transforms.0.")}
    found = flow.load_state_dict(part, strict=False)
    assert not found.unexpected_keys
    assert torch.equal(flow.chain[0].mean, other.chain[0].mean)


@pytest.mark.parametrize("field", [mlp, potential, residual], ids=lambda field: field.__name__)
def test_every_field_of_ours_scales_its_context(field):
    transform = ContinuousTransform(field(2, 3), solver=CHEAP)
    scaled = copy.deepcopy(transform)
    context = 100 + 7 * torch.randn(50, 3)
    flow = Flow([scaled])
    flow.initialize(torch.randn(50, 2), context)
    std, mean = torch.std_mean(context, 0)
    x = torch.randn(50, 2)
    torch.testing.assert_close(
        scaled.to_base(x, context), transform.to_base(x, (context - mean) / std)
    )


def test_a_run_resumes_with_the_scale_that_it_began_with(tmp_path):
    x, context = pairs(50)
    data, settings = (7 * x + 3, 9 * context - 1), config(6, batch_size=20)
    whole, cut = small(1, 1), small(1, 1)
    fit(whole, data, settings, checkpoints=Checkpoints(folder=tmp_path / "whole", every=2))
    kept = Checkpoints(folder=tmp_path / "cut", every=2)
    with pytest.raises(KeyboardInterrupt):
        fit(cut, data, settings, checkpoints=kept, callbacks=[interrupted_at(3)])
    resumed = small(1, 1)
    fit(resumed, data, settings, checkpoints=kept, resume=True)
    assert_same(weights(resumed), weights(whole))


def interrupted_at(step):
    def callback(report):
        if report.step == step:
            raise KeyboardInterrupt

    return callback


def test_without_standardize_nothing_is_scaled_ever():
    x, context = pairs(50)
    flow = small(1, 1, standardize=False)
    assert len(flow.chain) == 1
    fit(flow, (x, 3 * context + 2), config(2))
    scaling = flow.chain[0].vector_field.context_scaling
    assert (scaling.mean.item(), scaling.log_std.item()) == (0, 0)


def test_a_flow_whose_transforms_standardise_gets_no_second_scaling():
    x = torch.randn(20, 2)
    assert len(small(transforms=[Standardize.from_data(x)]).chain) == 2
    parts = small(transforms=[Logit(2)]).chain
    assert [type(part) for part in parts] == [Logit, Standardize, ContinuousTransform]


def test_a_flow_trained_without_data_keeps_the_scale_that_it_was_trained_at():
    flow = small(2, 1)
    contexts = 50 + 3 * torch.randn(64, 1)

    def log_density(x, context):
        return Normal((context - 50) / 3, 1.0).log_prob(x).sum(-1)

    fit(ReverseKL(flow, log_density, draws=1), contexts, config(2))
    before = weights(flow)
    assert not any(part.needs_initialization for part in flow.chain)
    assert before["transforms.0.log_std"].tolist() == [0, 0]
    assert abs(before["transforms.1.vector_field.context_scaling.mean"].item() - 50) < 2
    fit(flow, (torch.randn(40, 2) - 2, contexts[:40]), config(1, learning_rate=1e-9))
    assert_same({"m": flow.chain[0].mean}, {"m": before["transforms.0.mean"]})


def test_a_constant_context_keeps_its_scale_and_is_pointed_out():
    x, context = pairs(50)
    context = torch.cat([context, torch.full_like(context, 4.0)], -1)
    flow = small(1, 2)
    with pytest.warns(UserWarning, match=r"context is constant .* in column \[1\]"):
        fit(flow, (x, context), config(1))
    scaling = flow.chain[-1].vector_field.context_scaling
    assert (scaling.mean[1].item(), scaling.log_std[1].item()) == (4, 0)


@pytest.mark.parametrize("what", ["x", "context"])
def test_numbers_that_their_dtype_rounds_to_a_few_values_are_refused(what):
    days = (2_461_373.25 + 0.5 * torch.randn(100, 1, dtype=torch.float64)).float()
    x = torch.randn(100, 1).float()
    data = (days, x) if what == "x" else (x, days)
    flow = CNF(1, 1).float()
    name = "data" if what == "x" else what
    with pytest.raises(ValueError, match=rf"{name} loses its digits.*2461\d+.*use float64"):
        fit(flow, data, config(1))
    assert all(part.needs_initialization for part in flow.chain)


def test_days_in_double_precision_are_fitted():
    generator = seeded()
    days = 2_461_373.25 + 0.5 * torch.randn(400, 1, dtype=torch.float64, generator=generator)
    flow = small(1)
    fit(flow, days, phases(matching_steps=150, likelihood_steps=0))
    truth = -Normal(2_461_373.25, 0.5).log_prob(days).mean().item()
    assert -flow.log_prob(days).mean().item() == pytest.approx(truth, abs=0.1)


def test_no_rounding_is_advised_that_would_lose_what_the_data_say():
    flow = CNF(1).float()
    days = 2_461_373.25 + 0.5 * torch.randn(100, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float64.*model\.to\(torch\.float64\)") as caught:
        fit(flow, days)
    assert "data.to(torch.float32)" not in str(caught.value)
    with pytest.raises(ValueError, match=r"data\.to\(torch\.float32\)"):
        fit(flow, days - 2_461_373)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_half_precision_is_advised(dtype):
    with pytest.raises(ValueError, match=r"Convert it with data\.to\(torch\.float64\)\.$"):
        fit(small(), torch.randn(20, 2).to(dtype))


def with_column(make):
    x = torch.randn(200, 2, generator=seeded())
    return torch.cat([x, make(x)], -1)


DEGENERATE = {
    "linear": (lambda x: 3 * x[:, :1] - x[:, 1:] + 1, r"columns column 0, column 1, column 2"),
    "fill value": (
        lambda x: x[:, :1].where(torch.arange(200).unsqueeze(1) != 8, 1e20),
        r"far outside .*: 1e\+20 in 1 of 180 rows of 'column 2'",
    ),
    "rounded": (lambda x: x[:, :1].round(), r"share a value of column 2 \("),
    "inflated": (lambda x: x[:, :1].clamp(min=0), r"column 2 \(0 in 5\d %\)"),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("settings", [None, config(1)], ids=["none", "one"])
def test_data_without_a_bounded_density_are_pointed_out(name, settings, monkeypatch):
    monkeypatch.setattr("cnf.training.phases.recipe", lambda *rows, **options: (config(1),))
    make, message = DEGENERATE[name]
    with pytest.warns(DegenerateDataWarning, match=message):
        fit(small(3), with_column(make), settings)


def dependent(x):
    """Three columns; the last follows from the others."""
    return torch.cat([x, 3 * x[:, :1] - x[:, 1:]], -1)


@pytest.mark.parametrize(
    ("unit", "dtype"),
    [(1.0, torch.float32), (1e-30, torch.float32), (1.0, torch.float64), (1e-170, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e5])
def test_dependence_is_seen_through_rounding_and_in_any_unit(unit, dtype, offset):
    x = torch.randn(500, 2, generator=seeded())
    rows = (unit * (x + offset)).to(dtype)
    with pytest.warns(DegenerateDataWarning, match="linear function of the columns a, b, c"):
        check_columns("data", dependent(rows), "abc")
    free = torch.cat([rows, (unit * (x[:, :1] + 0.1 * x[:, 1:] ** 2 + offset)).to(dtype)], -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_columns("data", free, "abc")


def random(*shape):
    return torch.rand(*shape, generator=seeded())


def one_of_three(rows):
    return torch.eye(3)[torch.arange(rows) % 3] + 0.1 * random(rows, 3)


FOLLOWING = {
    "short": (lambda: with_doubled_column(5, 3), [0, 1]),
    "wide": (lambda: with_doubled_column(150, 100), [0, 1]),
    "sum of nearly one-hot": (
        lambda: torch.cat([one_of_three(600), one_of_three(600).sum(1, keepdim=True)], -1),
        [0, 1, 2, 3],
    ),
    "shares": (lambda: torch.nn.functional.normalize(random(2000, 50), p=1, dim=1), range(50)),
    "two": (lambda: torch.cat([random(99, 3), random(99, 3)[:, :2] + 1], -1), [0, 1, 3, 4]),
}


def with_doubled_column(rows, columns):
    x = torch.randn(rows, columns, generator=seeded())
    x[:, 1] = 2 * x[:, 0] + 1
    return x


@pytest.mark.parametrize("name", FOLLOWING)
def test_the_columns_that_follow_from_each_other_are_named(name):
    make, expected = FOLLOWING[name]
    x = make()
    names = [f"<{i}>" for i in range(x.shape[1])]
    with pytest.warns(DegenerateDataWarning) as caught:
        check_columns("data", x, names)
    said = str(caught[0].message)
    if len(expected) > 8:
        assert f"({len(expected)} in all)" in said
    else:
        assert [i for i in range(len(names)) if names[i] in said] == expected


@pytest.mark.parametrize(("noise", "is_pointed_out"), [(1e-4, True), (5e-4, False)])
def test_noise_is_told_from_rounding(noise, is_pointed_out):
    x = torch.rand(1000, 1, generator=seeded()).float()
    y = x + noise * torch.randn(1000, 1, generator=seeded().manual_seed(1)).float()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_columns("data", torch.cat([x + 1e4, y], -1), "ab")  # rounding has sd 3e-4
    assert bool(caught) == is_pointed_out


@pytest.mark.parametrize("far", [1e6, 1e30])
def test_an_outlier_that_columns_share_does_not_make_them_dependent(far):
    x = torch.randn(500, 2, generator=seeded())
    x[7] = far
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_columns("data", x, "ab")
    x[:, 1] = 2 * x[:, 0] + 1
    with pytest.warns(DegenerateDataWarning, match="linear function of the columns a, b is"):
        check_columns("data", x, "ab")


@pytest.mark.parametrize("settings", [None, config(1)], ids=["none", "one"])
@pytest.mark.parametrize("make", [affine_flow, small])
def test_a_constant_column_is_refused_whatever_the_settings(make, settings):
    x = with_column(lambda x: x[:, :1] * 0 + 7)[:, 1:]
    with pytest.raises(ValueError, match="constant in column 1"):
        fit(make(), x, settings)


def test_clean_data_are_trained_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(small(3), with_column(lambda x: x[:, :1] + 1e-2 * x[:, 1:] ** 2), config(1))


def test_a_hand_made_flow_is_left_without_a_scaling_of_its_data():
    flow = Flow([ContinuousTransform(mlp())])
    settings = config(1, objective=MaximumLikelihood)
    keys = list(flow.state_dict())
    fit(flow, torch.randn(50, 2), settings)
    assert list(flow.state_dict()) == keys
    with pytest.warns(UserWarning, match=r"put Standardize\(2\) first"):
        fit(flow, 100 * torch.randn(50, 2), settings)


@pytest.mark.parametrize("factor", [3e-45, 1e-300, 1e38, 7.0])
def test_weights_of_any_scale_give_the_same_fit(factor):
    x = torch.randn(60, 2, generator=seeded())
    weight = torch.rand(60, dtype=torch.float64, generator=seeded())
    flows = []
    for each in (weight, factor * weight):
        flow = small(standardize=True)
        fit(flow, {"x": x, "weight": each}, config(4, batch_size=20))
        flows.append(weights(flow))
    torch.testing.assert_close(flows[1], flows[0], rtol=1e-9, atol=1e-9)


def test_rows_of_weight_zero_are_as_if_they_were_not_there():
    x = torch.randn(60, 2, generator=seeded())
    weight = torch.rand(60, generator=seeded())
    far = torch.full((5, 2), 1e5) * torch.randn(5, 2, generator=seeded())
    absent, zero = small(), small()
    fit(absent, {"x": x, "weight": weight}, config(4, batch_size=20))
    both = {"x": torch.cat([x, far]), "weight": torch.cat([weight, torch.zeros(5)])}
    fit(zero, both, config(4, batch_size=20))
    assert_same(weights(zero), weights(absent))


@pytest.mark.parametrize("kind", [lambda rows: StackDataset(**rows), Rowwise], ids=["stack", "own"])
@pytest.mark.parametrize("factor", [1e-300, 1e300])
def test_weights_of_a_dataset_count_on_any_scale(kind, factor):
    x = torch.randn(60, 2, generator=seeded())
    weight = torch.rand(60, dtype=torch.float64, generator=seeded())
    flows = []
    for data in ({"x": x, "weight": weight}, kind({"x": x, "weight": factor * weight})):
        flow = small()
        fit(flow, data, config(4, batch_size=20))
        flows.append(weights(flow))
    torch.testing.assert_close(flows[1], flows[0], rtol=1e-9, atol=1e-9)


def test_weights_of_a_dataset_that_no_unit_can_hold_are_refused():
    weight = torch.full((30_000,), 1e-200)
    weight[1::3] = 1e200  # of which none is among the rows, every third, that give the unit
    rows = as_rows("data", Rowwise({"x": torch.zeros(30_000, 2), "weight": weight}), small())
    with pytest.raises(ValueError, match="weights of data must be alike in size"):
        rows.take(torch.arange(3))


def test_rows_of_weight_zero_in_a_dataset_do_not_set_the_scale():
    x, far = torch.randn(60, 2, generator=seeded()), 1e5 * torch.randn(5, 2, generator=seeded())
    data = {
        "x": torch.cat([x, far]),
        "weight": torch.tensor([1.0, 0.0]).repeat_interleave(torch.tensor([60, 5])),
    }
    flow = small()
    fit(flow, Rowwise(data), config(1), validation=None)
    torch.testing.assert_close(flow.chain[0].log_std.exp(), x.std(0), rtol=0.02, atol=0)


@pytest.mark.parametrize("most", [1e6, 1e12, 1e300])
def test_weights_that_leave_all_to_one_row_are_refused(most):
    x = torch.randn(60, 2, generator=seeded())
    weight = torch.ones(60, dtype=torch.float64)
    weight[7] = most
    with pytest.raises(ValueError, match=r"nearly all in a single row; one has (9|100)"):
        fit(small(), {"x": x, "weight": weight}, config(1))
    weight[7] = 100.0
    fit(small(), {"x": x, "weight": weight}, config(1))


def test_rows_that_hardly_count_do_not_set_the_scale():
    x = torch.cat([torch.randn(500, 1, generator=seeded()), torch.full((5, 1), 1e5)])
    weight = torch.cat([torch.ones(500), torch.full((5,), 1e-9)])
    scale = Standardize.from_data(x, weight=weight)
    assert scale.log_std.exp().item() == pytest.approx(1, abs=0.1)
    flow = small(1)
    fit(flow, {"x": x, "weight": weight}, config(1), validation=None)
    assert flow.chain[0].log_std.exp().item() == pytest.approx(1, abs=0.1)


def test_weighted_moments_of_many_rows_are_those_of_repeated_rows():
    x, counts = torch.randn(2000, 2, generator=seeded()), torch.tensor([1, 2, 3, 1]).repeat(500)
    repeated = x.repeat_interleave(counts, 0)
    weighted = Standardize.from_data(x, weight=counts.double())
    torch.testing.assert_close(weighted.mean, repeated.mean(0))
    torch.testing.assert_close(weighted.log_std.exp(), repeated.std(0), rtol=1e-3, atol=0)


def test_weighted_variance_is_unbiased():
    x = torch.randn(20_000, 3, generator=seeded())  # each row gives a triple
    weight = torch.tensor([1.0, 2.0, 5.0])
    variances = [column_moments("x", each.unsqueeze(-1), weight)[1].square() for each in x[:2000]]
    mean, error = torch.cat(variances).mean(), torch.cat(variances).std() / 2000**0.5
    assert abs(mean - 1) < 3.3 * error  # one chance in a thousand


@pytest.mark.parametrize("weight", [3e-45, 1.0, 1e38])
@pytest.mark.parametrize("unit", [1e-170, 1e-30, 1.0, 1e150])
def test_moments_of_equal_weights_are_those_of_the_rows_in_any_unit(weight, unit):
    x = torch.randn(50, 2, generator=seeded()) + 3
    mean, std = column_moments("x", unit * x, torch.full((50,), weight))
    torch.testing.assert_close(mean / unit, x.mean(0))
    torch.testing.assert_close(std / unit, x.std(0))


def test_a_row_that_nearly_is_all_leaves_the_spread_to_the_others():
    x = torch.randn(50, 1, generator=seeded())
    weight = torch.cat([torch.tensor([1e40]), torch.ones(49)])
    _, std = column_moments("x", x, weight)
    expected = ((x[1:] - x[0]).square().mean(0) / 2).sqrt()
    torch.testing.assert_close(std, expected)


@pytest.mark.parametrize(("unit", "what"), [(1e-39, "small"), (1e38, "large")])
def test_spreads_whose_inverse_is_infinite_are_refused(unit, what):
    x = (unit * torch.tensor([[-3.0, 3.0], [3.0, -3.0]])).float()
    with pytest.raises(ValueError, match=rf"it is too {what} in \[0, 1\]. Rescale"):
        Standardize.from_data(x)


def test_a_loop_of_ones_own_without_a_scale_is_pointed_out_by_fit():
    x, context = pairs()
    told, silent = small(1, 1), small(1, 1)
    silent.initialize(x, context)
    for flow in (told, silent):
        flow.log_prob(x, context).mean().backward()
    fit(silent, (x, context), config(1))
    with pytest.warns(UserWarning, match=r"flow\.initialize\(x, context\) before") as caught:
        fit(told, (x, context), config(1))
    assert caught[0].filename == __file__
    fit(told, (x, context), config(1))  # it is said once


@pytest.mark.parametrize("features", [1, 8])
@pytest.mark.parametrize(("a", "b"), [(1e-3, 0), (0.5, 0), (1, 0), (2, 1), (1e3, 5)])
def test_a_fresh_flow_is_always_given_the_scale_of_its_data(features, a, b):
    x = a * torch.randn(100, features, generator=seeded()) + b
    flow = small(features)
    fit(flow, x, config(1))
    torch.testing.assert_close(flow.chain[0].log_std.exp(), x.std(0), rtol=0.2, atol=0)


def test_a_scaling_waits_until_it_is_told():
    flow = Flow([Standardize(2), Affine(2)])
    x = 3 + torch.randn(50, 2)
    torch.testing.assert_close(flow.to_base(x), x)
    flow.initialize(x)
    torch.testing.assert_close(flow.to_base(x).mean(0), torch.zeros(2), rtol=0, atol=1e-12)
