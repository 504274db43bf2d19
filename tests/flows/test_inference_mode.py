"""Laws of what is made in inference mode: flows are refused with the remedy, data are welcome."""

import copy

import pytest
import torch
from training_runs import config
from zoo import cnf

from cnf import FlowMatching, MaximumLikelihood, ODESolver, fit, load, save
from cnf.diagnostics import check_gradients

GRID = ODESolver(method="rk4", steps=2)


def made_within():
    """A flow that was made in inference mode."""
    with torch.inference_mode():
        return cnf(2, solver=GRID)


ASKED = {
    "fit": lambda flow, x: fit(flow, x, config(steps=1, objective=MaximumLikelihood)),
    "fit an objective": lambda flow, x: fit(FlowMatching(flow), x, config(steps=1)),
    "initialize": lambda flow, x: flow.initialize(x),
    "log_prob": lambda flow, x: flow.log_prob(x),
    "a distribution": lambda flow, x: flow().log_prob(x),
    "check_gradients": check_gradients,
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_a_flow_made_in_inference_mode_is_refused_where_gradients_are_asked(ask):
    x = torch.randn(30, 2)
    with pytest.raises(ValueError, match=r"outside of torch.inference_mode\(\).* copy.deepcopy"):
        ask(made_within(), x)


def test_a_frozen_flow_made_in_inference_mode_is_asked_as_any_other():
    flow, x = made_within().requires_grad_(False), torch.randn(30, 2)
    with torch.no_grad():
        expected = flow.log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), expected)
    torch.testing.assert_close(flow().log_prob(x), expected)
    with pytest.raises(ValueError, match=r"outside of torch.inference_mode\(\)"):
        flow.log_prob(x.requires_grad_())


def test_the_remedies_work(tmp_path):
    flow, x = made_within(), torch.randn(30, 2)
    with torch.no_grad():
        expected = flow.log_prob(x)
    with torch.inference_mode():
        torch.testing.assert_close(flow.log_prob(x), expected)
    save(flow, tmp_path / "flow.safetensors")
    for other in (copy.deepcopy(flow), load(tmp_path / "flow.safetensors")):
        torch.testing.assert_close(other.log_prob(x), expected)
        fit(other, x, config(steps=1, objective=MaximumLikelihood))
        other.log_prob(x).sum().backward()


@pytest.mark.parametrize("objective", [FlowMatching, MaximumLikelihood])
def test_data_made_in_inference_mode_are_as_any_other(objective):
    x, weight = torch.randn(30, 2), torch.rand(30)
    with torch.inference_mode():
        made, made_weight = x.clone(), weight.clone()
    losses = []
    for data in ({"x": x, "weight": weight}, {"x": made, "weight": made_weight}):
        torch.manual_seed(0)
        flow = cnf(2, solver=GRID)
        losses.append(fit(flow, data, config(steps=2, objective=objective)).loss)
        loss = objective(flow)(data["x"])
        loss.backward()
    assert losses[0] == losses[1]
