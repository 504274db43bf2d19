"""Pictures of tables show what they are given, where it is."""

import math

import numpy as np
import pytest
import torch

from cnf.plots import plot_column, plot_pairs, plot_two_columns, save_figure


def normal(x):
    """A standard normal density in every column."""
    return -(x.square() + math.log(2 * math.pi)).sum(-1) / 2


def test_the_curve_of_a_column_is_its_density():
    figure = plot_column(normal, "height", samples=torch.randn(500, 1))
    (ax,) = figure.axes
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(y, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), rtol=1e-6)
    assert ax.get_xlabel() == "height"
    assert sum(bar.get_height() * bar.get_width() for bar in ax.patches) == pytest.approx(1)


def test_the_histogram_is_of_the_data_if_there_are_any():
    samples, data = torch.randn(500, 1), torch.randn(500, 1) + 4
    ax = plot_column(normal, "height", samples=samples, data=data, title="both").axes[0]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    mean = np.average(middles, weights=[bar.get_height() for bar in ax.patches])
    assert mean == pytest.approx(4, abs=0.2)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["data", "density"]
    assert ax.get_title() == "both"


@pytest.mark.parametrize("beside_data", [False, True])
def test_two_columns_are_drawn_each_on_its_own_scale(beside_data):
    scale = torch.tensor([1.0, 1000.0])
    data = torch.randn(1200, 2) * scale if beside_data else None  # here, where the seed is known
    figure = plot_two_columns(
        lambda x: normal(x / scale) - scale.log().sum(),
        ["height", "weight"],
        samples=torch.randn(1500, 2) * scale,
        data=data,
    )
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["density", "samples"] + ([] if data is None else ["data"])
    for ax in figure.axes:
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("height", "weight")
        assert ax.get_ylim()[1] / ax.get_xlim()[1] == pytest.approx(1000, rel=0.2)
        assert ax.get_aspect() == "auto"
        assert ax.get_xlim() == figure.axes[0].get_xlim()
        # Panels are bright in their middle, where the density is.
        image = ax.images[0].get_array()
        middle = image[image.shape[0] // 2, image.shape[1] // 2]
        assert middle > 0.5 * image.max()


def test_pairs_hold_every_pair_once():
    samples, data = torch.randn(50, 3), torch.randn(20, 3) + 5
    figure = plot_pairs(samples, ["a", "b", "c"], data=data, title="pairs")
    assert len(figure.axes) == 6
    bottom = [ax for ax in figure.axes if ax.get_xlabel()]
    assert [ax.get_xlabel() for ax in bottom] == ["a", "b", "c"]
    below = next(ax for ax in figure.axes if ax.get_ylabel() == "b")
    points = [np.asarray(layer.get_offsets()) for layer in below.collections]
    np.testing.assert_allclose(points[0], data[:, :2])
    np.testing.assert_allclose(points[1], samples[:, :2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["data", "samples"]


def test_pairs_of_samples_alone_and_of_one_column_can_be_drawn(tmp_path):
    plot_pairs(torch.randn(50, 2), ["a", "b"]).savefig(tmp_path / "two.png")
    plot_pairs(torch.ones(50, 1), ["a"]).savefig(tmp_path / "constant.png")


@pytest.mark.parametrize("name", ["$^$", "$x_1^2$", "a_b", r"$\alpha$", "100 $"])
def test_names_of_columns_are_no_formulas(tmp_path, name):
    x = torch.randn(50, 2)
    for figure in (
        plot_column(lambda x: -x.square().sum(-1), name, samples=x[:, :1]),
        plot_two_columns(lambda x: -x.square().sum(-1), [name, name], samples=x),
        plot_pairs(x, [name, name]),
    ):
        save_figure(figure, tmp_path / "picture.png")
        label = figure.axes[-1].xaxis.label
        assert label.get_text() == name
        assert not label.get_parse_math()


def test_grids_tell_large_numbers_apart():
    """Seconds since 1970, over a minute, of which single precision makes blocks of 128 s."""
    middle = torch.tensor([1.7e9, 1.6e9], dtype=torch.float64)
    samples = middle + 10 * torch.randn(500, 2, dtype=torch.float64)
    torch.set_default_dtype(torch.float32)

    def log_prob(x):
        assert x.dtype == torch.float64
        return normal((x - middle[: x.shape[-1]]) / 10)

    curve = plot_column(log_prob, "time", samples=samples[:, :1]).axes[0].lines[0]
    assert len(np.unique(curve.get_ydata())) > 400
    (image,) = plot_two_columns(log_prob, ["from", "to"], samples=samples).axes[0].images
    brightest = np.unravel_index(np.argmax(image.get_array()), (100, 100))
    left, right, bottom, top = image.get_extent()
    assert bottom + (brightest[0] + 0.5) * (top - bottom) / 100 == pytest.approx(1.6e9, abs=1)
    assert left + (brightest[1] + 0.5) * (right - left) / 100 == pytest.approx(1.7e9, abs=1)
    assert len(np.unique(image.get_array())) > 1000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_named(value):
    good = torch.randn(20, 2)
    bad = good.clone()
    bad[3, 1] = value
    for draw in (
        lambda samples, data: plot_pairs(samples, ["a", "b"], data=data),
        lambda samples, data: plot_two_columns(normal, ["a", "b"], samples=samples, data=data),
        lambda samples, data: plot_column(normal, "b", samples=samples[:, 1:], data=data[:, 1:]),
    ):
        with pytest.raises(ValueError, match=r"samples must be finite; .* in row 3\. Drop"):
            draw(bad, good)
        with pytest.raises(ValueError, match=r"data must be finite; .* in row 3\. Drop"):
            draw(good, bad)


@pytest.mark.usefixtures("shapes_unchecked")
def test_rows_of_another_shape_are_refused():
    good = torch.randn(20, 2, requires_grad=True)
    plot_pairs(good, ["a", "b"], data=good)
    for wrong in (torch.zeros(0, 2), torch.zeros(2), torch.zeros(3, 4, 2)):
        with pytest.raises(ValueError, match=r"samples must have shape \(n, 2\), not empty; got"):
            plot_pairs(wrong, ["a", "b"])
    with pytest.raises(
        ValueError, match=r"data must have shape \(n, 2\), not empty; got \(20, 1\)"
    ):
        plot_pairs(good, ["a", "b"], data=good[:, :1])
    with pytest.raises(ValueError, match="log_prob must return values that make a finite picture"):
        plot_column(lambda x: x[:, 0] * math.nan, "a", samples=good[:, :1])


def test_outliers_do_not_set_the_scale():
    samples = torch.randn(1000, 1)
    samples[0] = 1e6
    assert plot_column(normal, "a", samples=samples).axes[0].get_xlim()[1] < 10


def test_names_are_counted():
    with pytest.raises(ValueError, match="names must be 2, one for each column; got 1"):
        plot_pairs(torch.randn(5, 2), ["a"])
