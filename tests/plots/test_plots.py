"""Laws of the pictures: what is drawn equals what was given, where it was given."""

import io
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cnf.plots import (
    figure_grid,
    plot_density,
    plot_samples,
    plot_training,
    plot_trajectories,
    plot_vector_field,
    save_figure,
)

EXTENT = (-2.0, 4.0, -1.0, 3.0)
MODE = (3.0, -0.5)


def gaussian(x):
    """A narrow Gaussian in the lower right of `EXTENT`."""
    offset = x - x.new_tensor(MODE)
    return -offset.square().sum(dim=-1) / (2 * 0.3**2) - math.log(2 * math.pi * 0.3**2)


def shear(t, x):
    return torch.stack([1 + x[:, 1], t * x[:, 0]], dim=-1)


def panel(figure):
    (ax,) = figure.axes
    return ax


def rendered_brightness(ax, points):
    """Brightness of the drawn picture at points of the plane."""
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="rgba", dpi=ax.figure.dpi)
    width, height = ax.figure.canvas.get_width_height()
    picture = np.frombuffer(buffer.getvalue(), np.uint8).reshape(height, width, 4)
    columns, rows = ax.transData.transform(points).T.astype(int)
    return picture[height - 1 - rows, columns, :3].astype(float).sum(axis=-1)


def history(length):
    return {"step": list(range(length)), "loss": [3.0 + math.sin(i) for i in range(length)]}


def test_density_image_holds_the_density_at_the_centres_of_its_pixels():
    (image,) = panel(plot_density(gaussian, EXTENT, resolution=40)).images
    xmin, xmax, ymin, ymax = image.get_extent()
    row, column = 7, 31
    centre = torch.tensor(
        [[xmin + (column + 0.5) * (xmax - xmin) / 40, ymin + (row + 0.5) * (ymax - ymin) / 40]]
    )

    assert (xmin, xmax, ymin, ymax) == EXTENT
    assert image.origin == "lower"
    shown = torch.tensor(image.get_array()[row, column])
    torch.testing.assert_close(shown, gaussian(centre).exp()[0], rtol=1e-5, atol=1e-9)


def test_density_image_integrates_to_the_mass_inside():
    (image,) = panel(plot_density(gaussian, EXTENT, resolution=150)).images
    cell = 6.0 * 4.0 / 150**2
    inside = 1 - 0.5 * math.erfc(1.0 / (0.3 * 2**0.5)) - 0.5 * math.erfc(0.5 / (0.3 * 2**0.5))
    assert float(image.get_array().sum()) * cell == pytest.approx(inside, abs=2e-3)


@pytest.mark.parametrize("log", [False, True])
def test_density_is_rendered_brightest_at_its_mode(log):
    ax = panel(plot_density(gaussian, EXTENT, log=log))
    mirrored = [(-1.0, -0.5), (3.0, 2.5), (-1.0, 2.5)]

    brightness = rendered_brightness(ax, [MODE, *mirrored])

    assert brightness[0] > 600  # of 765: the top of the colour map
    assert (brightness[1:] < 20).all()


def test_log_density_is_shown_relative_to_its_maximum_and_clipped():
    (image,) = panel(plot_density(gaussian, EXTENT, log=True, resolution=50)).images
    values = np.asarray(image.get_array())
    low, high = image.get_clim()

    assert values.max() == high
    assert values.min() == low
    assert high - low == pytest.approx(12)


def test_log_density_image_is_the_log_of_the_density_image_above_the_floor():
    (log_image,) = panel(plot_density(gaussian, EXTENT, log=True, resolution=50)).images
    (image,) = panel(plot_density(gaussian, EXTENT, resolution=50)).images
    seen = np.asarray(log_image.get_array()) > log_image.get_clim()[0]

    assert 0 < seen.mean() < 1
    np.testing.assert_allclose(
        np.exp(log_image.get_array()[seen]), image.get_array()[seen], rtol=1e-6
    )


