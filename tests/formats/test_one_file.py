"""A format is one file in lora_dag/formats: with nothing else touched, every stage and the Snakefile know it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_dag.artifacts.lineage import save as save_lineage
from lora_dag.core.files import read_json
from lora_dag.formats import known_files
from tests.helpers.adapters import adapt
from tests.helpers.errors import assert_line
from tests.helpers.reports import MADE, write_reports
from tests.helpers.workspace import REPOSITORY, Workspace

NEW_FORMAT = '''
"""One file of torch's own, with the tensors as PEFT names them."""

from lora_dag.formats import LoadedBack

FILE = "adapter.pt"
READER = "`torch.load`"
IS_ADAPTER = True
LOADED_BY_PEFT = False
CAVEAT = "A file of torch holds no record of its base."


def unsupported_reason(adapter):
    return "it has no place for biases" if adapter.bias != "none" else ""


def write(export, folder):
    import torch

    folder.mkdir(parents=True)
    torch.save(export.weights, folder / FILE)


def load_back(export, folder):
    import torch

    from lora_dag.adapters import lora

    modules = export.load_modules()
    modules.inject(export.adapter, torch.load(folder / FILE, weights_only=True))
    return LoadedBack(modules, [], lambda: lora.delete(modules.denoiser))


def usage(card):
    return f"With torch: `torch.load('{card.source}/torch_file/{FILE}')`"
'''


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """The repository's packages with one more format."""
    for package in ("lora_dag", "stages"):
        shutil.copytree(REPOSITORY / package, tmp_path / "code" / package)
    (tmp_path / "code/lora_dag/formats/torch_file.py").write_text(NEW_FORMAT)
    return tmp_path / "code"


def run(code: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(code)}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)


def test_a_new_file_is_exported_checked_refused_and_described(workspace: Workspace, code: Path) -> None:
    adapt(workspace)
    argv = ("-m", "stages.export", "--set", "export.formats=[torch_file, comfyui]", "--set", "export.resized_ranks=[1]")
    done = run(code, *argv)
    assert done.returncode == 0, done.stderr
    measured = read_json(Path("reports/export/metrics.json"))
    assert measured["export.torch_file.max_abs_error"] == measured["export.torch_file.unmapped_keys"] == 0
    assert Path("data/export/torch_file/adapter.pt").is_file()
    assert Path("data/export/resized/rank-1/torch_file/adapter.pt").is_file()
    script = "from lora_dag.formats import known_files; print(sorted(known_files(['torch_file'], [1])))"
    assert run(code, "-c", script).stdout == "['resized/rank-1/torch_file/adapter.pt', 'torch_file/adapter.pt']\n"

    adapt(workspace, bias="lora_only")
    refused = run(code, *argv[:-2])
    assert refused.returncode == 2
    values = ("torch_file", "it has no place for biases", "Use comfyui, diffusers")
    assert_line(refused.stderr, "format-unsupported", *values)

    write_reports(Path("reports"))
    files = {"torch_file/adapter.pt": {"bytes": 2000, "sha256": "a" * 64}, "torch_file/config.json": {"bytes": 1}}
    made = MADE | {"export": MADE["export"] | {"formats": ["torch_file"]}, "files": files}
    save_lineage(Path("reports/export/lineage.json"), made)
    done = run(code, "-m", "stages.report")
    assert done.returncode == 0, done.stderr
    card = Path("reports/model_card.md").read_text(encoding="utf-8")
    assert "With torch: `torch.load('data/export/torch_file/adapter.pt')`" in card
    assert f"| `torch_file/adapter.pt` | 0.002 MB | `{'a' * 16}` |" in card and "config.json" not in card
    assert "- A file of torch holds no record of its base." in card


def test_known_files_have_no_parameter_in_their_names() -> None:
    assert known_files(["diffusers", "comfyui", "merged"], [2]) == {
        "diffusers/pytorch_lora_weights.safetensors",
        "merged/model_index.json",
        "resized/rank-2/diffusers/pytorch_lora_weights.safetensors",
    }


def test_a_format_is_read_without_torch() -> None:
    """The Snakefile, `lora-dag check --help` and the report need only constants of the formats."""
    script = (
        "import sys; from lora_dag import formats; [formats.load_format(name) for name in formats.FORMATS];"
        "print(formats.FORMATS, {'torch', 'peft', 'diffusers'} & set(sys.modules))"
    )
    assert run(REPOSITORY, "-c", script).stdout == "('comfyui', 'diffusers', 'merged', 'peft') set()\n"
