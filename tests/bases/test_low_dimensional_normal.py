"""A base that is drawn from few numbers: its draws lie on a surface, and it has no density."""

import pytest
import torch
from zoo import WITHOUT_DENSITY, perturbed, seeded

from cnf import CNF, Flow, MaximumLikelihood, TrainingConfig, certify, fit, load, save
from cnf.bases import LowDimensionalNormal
from cnf.transforms import Affine


def test_draws_fill_a_surface_of_as_many_dimensions_as_there_are_numbers():
    base = LowDimensionalNormal(5, 2, hidden_features=())
    z = base.rsample(torch.Size([100]), generator=seeded())
    spread = torch.linalg.svdvals(z - z.mean(0))
    assert spread[1] > 1e-3
    assert spread[2] < 1e-12 * spread[0]
    assert base.rsample(torch.Size([3, 4])).shape == (3, 4, 5)
    assert base.float().rsample(torch.Size([0])).dtype == torch.float32


def test_a_generator_fixes_the_draws_and_gradients_reach_the_network():
    base = LowDimensionalNormal(3, 1)
    first, second = (base.rsample(torch.Size([9]), generator=seeded()) for _ in range(2))
    assert torch.equal(first, second)
    first.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in base.parameters())


@pytest.mark.parametrize("make", WITHOUT_DENSITY.values(), ids=WITHOUT_DENSITY)
def test_a_flow_without_density_says_so(make):
    flow = make()
    x = flow.sample(20, generator=seeded())
    assert flow.likelihood == "not_a_likelihood"
    for ask in (
        lambda: flow.log_prob(x),
        lambda: flow.sample_and_log_prob(3),
        lambda: MaximumLikelihood(flow)(x),
        lambda: flow.rsample_and_log_weight(lambda x: -x.square().sum(-1), 3),
    ):
        with pytest.raises(ValueError, match=r"ManifoldLikelihood|of its draws|no likelihood"):
            ask()
    report = certify(flow, x)
    assert {check.name for check in report.checks if check.verdict == "fail"} == set()
    torch.testing.assert_close(flow.to_data(flow.to_base(x)), x)


def test_a_file_keeps_it(tmp_path):
    flow = Flow([perturbed(Affine(3))], LowDimensionalNormal(3, 2, hidden_features=(5,)))
    save(flow, tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors")
    assert repr(again) == repr(flow)
    draws = [each.sample(4, generator=seeded()) for each in (flow, again)]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowDimensionalNormal(3, 3), "noise_features must be less than the 3 features"),
        (lambda: LowDimensionalNormal(3, 0), "noise_features must be at least 1"),
        (
            lambda: fit(
                CNF(2, base=LowDimensionalNormal(2, 1)),
                torch.randn(30, 2),
                TrainingConfig(steps=1, progress=False),
            ),
            "no log-density|no likelihood",
        ),
    ],
)
def test_what_needs_a_density_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