def test_density_does_not_depend_on_chunks():
    sizes = []

    def counted(x):
        sizes.append(len(x))
        return gaussian(x)

    (image,) = panel(plot_density(counted, EXTENT, resolution=150)).images

    assert len(sizes) > 1
    assert sum(sizes) == 150**2
    row, column = np.unravel_index(np.argmax(image.get_array()), (150, 150))
    assert (column + 0.5) * 6 / 150 - 2 == pytest.approx(MODE[0], abs=0.03)
    assert (row + 0.5) * 4 / 150 - 1 == pytest.approx(MODE[1], abs=0.03)


def test_density_may_vanish():
    def half_plane(x):
        return torch.where(x[:, 0] > 0, 0.0, -math.inf)

    (image,) = panel(plot_density(half_plane, (-1, 1, -1, 1), resolution=10)).images
    (log_image,) = panel(plot_density(half_plane, (-1, 1, -1, 1), log=True, resolution=10)).images

    np.testing.assert_array_equal(image.get_array()[:, :5], 0)
    np.testing.assert_array_equal(image.get_array()[:, 5:], 1)
    np.testing.assert_array_equal(log_image.get_array()[:, :5], -12)


def test_callables_are_called_without_gradient():
    weight = torch.ones((), requires_grad=True)
    asked = []

    def log_prob(x):
        asked.append(torch.is_grad_enabled())
        return -weight * x.square().sum(dim=-1)

    def vector_field(t, x):
        asked.append(torch.is_grad_enabled())
        return weight * x

    plot_density(log_prob, EXTENT, resolution=5)
    plot_vector_field(vector_field, torch.tensor([0.0]), EXTENT, resolution=5)

    assert asked == [False, False]


def test_callables_may_turn_the_gradient_on():
    weight = torch.ones((), requires_grad=True)

    @torch.enable_grad()
    def log_prob(x):
        return -weight * x.square().sum(dim=-1)

    @torch.enable_grad()
    def vector_field(t, x):
        return weight * x

    assert panel(plot_density(log_prob, EXTENT, resolution=5)).images
    assert panel(plot_vector_field(vector_field, torch.zeros(1), EXTENT)).collections


def test_sample_image_integrates_to_the_fraction_inside():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5000, 2, generator=generator, dtype=torch.float64) * 2
    extent = (0.0, 1.0, 0.0, 2.0)

    (image,) = panel(plot_samples(x, extent=extent)).images
    values = np.asarray(image.get_array())

    fraction = (x[:, 0] < 1).double().mean().item()
    assert values.sum() * 2.0 / values.size == pytest.approx(fraction, rel=1e-12)


def test_samples_of_a_density_look_like_the_density():
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor(MODE) + 0.3 * torch.randn(40_000, 2, generator=generator)

    ax = panel(plot_samples(x, extent=EXTENT))
    (image,) = ax.images
    rows, columns = image.get_array().shape
    (expected,) = panel(plot_density(gaussian, EXTENT, resolution=rows)).images

    assert rows == columns
    distance = np.abs(image.get_array() - expected.get_array()).sum() * 24 / rows**2
    assert distance < 0.2  # in total variation 2 is the largest; counting noise alone gives 0.12
    assert image.get_cmap().name == expected.get_cmap().name
    assert rendered_brightness(ax, [MODE])[0] > 400
    assert rendered_brightness(ax, [(-1.0, 2.5)])[0] < 20


def test_pictures_without_any_density_are_black():
    outside = panel(plot_samples(torch.full((2000, 2), 9.0), extent=EXTENT))
    nowhere = panel(plot_density(lambda x: x[:, 0] * 0 - math.inf, EXTENT))
    for ax in (outside, nowhere):
        assert rendered_brightness(ax, [(0.0, 0.0), MODE]).max() < 20


def test_few_samples_are_drawn_as_points_where_they_are():
    x = torch.tensor([[0.5, 2.0], [-1.0, 0.0], [3.0, 1.0]])
    ax = panel(plot_samples(x, extent=EXTENT))
    (points,) = ax.collections
    np.testing.assert_allclose(points.get_offsets(), x.numpy())
    assert (rendered_brightness(ax, x.numpy()) > 200).all()
    assert rendered_brightness(ax, [(1.0, 1.0)])[0] < 20


