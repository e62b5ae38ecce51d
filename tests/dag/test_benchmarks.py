"""The benchmarks' own arithmetic, and their path end to end against a stand-in for the diffusers script."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import flops, gpu, players, readme, side_by_side, together
from benchmarks.bases import DRY_SD15, SD15, SDXL, TINY
from benchmarks.child import Turns
from benchmarks.players import Failed, Turn, Variant
from benchmarks.workplace import Workplace
from tests.helpers.workspace import REPOSITORY

OWN = ("lora_dag", "stages", "base", "benchmarks", "tests")

# What benchmarks/child.py hooks into, and nothing of ours: images by Pillow, a shuffled DataLoader, AdamW by its
# dotted name, randn_like and randint, Accelerator.
STAND_IN = """
import argparse, json
from pathlib import Path
import numpy as np, torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "train_data_dir"):
    parser.add_argument(f"--{name}")
for name in ("resolution", "train_batch_size", "max_train_steps", "rank"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--learning_rate", type=float)
args, _ = parser.parse_known_args()
base = args.pretrained_model_name_or_path
torch.manual_seed(0)
accelerator = Accelerator()
vae = AutoencoderKL.from_pretrained(base, subfolder="vae").requires_grad_(False)
unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").requires_grad_(False)
encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").requires_grad_(False)
tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
targets = ["to_k", "to_q", "to_v", "to_out.0"]
unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=targets))

class Images(torch.utils.data.Dataset):
    rows = [json.loads(line) for line in Path(args.train_data_dir, "metadata.jsonl").read_text().splitlines()]
    def with_format(self, _):
        return {"text": [row["text"] for row in self.rows]}
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, index):
        row = self.rows[index]
        image = Image.open(Path(args.train_data_dir, row["file_name"])).resize((args.resolution,) * 2, Image.LANCZOS)
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)
        return pixels, tokenizer(row["text"], padding="max_length", return_tensors="pt").input_ids[0]

optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, unet.parameters()), lr=args.learning_rate)
loader = torch.utils.data.DataLoader(Images(), args.train_batch_size, shuffle=True)
unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
step = 0
while step < args.max_train_steps:
    for pixels, ids in loader:
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        loss = torch.nn.functional.mse_loss(unet(noisy, timesteps, encoder(ids)[0]).sample, noise)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == args.max_train_steps:
            break
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(STAND_IN)
    return path


def turn(cpu: float, **parts: float) -> Turn:
    return Turn(2 * cpu, cpu, parts, 2**30, 0, {})


def arguments(script: Path, **changes: Any) -> argparse.Namespace:
    values = {"base": "tiny", "rounds": 1, "num_steps": 1, "batch_size": 2, "num_images": 8, "cold_runs": 0}
    values |= {"parity_steps": 0, "only_fp32": True, "script": script, "script_python": sys.executable}
    return argparse.Namespace(**values | changes)


def test_ratios_are_paired_by_round() -> None:
    slow, fast = [turn(2.0), turn(40.0), turn(3.0)], [turn(1.0), turn(20.0), turn(1.0)]
    assert players.paired(slow, fast) == [2.0, 2.0, 3.0]
    assert players.spread([2.0, 2.0, 3.0]) == "2.00 [2.00, 3.00]"


def test_the_cache_is_paid_back_by_the_difference_of_the_steps(script: Path) -> None:
    """Four steps an epoch, 2 s against 1 s: 4 s saved per epoch, 6 s behind after the first."""
    args = arguments(script)
    turns = {side_by_side.REFERENCE: [turn(2.0)], side_by_side.OURS: [turn(1.0)]}
    results = side_by_side.Results(turns, 0.0, 0.0, 0.0, [(10.0, 16.0)], None)
    assert side_by_side.break_even(args, results) == pytest.approx(2.5)


def test_a_turn_ends_after_its_steps_and_the_next_is_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Channel(io.StringIO):
        asked = ["2\n", "1\n", ""]  # then the parent is gone

        def readline(self) -> str:  # type: ignore[override]
            return self.asked.pop(0)

    channel = Channel()
    turns = Turns(channel, warm_up=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    reports = []
    for _ in range(9):
        turns.step_done(optimizer)
        reports.append(len(channel.getvalue().splitlines()))
    assert reports == [0, 0, 1, 1, 2, 3, 3, 3, 3]
    assert json.loads(channel.getvalue().splitlines()[0])["cpu"] >= 0


def test_the_table_compares_both_sides(script: Path) -> None:
    theirs = turn(2.0, **{"VAE encode": 0.5, "denoiser forward": 1.0, "backward": 0.5})
    ours = turn(1.0, **{"batch from the cache": 0.1, "denoiser forward": 0.5, "backward": 0.4})
    turns = {side_by_side.REFERENCE: [theirs], side_by_side.OURS: [ours]}
    text = side_by_side.table(arguments(script), side_by_side.Results(turns, 1.0, 2.0, 0.5, [], None))
    assert "| the script | 1.00 [1.00, 1.00] |" in text and "| ours | 2.00 [2.00, 2.00] |" in text


@pytest.mark.slow
def test_both_sides_run_in_turns_and_make_a_table(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(workplace: Workplace, *command: str) -> float:
        """Prepare and cache_latents, without 4 s of imports each."""
        monkeypatch.chdir(workplace.folder)
        monkeypatch.setattr(sys, "argv", [command[-1]])
        importlib.import_module(f"{command[-1]}.__main__").main()
        return 1.0

    monkeypatch.setattr(Workplace, "cpu_seconds", in_this_process)
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / ".state"))
    args = arguments(script)
    results = side_by_side.measure(args, tmp_path)
    assert list(results.turns) == ["the script", "ours"]
    theirs, ours = (side[0] for side in results.turns.values())
    assert {"VAE encode", "text encoder", "denoiser forward", "backward"} <= set(theirs.parts)
    assert "VAE encode" not in ours.parts and ours.parts["batch from the cache"] > 0
    for side in (theirs, ours):
        assert 0 < sum(side.parts.values()) <= side.cpu * 1.01
    text = side_by_side.table(args, results)
    assert "| the script | 1.00 [1.00, 1.00] |" in text
    assert "| ours | " in text and "% | " in text


