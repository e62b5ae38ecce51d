"""``export.step``: a snapshot in every format, named in headers and pages; a step without one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict

from lora_dag.artifacts.lineage import load as load_lineage
from lora_dag.artifacts.lineage import save as save_lineage
from lora_dag.core.files import sha256_file, write_json
from lora_dag.core.tensors import load_metadata, load_tensors
from stages.export.params import step_problems
from tests.helpers.errors import assert_line, refused
from tests.helpers.workspace import Workspace

SNAPSHOT = Path("data/adapter/snapshots/step-000002.safetensors")
AT_2 = ("--set", "export.step=2")


@pytest.fixture
def trained(workspace: Workspace) -> Workspace:
    for stage in ("prepare", "cache_latents", "train"):
        workspace.run(stage)
    return workspace


def test_every_format_holds_the_snapshot(trained: Workspace) -> None:
    lines = trained.run("export", *AT_2, "--set", "export.formats=[diffusers, peft, comfyui, merged]")
    assert "snapshot    of step 2 of 4" in lines
    snapshot = load_tensors(SNAPSHOT)
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    pipeline.load_lora_weights("data/export/diffusers", adapter_name="default")
    loaded = get_peft_model_state_dict(pipeline.unet, adapter_name="default", save_embedding_layers=False)
    assert loaded.keys() == snapshot.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in snapshot.items())

    name = next(name for name in snapshot if ".lora_A." in name)
    target = name.removesuffix(".lora_A.weight")
    a, b = snapshot[name], snapshot[f"{target}.lora_B.weight"]
    peft = load_tensors(Path("data/export/peft/adapter_model.safetensors"))
    comfyui = load_tensors(Path("data/export/comfyui/ink-icons.safetensors"))
    merged = load_tensors(Path("data/export/merged/unet/diffusion_pytorch_model.safetensors"))
    base = load_tensors(Path("data/base/unet/diffusion_pytorch_model.safetensors"))
    assert torch.equal(peft[f"base_model.model.{name}"], a)
    assert torch.equal(comfyui[f"lora_unet_{target.replace('.', '_')}.lora_down.weight"], a)
    torch.testing.assert_close(merged[f"{target}.weight"], base[f"{target}.weight"] + b @ a)  # alpha is the rank

    for path in Path("data/export").rglob("*lora*.safetensors"):
        header = load_metadata(path)
        record = json.loads(header["lora_dag"])
        assert (header["ss_steps"], record["step"], record["num_steps"]) == ("2", 2, 4)
        assert record["snapshot"] == sha256_file(SNAPSHOT)
        assert record["adapter"] == sha256_file(Path("data/adapter/adapter.safetensors"))


def test_last_step_gives_the_same_bytes_as_null(trained: Workspace) -> None:
    trained.run("export")
    plain = trained.tree("data/export") | trained.tree("reports/export")
    trained.run("export", "--set", "export.step=4")
    assert trained.tree("data/export") | trained.tree("reports/export") == plain
    assert "step" not in load_lineage(Path("reports/export/lineage.json"))


def test_a_step_without_a_snapshot_is_refused_before_anything_is_written(trained: Workspace) -> None:
    with refused("no-snapshot", "--set export.step: ", "step 3", "Snapshots: 2 ", "null", "4"):
        trained.run("export", "--set", "export.step=3")
    assert not Path("data/export").exists() and not Path("reports/export").exists()
    done = trained.process("check", "--set", "export.step=3")
    assert done.returncode == 2
    assert_line(done.stderr, "no-snapshot", "export.step", "3")


def test_long_list_of_snapshots_is_shortened() -> None:
    (line,) = step_problems(60, list(range(50, 5000, 50)), 5000)
    assert ": 50, 100, ..., 4900, 4950 (" in line
    assert "There are none (" in step_problems(60, [], 100)[0]
    assert step_problems(None, [], 9) == step_problems(9, [], 9) == step_problems(3, [3, 6], 9) == []


@pytest.mark.parametrize(("best", "is_shown"), [(2, True), (0, False), (4, False)])
def test_validate_logs_how_to_export_the_best_step(caplog: pytest.LogCaptureFixture, best: int, is_shown: bool) -> None:
    from stages.validate.__main__ import log_end
    from tests.helpers.reports import MEASURED

    caplog.set_level("INFO", logger="lora-dag")
    none_copied = {"samples.copied_share": 0, "samples.copied_share_base": 0}
    log_end(Path("reports"), MEASURED | none_copied | {"val.best_step": best}, 4)
    assert any("2 of 4" in line and "dvc exp run -S export.step=2" in line for line in caplog.messages) == is_shown


def test_card_and_report_name_the_exported_step(trained: Workspace) -> None:
    from tests.helpers.reports import MADE, MEASURED, write_reports

    write_reports(Path("reports"))
    trained.run("report")
    for name in ("report.md", "model_card.md"):
        assert "snapshot of step" not in Path("reports", name).read_text()
    write_json(Path("reports/metrics.json"), MEASURED | {"val.best_step": 2})
    trained.run("report")
    assert "at step 2 of 4. `export.step=2` exports it" in Path("reports/report.md").read_text()
    save_lineage(Path("reports/export/lineage.json"), MADE | {"step": 2, "snapshot": "9" * 64})
    trained.run("report")
    line = "snapshot of step 2 of 4 (held-out loss 0.1000, and 0.0900 at the end)."
    for name in ("report.md", "model_card.md"):
        text = Path("reports", name).read_text()
        assert line in text and "exports it" not in text
    assert f"| Snapshot of step 2 | `{'9' * 16}` |" in Path("reports/model_card.md").read_text()