@pytest.mark.parametrize("count", [1, 7, 2000])
def test_samples_without_extent_are_all_inside_a_square(count):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator) * torch.tensor([5.0, 0.5]) + 10
    ax = panel(plot_samples(x))
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()

    assert right - left == pytest.approx(top - bottom)
    assert left < x[:, 0].min() <= x[:, 0].max() < right
    assert bottom < x[:, 1].min() <= x[:, 1].max() < top


def test_trajectories_follow_the_states():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, 4, 2, generator=generator)
    ax = panel(plot_trajectories(states))
    paths, ends = ax.lines[:4], ax.lines[4:]

    for index, path in enumerate(paths):
        np.testing.assert_allclose(path.get_xydata(), states[:, index].numpy())
    np.testing.assert_allclose(ends[0].get_xydata(), states[0].numpy())
    np.testing.assert_allclose(ends[1].get_xydata(), states[-1].numpy())


def test_trajectories_tell_base_from_data():
    ax = panel(plot_trajectories(torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))))
    base, data = ax.lines[4:]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]

    assert labels == ["base, t = 0", "data, t = 1"]
    assert base.get_label() == labels[0]
    assert data.get_label() == labels[1]
    assert base.get_markerfacecolor() != data.get_markerfacecolor()


def test_arrows_equal_the_field_at_each_time():
    times = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    figure = plot_vector_field(shear, times, EXTENT, resolution=5)

    assert len(figure.axes) == 3
    for ax, t in zip(figure.axes, times, strict=True):
        (arrows,) = ax.collections
        x = torch.from_numpy(np.asarray(arrows.get_offsets()))
        velocity = torch.stack([torch.tensor(arrows.U), torch.tensor(arrows.V)], dim=-1)
        torch.testing.assert_close(velocity, shear(t, x), rtol=1e-12, atol=1e-12)
        assert ax.get_title() == f"t = {t:.3g}"


def test_arrows_cover_the_extent_and_compare_between_panels():
    figure = plot_vector_field(shear, torch.linspace(0, 1, 7), EXTENT, resolution=4)
    arrows = [ax.collections[0] for ax in figure.axes]

    assert len(arrows) == 7
    assert len({arrow.scale for arrow in arrows}) == 1
    assert len({tuple(arrow.get_clim()) for arrow in arrows}) == 1
    np.testing.assert_allclose(np.unique(arrows[0].get_offsets()[:, 0]), [-1.25, 0.25, 1.75, 3.25])
    np.testing.assert_allclose(np.unique(arrows[0].get_offsets()[:, 1]), [-0.5, 0.5, 1.5, 2.5])


def test_vector_field_at_rest_can_be_drawn(tmp_path):
    figure = plot_vector_field(lambda _, x: 0 * x, torch.tensor([0.5]), EXTENT, title="rest")
    save_figure(figure, tmp_path / "rest.png")
    assert figure.get_suptitle() == "rest"


def test_vector_field_gets_the_dtype_of_times():
    seen = []

    def vector_field(t, x):
        seen.append((t.shape, t.dtype, x.dtype))
        return x

    plot_vector_field(vector_field, torch.zeros(1, dtype=torch.float64), EXTENT)
    assert seen == [(torch.Size([]), torch.float64, torch.float64)]


def test_running_median_ignores_spikes_and_raw_losses_do_not():
    columns = {"step": list(range(300)), "loss": [2.0] * 300}
    columns["loss"][150] = 1e6
    raw, median = panel(plot_training(columns)).lines

    np.testing.assert_array_equal(raw.get_ydata(), columns["loss"])
    np.testing.assert_array_equal(median.get_ydata(), 2.0)


