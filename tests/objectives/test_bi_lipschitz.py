"""Laws of the bi-Lipschitz penalty: its closed forms, its gradient, and what it adds to a loss."""

import math

import pytest
import torch
from torch import nn
from training_runs import affine_flow, config
from zoo import EXACT_FLOWS, cnf, couplings, perturbed, rows_for, seeded

from cnf import CNF, Flow, MaximumLikelihood, ReverseKL, TrainingConfig, fit
from cnf.objectives import BiLipschitz, HybridObjective
from cnf.transforms import Augment, Dequantize, Logit, Transform
from cnf.transforms.base import WithLadj


class Linear(Transform):
    """Multiplication by a matrix."""

    def __init__(self, matrix):
        super().__init__(len(matrix))
        self.matrix = nn.Parameter(matrix)

    def _to_base(self, x, context, generator) -> WithLadj:
        return x @ self.matrix.T, self.matrix.det().abs().log().expand(x.shape[:-1])

    def _to_data(self, z, context, generator) -> WithLadj:
        return z @ self.matrix.inverse().T, -self.matrix.det().abs().log().expand(z.shape[:-1])


def penalised(flow, **settings):
    return BiLipschitz(MaximumLikelihood(flow), **{"weight": 0.3, **settings})


def test_of_a_linear_map_it_is_the_mean_square_of_both_matrices():
    """At 4 standard errors: 6e-5."""
    matrix = torch.randn(3, 3)
    squares = (matrix.square().sum() + matrix.inverse().square().sum()) / 3
    penalty = penalised(Flow([Linear(matrix)])).penalty(torch.randn(4000, 3), generator=seeded())
    assert abs(penalty.mean() - squares) < 4 * penalty.std() / 4000**0.5


