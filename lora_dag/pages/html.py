"""Markdown -> one HTML file that needs nothing beside it: every page is written once, as Markdown, and shown twice.

Images are inlined and enlarge, tables sort by a click: templates/ holds the page, its parts, its style and its script.
Text is escaped, whatever a caption says; only what ``page`` gets as ``extras`` is HTML.
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
    """A self-contained HTML page.

    Args:
        markdown: GitHub-flavoured, with tables; HTML in it is shown as text.
        folder: that the links of images are relative to. An image that is not there stays its description.
        extras: a paragraph of ``markdown``, to the letter -> HTML that replaces it.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("js-default")  # tables on, raw HTML off
    parser.add_render_rule("image", image)
    parser.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    replace_paragraphs(tokens, extras or {})
    body = parser.renderer.render(tokens, parser.options, {"folder": folder})
    style, script = (Markup((FOLDER / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    template = TEMPLATES.get_template("page.html.j2")
    return template.render(title=title, body=Markup(body), style=style, script=script) + "\n"


def replace_paragraphs(tokens: list[Token], extras: Mapping[str, str]) -> None:
    """A paragraph is three tokens: open, inline, close."""
    for index, token in enumerate(tokens):
        if token.type == "inline" and token.content in extras and tokens[index - 1].type == "paragraph_open":
            token.type, token.content, token.children = "html_block", extras[token.content], None
            tokens[index - 1].hidden = tokens[index + 1].hidden = True


def image(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Mapping[str, Any]) -> str:
    """Render rule: a file below the page's folder, inlined."""
    token = tokens[index]
    path = env["folder"] / unquote(str(token.attrs["src"]))
    return picture(path.read_bytes(), token.content, path.name) if path.is_file() else escape(token.content)


@functools.cache
def figures() -> Any:
    """The macros of templates/figures.html.j2, whose text says what each shows."""
    return TEMPLATES.get_template("figures.html.j2").module


def picture(data: bytes, text: str, name: str = "picture.png", plot: bool = False) -> Markup:
    """An image that a click enlarges.

    Args:
        data: bytes of the file, whose format its ``name`` says.
        text: for those who do not see it.
        plot: dark lines on white, which a dark page inverts.
    """
    return figures().picture(data_url(data, name), text, plot)


def slider(before: bytes, after: bytes, labels: tuple[str, str]) -> Markup:
    """Two PNG files of one size, before left of a line that moves and after right of it."""
    return figures().slider(data_url(before), data_url(after), *labels)


def choice(label: str, panels: Mapping[str, Markup]) -> Markup:
    """One panel at a time, chosen from a list of their names."""
    return figures().choice(label, panels)


def beside(*parts: Markup) -> Markup:
    """Parts in a row."""
    return figures().beside(parts)


def data_url(data: bytes, name: str = "picture.png") -> str:
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