def test_spikes_do_not_set_the_height_of_the_panel():
    columns = history(300)
    columns["loss"][150] = 1e6
    low, high = panel(plot_training(columns)).get_ylim()
    assert 1.5 < low < 2.1
    assert 3.9 < high < 4.5


def test_running_median_keeps_a_straight_line_away_from_the_ends():
    columns = {"step": list(range(0, 3000, 3)), "loss": [1000.0 - i for i in range(1000)]}
    _, median = panel(plot_training(columns)).lines
    x, y = median.get_xdata(), median.get_ydata()
    inside = (x > 60) & (x < 2940)

    assert (x[0], x[-1]) == (0, 2997)
    np.testing.assert_allclose(y[inside], 1000 - x[inside] / 3)


def test_the_running_median_keeps_within_a_phase_whose_end_is_marked():
    columns = {
        "step": list(range(1, 101)),
        "phase": [1] * 40 + [2] * 60,
        "loss": [5.0] * 40 + [1.0] * 60,
    }
    ax = panel(plot_training(columns))
    _, median, end = ax.lines

    x, y = median.get_xdata(), median.get_ydata()
    np.testing.assert_array_equal(y[x <= 40], 5)
    np.testing.assert_array_equal(y[x > 40], 1)
    assert list(end.get_xdata()) == [40.5, 40.5]
    assert ax.get_ylabel() == "loss"  # of which kind depends on the phase


def test_values_not_measured_leave_no_mark():
    columns = {
        "step": [1, 2, 3, 4],
        "loss": [5.0, math.nan, 4.0, None],
        "validation": [None, 4.5, math.nan, 3.5],
    }
    raw, _, validation = panel(plot_training(columns)).lines

    np.testing.assert_array_equal(raw.get_xydata(), [[1, 5], [3, 4]])
    np.testing.assert_array_equal(validation.get_xydata(), [[2, 4.5], [4, 3.5]])


def test_reference_is_a_labelled_horizontal_line_inside_the_panel():
    ax = panel(plot_training(history(50), reference=-1))
    line = ax.lines[-1]

    assert list(line.get_ydata()) == [-1, -1]
    assert ax.get_ylim()[0] < -1
    assert "entropy of the truth" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert "nats" in ax.get_ylabel()


def test_validation_column_may_be_empty_of_measurements():
    columns = {**history(5), "validation": [None] * 5}
    legend = panel(plot_training(columns)).get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["loss, running median"]


