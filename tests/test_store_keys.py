"""The store's keys name code by a number that a person raises: here its source is recorded beside that number."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from stages import cache_latents
from stages.core import device, pictures
from stages.families import sd

PIXELS = (pictures.load_view, pictures.to_rgb, pictures.to_srgb)
ENTRIES = (
    cache_latents.encode_pictures,
    cache_latents.encode_captions,
    cache_latents.encode_all,
    cache_latents.forward,
    device.autocast,
    sd.load_vae,
    sd.encode_images,
    sd.load_tokenizer,
    sd.load_text,
    sd.encode_prompts,
    sd._source,
    sd._freeze,
)
RECORDED = {  # number, digest of the source that it stands for
    "pictures.VERSION": (1, "d99438d00a034ae8"),
    "cache_latents.FORMAT": (1, "c827c2a340ad6b73"),
}


class Bare(ast.NodeTransformer):
    """Without docstrings and annotations; comments and layout are not in the tree."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return ast.copy_location(ast.Assign([node.target], node.value), node) if node.value else ast.Pass()


def digest(functions: tuple[Callable[..., Any], ...]) -> str:
    sources = [source(inspect.getsource(function)) for function in functions]
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()[:16]


def source(text: str) -> str:
    return ast.unparse(ast.fix_missing_locations(Bare().visit(ast.parse(textwrap.dedent(text)))))


@pytest.mark.parametrize(
    ("name", "number", "functions"),
    [
        ("pictures.VERSION", pictures.VERSION, PIXELS),
        ("cache_latents.FORMAT", cache_latents.FORMAT, ENTRIES),
    ],
)
def test_code_that_decides_an_entry_changes_with_its_number(
    name: str, number: int, functions: tuple[Callable[..., Any], ...]
) -> None:
    found = (number, digest(functions))
    assert found == RECORDED[name], (
        f"code that decides what the store holds has changed: raise {name} if bits can change, "
        f"then record {found} for it in this file"
    )


def test_the_digest_sees_code_and_nothing_else() -> None:
    code = source("def f(x):\n    return x + 1\n")
    assert source('def f(x: int) -> int:\n    """Says."""\n    # why\n    return (x + 1)\n') == code
    assert source("def f(x):\n    return x + 2\n") != code
