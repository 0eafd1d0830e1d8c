"""The page as Chromium shows it: every picture is there, and nothing is wider than the screen."""

import warnings
from pathlib import Path

import pytest

from common.report.__main__ import write_page
from tests.common.report import browser, made

pytestmark = pytest.mark.slow
WIDTHS = (390, 800, 1400)
# elements that end to the right of the screen, unless a container that scrolls by itself holds them
TOO_WIDE = """
[...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".scroll table, svg") && e.getBoundingClientRect().right > innerWidth + 0.5)
  .map(e => e.tagName + "." + e.className + ": " + e.getBoundingClientRect().right)
"""
HIDDEN_PICTURES = """[...document.images].filter(i => !(i.complete && i.naturalWidth > 0 && i.width > 50)).length"""
# an SVG's text that leaves its picture
CUT_TEXTS = """
[...document.querySelectorAll("svg text")].filter(t => {
  const own = t.getBoundingClientRect(), all = t.ownerSVGElement.getBoundingClientRect();
  return own.width > 0 && (own.left < all.left - 1 || own.right > all.right + 1);
}).map(t => t.textContent)
"""
CUT_NUMBERS = """[...document.querySelectorAll(".tile b")].filter(b => b.scrollWidth > b.clientWidth).length"""
# tables that scroll on a screen and would be cut on paper
BEYOND_CARDS = """[...document.querySelectorAll(".scroll")].filter(s => s.scrollWidth > s.clientWidth + 1).length"""
OPEN_ALL = """document.querySelectorAll("details").forEach(d => d.open = true)"""
REQUESTS = """performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).map(r => r.name)"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    program = browser.find()
    if program is None:
        reason = "no Chromium: the pages of runs were not checked (apt-get install chromium)"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    with browser.Browser(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module", params=["pretraining", "finetuning", "classification", "sweep", "score_card"])
def page(request, tmp_path_factory) -> Path:
    """The page of a run of each kind."""
    folder = getattr(made, request.param)(tmp_path_factory.mktemp("runs") / request.param)
    write_page(folder, folder / "report.html")
    return folder / "report.html"


def assert_fits(chromium, width):
    assert chromium.evaluate("innerWidth") == width
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate(TOO_WIDE) == [] and chromium.evaluate(CUT_TEXTS) == []
    assert chromium.evaluate(CUT_NUMBERS) == 0
    assert chromium.evaluate(HIDDEN_PICTURES) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_pictures_show_and_nothing_overflows(chromium, page, width, scheme, tmp_path):
    chromium.open(page, width, scheme)
    assert_fits(chromium, width)
    background = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")
    chromium.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    chromium.evaluate(OPEN_ALL)
    assert_fits(chromium, width)
    assert chromium.evaluate(REQUESTS) == []


def test_pictures_are_embedded(chromium, page):
    expected = {"pretraining": 2, "finetuning": 1, "score_card": 1}.get(page.parent.name, 0)
    chromium.open(page, 1400, "light")
    chromium.evaluate(OPEN_ALL)
    assert chromium.evaluate("document.images.length") == expected


def test_a_page_that_is_too_wide_is_found(chromium, tmp_path):
    path = tmp_path / "wide.html"
    path.write_text("<body><p style='width: 2000px'>wide</p><img src='data:image/png;base64,AAAA'></body>")
    chromium.open(path, 800, "light")
    assert len(chromium.evaluate(TOO_WIDE)) == 1 and chromium.evaluate(HIDDEN_PICTURES) == 1


def test_print_is_on_white_and_shows_what_is_folded(chromium, page):
    # the width of a narrow sheet
    chromium.open(page, 640, "dark")
    chromium.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    heights = "[...document.querySelectorAll('details')].map(d => d.getBoundingClientRect().height)"
    assert all(height > 40 for height in chromium.evaluate(heights))
    assert chromium.evaluate(TOO_WIDE) == [] and chromium.evaluate(BEYOND_CARDS) == 0
    assert chromium.pdf().startswith(b"%PDF")
    chromium.call("Emulation.setEmulatedMedia", media="", features=[])
