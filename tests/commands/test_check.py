"""Every message of the preflight, and that it comes before anything slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from lora_dag.commands import check
from lora_dag.core.console import UserError
from lora_dag.core.files import read_json
from lora_dag.core.params import FAMILIES
from lora_dag.pipeline import sharing
from tests.conftest import Workspace, read_rows, write_rows


@pytest.fixture
def copied(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace whose base may be changed; what is installed is another test's matter."""
    monkeypatch.setattr(check, "package_problems", list)
    source = Path("data/base").resolve()
    Path("data/base").unlink()
    shutil.copytree(source, "data/base")
    return workspace


def problems(workspace: Workspace, *changes: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        workspace.run("check", *(word for change in changes for word in ("--set", change)))
    return caught.value.problems


def problem(workspace: Workspace, *changes: str) -> str:
    (found,) = problems(workspace, *changes)
    return found


# As a person meets it


def test_all_is_well(workspace: Workspace) -> None:
    done = workspace.process("check")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    noted = "note: data/raw: 2 pictures are held out of 8, and fewer than 5 seldom tell settings apart; add pictures"
    assert [line for line in lines if line.startswith("note: data")] == [noted]
    lines = [line for line in lines if not line.startswith(("note: ", "warning: params.yaml validate.prompts"))]
    assert lines.pop(3) == "pictures    8 opened"
    names = ["parameters", "base", "dataset", "packages", "disk", "device", "objective", "captions", "adapter"]
    assert [line.split()[0] for line in lines] == names
    assert lines[6] == "objective   v_prediction"
    assert "torch 2.13" in lines[3] and lines[5] == "device      cpu, 1 thread, float32"


def test_notes_of_what_a_run_will_tell_little_with(workspace: Workspace) -> None:
    """Of no snapshot, for a run of the sweep too."""
    lines = workspace.run("check", "--set", "train.snapshot_every_n_steps=5")
    assert [line for line in lines if line.startswith("note: params.yaml")] == [
        "note: params.yaml train.snapshot_every_n_steps: 5 keeps none of 4 steps: the progress sheet and the held-out "
        "curve have the start and the end alone; lower it"
    ]
    lines = workspace.run("check", "--set", "sweep.grid={train.snapshot_every_n_steps: [4, 9]}")
    assert [line[:60] for line in lines if "snapshot" in line] == [
        "note: params.yaml train.snapshot_every_n_steps: 9 keeps none"
    ]


def test_data_that_nobody_else_can_get_is_noted(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "unshared", lambda: ["data/mine.dvc: nobody else can get this data"])
    assert "note: data/mine.dvc: nobody else can get this data" in workspace.run("check")


def test_several_machines_are_noted(workspace: Workspace) -> None:
    asked = ("runtime.num_machines=2", "runtime.num_processes=2", "train.gradient_accumulation_steps=2")
    lines = workspace.run("check", *(word for change in asked for word in ("--set", change)))
    assert any("num_machines: 2, and `dvc repro` stops before train; use `snakemake --work" in line for line in lines)


def test_problems_are_lines_and_exit_code_2(workspace: Workspace) -> None:
    changes = ("model.pretrained=data/none", "dataset.source=data/nothing")
    done = workspace.process("check", *(word for change in changes for word in ("--set", change)))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: params.yaml model.pretrained: 'data/none' is no folder; `dvc pull data/base` brings the embedded base",
        "error: params.yaml dataset.source: 'data/nothing' is no folder; "
        "`dvc pull` brings tracked data, or name a folder of your own",
    ]


