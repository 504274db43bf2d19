"""Laws of residual flows: the way back is found, with its gradient, and values are honest."""

import pytest
import torch
from laws import every_parameter_matters
from training_runs import config
from zoo import (
    ESTIMATES,
    LinearContraction,
    lipschitz_attention,
    lipschitz_conv,
    lipschitz_mlp,
    perturbed,
    residual_flow,
    rows_for,
    seeded,
)

from cnf import Flow, MaximumLikelihood, TrainingConfig, fit, load, save
from cnf.data.toy import toy_density
from cnf.transforms import (
    ActNorm,
    Affine,
    ContractiveNetwork,
    ExactLogDet,
    Flatten,
    LipschitzAttention,
    LipschitzConv,
    LipschitzMLP,
    ResidualFlow,
    RussianRoulette,
    TruncatedSeries,
)
from cnf.transforms.residual.fixed_point import fixed_point

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # whole solves

every_estimate = pytest.mark.parametrize("make", ESTIMATES.values(), ids=ESTIMATES)
NETWORKS = {
    "perceptron": lambda: lipschitz_mlp(2, 3),
    "elu": lambda: lipschitz_mlp(3, activation="elu", coefficient=0.8),
    "convolutional": lambda: lipschitz_conv(coefficient=0.5),
    "attentive": lipschitz_attention,
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


class Stretch(ContractiveNetwork):
    """What no contraction is: an expansion, where x is large."""

    def given(self, context):
        return lambda x: torch.where(x.abs() > 1, -1.5 * x, 0.3 * x)


def contraction(coefficient, features=3):
    """A linear one whose singular values all are its coefficient: the slowest to iterate."""
    matrix = torch.linalg.qr(torch.randn(features, features)).Q
    return LinearContraction(coefficient * matrix)


def images():
    """Of 3 x 3 pixels, each image of one brightness."""
    return 0.3 * torch.randn(200, 1, 3, 3) + torch.randn(200, 1, 1, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LipschitzMLP(4),
        lambda: LipschitzConv((1, 2, 2), kernel_size=1),
        lambda: LipschitzAttention(2, 2),
    ],
    ids=["perceptron", "convolutional", "attentive"],
)
def test_a_new_residual_flow_is_the_identity(make):
    transform, x = ResidualFlow(make()), torch.randn(5, 4)
    z, ladj = transform.to_base_and_ladj(x)
    assert torch.equal(z, x)
    assert torch.equal(ladj, torch.zeros(5))
    assert torch.equal(transform.to_data(x), x)


@every_estimate
@pytest.mark.parametrize("batch", [(), (4,), (3, 2), (0,)], ids=str)
def test_the_map_of_an_estimate_is_undone_and_its_ladjs_cancel_for_the_same_draws(make, batch):
    transform = make()
    x, context = rows_for(transform, *batch)
    z, ladj = transform.to_base_and_ladj(x, context, generator=seeded())
    back, ladj_back = transform.to_data_and_ladj(z, context, generator=seeded())
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(ladj_back, -ladj, rtol=0, atol=1e-8)
    torch.testing.assert_close(transform.to_base(x, context), z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(transform.to_data(z, context), back, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6, 1e-10])
@pytest.mark.parametrize("coefficient", [0.3, 0.97])
def test_the_error_of_the_way_back_is_within_the_tolerance(coefficient, tolerance):
    network = contraction(coefficient)
    z = 100 * torch.randn(50, 3)
    x = ResidualFlow(network, tolerance=tolerance).to_data(z)
    expected = torch.linalg.solve(torch.eye(3) + network.matrix, z.T).T
    error = (x - expected).norm(dim=-1)
    assert (error <= tolerance * (expected.norm(dim=-1) + z.norm(dim=-1))).all()


@every_network
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_float32_comes_back_as_far_as_rounding_allows(make, scale):
    transform = ResidualFlow(make().float())
    x, context = rows_for(transform, 50)
    x, context = (scale * x).float(), None if context is None else context.float()
    back = transform.to_data(transform.to_base(x, context), context)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4 * scale + 1e-5)


@pytest.mark.parametrize("coefficient", [0.3, 0.97])
def test_the_gradient_of_the_way_back_is_that_of_the_closed_form(coefficient):
    network = contraction(coefficient)
    z = torch.randn(5, 3, requires_grad=True)

    x, ladj = residual_flow(network).to_data_and_ladj(z)
    found = torch.autograd.grad((x.sin().sum(-1) + ladj).sum(), [z, network.matrix])

    matrix = torch.eye(3) + network.matrix
    solved = torch.linalg.solve(matrix, z.T).T
    closed = solved.sin().sum() - 5 * torch.linalg.slogdet(matrix).logabsdet
    expected = torch.autograd.grad(closed, [z, network.matrix])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@every_network
