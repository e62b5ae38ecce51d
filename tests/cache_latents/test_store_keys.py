"""Version numbers in the store's keys, with a digest of the source that each number covers."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from lora_dag.artifacts import packing
from lora_dag.core import device
from lora_dag.core.params import FAMILIES
from lora_dag.families import common, z_image
from lora_dag.families.protocol import load_family
from lora_dag.images import decode, masks
from stages.cache_latents import RESULTS, captions, encoding, keys, latents
from stages.cache_latents import masks as mask_entries
from tests.helpers.families import case

PIXELS = (
    decode.load_view,
    decode.decode,
    decode.cut_view,
    masks.load_mask,
    masks.decode_mask,
    masks.cut_mask,
    decode.to_rgb,
    decode.upright,
    decode.flat,
    masks.luminance,
    decode.eight_bits,
    decode.to_srgb,
)
ENTRIES = (
    latents.LatentEncoder.encoder.func,
    latents.LatentEncoder.read,
    latents.LatentEncoder.decode,
    captions.CaptionEncoder.encoder.func,
    encoding.encode_all,
    encoding.make_batches,
    encoding.encode_batch,
    device.autocast,
    common.component_class,
    common.load_frozen,
    common.load_tokenizer,
    common._load_options,
    common.upcast_vae_dtype,
    common.load_vae,
    common.encode_images,
    common.load_text,
    common.load_trainable_text,
    common.load_encoders,
    common.tokenizer_of,
    common.input_ids,
    common.clip_states,
    common.t5_states,
)
OF_A_FAMILY = ("COMPONENTS", "vae_dtype", "load_vae", "encode_images", "load_tokenizer", "load_text", "encode_prompts")
"""What each family decides of an entry; ``common`` is in the list above."""
MASKS = (
    mask_entries.MaskBuilder.read,
    mask_entries.MaskBuilder.decode,
    mask_entries.MaskBuilder._make,
    mask_entries.mask_weights,
)
FORMS = (packing.pack, packing.own_part, packing.same_bits)
RECORDED = {  # number, digest of the source that it stands for
    "decode.VERSION": (2, "6a1fd7bb02af6ddd"),
    "keys.FORMAT": (1, "c4d0bd9f87ad997a"),
    "keys.MASK_FORMAT": (2, "814b583e7f75cddb"),
    "packing.PACKED": (2, "2fc902c4201650b5"),
}
RECORDED_RESULTS = {1: (2, 1, 2)}
"""``RESULTS`` of cache_latents -> decode.VERSION, keys.FORMAT and keys.MASK_FORMAT."""


def needed(module: Any, names: Iterable[str]) -> str:
    """Return the source of top-level statements that define these names, and of all names that they use."""
    tree = Bare().visit(ast.parse(inspect.getsource(module)))
    given = {name: node for node in tree.body for name in names_of(node)}
    todo, found = list(names), {}
    while todo:
        name = todo.pop()
        if name in given and name not in found:
            found[name] = ast.unparse(ast.fix_missing_locations(given[name]))
            todo += [node.id for node in ast.walk(given[name]) if isinstance(node, ast.Name)]
    return "\n".join(found[name] for name in sorted(found))


def names_of(node: ast.AST) -> list[str]:
    """Return the names that a class, function or assignment defines."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [getattr(node, "name", ""), *(target.id for target in targets if isinstance(target, ast.Name))]


class Bare(ast.NodeTransformer):
    """Transformer that removes docstrings and annotations; comments and layout are not in the tree."""

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
        ("decode.VERSION", decode.VERSION, PIXELS),
        ("keys.FORMAT", keys.FORMAT, ENTRIES),
        ("keys.MASK_FORMAT", keys.MASK_FORMAT, MASKS),
        ("packing.PACKED", packing.PACKED, FORMS),
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


def results_problem(recorded: dict[int, tuple[int, int, int]], results: int, numbers: tuple[int, int, int]) -> str:
    """Return the problem with ``RESULTS`` and the store's numbers; empty for none."""
    if recorded.get(results - 1) == numbers:
        return (
            f"cache_latents has RESULTS = {results}, and the store's keys are those of {results - 1}: runs would read "
            "old entries; raise decode.VERSION, keys.FORMAT or keys.MASK_FORMAT, whichever names what changed"
        )
    if list(recorded.items())[-1:] != [(results, numbers)]:
        return f"record {results}: {numbers} as the last of RECORDED_RESULTS in this file"
    return ""


def test_results_rise_with_a_number_of_the_store() -> None:
    assert results_problem(RECORDED_RESULTS, RESULTS, (decode.VERSION, keys.FORMAT, keys.MASK_FORMAT)) == ""


def test_results_that_rise_alone_are_refused() -> None:
    both = {1: (2, 1, 2), 2: (2, 1, 2)}
    for recorded in (RECORDED_RESULTS, both):  # recorded or not
        assert "raise decode.VERSION, keys.FORMAT or keys.MASK_FORMAT" in results_problem(recorded, 2, (2, 1, 2))
    assert results_problem({1: (2, 1, 2)}, 2, (2, 2, 2)).startswith("record 2: (2, 2, 2)")
    assert results_problem({1: (2, 1, 2)}, 1, (3, 1, 2)).startswith("record 1: (3, 1, 2)")
    assert results_problem({1: (2, 1, 2), 2: (2, 2, 2)}, 2, (2, 2, 2)) == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_code_of_a_family_that_decides_an_entry_changes_with_its_number(family: str) -> None:
    found = (keys.FORMAT, hashlib.sha256(needed(load_family(family), OF_A_FAMILY).encode()).hexdigest()[:16])
    assert found == case(family).ENCODERS, (
        f"code of family {family} that decides what the store holds has changed: raise keys.FORMAT if bits can change, "
        f"then record {found} as ENCODERS in tests/helpers/families/{family}.py"
    )


def test_needed_source_includes_called_functions() -> None:
    found = needed(z_image, ["encode_prompts"])
    assert found.startswith("MAX_TOKENS = 512\ndef chats(") and "\ndef encode_prompts(" in found
    assert "def load_tokenizer" not in found and "def predict" not in found


def test_the_digest_sees_code_and_nothing_else() -> None:
    code = source("def f(x):\n    return x + 1\n")
    assert source('def f(x: int) -> int:\n    """Says."""\n    # why\n    return (x + 1)\n') == code
    assert source("def f(x):\n    return x + 2\n") != code
