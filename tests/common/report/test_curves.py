"""Curves lie where their numbers are."""

import math
import re

import pytest

from common.report.curves import MAX_POINTS, Series, chart, dots_per_row, linear, stretches, thinned, tick_text


def ticks(svg, name):
    """(value, place) of the ticks of an axis."""
    along = "x" if name == "x" else "y"
    found = re.findall(r"<text ([^>]*)>([^<]*)</text>", svg)
    places = [(float(text), re.search(rf'\b{along}="([\d.]+)"', a)[1]) for a, text in found if f'class="{name}"' in a]
    return [(value, float(place) - (3.5 if name == "y" else 0)) for value, place in places]


def values_of(svg, kind="polyline"):
    """The points of the curves of a chart, read from the drawing by means of the ticks."""
    axes = []
    for name in ("x", "y"):
        (v0, p0), *_, (v1, p1) = ticks(svg, name)
        axes.append(lambda place, v0=v0, p0=p0, v1=v1, p1=p1: v0 + (place - p0) * (v1 - v0) / (p1 - p0))
    curves = re.findall(rf'<{kind} points="([^"]*)"', svg)
    pairs = [[tuple(map(float, pair.split(","))) for pair in curve.split()] for curve in curves]
    return [[(axes[0](x), axes[1](y)) for x, y in curve] for curve in pairs]


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1e-4, 0.0), (250.0, -1000.0), (1e-3, 5.0)])
def test_a_curve_lies_at_its_numbers(scale, offset):
    points = [(float(x), offset + scale * math.sin(x)) for x in range(1, 31)]
    (found,) = values_of(chart("t", [Series("a", points)]))
    for (x, y), (fx, fy) in zip(points, found, strict=True):
        assert abs(x - fx) < 0.02 and abs(y - fy) < 0.002 * 2 * scale + 1e-3 * scale


def test_curves_share_axes_and_the_legend_has_last_values():
    svg = chart("t", [Series("a", [(1, 1.0), (2, 3.0)]), Series("b", [(1, 10.0), (2, math.nan)], 1, dashed=True)])
    first, second = values_of(svg)
    assert first[1][1] == pytest.approx(3.0, abs=0.05) and second[0][1] == pytest.approx(10.0, abs=0.05)
    assert "a <b>3</b>" in svg and "b <b>10</b>" in svg and svg.count("dashed") == 2


def test_a_band_lies_around_its_curve():
    svg = chart("t", [Series("a", [(4, 0.5), (16, 0.7)], band=[(0.4, 0.6), (0.6, 0.9)])], log_x=True)
    (band,) = values_of(svg, "polygon")
    assert [round(y, 2) for _, y in band] == [0.6, 0.9, 0.6, 0.4]
    assert [value for value, _ in ticks(svg, "x")] == [4, 16]


def test_what_cannot_be_drawn_is_left_out():
    assert chart("t", []) is None and chart("t", [Series("a", [(1, math.nan)])]) is None
    assert stretches([(1, 1.0), (2, math.inf), (3, 3.0), (4, 4.0)]) == [[(1, 1.0)], [(3, 3.0), (4, 4.0)]]
    svg = chart("t", [Series("a", [(1, 2.0)])])
    assert "nan" not in svg and [value for value, _ in ticks(svg, "x")] == [1]


def test_many_points_are_thinned_and_keep_their_extremes():
    points = [(float(x), math.sin(x / 50)) for x in range(5000)]
    points[1234] = (1234.0, 40.0)
    points[4321] = (4321.0, -40.0)
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS + 2 and kept == sorted(kept)
    assert {points[0], points[-1], points[1234], points[4321]} <= set(kept)
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_ticks_cover_the_values():
    to_place, found = linear(0.013, 0.97, 200, 0)
    assert found[0] <= 0.013 and found[-1] >= 0.97 and to_place(found[0]) == 200 and to_place(found[-1]) == 0
    assert linear(3, 3, 0, 10)[1] and linear(0, 0, 0, 10)[1]


@pytest.mark.parametrize("value, text", [(0.25, "0.25"), (1600, "1600"), (2.5e-5, "2.5e-5"), (0, "0"), (3e7, "3e7")])
def test_ticks_are_short(value, text):
    assert tick_text(value) == text


def test_dots_show_every_value_of_a_row():
    svg = dots_per_row("Dice", [("liver", [0.5, 0.9]), ("a name that is longer than the space for it", [0.1])])
    assert svg.count("<circle") == 3 and svg.count('class="line c1"') == 2 and "a name that is l…" in svg
