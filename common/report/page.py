"""Pieces of the page. Text that is given to `tag` is escaped; only what `tag` returns is taken as HTML."""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("style.css")
VOID = ("br", "hr", "img", "meta")


class Html(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """Return an element of HTML or SVG. Children and attributes that are no `Html` are escaped, None is left out.

    `class_` gives `class`, and `stroke_width` gives `stroke-width`.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    inside = "".join(f' {key}="{html.escape(str(value))}"' for key, value in given.items())
    if name in VOID:
        return Html(f"<{name}{inside}>")
    return Html(f"<{name}{inside}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """Return children one after the other, escaped where they are no `Html`; None is left out."""
    texts = (child if isinstance(child, Html) else html.escape(str(child)) for child in children if child is not None)
    return Html("".join(texts))


def document(title: str, body: Html, refresh: float | None = None) -> str:
    """Return the whole page: one file without scripts that loads nothing.

    Args:
        refresh: seconds after which the browser loads it again, None: never.
    """
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="refresh", content=f"{refresh:g}") if refresh else None,
        tag("title", title),
        tag("style", Html(STYLE.read_text())),
    ]
    return f'<!doctype html>\n<html lang="en">{tag("head", *head)}{tag("body", tag("main", body))}</html>\n'


def section(title: str, *children: Any) -> Html | None:
    """Return a section with its heading, None without content."""
    content = [child for child in children if child is not None]
    return tag("section", tag("h2", title), *content) if content else None


def cards(*children: Any, uneven: bool = False) -> Html | None:
    """Return cards side by side where there is room, None without a card.

    Args:
        uneven: two cards, the first wider than the second.
    """
    content = [tag("div", child, class_="card") for child in children if child is not None]
    return tag("div", *content, class_="cards uneven" if uneven else "cards") if content else None


def tile(label: str, value: str, note: str | None = None) -> Html:
    """Return a number with its name, and a note below."""
    small = tag("small", note) if note else None
    return tag("div", tag("span", label), tag("b", value), small, class_="tile")


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], numbers: bool = False) -> Html:
    """Return a table that scrolls by itself where it is too wide.

    Args:
        numbers: all columns but the first are flush right.
    """
    head = tag("thead", tag("tr", *(tag("th", cell) for cell in header)))
    body = tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows))
    return tag("div", tag("table", head, body, class_="numbers" if numbers else None), class_="scroll")


def pairs(values: Iterable[tuple[str, Any]]) -> Html:
    """Return names with their values below one another."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in values))


def folded(title: str, *children: Any) -> Html | None:
    """Return content that is shown on request (and in print), None without content."""
    content = [child for child in children if child is not None]
    return tag("details", tag("summary", title), *content) if content else None


def message(text: str, kind: str = "warning") -> Html:
    """Return a line that stands out; `kind` is warning, good or note."""
    return tag("p", text, class_=f"message {kind}")


def picture(path: Path, caption: str, large: bool = False) -> Html:
    """Return a PNG with its caption, embedded in the page, or why it cannot be read.

    Args:
        large: it stands alone, and is not wider than it can be read.
    """
    try:
        content = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        return message(f"{path.name} cannot be read ({error.strerror})", "note")
    image = tag("img", src=f"data:image/png;base64,{content}", alt=caption)
    return tag("figure", image, tag("figcaption", caption), class_="large" if large else None)


def number(value: Any, digits: int = 4) -> str:
    """Return a number with significant digits, "-" for none and NaN."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return "-" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def decimals(value: Any, count: int = 3) -> str:
    """Return a number with fixed decimals, "-" for none and NaN."""
    return f"{value:.{count}f}" if isinstance(value, (int, float)) and math.isfinite(value) else "-"


def counted(count: Any, noun: str) -> str:
    """Return `1 case`, `2 cases`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
