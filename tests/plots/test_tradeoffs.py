"""Pictures of nats against evaluations."""

import pytest

from cnf.plots import Tradeoff, plot_tradeoffs


def points(worse=0.0):
    return [
        Tradeoff(row, column, name, strength, 100 - 40 * strength, 2 + strength + extra, 0.1)
        for row in ("rings", "a$b$")
        for column, extra in (("recipe", 0.0), ("scratch", worse))
        for name, strength in (("", 0.0), ("kinetic", 1.0), ("kinetic", 0.5), ("mine:Own", 0.5))
    ]


def test_a_line_goes_from_no_penalty_through_rising_strengths():
    figure = plot_tradeoffs(points(), nats="held-out NLL", accuracy=1e-3)
    assert [ax.get_title() for ax in figure.axes] == [
        *("rings: recipe", "rings: scratch", "a$b$: recipe", "a$b$: scratch")
    ]
    for ax in figure.axes:
        line = ax.lines[0]
        assert line.get_xdata().tolist() == [100, 80, 60]
        assert line.get_ydata().tolist() == [2, 2.5, 3]
        assert [text.get_text() for text in ax.texts] == ["0.5", "1", "0.5"]
        assert ax.get_xlabel() == "evaluations a row, for 0.001 nats"
    assert figure.axes[0].get_ylabel() == "held-out NLL (nats)"
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {
        *("no penalty", "kinetic", "mine:Own")
    }


def test_the_panels_of_a_row_have_one_scale_that_holds_every_point():
    figure = plot_tradeoffs(points(worse=5.0), nats="held-out NLL", accuracy=1e-3)
    for ax in figure.axes:
        (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
        assert (left, right, low, high) == (*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim())
        assert left < 60
        assert right > 100
        assert low < 2 - 0.1
        assert high > 8 + 0.1


def test_a_picture_without_points_is_refused():
    with pytest.raises(ValueError, match=r"points must be one or more; got none"):
        plot_tradeoffs([], nats="held-out NLL", accuracy=1e-3)
