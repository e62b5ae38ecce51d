"""Turn a Markdown page into one self-contained HTML file.

Images are inlined and can be enlarged; tables can be sorted by a click. The folder templates/ has the page, its parts,
its style and its script. All text is escaped; only the ``extras`` of ``page`` are HTML.
"""

from __future__ import annotations

import base64
import functools
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from markdown_it.renderer import RendererHTML
    from markdown_it.token import Token

FOLDER = Path(__file__).with_name("templates")
TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def page(title: str, markdown: str, folder: Path, extras: Mapping[str, Markup] | None = None) -> str:
    """Return a self-contained HTML page.

    Args:
        markdown: GitHub-flavored, with tables; HTML in it is shown as text.
        folder: folder of relative image links. A missing image is replaced by its description.
        extras: exact text of a paragraph in ``markdown`` -> HTML that replaces it.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("js-default")  # tables on, raw HTML off
    parser.add_render_rule("image", image)
    parser.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    keep_percent_signs(tokens)
    replace_paragraphs(tokens, extras or {})
    body = parser.renderer.render(tokens, parser.options, {"folder": folder})
    style, script = (Markup((FOLDER / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    template = TEMPLATES.get_template("page.html.j2")
    return template.render(title=title, body=Markup(body), style=style, script=script) + "\n"


def keep_percent_signs(tokens: list[Token]) -> None:
    """Put a no-break space between a number and its percent sign."""
    for token in tokens:
        for child in token.children or ():
            if child.type == "text":
                child.content = child.content.replace(" %", "\N{NO-BREAK SPACE}%")


def replace_paragraphs(tokens: list[Token], extras: Mapping[str, str]) -> None:
    """Replace paragraphs, each of which is three tokens: open, inline, close."""
    for index, token in enumerate(tokens):
        if token.type == "inline" and token.content in extras and tokens[index - 1].type == "paragraph_open":
            token.type, token.content, token.children = "html_block", extras[token.content], None
            tokens[index - 1].hidden = tokens[index + 1].hidden = True


def image(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Mapping[str, Any]) -> str:
    """Render an image: a file below the page's folder is inlined."""
    token = tokens[index]
    path = env["folder"] / unquote(str(token.attrs["src"]))
    return embedded_image(path.read_bytes(), token.content, path.name) if path.is_file() else escape(token.content)


@functools.cache
def figures() -> Any:
    """Return the macros of templates/figures.html.j2."""
    return TEMPLATES.get_template("figures.html.j2").module


def embedded_image(data: bytes, text: str, name: str = "image.png", plot: bool = False) -> Markup:
    """Return an image that a click enlarges.

    Args:
        data: bytes of the file; the ending of ``name`` is its format.
        text: alternative text.
        plot: whether it has dark lines on white, which a dark page inverts.
    """
    return figures().zoomable(data_url(data, name), text, plot)


def slider(before: bytes, after: bytes, labels: tuple[str, str]) -> Markup:
    """Return two PNG files of one size over each other: before left of a movable line, after right of it."""
    return figures().slider(data_url(before), data_url(after), *labels)


def choice(label: str, panels: Mapping[str, Markup]) -> Markup:
    """Return panels of which a list of names selects one."""
    return figures().choice(label, panels)


def beside(*parts: Markup) -> Markup:
    """Return the parts in a row."""
    return figures().beside(parts)


def data_url(data: bytes, name: str = "image.png") -> str:
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
