"""The store's keys name code by a number that a person raises: here its source is recorded beside that number."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from lora_dag.core import device
from lora_dag.families import common, flux, sd, sd3, sdxl, z_image
from lora_dag.pictures import pictures
from stages.cache_latents import encoding, entries, keys

PIXELS = (
    pictures.load_view,
    pictures.decode,
    pictures.cut_view,
    pictures.load_mask,
    pictures.decode_mask,
    pictures.cut_mask,
    pictures.to_rgb,
    pictures._upright,
    pictures._flat,
    pictures._luminance,
    pictures._eight_bits,
    pictures.to_srgb,
)
ENTRIES = (
    entries.Views.encoder.func,
    entries.Views.read,
    entries.Views.decode,
    entries.Captions.encoder.func,
    encoding.encode_all,
    encoding.batched,
    encoding.forward,
    device.autocast,
    sd.vae_dtype,
    sd.load_tokenizer,
    sd.load_text,
    sd.encode_prompts,
    common.load_frozen,
    common.load_tokenizer,
    common._source,
    common.upcast_vae_dtype,
    common.load_vae,
    common.encode_images,
    common.input_ids,
    common.clip_states,
    common.t5_states,
    flux.load_tokenizer,
    flux.load_text,
    flux.load_trainable_text,
    flux.encode_prompts,
    sd3.load_tokenizer,
    sd3.load_text,
    sd3.load_trainable_text,
    sd3.encode_prompts,
    sdxl.load_tokenizer,
    sdxl.load_text,
    sdxl.encode_prompts,
    z_image.load_tokenizer,
    z_image.chats,
    z_image.load_text,
    z_image.encode_prompts,
)
MASKS = (entries.Masks.read, entries.Masks.decode, entries.Masks._make, entries.mask_weights)
RECORDED = {  # number, digest of the source that it stands for
    "pictures.VERSION": (2, "5523ea9372fec6b8"),
    "keys.FORMAT": (1, "d265fcc34af5f8b3"),
    "keys.MASK_FORMAT": (2, "c0c3f05683585a96"),
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
        ("keys.FORMAT", keys.FORMAT, ENTRIES),
        ("keys.MASK_FORMAT", keys.MASK_FORMAT, MASKS),
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
