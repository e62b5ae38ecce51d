"""The table of readers in docs/export.md; diffusers' column is checked here, on each kind of file of each family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
from peft.tuners.tuners_utils import BaseTunerLayer

from lora_dag.core.params import FAMILIES
from lora_dag.families.protocol import load_family
from tests.helpers.exports import write
from tests.helpers.families import stock_of
from tests.helpers.readers import KINDS, TABLE, Tensors, judged, markdown, train, verdict
from tests.helpers.workspace import REPOSITORY

CASES = [
    (family, kind, file)
    for family in FAMILIES
    for kind in KINDS
    for file in ("comfyui", "diffusers")
    if verdict(family, kind, file, "diffusers")
]
DEFAULT = [("LoRA, patterns", "comfyui"), ("DoRA, all layers", "comfyui"), ("LoKr", "comfyui"), ("rsLoRA", "diffusers")]
"""Kind and format, of each family."""


@pytest.fixture(scope="module")
def pipelines(bases: dict[str, Path]) -> dict[str, Any]:
    return {name: getattr(diffusers, stock_of(name).cls).from_pretrained(bases[name]) for name in FAMILIES}


def test_the_table_in_the_docs_is_current() -> None:
    assert markdown() in (REPOSITORY / "docs/export.md").read_text(encoding="utf-8")


def test_the_table_has_the_installed_diffusers_and_one_entry_per_case() -> None:
    assert TABLE["columns"]["diffusers"] == f"diffusers {diffusers.__version__}"
    said = [(row["file"], family, kind) for row in TABLE["rows"] for family in row["families"] for kind in row["kinds"]]
    assert len(said) == len(set(said)) and {kind for _, _, kind in said} == set(KINDS)
    answers = {answer for row in TABLE["rows"] for answer in row["readers"].values()}
    assert answers == {"exact", "plain", "part", "wrong", "refused"}
    assert all(set(row["readers"]) <= set(TABLE["columns"]) for row in TABLE["rows"])


@pytest.mark.parametrize(
    ("family", "kind", "file"),
    [pytest.param(*case, marks=[] if case[1:] in DEFAULT else [pytest.mark.slow]) for case in CASES],
)
def test_diffusers_reads_files_as_in_the_table(
    pipelines: dict[str, Any], tmp_path: Path, family: str, kind: str, file: str
) -> None:
    module, pipe = load_family(family), pipelines[family]
    base = {name: getattr(pipe, name) for name in (module.DENOISER, *module.TEXT_ENCODERS)}
    trained = train(module, base, kind)
    path = write(file, tmp_path, module, trained.parts)
    for name, kept in base.items():
        setattr(pipe, name, copy.deepcopy(kept))
    try:
        pipe.load_lora_weights(tmp_path, weight_name=path.name)
        found = flat({name: merged(getattr(pipe, name)) for name in base})
        answer = judged(found, flat(trained.merged), flat(trained.without_dora), said=False)
    except ValueError:
        answer = "refused"
    finally:
        for name, kept in base.items():
            setattr(pipe, name, kept)
    assert answer == verdict(family, kind, file, "diffusers")


def merged(module: Any) -> Tensors:
    """Return a module's tensors with the adapter merged by PEFT."""
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    return {n.replace(".base_layer", ""): t for n, t in module.state_dict().items() if ".lora_" not in n}


def flat(found: dict[str, Tensors]) -> Tensors:
    return {f"{component}.{name}": tensor for component, own in found.items() for name, tensor in own.items()}
