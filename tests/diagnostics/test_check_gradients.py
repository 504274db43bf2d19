"""Laws of the comparison of gradients: right ones pass, wrong ones are found, nothing changes."""

import math

import pytest
import torch
from zoo import FLOWS, cnf, perturbed, rows_for

from cnf import Flow, Hutchinson, ModuleField, ODESolver, count_evaluations
from cnf.diagnostics import GradientReport, check_gradients
from cnf.transforms import Affine, ContinuousTransform

WITH_ODE = {
    name: make
    for name, make in FLOWS.items()
    if any(isinstance(part, ContinuousTransform) for part in make().modules())
}


@pytest.mark.slow
@pytest.mark.parametrize("make", WITH_ODE.values(), ids=WITH_ODE)
def test_every_flow_with_an_ode_passes(make):
    flow = make()
    report = check_gradients(
        flow.using(solver=ODESolver(rtol=1e-5, atol=1e-5)), *rows_for(flow, 10)
    )
    assert report.passed, report
    assert [check.gradient for check in report.checks] == ["backprop", "adjoint", "checkpoint"]
    learnt = any(part.learn_end_time for part in flow.modules() if hasattr(part, "learn_end_time"))
    assert report["checkpoint"].error < (1e-4 if learnt else 1e-8)


def test_the_numbers_are_those_of_the_gradients():
    flow = cnf(solver=ODESolver(rtol=1e-3, atol=1e-3))
    x = torch.randn(10, 2)
    report = check_gradients(flow, x)

    def gradient_and_evaluations(gradient):
        solver = ODESolver(rtol=1e-3, atol=1e-3, gradient=gradient)
        with count_evaluations(flow) as nfe:
            loss = flow.using(solver=solver).log_prob(x).mean()
            found = torch.autograd.grad(loss, list(flow.parameters()))
        return torch.cat([part.flatten() for part in found]), nfe.value

    expected, nfe = gradient_and_evaluations("backprop")
    assert report["backprop"].nfe == nfe
    assert report.parameters == len(expected)
    for gradient in ("adjoint", "checkpoint"):
        found, nfe = gradient_and_evaluations(gradient)
        assert report[gradient].nfe == nfe
        error = (found - expected).norm() / expected.norm()
        assert report[gradient].error == pytest.approx(float(error), rel=1e-6, abs=1e-14)
    assert 1e-12 < report["adjoint"].error < 1e-1


def test_an_adjoint_of_too_few_steps_is_found():
    flow = cnf(solver=ODESolver(method="euler", steps=2))
    report = check_gradients(flow, torch.randn(50, 2))
    assert report["adjoint"].verdict == "fail"
    assert report["checkpoint"].verdict == "pass"
    assert not report.passed
    assert "raise steps" in str(report)
    assert check_gradients(flow, torch.randn(50, 2), tolerance=10.0).passed


def test_a_field_that_is_random_is_found():
    class Noisy(torch.nn.Linear):
        def forward(self, t, x):
            return super().forward(x) * torch.randn(())

    field = ModuleField(Noisy(2, 2), 2)
    flow = Flow([ContinuousTransform(field, solver=ODESolver(method="euler", steps=5))])
    report = check_gradients(flow, torch.randn(10, 2))
    assert report["checkpoint"].verdict == "fail"
    assert "randomness" in str(report["checkpoint"])


def test_a_backward_solve_that_fails_is_a_check_that_fails():
    class Rough(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, t, x):
            return self.scale * (x + 1e-3 * torch.sin(3e3 * x))

    solver = ODESolver(rtol=1e-2, atol=1e-2, max_evaluations=60, error_norm="points")
    flow = Flow([ContinuousTransform(ModuleField(Rough(), 2), solver=solver)])
    report = check_gradients(flow, torch.randn(5, 2))
    assert report["adjoint"].error == math.inf
    assert "the backward solve with dopri5 spent its budget" in str(report)
    assert report["checkpoint"].verdict == "pass"