@pytest.mark.slow
def test_both_sides_compute_the_same_and_the_cold_run_is_charged(script: Path, tmp_path: Path) -> None:
    args = arguments(script, parity_steps=3, cold_runs=1, num_images=12)
    results = side_by_side.measure(args, tmp_path)
    assert results.parity is not None
    loss, adapter = results.parity
    assert loss < 1e-5 and adapter < 1e-3
    theirs, ours = results.cold[0]
    assert theirs > 1 and ours > results.cache


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ["gpu", "--dry", "--batch-sizes", "2", "--script", str(script)]
    monkeypatch.setattr(sys, "argv", words)
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[2] for line in lines if "px" in line] == [gpu.EAGER, gpu.COMPILED, gpu.SCRIPT] + [
        gpu.EAGER,
        gpu.COMPILED,
    ]


def test_adapters_in_one_pass_have_the_gradients_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near, where all rows are joined; to the bit, where each product sees one adapter's rows at a time."""
    monkeypatch.setattr(together, "WARM_UP", 0)
    args = argparse.Namespace(num_adapters=3, rounds=1, batch_sizes=[1], dry=True)
    alone, joined, apart = together.measure(args, "float32", batch_size=1)
    assert joined.difference < 1e-5 and apart.is_equal and apart.difference == 0
    assert min(row.milliseconds[0] for row in (alone, joined, apart)) > 0 and alone.ratios == [1.0]
    text = together.table(args, [alone, joined, apart])
    assert "| products one by one, float32 | 1 |" in text.replace("together, ", "") and "| 0 | yes |" in text


def test_a_failed_side_is_reported_with_its_output(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit('no such model')")
    variant = Variant("the script", (str(tmp_path / "broken.py"),))
    with pytest.raises(Failed, match=r"the script:\nno such model"):
        players.in_turns([variant], tmp_path, warm_up=1, rounds=1, num_steps=1)


def test_flops_are_those_of_the_published_models() -> None:
    """SD 1.5 at 512 px, batch 1: 0.80 TFLOP per forward of the UNet alone, 1.12 of the VAE's encoder."""
    counted = flops.count(SD15, rank=16)
    assert counted.forward == pytest.approx(0.808e12, rel=0.01)
    assert counted.encode == pytest.approx(1.117e12, rel=0.01)
    assert counted.step == pytest.approx(1.725e12, rel=0.01)


def test_gpu_rows_are_images_per_second_of_the_ceiling_and_times_the_script() -> None:
    rows = [
        gpu.Row(SD15, 4, gpu.EAGER, 0.1, 2**30),
        gpu.Row(SD15, 4, gpu.SCRIPT, 0.25, 2**31),
        gpu.Row(SDXL, 4, gpu.EAGER, None, 0),
    ]
    assert gpu.line(rows[0], rows, ceiling=80.0) == "| SD 1.5, 512 px | 4 | ours | 2.50 | 40.0 | 50 % | 1.0 GiB |"
    assert "out of memory" in gpu.line(rows[2], rows, ceiling=80.0)


def test_a_block_is_replaced_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n")
    monkeypatch.setattr(readme, "README", path)
    readme.write("gpu", "new\n")
    assert path.read_text() == "before\n<!-- gpu -->\nnew\n<!-- /gpu -->\nafter\n"
    with pytest.raises(SystemExit, match="other"):
        readme.write("other", "new\n")


def test_thin_bases_have_the_layout_that_stages_read(tmp_path: Path) -> None:
    from lora_dag.bases import diffusers_folder
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import load_family

    Workplace(tmp_path, DRY_SD15, num_images=1).create("float32", "float32")
    assert TINY.family == DRY_SD15.family
    base = str(tmp_path / "data/base")
    model = ModelParams(family="sd", pretrained=base, variant=None, dtype="float32", quantization=None)
    assert diffusers_folder.folder_problems(model, load_family("sd")) == []


def test_benchmarks_import_names_that_exist() -> None:
    """Also the names that are imported inside functions, which only a long run would reach."""
    missing = []
    for path in sorted((REPOSITORY / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] not in OWN:
                continue
            module = importlib.import_module(str(node.module))
            for name in (alias.name for alias in node.names if not hasattr(module, alias.name)):
                if importlib.util.find_spec(f"{node.module}.{name}") is None:
                    missing.append(f"{path.name}: {node.module}.{name}")
    assert missing == []
