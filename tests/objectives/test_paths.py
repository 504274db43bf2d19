"""Laws of probability paths: endpoints, velocity, and the law of the states."""

import math

import pytest
import torch
from scipy.stats import kstest
from zoo import seeded

from cnf.objectives import LinearPath, SmoothedPath, VariancePreservingPath

PATHS = {
    "linear": LinearPath(),
    "linear with noise left": LinearPath(0.3),
    "variance-preserving": VariancePreservingPath(),
    "smoothed": SmoothedPath(0.2),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("batch", [(), (4,), (3, 4)], ids=str)
def test_the_velocity_is_the_derivative_of_the_state_in_time_with_noise_held_fixed(path, batch):
    x0, x1, t = torch.randn(*batch, 3), torch.randn(*batch, 3), torch.rand(batch)
    state, velocity = path.state_and_velocity(t, x0, x1, generator=seeded())

    again, derivative = torch.autograd.functional.jvp(
        lambda t: path.state_and_velocity(t, x0, x1, generator=seeded())[0], t, torch.ones_like(t)
    )

    torch.testing.assert_close(again, state)
    torch.testing.assert_close(velocity, derivative)


ENDS = {
    "linear": (LinearPath(), 0.0, 0.0),
    "linear with noise left": (LinearPath(0.3), 0.3, 0.0),
    "variance-preserving": (VariancePreservingPath(), 0.0, 0.0),
    "smoothed": (SmoothedPath(0.2), 0.0, 0.2),
}


@pytest.mark.parametrize(("path", "left", "sigma"), ENDS.values(), ids=ENDS)
def test_paths_run_from_the_base_to_the_data(path, left, sigma):
    """But for what is left of the base, and for the noise of a path that has some."""
    x0, x1 = torch.randn(5, 3), torch.randn(5, 3)
    noise = sigma * torch.randn(5, 3, generator=seeded())
    start, _ = path.state_and_velocity(torch.zeros(5), x0, x1, generator=seeded())
    end, _ = path.state_and_velocity(torch.ones(5), x0, x1, generator=seeded())
    torch.testing.assert_close(start, x0 + noise)
    torch.testing.assert_close(end, left * x0 + x1 + noise)


LAWS = {
    "linear": (LinearPath(), lambda t: (1 - t, t, 0.0)),
    "linear with noise left": (LinearPath(0.3), lambda t: (1 - 0.7 * t, t, 0.0)),
    "variance-preserving": (
        VariancePreservingPath(),
        lambda t: (math.cos(math.pi * t / 2), math.sin(math.pi * t / 2), 0.0),
    ),
    "smoothed": (SmoothedPath(0.2), lambda t: (1 - t, t, 0.2)),
}


@pytest.mark.parametrize(("path", "weights"), LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("time", [0.0, 0.35, 1.0])
def test_the_states_between_normal_ends_are_normal_with_the_mean_and_variance_of_the_path(
    path, weights, time
):
    """At 0.1 %, given a fixed seed, by the test of Kolmogorov and Smirnov."""
    x0, x1 = torch.randn(2000, 1), 1.5 + 0.5 * torch.randn(2000, 1)
    state, _ = path.state_and_velocity(torch.full((2000,), time), x0, x1)
    a, b, sigma = weights(time)
    deviation = math.sqrt(a**2 + 0.25 * b**2 + sigma**2)
    assert kstest(state.flatten().numpy(), "norm", args=(1.5 * b, deviation)).pvalue > 1e-3


def test_a_variance_preserving_path_keeps_the_variance():
    t, path = torch.linspace(0, 1, 9), VariancePreservingPath()
    one, zero = torch.ones(9, 1), torch.zeros(9, 1)
    from_x0, _ = path.state_and_velocity(t, one, zero)
    from_x1, _ = path.state_and_velocity(t, zero, one)
    torch.testing.assert_close(from_x0.square() + from_x1.square(), one)


def test_the_noise_of_a_path_comes_from_the_generator_alone():
    path, x, before = SmoothedPath(0.2), torch.zeros(4, 2), torch.get_rng_state()
    first, second = (
        path.state_and_velocity(torch.zeros(4), x, x, generator=seeded())[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.abs().min() > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_states_have_the_dtype_of_the_points(path):
    x = torch.zeros(4, 2, dtype=torch.float32)
    parts = path.state_and_velocity(torch.zeros(4, dtype=torch.float32), x, x)
    assert [part.dtype for part in parts] == [torch.float32] * 2


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearPath(-0.1), r"sigma_min must be in \[0, 1\); got -0\.1"),
        (lambda: LinearPath(1.0), r"sigma_min must be in \[0, 1\); got 1\.0"),
        (lambda: LinearPath(math.nan), r"sigma_min must be in \[0, 1\); got nan"),
        (lambda: SmoothedPath(0.0), r"sigma must be positive and finite; got 0\.0.*LinearPath"),
        (lambda: SmoothedPath(math.inf), "sigma must be positive and finite; got inf"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