def test_a_method_without_a_gradient_is_skipped_with_its_reason():
    solver = ODESolver(method="explicit_adams", steps=30)
    report = check_gradients(cnf(solver=solver, skip=False), torch.randn(10, 2))
    assert report["checkpoint"].verdict == "skip"
    assert "remembers earlier steps" in str(report["checkpoint"])
    assert report.passed


@pytest.mark.parametrize("divergence", [None, Hutchinson()], ids=str)
def test_a_report_is_reproducible_and_changes_nothing(divergence):
    flow = cnf(divergence=divergence, solver=ODESolver(rtol=1e-3, atol=1e-3))
    x = torch.randn(10, 2)
    before, state = [p.clone() for p in flow.parameters()], torch.get_rng_state()
    first, second = check_gradients(flow, x), check_gradients(flow, x)
    assert isinstance(first, GradientReport)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    other = check_gradients(flow, x, generator=torch.Generator().manual_seed(5))
    assert (other["adjoint"].error != first["adjoint"].error) is (divergence is not None)
    for parameter, old in zip(flow.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)


def test_frozen_parameters_are_left_out_and_inference_mode_does_not_matter():
    flow = cnf(solver=ODESolver(method="rk4", steps=10))
    flow.chain[-1].vector_field.layers[0].requires_grad_(False)
    trainable = sum(p.numel() for p in flow.parameters() if p.requires_grad)
    with torch.inference_mode():
        report = check_gradients(flow, torch.randn(10, 2))
    assert report.parameters == trainable
    assert report.passed


def test_a_gradient_of_zero_is_no_error():
    class Idle(torch.nn.Linear):
        def forward(self, t, x):
            return 0 * super().forward(x)

    solver = ODESolver(method="rk4", steps=2)
    flow = Flow([ContinuousTransform(ModuleField(Idle(2, 2), 2), solver=solver)])
    report = check_gradients(flow, torch.randn(5, 2))
    assert report.passed
    assert report["adjoint"].error == report["checkpoint"].error == 0


def test_a_report_reads_as_a_table():
    flow = cnf(solver=ODESolver(method="rk4", steps=2))
    lines = str(check_gradients(flow, torch.randn(10, 2))).splitlines()
    assert lines[0].startswith("gradient of the mean log-likelihood of 10 rows in ")
    assert lines[1].split()[:2] == ["pass", "backprop"]
    assert lines[1].endswith("(tolerance 0.01), 8 evaluations")
    with pytest.raises(KeyError):
        check_gradients(flow, torch.randn(10, 2))["autograd"]


@pytest.mark.usefixtures("shapes_unchecked")
def test_bad_input_is_refused():
    x = torch.randn(3, 2)
    with pytest.raises(TypeError, match="flow must be a Flow; got Affine"):
        check_gradients(Affine(2), x)
    with pytest.raises(TypeError, match="x must be a Tensor; got list"):
        check_gradients(cnf(), [[0.0, 0.0]])
    with pytest.raises(ValueError, match=r"at least 1 row, and shape \(rows, 2\); got \(0, 2\)"):
        check_gradients(cnf(), x[:0])
    with pytest.raises(ValueError, match=r"got \(2,\)"):
        check_gradients(cnf(), x[0])
    with pytest.raises(ValueError, match="tolerance must be positive and finite; got 0"):
        check_gradients(cnf(), x, tolerance=0)
    with pytest.raises(ValueError, match="flow must follow an ODE"):
        check_gradients(Flow([perturbed(Affine(2))]), x)
    with pytest.raises(ValueError, match="parameters that require a gradient; got none"):
        check_gradients(cnf().requires_grad_(False), x)
    with pytest.raises(ValueError, match="which backprop cannot follow"):
        check_gradients(cnf(solver=ODESolver(method="scipy_solver", gradient="adjoint")), x)
    with pytest.raises(ValueError, match="x must be finite"):
        check_gradients(cnf(), torch.full((3, 2), math.nan))