@pytest.mark.parametrize("step", [1e-4, 10.0])
def test_of_a_similarity_it_is_the_same_in_every_direction_and_for_every_step(step):
    rotation, _ = torch.linalg.qr(torch.randn(3, 3))
    objective = penalised(Flow([Linear(1.5 * rotation)]), step=step)
    expected = torch.full((2, 4), 1.5**2 + 1.5**-2)
    torch.testing.assert_close(objective.penalty(torch.randn(2, 4, 3)), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("context_features", [0, 2])
def test_in_one_dimension_it_is_that_of_the_slope(context_features):
    flow = cnf(1, context_features)
    x, context = rows_for(flow, 2, 3)
    _, ladj = flow.to_base_and_ladj(x, context)
    penalty = penalised(flow, step=1e-4).penalty(x, context)
    torch.testing.assert_close(penalty, 2 * (2 * ladj).cosh(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["couplings", "glow with context", "image", "residual flows"])
def test_it_lies_between_the_squares_of_the_singular_values(name):
    flow = EXACT_FLOWS[name]()
    x, context = rows_for(flow, 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.to_base(x, context), x)
    values = torch.linalg.svdvals(jacobian.reshape(flow.features, flow.features))
    penalties = torch.stack(
        [penalised(flow, step=1e-5).penalty(x, context, generator=seeded()) for _ in range(3)]
    )
    assert torch.equal(penalties[0], penalties[1])
    inverses = 1 / values
    assert (penalties > 0.999 * (values.min() ** 2 + inverses.min() ** 2)).all()
    assert (penalties < 1.001 * (values.max() ** 2 + inverses.max() ** 2)).all()


def test_each_row_has_a_unit_vector_of_its_own():
    """Rows of one place, where the squared slopes are 1 and 9."""
    matrix = torch.diag(torch.tensor([1.0, 3.0]))
    penalty = penalised(Flow([Linear(matrix)])).penalty(torch.zeros(50, 2))
    assert (penalty > 1 + 1 / 9).all()
    assert (penalty < 9 + 1).all()
    assert penalty.std() > 1


def test_its_gradient_is_that_of_finite_differences():
    transform = Linear(torch.eye(2) + 0.3 * torch.randn(2, 2))
    x = torch.randn(3, 2)
    objective = penalised(Flow([transform]))

    ((name, _),) = objective.named_parameters()

    def loss(matrix):
        given = {"generator": seeded()}
        return torch.func.functional_call(objective, {name: matrix}, (x,), given)

    assert torch.autograd.gradcheck(loss, (transform.matrix,))


def test_it_is_added_with_its_weight_and_those_of_the_rows():
    flow = perturbed(Flow(couplings()))
    x, weight = torch.randn(4, 2), torch.tensor([0.0, 1.0, 2.5, 0.5])
    objective = penalised(flow)
    penalty = objective.penalty(x, generator=seeded())
    expected = MaximumLikelihood(flow)(x, weight=weight) + 0.3 * (weight * penalty).mean()
    torch.testing.assert_close(objective(x, weight=weight, generator=seeded()), expected)


def test_a_classifier_gets_its_labels():
    hybrid = HybridObjective(perturbed(affine_flow()), 2)
    objective = BiLipschitz(hybrid, weight=2.0)
    x, labels = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    expected = hybrid(x, target=labels) + 2 * objective.penalty(x, generator=seeded()).mean()
    torch.testing.assert_close(objective(x, target=labels, generator=seeded()), expected)
    fit(objective, (x, labels), TrainingConfig(steps=2, progress=False), validation=None)
    with pytest.raises(ValueError, match="target must be None, because BiLipschitz takes no"):
        penalised(affine_flow())(x, target=labels)


@pytest.mark.slow
def test_fit_finds_the_scale_of_least_penalised_loss():
    """The derivative of log(s) + m / (2 s^2) + w (s^2 + s^-2) in s is 0, with m the mean of x^2."""
    x, weight = 3 * torch.randn(500, 1), 0.2
    mean = float((x - x.mean()).square().mean())
    flow = affine_flow(1)
    settings = config(
        400,
        batch_size=500,
        learning_rate=0.05,
        objective=lambda made: penalised(made, weight=weight),
        schedule="cosine",
    )
    fit(flow, x, settings, validation=None)
    scale = (math.sqrt(1 + 8 * weight * (mean + 2 * weight)) - 1) / (4 * weight)
    assert flow.transforms[0].log_scale.exp().square().item() == pytest.approx(scale, rel=1e-3)


def test_in_float32_the_differences_keep_three_digits():
    rotation, _ = torch.linalg.qr(torch.randn(3, 3))
    objective = penalised(Flow([Linear(0.7 * rotation)]).float())
    penalty = objective.penalty(10 * torch.randn(50, 3, dtype=torch.float32))
    assert penalty.dtype == torch.float32
    assert ((penalty / (0.7**2 + 0.7**-2) - 1).abs() < 5e-3).all()


def test_an_inverse_that_overflows_is_refused_by_row():
    flow = affine_flow(1)
    nn.init.constant_(flow.transforms[0].log_scale, 400.0)
    with pytest.raises(ValueError, match=r"the penalty is finite in torch.float64.*row 0"):
        penalised(flow).penalty(torch.ones(1, 1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BiLipschitz(affine_flow(), weight=1.0), TypeError, "objective must be a Object"),
        (lambda: penalised(affine_flow(), weight=0.0), ValueError, "weight must be positive"),
        (lambda: penalised(affine_flow(), step=math.inf), ValueError, "step must be positive"),
        (
            lambda: BiLipschitz(ReverseKL(CNF(2), lambda x: -x.square().sum(-1)), weight=1.0),
            ValueError,
            "objective must take data.*ReverseKL takes none",
        ),
        (lambda: penalised(Flow([Logit(2)])), ValueError, r"its support is .*OpenInterval"),
        (lambda: penalised(Flow([Augment(2, 1)])), ValueError, "is_bijective is False"),
        (lambda: penalised(Flow([Dequantize(2, 4)])), ValueError, "is_bijective is False"),
    ],
)
def test_what_cannot_be_penalised_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
