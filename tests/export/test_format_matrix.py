"""Every family x bias mode x kind of adapter, alpha twice the rank: each format is proven equal, or refused.

The proof is the stage's own gate: stock diffusers, stock PEFT and the reader of ComfyUI's keys load the file into a
fresh base and must answer as the adapter. tests/export/test_formats.py looks at the same files without the stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_dag.core.console import UserError
from lora_dag.core.files import read_json
from lora_dag.core.params import FAMILIES
from lora_dag.families.protocol import load_family
from tests.helpers.adapters import FORMATS, adapt_family
from tests.helpers.workspace import Workspace

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "attention"},
    "rslora": {"target_modules": "attention+ff", "use_rslora": True},
    "dora": {"target_modules": "attention", "use_dora": True},
    "conv": {"target_modules": "all-linear+conv"},
}
MODES = ("none", "lora_only", "all")
CASES = [(family, kind, mode) for family in FAMILIES for kind in KINDS for mode in MODES]
DEFAULT = {(family, kind, mode) for family, kind, mode in CASES if (family, kind) == ("sd3", "conv") and mode != "all"}


def holds(name: str, kind: str, mode: str, denoiser: str) -> bool:
    """Return whether docs/export.md says that the format can hold such an adapter."""
    if name in ("diffusers", "peft"):
        return mode == "none" or (mode == "lora_only" and kind != "dora")
    return name == "merged" or mode == "none" or denoiser == "unet"


@pytest.mark.parametrize(
    ("family", "kind", "mode"),
    [pytest.param(*case, marks=[] if case in DEFAULT else [pytest.mark.slow]) for case in CASES],
)
def test_each_format_is_proven_or_refused(
    workspace: Workspace, bases: dict[str, Path], family: str, kind: str, mode: str
) -> None:
    Path("data/base").unlink()
    Path("data/base").symlink_to(bases[family])
    mode = mode if adapt_family(family, **KINDS[kind], bias=mode, alpha=8.0, rank=4) else "none"
    argv = ("--set", f"model.family={family}", "--set", "export.prompt=red apple")
    written = [name for name in FORMATS if holds(name, kind, mode, load_family(family).DENOISER)]
    if refused := [name for name in FORMATS if name not in written]:
        with pytest.raises(UserError) as caught:
            workspace.run("export", *argv, "--set", f"export.formats=[{', '.join(FORMATS)}]")
        assert [line.split()[2] for line in caught.value.problems] == refused
        assert set(caught.value.codes) == {"format-unsupported"}
        assert all("Use " in line and "merged" in line for line in caught.value.problems)
    workspace.run("export", *argv, "--set", f"export.formats=[{', '.join(written)}]")
    measured = read_json(Path("reports/export/metrics.json"))
    assert measured["export.effect"] > 0.01
    for name in written:
        assert measured[f"export.{name}.unmapped_keys"] == 0, name
        assert measured[f"export.{name}.max_abs_error"] <= max(1e-5, 2e-5 * measured["export.effect"]), name
