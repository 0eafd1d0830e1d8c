"""Curves as inline SVG, with a legend in HTML. Colours are classes of the style sheet: they follow light and dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from common.report.page import Html, number, tag

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 34
COLOURS = 6
# points of a curve that are drawn; of more the lowest and highest of each stretch
MAX_POINTS = 300
# up to this number of points each gets a dot with its value
MAX_DOTS = 40

Point = tuple[float, float]
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        points: (x, y) in the order of x; a y that is not finite interrupts the curve.
        colour: number of the colour.
        dashed: for held-out values beside those of training.
        band: (low, high) per point, drawn around the curve.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False
    band: Sequence[Point] = ()


def chart(title: str, series: Sequence[Series], xlabel: str = "epoch", log_x: bool = False) -> Html | None:
    """Return curves in common axes with their legend and last values, None where there is no finite value.

    Args:
        log_x: a logarithmic x axis whose ticks are the x of the points.
    """
    series = [one for one in series if any(math.isfinite(y) for _, y in one.points)]
    if not series:
        return None
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for pair in [*one.points, *one.band] for y in pair[1:] if math.isfinite(y)]
    ys += [low for one in series for low, _ in one.band]
    to_x, x_ticks = x_axis(xs, log_x)
    to_y, y_ticks = linear(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    drawn = [part for one in series for part in curve(one, to_x, to_y)]
    picture = svg(title, *axes(to_x, x_ticks, to_y, y_ticks, xlabel), *drawn)
    return tag("figure", tag("figcaption", title, class_="title"), picture, legend(series), class_="chart")


def x_axis(xs: Sequence[float], log_x: bool) -> tuple[Scale, Sequence[float]]:
    if not log_x:
        return linear(min(xs), max(xs), LEFT, WIDTH - RIGHT, whole=True)
    low, high = math.log(min(xs)), math.log(max(xs))
    middle, span = (LEFT + WIDTH - RIGHT) / 2, (WIDTH - RIGHT - LEFT - 30)
    return lambda x: middle + ((math.log(x) - (low + high) / 2) / ((high - low) or 1)) * span, sorted(set(xs))


def linear(
    low: float, high: float, start: float, end: float, whole: bool = False
) -> tuple[Callable[[float], float], list[float]]:
    """Return a scale from the values `low` to `high` to pixels `start` to `end`, and its ticks.

    Args:
        whole: values are whole numbers, and the axis ends where they do.
    """
    if low == high and whole:
        return lambda value: (start + end) / 2 + value - low, [low]
    if low == high:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(low) * 0.1 or 1.0)
    ticks = [float(t) for t in MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)]
    if not whole:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    ticks = [tick for tick in ticks if low <= tick <= high]
    return lambda value: start + (value - low) / (high - low) * (end - start), ticks


def axes(to_x: Scale, x_ticks: Sequence[float], to_y: Scale, y_ticks: Sequence[float], xlabel: str) -> list[Html]:
    """Return grid lines, ticks and the name of the x axis."""
    lines = [
        tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=place(to_y(tick)), y2=place(to_y(tick)), class_="grid")
        for tick in y_ticks
    ]
    values = [
        tag("text", tick_text(tick), x=LEFT - 6, y=place(to_y(tick) + 3.5), text_anchor="end", class_="y")
        for tick in y_ticks
    ]
    below = [
        tag("text", tick_text(tick), x=place(to_x(tick)), y=HEIGHT - BOTTOM + 14, text_anchor="middle", class_="x")
        for tick in x_ticks
    ]
    name = tag("text", xlabel, x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end", class_="name")
    return [*lines, *values, *below, name]


def tick_text(tick: float) -> str:
    """Return the value of a tick: `0.25`, `1600`, `2.5e-5`."""
    if tick and not 1e-3 <= abs(tick) < 1e6:
        digits, _, power = f"{tick:.3e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{tick:.6g}"


def place(value: float) -> str:
    """Return a coordinate in pixels, to a hundredth."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def curve(series: Series, to_x: Scale, to_y: Scale) -> list[Html]:
    """Return the band, the line and, of few points, the dots of a curve."""
    style, parts = f"c{series.colour % COLOURS}", []
    if series.band:
        upper = [(x, high) for (x, _), (_, high) in zip(series.points, series.band)]
        lower = [(x, low) for (x, _), (low, _) in zip(series.points, series.band)]
        parts.append(tag("polygon", points=places([*upper, *lower[::-1]], to_x, to_y), class_=f"band {style}"))
    line = f"line {style}{' dashed' if series.dashed else ''}"
    for stretch in stretches(thinned(series.points)):
        parts.append(tag("polyline", points=places(stretch, to_x, to_y), class_=line))
    if len(series.points) <= MAX_DOTS:
        for x, y in series.points:
            if math.isfinite(y):
                value = tag("title", f"{series.name}: {number(y)} at {tick_text(x)}")
                parts.append(tag("circle", value, cx=place(to_x(x)), cy=place(to_y(y)), r=2.5, class_=f"dot {style}"))
    return parts


def places(points: Sequence[Point], to_x: Scale, to_y: Scale) -> str:
    return " ".join(f"{place(to_x(x))},{place(to_y(y))}" for x, y in points)


def stretches(points: Sequence[Point]) -> list[list[Point]]:
    """Return the points between those whose y is not finite."""
    parts: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            parts[-1].append((x, y))
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most about `MAX_POINTS` points: all, or the lowest and highest of each stretch and the ends."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        finite = [i for i in range(start, min(start + size, len(points))) if math.isfinite(points[i][1])]
        if finite:
            kept |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
    return [points[index] for index in sorted(kept)]


def legend(series: Sequence[Series]) -> Html:
    items = []
    for one in series:
        last = next((y for _, y in reversed(one.points) if math.isfinite(y)), None)
        key = tag("i", class_=f"key c{one.colour % COLOURS}{' dashed' if one.dashed else ''}")
        items.append(tag("span", key, f"{one.name} ", tag("b", number(last, 3))))
    return tag("div", *items, class_="legend")


def dots_per_row(title: str, rows: Sequence[tuple[str, Sequence[float]]]) -> Html | None:
    """Return values in [0, 1] as dots, one row per name, with a line at the mean; None without rows."""
    if not rows:
        return None
    height, left = 24 * len(rows) + 24, 110
    to_x, ticks = linear(0.0, 1.0, left, WIDTH - RIGHT)
    parts = []
    for tick in ticks:
        x = place(to_x(tick))
        parts.append(tag("line", x1=x, x2=x, y1=2, y2=height - 22, class_="grid"))
        parts.append(tag("text", tick_text(tick), x=x, y=height - 8, text_anchor="middle", class_="x"))
    for index, (name, values) in enumerate(rows):
        y = 24 * index + 14
        short = name if len(name) <= 17 else name[:16] + "…"
        parts.append(tag("text", tag("title", name), short, x=left - 8, y=y + 4, text_anchor="end", class_="y"))
        parts += [tag("circle", cx=place(to_x(value)), cy=y, r=3, class_="dot c0 faint") for value in values]
        if values:
            x = place(to_x(sum(values) / len(values)))
            parts.append(tag("line", x1=x, x2=x, y1=y - 8, y2=y + 8, class_="line c1"))
    return tag("figure", tag("figcaption", title, class_="title"), svg(title, *parts, height=height), class_="chart")


def svg(title: str, *parts: Html, height: int = HEIGHT) -> Html:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title)