DRAWINGS = {
    "density": lambda **options: plot_density(gaussian, EXTENT, resolution=5, **options),
    "samples": lambda **options: plot_samples(torch.rand(2000, 2), **options),
    "points": lambda **options: plot_samples(torch.rand(20, 2), **options),
    "trajectories": lambda **options: plot_trajectories(torch.rand(3, 4, 2), **options),
    "training": lambda **options: plot_training(history(9), **options),
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_ax_receives_the_drawing_and_its_title(draw):
    figure, [[left, right]] = figure_grid(1, 2)

    assert draw(ax=right, title="here") is figure
    assert right.get_title() == "here"
    assert right.has_data()
    assert not left.has_data()
    assert figure.axes == [left, right]


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_drawing_leaves_its_input_alone_and_needs_no_ax(draw, tmp_path):
    save_figure(draw(title="alone"), tmp_path / "alone.png")
    assert (tmp_path / "alone.png").stat().st_size > 1000


def test_panel_of_a_subfigure_returns_the_whole_figure():
    figure, _ = figure_grid(1, 1)
    ax = figure.subfigures(1, 2)[0].subplots()
    assert plot_density(gaussian, EXTENT, resolution=5, ax=ax) is figure


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_of_any_float_dtype_with_gradient_are_drawn(dtype):
    x = torch.tensor([[0.5, 2.0], [-1.0, 0.25]], dtype=dtype, requires_grad=True)
    (points,) = panel(plot_samples(x)).collections
    np.testing.assert_array_equal(points.get_offsets(), [[0.5, 2.0], [-1.0, 0.25]])


def test_figure_grid_is_a_list_of_rows_of_the_asked_size():
    figure, axes = figure_grid(2, 3, panel_size=2.0)

    assert [len(row) for row in axes] == [3, 3]
    assert [ax for row in axes for ax in row] == figure.axes
    assert tuple(figure.get_size_inches()) == (6.0, 4.0)
    assert axes[0][0].get_subplotspec().rowspan.start == 0
    assert axes[1][2].get_subplotspec().rowspan.start == 1
    assert axes[1][2].get_subplotspec().colspan.start == 2


def test_save_figure_makes_folders_and_writes_png(tmp_path):
    path = tmp_path / "new" / "folder" / "picture.png"
    save_figure(figure_grid(1, 1)[0], path)
    content = path.read_bytes()

    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.rstrip(b"\n").endswith(b"IEND\xaeB`\x82")
    assert [child.name for child in path.parent.iterdir()] == ["picture.png"]


def test_save_figure_replaces_an_old_file_and_takes_a_string(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    save_figure(figure_grid(1, 1)[0], str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_failing_figure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    figure, [[ax]] = figure_grid(1, 1)
    ax.set_title("$\\unknowncommand$")  # fails only when it is drawn

    with pytest.raises(ValueError, match="unknowncommand"):
        save_figure(figure, path)

    assert path.read_bytes() == b"old"
    assert [child.name for child in tmp_path.iterdir()] == ["picture.png"]


def test_a_half_written_picture_is_never_seen(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    figure, _ = figure_grid(1, 1)

    def fill_the_disk(_):
        assert path.read_bytes() == b"old"
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fill_the_disk)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, path)

    assert path.read_bytes() == b"old"
    assert [child.name for child in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.slow
def test_importing_plots_imports_no_matplotlib_and_drawing_no_pyplot_and_changes_no_setting():
    code = """
import sys, tempfile, torch
from cnf.plots import *
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
figure, axes = figure_grid(2, 2)
plot_density(lambda x: -x.square().sum(-1), (-1, 1, -1, 1), resolution=5, ax=axes[0][0])
plot_samples(torch.rand(2000, 2), ax=axes[0][1])
plot_trajectories(torch.rand(3, 4, 2), ax=axes[1][0])
plot_training({"step": [0, 1], "loss": [2.0, 1.0]}, ax=axes[1][1])
field = plot_vector_field(lambda t, x: x, torch.zeros(2), (-1, 1, -1, 1))
with tempfile.TemporaryDirectory() as folder:
    save_figure(figure, folder + "/a.png")
    save_figure(field, folder + "/b.png")
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams.copy() == before  # a plain dict(rcParams) would import pyplot
"""
    warnings_are_errors = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(warnings_are_errors, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


EXTENTS = [(1, -1, 0, 1), (0, 1, 1, 1), (0, 1, 0), (0, 1, 0, math.inf), (0, 1, 0, math.nan)]


@pytest.mark.parametrize("extent", EXTENTS, ids=str)
def test_bad_extent_is_refused(extent):
    with pytest.raises(ValueError, match="extent must be"):
        plot_density(gaussian, extent)
    with pytest.raises(ValueError, match="extent must be"):
        plot_samples(torch.zeros(3, 2), extent=extent)
    with pytest.raises(ValueError, match="extent must be"):
        plot_trajectories(torch.zeros(3, 3, 2), extent=extent)
    with pytest.raises(ValueError, match="extent must be"):
        plot_vector_field(shear, torch.zeros(1), extent)


@pytest.mark.parametrize(
    ("log_prob", "match"),
    [
        (lambda x: x, r"log_prob must return shape \(100,\).*got \(100, 2\)"),
        (lambda x: x.sum(), r"log_prob must return shape \(100,\).*got \(\)"),
        (lambda x: x[:, 0] * math.nan, "log_prob must return values.*nan"),
        (lambda x: x[:, 0].abs() / 0, "log_prob must return values.*inf"),
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_bad_log_prob_is_refused(log_prob, match, log):
    with pytest.raises(ValueError, match=match):
        plot_density(log_prob, EXTENT, resolution=10, log=log)


def test_log_density_that_vanishes_everywhere_is_refused():
    with pytest.raises(ValueError, match=r"log_prob must return values.*-inf"):
        plot_density(lambda x: x[:, 0] * 0 - math.inf, EXTENT, log=True)


def test_density_too_high_for_a_picture_is_shown_by_its_logarithm():
    def steep(x):
        return 1000 - x.square().sum(dim=-1)

    with pytest.raises(ValueError, match="log_prob must return values"):
        plot_density(steep, EXTENT, resolution=10)
    plot_density(steep, EXTENT, resolution=10, log=True)


@pytest.mark.parametrize(
    ("vector_field", "match"),
    [
        (lambda t, x: x[:, :1], r"vector_field must return shape \(400, 2\).*got \(400, 1\)"),
        (lambda t, x: x / 0, "vector_field must return finite velocities"),
    ],
)
def test_bad_vector_field_is_refused(vector_field, match):
    with pytest.raises(ValueError, match=match):
        plot_vector_field(vector_field, torch.zeros(1), EXTENT)


def test_a_grid_that_the_dtype_rounds_away_is_refused():
    extent = (1.7e9, 1.7e9 + 60, 0, 1)
    times = torch.zeros(1, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"extent must be wide enough for the dtype torch\.float32"
    ):
        plot_vector_field(lambda t, x: x, times, extent)
    plot_density(gaussian, extent)
    torch.set_default_dtype(torch.float32)
    with pytest.raises(
        ValueError, match=r"extent must be wide enough for the dtype torch\.float32"
    ):
        plot_density(gaussian, extent)


@pytest.mark.parametrize("times", [torch.zeros(0), torch.tensor([0.0, math.nan])])
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match="times must be finite"):
        plot_vector_field(shear, times, EXTENT)


def test_resolution_below_one_is_refused():
    with pytest.raises(ValueError, match="resolution must be at least 1; got 0"):
        plot_density(gaussian, EXTENT, resolution=0)


@pytest.mark.parametrize("shape", [(5, 3), (0, 2)], ids=str)
def test_samples_of_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(n, 2\)"):
        plot_samples(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4, 5, 3), (0, 5, 2), (4, 0, 2)], ids=str)
def test_states_of_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"states must have shape \(times, n, 2\)"):
        plot_trajectories(torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_points_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="x must be finite; got 2"):
        plot_samples(torch.tensor([[0.0, 1.0], [value, value]]))
    with pytest.raises(ValueError, match="states must be finite; got 2"):
        plot_trajectories(torch.tensor([[[0.0, 1.0]], [[value, value]]]))


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"loss": [1.0]}, 'must hold "step" and "loss"'),
        ({"step": [1]}, 'must hold "step" and "loss"'),
        ({"step": [1, 2], "loss": [1.0]}, "got 2 and 1"),
        ({"step": [1], "loss": [1.0], "validation": []}, "got 1 and 0"),
        ({"step": [None], "loss": [1.0]}, 'finite "step"'),
        ({"step": [1, 2], "loss": [None, math.nan]}, 'finite "loss"'),
        ({"step": [], "loss": []}, 'finite "loss"'),
    ],
)
def test_bad_history_is_refused(columns, match):
    with pytest.raises(ValueError, match=match):
        plot_training(columns)


@pytest.mark.parametrize("reference", [math.nan, math.inf])
def test_reference_that_is_not_finite_is_refused(reference):
    with pytest.raises(ValueError, match="reference must be finite"):
        plot_training(history(5), reference=reference)


def test_bad_grid_and_bad_path_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rows and columns must be at least 1; got 0 and 2"):
        figure_grid(0, 2)
    with pytest.raises(ValueError, match="panel_size must be positive"):
        figure_grid(1, 1, panel_size=0)
    with pytest.raises(ValueError, match=r"path must end in \.png"):
        save_figure(figure_grid(1, 1)[0], tmp_path / "picture.pdf")