def test_gradcheck_of_the_way_back(make):
    transform = residual_flow(make(), log_det=ExactLogDet())
    z, context = rows_for(transform, 2)
    parameter = next(transform.parameters())

    def to_data(z, _, *context):  # the weight is perturbed in place
        return transform.to_data_and_ladj(z, *context)

    inputs = [z.requires_grad_(), parameter]
    if context is not None:
        inputs.append(context.requires_grad_())
    assert torch.autograd.gradcheck(to_data, inputs, eps=1e-6, atol=1e-5)


@every_network
def test_a_gradient_can_be_taken_again_and_reaches_every_parameter(make):
    transform = residual_flow(make())
    z, context = rows_for(transform, 3)
    value = transform.to_data(z.requires_grad_(), context).square().sum()
    first, second = (torch.autograd.grad(value, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    every_parameter_matters(transform, value)


def test_a_second_derivative_of_the_way_back_is_refused():
    transform, z = ResidualFlow(lipschitz_mlp()), torch.randn(3, 2, requires_grad=True)
    value = transform.to_data(z).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, z, create_graph=True)


def test_rows_that_do_not_converge_are_named():
    transform = ResidualFlow(Stretch(1, coefficient=0.5))
    z = torch.tensor([[0.1], [9.0], [0.2], [-7.0]])
    with pytest.raises(RuntimeError, match=r"ResidualFlow did not converge in rows 1, 3.*0\.5"):
        transform.to_data(z)
    torch.testing.assert_close(transform.to_data(z[::2]), z[::2] / 1.3, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_ends_at_once_by_name(value):
    z = torch.tensor([[0.1, 0.2], [value, 0.0]])
    with pytest.raises(RuntimeError, match=r"in row 1\. Either values are not finite"):
        ResidualFlow(lipschitz_mlp()).to_data(z)


def test_the_iteration_takes_as_few_steps_as_it_promises():
    """By the bound L^k of the k-th step, for a map that is as slow as its coefficient says."""
    counted = []

    def update(x):
        counted.append(x)
        return 1.0 - 0.9 * x

    x = fixed_point(update, torch.zeros(1), coefficient=0.9, tolerance=1e-6)
    assert x.item() == pytest.approx(1 / 1.9, abs=1e-6)
    assert len(counted) < 165


@every_estimate
def test_train_and_eval_mode_give_the_same_value_and_gradient(make):
    transform = make()
    x, context = rows_for(transform, 3)
    found = []
    for mode in (transform.train, transform.eval):
        mode()
        _, ladj = transform.to_base_and_ladj(x, context, generator=seeded())
        slopes = torch.autograd.grad(ladj.sum(), list(transform.parameters()), allow_unused=True)
        found.append((ladj, *slopes))
    assert all(
        first is second or torch.equal(first, second) for first, second in zip(*found, strict=True)
    )


@pytest.mark.parametrize("log_det", [RussianRoulette(), TruncatedSeries()], ids=repr)
def test_the_loss_of_training_is_the_likelihood_that_is_reported(log_det):
    flow = Flow([residual_flow(lipschitz_mlp(4), log_det=log_det)])
    x = torch.randn(5, 4)
    loss = MaximumLikelihood(flow.train())(x, generator=seeded())
    with torch.no_grad():
        reported = -flow.eval().log_prob(x, generator=seeded()).mean()
    torch.testing.assert_close(loss.detach(), reported, rtol=0, atol=1e-12)


@pytest.mark.parametrize("log_det", [None, RussianRoulette()], ids=repr)
def test_works_in_inference_mode_and_without_gradient(log_det):
    flow = Flow([residual_flow(lipschitz_mlp(2, 3), log_det=log_det)])
    x, context = rows_for(flow, 3)

    def values(x, context):
        log_prob = flow.log_prob(x, context, generator=seeded())
        return log_prob.detach(), flow.to_data(x, context).detach()

    expected = values(x, context)
    with torch.inference_mode():
        found = values(x.clone(), context.clone())
    # Products of matrices may go another way there: a few rounding errors of numbers up to 10.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(values(x, context), expected, rtol=0, atol=1e-13)


def test_autocast_changes_nothing():
    transform = ResidualFlow(lipschitz_mlp().float())
    x = torch.randn(5, 2, dtype=torch.float32)
    expected = *transform.to_base_and_ladj(x), transform.to_data(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = *transform.to_base_and_ladj(x), transform.to_data(x)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("make", ESTIMATES.values(), ids=ESTIMATES)
def test_a_file_keeps_an_estimate(make, tmp_path):
    flow = Flow([make()])
    save(flow, tmp_path / "flow.safetensors")
    loaded = load(tmp_path / "flow.safetensors")
    assert loaded.likelihood == flow.likelihood != "exact"
    x, context = rows_for(flow, 3)
    found, expected = (part.log_prob(x, context, generator=seeded()) for part in (loaded, flow))
    assert torch.equal(found, expected)


def test_the_log_determinant_is_exact_for_few_features_unless_it_is_named():
    kinds = [ResidualFlow(LipschitzMLP(features)).likelihood for features in (8, 9)]
    assert kinds == ["exact", "estimate"]
    assert ResidualFlow(LipschitzMLP(9), log_det=ExactLogDet()).likelihood == "exact"
    assert ResidualFlow(LipschitzMLP(2), log_det=TruncatedSeries()).likelihood == "biased_estimate"


FITTED = {
    "exact": (lambda: [Affine(2), ResidualFlow(LipschitzMLP(2, hidden_features=(16, 16)))], 2),
    "roulette": (
        lambda: [ResidualFlow(LipschitzMLP(2), log_det=RussianRoulette(exact_terms=4))],
        2,
    ),
    "truncated": (lambda: [ResidualFlow(LipschitzMLP(2), log_det=TruncatedSeries(terms=5))], 2),
    "images": (
        lambda: [
            Flatten((1, 3, 3)),
            ActNorm((1, 3, 3)),
            ResidualFlow(LipschitzConv((1, 3, 3), hidden_channels=(8,))),
        ],
        9,
    ),
    "attentive": (
        lambda: [ResidualFlow(LipschitzAttention(2, 1)), ResidualFlow(LipschitzMLP(2))],
        2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "features"), FITTED.values(), ids=FITTED)
def test_fit_lowers_the_loss(make, features):
    flow = Flow(make()).double()
    x = 0.3 * torch.randn(400, 2)
    x = images() if features == 9 else x + torch.stack([x[:, 1].sin(), -x[:, 0]], -1)
    flow.initialize(x)

    def nll():
        with torch.no_grad():
            return -flow.log_prob(x, generator=seeded()).mean()

    before = nll()
    fit(flow, x, config(25, learning_rate=2e-2))
    assert nll() < before - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_six_blocks_leave_the_gaussian_far_behind_in_few_steps(seed):
    """The best Gaussian is 1.42 nats from the truth."""
    torch.manual_seed(seed)
    truth, generator = toy_density("8gaussians"), seeded()
    rows, new = (truth.sample(count, generator=generator) for count in (20_000, 4_000))
    blocks = [ResidualFlow(LipschitzMLP(2, hidden_features=(32, 32))) for _ in range(6)]
    flow = Flow([part for block in blocks for part in (ActNorm(2), block)])
    plan = TrainingConfig(steps=150, batch_size=256, learning_rate=1e-2, progress=False)
    fit(flow, rows, plan, validation=None)
    with torch.no_grad():
        assert (truth.log_prob(new) - flow.log_prob(new)).mean() < 0.5


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ResidualFlow(torch.nn.Linear(2, 2)), TypeError, "use LipschitzMLP"),
        (lambda: ResidualFlow(LipschitzMLP(2), log_det="exact"), TypeError, "RussianRoulette"),
        (lambda: ResidualFlow(LipschitzMLP(2), tolerance=0.0), ValueError, "between 0 and 1"),
        (lambda: ResidualFlow(LipschitzMLP(2), tolerance=1.0), ValueError, "got 1.0"),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("coefficient", "probability"), [(0.98, 0.05), (0.97, 0.06), (0.5, 0.75)])
def test_a_roulette_that_may_have_infinite_variance_is_told_of(coefficient, probability):
    network = LipschitzMLP(9, coefficient=coefficient)
    with pytest.warns(UserWarning, match=f"probability less than .* in place of {probability}"):
        ResidualFlow(network, log_det=RussianRoulette(probability=probability))
    ResidualFlow(network, log_det=RussianRoulette(probability=0.9 * (1 - coefficient**2)))
    ResidualFlow(network, log_det=TruncatedSeries())


def test_perturbing_does_not_matter_for_the_way_back_far_from_the_data():
    transform = residual_flow(perturbed(lipschitz_mlp(), 10.0))
    x = 1e3 * torch.randn(20, 2)
    torch.testing.assert_close(transform.to_data(transform.to_base(x)), x, rtol=1e-8, atol=0)
