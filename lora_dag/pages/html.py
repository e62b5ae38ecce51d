"""Markdown -> one HTML file that needs nothing beside it: every page is written once, as Markdown, and shown twice.

Pictures are inlined and enlarge, tables sort by a click. The page asks no network for anything, and its own policy
forbids it to. Text is escaped, whatever a caption says; only what ``page`` is handed as ``extras`` is HTML.
"""

from __future__ import annotations

import base64
import io
import mimetypes
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from lora_dag.core.labels import exact
from lora_dag.pages.page_assets import SCRIPT, STYLE

if TYPE_CHECKING:
    from markdown_it.renderer import RendererHTML
    from markdown_it.token import Token
    from PIL import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, markdown: str, folder: Path, extras: Mapping[str, str] | None = None) -> str:
    """A self-contained HTML page.

    Args:
        markdown: GitHub-flavoured, with tables; HTML in it is shown as text.
        folder: that the links of pictures are relative to. A picture that is not there stays its description.
        extras: a paragraph of ``markdown``, to the letter -> HTML that stands in its place.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("js-default")  # tables on, raw HTML off
    parser.add_render_rule("image", image)
    parser.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    replace_paragraphs(tokens, extras or {})
    body = parser.renderer.render(tokens, parser.options, {"folder": folder})
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}</main>
<dialog aria-label="Enlarged picture"></dialog>
<script>{SCRIPT}</script>
</body>
</html>
"""


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


def picture(data: bytes, text: str, name: str = "picture.png", plot: bool = False) -> str:
    """A picture that a click enlarges.

    Args:
        data: bytes of the file; its kind is told by ``name``.
        text: for those who do not see it.
        plot: dark lines on white, which a dark page shows the other way round.
    """
    kind = "picture plot" if plot else "picture"
    return f'<button type="button" class="{kind}" title="Enlarge">{inline(data, text, name)}</button>'


def slider(before: bytes, after: bytes, labels: tuple[str, str]) -> str:
    """Two pictures of one size over each other, with a line between them that pointer, touch and arrow keys move.

    Args:
        before: bytes of a PNG, shown left of the line.
        after: the same, shown right of it.
        labels: of the two.
    """
    left, right = (escape(label) for label in labels)
    return f"""<figure class="slider">
<div>{inline(before, labels[0])}{inline(after, labels[1])}
<input type="range" min="0" max="100" step="any" value="50" aria-label="{left} left of here, {right} right of it"></div>
<figcaption><span>{left}</span><span>{right}</span></figcaption>
</figure>
"""


def shown_scale(scales: Sequence[float]) -> tuple[float, int]:
    """The adapter's strength that a slider shows, the nearest to 1 of those on a sample sheet; and its column there."""
    scale = min(scales, key=lambda scale: abs(scale - 1))
    return scale, 1 + scales.index(scale)


def at_scale(name: str, scale: float) -> str:
    return name if scale == 1 else f"{name} x {exact(scale)}"


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def choice(label: str, panels: Mapping[str, str]) -> str:
    """One of several pieces of HTML at a time, chosen from a list of their names; all of them without scripts."""
    options = "".join(f"<option>{escape(name)}</option>" for name in panels)
    bodies = "\n".join(f"<div>{panel}</div>" for panel in panels.values())
    return f'<div class="choice"><label>{escape(label)} <select>{options}</select></label>\n{bodies}</div>\n'


def beside(*parts: str) -> str:
    """Pieces of HTML in a row, below one another where the page is narrow."""
    return f'<div class="beside">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def inline(data: bytes, text: str, name: str = "picture.png") -> str:
    """An <img> that holds its file."""
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return f'<img alt="{escape(text)}" src="data:{kind};base64,{base64.b64encode(data).decode()}">'