PROBE = """
import sys
from lora_dag.core.console import UserError
from tests.helpers import command
try:
    command.run("check", *sys.argv[1:])
except UserError as error:
    print(len(error.problems), *({"torch", "diffusers", "transformers", "peft"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "change", ["lora.rnak=4", "model.pretrained=data/none", "dataset.resolution=36", "dataset.caption_column=caption"]
)
def test_problems_are_found_before_anything_slow_is_imported(workspace: Workspace, change: str) -> None:
    command = [sys.executable, "-c", PROBE, "--set", change]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


# Parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.rnak=4", "params.yaml lora.rnak: unknown key (near: rank)"),
        ("train.batch_sise=4", "params.yaml train.batch_sise: unknown key (near: batch_size)"),
        ("lora.rank=0", "params.yaml lora.rank: got 0; input should be greater than or equal to 1"),
        ("lora.rank=eight", "params.yaml lora.rank: got 'eight'; input should be a valid integer"),
        (
            "model.family=sdd",
            f"params.yaml model.family: got 'sdd'; input should be {', '.join(map(repr, FAMILIES[:-1]))} or "
            f"{FAMILIES[-1]!r} (near: sd, sd3)",
        ),
    ],
)
def test_params(copied: Workspace, change: str, message: str) -> None:
    assert problem(copied, change) == message


def test_params_of_all_sections_at_once(copied: Workspace) -> None:
    found = problems(copied, "lora.rnak=4", "train.lr_warmup_steps=9", "validate.seed=-1")
    assert [line.split(":")[0] for line in found] == [
        "params.yaml lora.rnak",
        "params.yaml train",
        "params.yaml validate.seed",
    ]


# The base


def test_formats_that_could_not_hold_the_adapter(copied: Workspace) -> None:
    found = problems(copied, "lora.bias=all")
    assert [line.split(" cannot hold")[0] for line in found] == [
        "params.yaml export.formats: diffusers",
        "params.yaml export.formats: peft",
    ]
    copied.run("check", "--set", "lora.bias=all", "--set", "export.formats=[comfyui, merged]")


def test_a_hub_id_gets_the_line_that_fetches_it(copied: Workspace) -> None:
    assert problem(copied, "model.pretrained=stable-diffusion-v1-5/stable-diffusion-v1-5") == (
        "params.yaml model.pretrained: 'stable-diffusion-v1-5/stable-diffusion-v1-5' is no folder here; write the lines"
        " `hub: stable-diffusion-v1-5/stable-diffusion-v1-5` and `revision: ` with its commit into"
        " data/stable-diffusion-v1-5.yaml and name that, or fetch it: hf download"
        " stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir data/stable-diffusion-v1-5"
    )


def test_a_folder_that_is_no_pipeline(copied: Workspace) -> None:
    os.remove("data/base/model_index.json")
    assert problem(copied) == (
        "params.yaml model.pretrained: 'data/base' has no model_index.json; expected a folder in the diffusers layout"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_model_index(copied: Workspace, text: str) -> None:
    Path("data/base/model_index.json").write_text(text)
    assert problem(copied) == "data/base/model_index.json: not a diffusers model index; fetch the model again"


def change_index(**values: object) -> None:
    path = Path("data/base/model_index.json")
    path.write_text(json.dumps(read_json(path) | values))


def test_another_pipeline(copied: Workspace) -> None:
    change_index(_class_name="StableDiffusionXLPipeline")
    assert problem(copied) == (
        "params.yaml model.pretrained: 'data/base' is a StableDiffusionXLPipeline; "
        "model.family 'sd' trains StableDiffusionPipeline; use model.family: sdxl"
    )


def test_a_pipeline_that_no_family_trains(copied: Workspace) -> None:
    change_index(_class_name="KandinskyPipeline")
    assert problem(copied).endswith("trains StableDiffusionPipeline; no family here trains that")


def test_another_component(copied: Workspace) -> None:
    change_index(unet=["diffusers", "UNet3DConditionModel"])
    assert problem(copied) == (
        "data/base/model_index.json unet: got UNet3DConditionModel, expected UNet2DConditionModel; "
        "this is no base of family 'sd'"
    )


def test_all_components_at_once(copied: Workspace) -> None:
    shutil.rmtree("data/base/vae")
    os.remove("data/base/unet/config.json")
    assert problems(copied) == (
        "data/base/vae: no such folder; StableDiffusionPipeline needs AutoencoderKL there",
        "data/base/unet: no config file; the folder is incomplete, fetch the model again",
    )


def test_pickles_only(copied: Workspace) -> None:
    os.rename("data/base/unet/diffusion_pytorch_model.safetensors", "data/base/unet/diffusion_pytorch_model.bin")
    assert problem(copied) == (
        "data/base/unet: only diffusion_pytorch_model.bin, a pickle, which can run code when loaded; "
        "convert it to safetensors"
    )


def test_no_weights(copied: Workspace) -> None:
    os.remove("data/base/unet/diffusion_pytorch_model.safetensors")
    assert problem(copied) == (
        "data/base/unet: no .safetensors weights; the folder is incomplete, fetch the model again"
    )


def test_code_in_a_component(copied: Workspace) -> None:
    Path("data/base/unet/my_unet.py").write_text("raise SystemExit('ran')")
    assert problem(copied) == (
        "data/base/unet/my_unet.py: code inside a model folder is never run; remove it or use another base"
    )


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_broken_json_in_a_component(copied: Workspace, name: str, text: str) -> None:
    (Path("data/base") / name).write_text(text)
    assert problem(copied) == f"data/base/{name}: no JSON object; fetch the model again"


@pytest.mark.parametrize("kept", [0, 5, 5000])
def test_truncated_weights(copied: Workspace, kept: int) -> None:
    path = Path("data/base/unet/diffusion_pytorch_model.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    assert problem(copied) == f"{path}: truncated or no safetensors file; fetch the model again"


def test_a_tokenizer_without_its_vocabulary(copied: Workspace) -> None:
    Path("data/base/tokenizer/tokenizer.json").unlink()
    assert problem(copied).startswith("data/base/tokenizer: no vocab.json with merges.txt; ")


def test_a_config_without_its_keys(copied: Workspace) -> None:
    Path("data/base/vae/config.json").write_text("{}")
    assert "lacks what the family reads ('block_out_channels')" in problem(copied)


def test_wrong_variant(copied: Workspace) -> None:
    found = problems(copied, "model.variant=fp16")
    assert found == (
        "data/base/vae: no weights of model.variant 'fp16'; there is diffusion_pytorch_model.safetensors",
        "data/base/text_encoder: no weights of model.variant 'fp16'; there is model.safetensors",
        "data/base/unet: no weights of model.variant 'fp16'; there is diffusion_pytorch_model.safetensors",
    )


@pytest.mark.parametrize(("resolution", "near"), [(36, "32 or 40"), (100, "96 or 104")])
def test_resolution_must_fit_the_base(copied: Workspace, resolution: int, near: str) -> None:
    assert problem(copied, f"dataset.resolution={resolution}", "dataset.max_upscale=9") == (
        f"params.yaml dataset.resolution: {resolution} is no multiple of 8, which data/base needs; use {near}"
    )


def test_resolution_below_the_least(copied: Workspace) -> None:
    for component in ("vae", "unet"):  # four levels each, as in Stable Diffusion 1.5
        path = Path("data/base") / component / "config.json"
        path.write_text(json.dumps(read_json(path) | {"block_out_channels": [32] * 4}))
    assert problem(copied) == ("params.yaml dataset.resolution: 32 is no multiple of 64, which data/base needs; use 64")


def test_bucket_sides(copied: Workspace) -> None:
    change = ("dataset.aspect_buckets=true", "dataset.resolution=64", "dataset.bucket_step=8", "dataset.max_upscale=9")
    path = Path("data/base/unet/config.json")
    path.write_text(json.dumps(read_json(path) | {"block_out_channels": [32] * 3}))
    assert problem(copied, *change) == (
        "params.yaml dataset.bucket_step: sides of 56, 72 pixels are no multiples of 16, which data/base needs; use 16"
    )


def test_hundreds_of_bucket_sides_are_shown_in_part(copied: Workspace) -> None:
    change = (
        "dataset.aspect_buckets=true",
        "dataset.resolution=2048",
        "dataset.bucket_step=8",
        "dataset.max_upscale=99",
    )
    path = Path("data/base/unet/config.json")
    path.write_text(json.dumps(read_json(path) | {"block_out_channels": [32] * 5}))
    assert problem(copied, *change) == (
        "params.yaml dataset.bucket_step: sides of 1448, 1456, 1464, 1480, 1488 and 154 more pixels are no multiples of"
        " 64, which data/base needs; use 64"
    )


# The dataset


def test_pictures_without_captions(copied: Workspace) -> None:
    os.remove("data/raw/metadata.jsonl")
    assert problem(copied).startswith("data/raw: pictures without captions; write metadata.jsonl with rows such as")


def test_bad_rows_that_are_left_out_are_said(copied: Workspace) -> None:
    rows = read_rows(Path("data/raw"))
    rows[2]["text"] = None
    write_rows(Path("data/raw"), rows)
    assert any("1 of 8 pictures are bad, more than" in line for line in problems(copied, "dataset.on_bad=skip"))
    lines = copied.run("check", "--set", "dataset.on_bad=skip", "--set", "dataset.max_bad_fraction=0.2")
    said = "warning: will be left out: data/raw/metadata.jsonl:3: text: got null"
    assert any(line.startswith(said) for line in lines)


def test_batch_of_more_pictures_than_there_are(copied: Workspace) -> None:
    assert problem(copied, "train.batch_size=9") == (
        "params.yaml train.batch_size: 9 is more than the dataset's 8 pictures, repeats counted; lower it"
    )


def test_mirrors_without_a_second_view(copied: Workspace) -> None:
    assert problem(copied, "dataset.flip=true").startswith("params.yaml dataset.flip: true with cache.num_variants 1")


def test_metadata_that_is_empty(copied: Workspace) -> None:
    Path("data/raw/metadata.jsonl").write_text("")
    assert problem(copied) == "data/raw/metadata.jsonl: no rows; the dataset is empty"


def test_a_hub_dataset_is_imported_first(copied: Workspace) -> None:
    assert problem(copied, "dataset.source=acme/icons") == (
        "params.yaml dataset.source: 'acme/icons' is no folder; if it is a dataset of the Hugging Face Hub, unpack it"
        " once: `lora-dag import acme/icons data/mine`, and set dataset.source=data/mine"
    )


def test_every_bad_row_is_named(copied: Workspace) -> None:
    rows = read_rows(Path("data/raw"))
    rows[2]["text"], rows[5]["file_name"] = None, "gone.png"
    write_rows(Path("data/raw"), rows)
    with Path("data/raw/metadata.jsonl").open("a") as file:
        file.write("file_name,text\n")
    found = problems(copied)
    assert [line.partition(": ")[0] for line in found] == [f"data/raw/metadata.jsonl:{number}" for number in (3, 6, 9)]


def test_wrong_caption_column(copied: Workspace) -> None:
    write_rows(Path("data/raw"), [{**row, "tags": "x"} for row in read_rows(Path("data/raw"))])
    assert problem(copied, "dataset.caption_column=caption") == (
        "params.yaml dataset.caption_column: 'caption' is no column of data/raw/metadata.jsonl; it has tags, text"
    )


# Packages, disk, device


def test_packages_of_another_series_and_missing_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "PACKAGES", {"pydantic": "1", "no-such-package": "2"})
    old, missing = check.package_problems()[:2]
    assert old.startswith("package pydantic: got 2.") and old.endswith(
        "tested with 1; pip install -r requirements.lock"
    )
    assert missing == "package no-such-package: not installed; pip install -r requirements.lock"


@pytest.mark.parametrize(
    ("torch", "torchvision", "fits"),
    [
        ("2.13.0+cpu", "0.28.0+cpu", True),
        ("2.13.0+cu130", "0.28.0+cu130", True),
        ("2.13.0", "0.28.0", True),
        ("2.13.0+cpu", "0.28.0+cu130", False),
        ("2.13.0+cu126", "0.28.0+cu130", False),
        ("2.13.0", "0.27.0", False),
        ("2.12.1+cpu", "0.28.0+cpu", False),
        ("", "0.28.0", False),
    ],
)
def test_torchvision_must_belong_to_torch(torch: str, torchvision: str, fits: bool) -> None:
    found = check.torchvision_problems(torch, torchvision)
    assert found == (
        []
        if fits
        else [
            f"package torchvision: {torchvision} beside torch {torch} breaks `import diffusers`; "
            "the project does not need it: pip uninstall torchvision"
        ]
    )


@pytest.mark.parametrize("torch", ["2.13.0+cpu", "2.13.0+cu130"])
def test_the_build_of_an_installed_torchvision_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str
) -> None:
    """The package index's metadata says 0.28.0 for a CUDA build; the package itself says which."""
    for name, version in (("torch", torch), ("torchvision", "0.28.0+cu130")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError")
        (tmp_path / name / "version.py").write_text(f"__version__ = '{version}'\ngit_version = 'abc'\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"] + ["torch"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(check, "PACKAGES", {})
    assert len(check.package_problems()) == (torch == "2.13.0+cpu")


def test_read_only_state_directory(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.os, "access", lambda path, mode: mode != os.W_OK)
    assert problem(copied) == (f"{copied.path / '.state'}: not writable; set LORA_STATE_DIR to a folder that is")


def test_full_disk(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: usage(10**9, 9 * 10**8, 10**8))
    assert problem(copied) == (
        f"{copied.path / '.state'}: 100 MB free, at least 524 MB are needed; set LORA_STATE_DIR to another disk"
    )


def test_float16_needs_a_gpu(copied: Workspace) -> None:
    assert problem(copied, "model.dtype=float16") == (
        "params.yaml model.dtype: float16 needs a GPU; use bfloat16 or float32 on a CPU"
    )


def test_a_device_that_is_not_here(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert problem(copied, "runtime.device=mps") == (
        "params.yaml runtime.device: 'mps' is not available here; use auto or cpu"
    )


def test_nothing_is_written_but_what_was_seen_of_pictures(copied: Workspace) -> None:
    before = set(Path().rglob("*"))
    copied.run("check")
    (written,) = (path for path in set(Path().rglob("*")) - before if path.is_file())
    assert written.match(".state/store/inspected-*.sqlite")


def test_every_picture_is_opened(copied: Workspace) -> None:
    (Path("data/raw") / "03.png").write_bytes(b"\x89PNG nothing")
    (Path("data/raw") / "05.png").write_bytes(b"")
    assert [line.partition("; ")[0] for line in problems(copied)] == [
        "data/raw/metadata.jsonl:4: '03.png' is a damaged PNG: its header cannot be read",
        "data/raw/metadata.jsonl:6: '05.png' is an empty file",
    ]


def test_pictures_that_were_not_opened_are_counted(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "OPEN_SECONDS", 0.0)
    (Path("data/raw") / "07.png").write_bytes(b"")
    lines = copied.run("check")
    assert "pictures    0 of 8 opened in 0 s; prepare opens the others" in lines
    assert any(line.startswith("note: data/raw: about 2 pictures of 8 will be held out, and fewer") for line in lines)


def test_a_set_that_cannot_be_split(copied: Workspace) -> None:
    write_rows(Path("data/raw"), read_rows(Path("data/raw"))[:1])
    assert "data/raw: 1 picture cannot be split; at least two are needed, since one is held out" in problems(copied)


def test_a_mapping_that_dvc_would_add_to_is_noted(workspace: Workspace) -> None:
    lines = workspace.run("check", "--set", "lora.rank_pattern={to_k: 1}", "--set", "lora.alpha=null")
    (note,) = [line for line in lines if "adds to it" in line]
    assert note.startswith(
        'note: params.yaml lora.rank_pattern: {"to_k": 1}; `-S` adds to it, `-S lora.rank_pattern=null`'
    )
    assert not any("adds to it" in line for line in workspace.run("check"))


def test_a_prompt_with_the_trigger_word_is_of_these_captions(workspace: Workspace) -> None:
    """The prefix is a part of what is learned."""
    asked = ("--set", "validate.prompts=[ohwx on a beach]")
    stranger = "no prompt has a word of any caption"
    assert any(stranger in line for line in workspace.run("check", *asked))
    lines = workspace.run("check", *asked, "--set", "dataset.caption_prefix='ohwx, '")
    assert not any(stranger in line for line in lines)
