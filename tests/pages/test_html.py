"""Pages: text stays text, nothing is loaded, and in a browser tables sort, images enlarge and the slider moves."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from markupsafe import Markup
from PIL import Image

from lora_dag.pages import html
from lora_dag.pages.markdown import code, image, table
from tests.helpers.browser import CHROMIUM, Browser, browser

EVIL = "<script>document.title = 'owned'</script>"
ROWS = [("a", "1,200"), ("b", "−0.5 [−0.6, −0.4]"), ("c", ""), ("d", "1e-3"), ("e", "110 %")]


def png(color: str, side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_example(folder: Path) -> Path:
    """A page with everything in it."""
    (folder / "an image.png").write_bytes(png("orange"))
    sliders = {name: html.slider(png("red"), png("blue"), ("base", name)) for name in (f"apple {EVIL}", "boat")}
    parts = [
        f"# Icons {EVIL}",
        image("An image", folder / "an image.png", folder),
        "![Gone](gone.png) ![Far](https://example.org/far.png)",
        table(("name", "value"), ROWS),
        table(("Facts", ""), [("z", "2"), ("y", "1")]),
        code(EVIL),
        "[click](javascript:alert(1))",
        "The sliders",
        "The sliders, and more",
        "The plot",
    ]
    extras = {
        "The sliders": html.choice("Prompt", sliders),
        "The plot": html.embedded_image(png("white"), "Plot", plot=True),
    }
    path = folder / "page.html"
    path.write_text(html.page(f"Icons {EVIL}", "\n\n".join(parts), folder, extras), encoding="utf-8")
    return path


def test_text_stays_text_and_nothing_is_loaded(tmp_path: Path) -> None:
    page = write_example(tmp_path).read_text(encoding="utf-8")
    assert page.count("<script>") == 1 and "&lt;script&gt;document.title" in page
    sources = re.findall(r'\bsrc="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "Gone Far" in page and 'href="javascript:' not in page
    assert not re.search(r"@import|url\(|<link", page)


def test_an_extra_stands_in_the_place_of_its_paragraph_alone(tmp_path: Path) -> None:
    page = html.page("t", "# Here\n\nHere\n\nHere too\n\n| Here |\n|---|\n| Here |", tmp_path, {"Here": Markup("<hr>")})
    assert re.search(r"<h1>Here</h1>\n<hr>\s*<p>Here too</p>", page)
    assert page.count("<hr>") == 1 and "<td>Here</td>" in page


# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(chromium: Browser, tmp_path: Path) -> Browser:
    chromium.open(write_example(tmp_path))
    return chromium


def names(page: Browser, nth: int = 0) -> str:
    return page.evaluate(f"[...document.querySelectorAll('tbody')[{nth}].rows].map(r => r.cells[0].innerText).join('')")


def test_tables_sort_by_number_and_facts_do_not(page: Browser) -> None:
    heading = "th:nth-child(2) button"
    page.click(heading)
    assert names(page) == "bdeac"
    assert page.evaluate("document.querySelector('th:nth-child(2)').getAttribute('aria-sort')") == "ascending"
    page.click(heading)
    assert names(page) == "aedbc"  # what has no number stays last
    page.click("th:nth-child(1) button")
    assert names(page) == "abcde"
    assert page.evaluate("document.querySelectorAll('th[aria-sort]').length") == 1
    assert names(page, 1) == "zy" and page.evaluate("document.querySelectorAll('th button').length") == 2


def test_a_image_enlarges_and_escape_closes_it(page: Browser) -> None:
    page.click(".image")
    assert page.evaluate("document.querySelector('dialog').open")
    assert page.evaluate("document.querySelector('dialog img').getBoundingClientRect().width") > 900
    page.press("Escape")
    assert not page.evaluate("document.querySelector('dialog').open")


def test_the_slider_follows_pointer_and_keys(page: Browser) -> None:
    where = "document.querySelector('.slider').style.getPropertyValue('--at')"
    shown = "getComputedStyle(document.querySelector('.slider img + img')).clipPath"
    page.click(".slider input", share=0.25)
    first = float(page.evaluate(where).rstrip("%"))
    assert 24 < first < 26
    assert float(re.findall(r"[\d.]+(?=%)", page.evaluate(shown))[-1]) == pytest.approx(first, abs=1e-3)
    page.press("ArrowRight")
    assert float(page.evaluate(where).rstrip("%")) > first


def test_one_panel_of_a_choice_is_shown(page: Browser) -> None:
    shown = "[...document.querySelectorAll('.choice > div')].map(d => d.offsetHeight > 0)"
    assert page.evaluate(shown) == [True, False]
    page.evaluate(
        "(s => { s.selectedIndex = 1; s.dispatchEvent(new Event('input')) })(document.querySelector('select'))"
    )
    assert page.evaluate(shown) == [False, True]


def test_no_request_leaves_and_no_caption_runs(page: Browser) -> None:
    assert page.requests() == [] and page.complaints() == []
    assert page.evaluate("document.title").startswith("Icons <script>")


@pytest.mark.parametrize("dark", [False, True])
def test_dark_and_light_at_a_phone_s_width(chromium: Browser, tmp_path: Path, dark: bool) -> None:
    chromium.open(write_example(tmp_path), width=390, dark=dark)
    background = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert ("invert" in chromium.evaluate("getComputedStyle(document.querySelector('.plot img')).filter")) is dark
    assert chromium.evaluate("document.documentElement.scrollWidth") == 390
