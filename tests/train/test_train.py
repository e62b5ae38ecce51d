"""Training on the tiny random base: outputs, the step, the adapter's options, refused settings."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_dag.artifacts.adapter import FINAL, Adapter, snapshot_name
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.artifacts.manifest import Manifest
from lora_dag.core import params
from lora_dag.core.files import read_json
from lora_dag.core.params import ModelParams
from lora_dag.core.tensors import load_tensors
from lora_dag.families import sd
from lora_dag.images.decode import load_view
from stages.train.optimizers import make_optimizer
from tests.helpers.errors import assert_line
from tests.helpers.settings import train_params
from tests.helpers.trainings import LONG, batches, history, outputs, refusal, squared_errors, weights
from tests.helpers.workspace import Workspace, outcome

# What is written


def test_outputs(encoded: Workspace) -> None:
    lines = encoded.run("train")
    assert set(encoded.tree("data/adapter")) == {"adapter.json", FINAL, snapshot_name(2)}
    adapter = Adapter.load(Path("data/adapter"))
    assert (adapter.num_steps, adapter.snapshots) == (4, [2])
    assert adapter.lora_config["r"] == 2 and adapter.lora_config["target_modules"] == sorted(TARGETS)
    assert sorted(adapter.base) == sorted(sd.COMPONENTS)

    final, snapshot = adapter.weights(Path("data/adapter")), adapter.weights(Path("data/adapter"), 2)
    assert final.keys() == snapshot.keys() and len(final) == 64
    for name, tensor in final.items():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all() and tensor.any()
        assert not torch.equal(tensor, snapshot[name])

    rows = history()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    rates = [0, 1e-3, 0.75e-3, 0.25e-3]  # one warmup step, then cosine over the three left
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    metrics = read_json(Path("reports/train/metrics.json"))
    assert metrics["train.num_images"] == 6 and metrics["train.images_seen"] == 8
    assert metrics["train.num_trainable_parameters"] == sum(tensor.numel() for tensor in final.values())
    assert metrics["train.loss_final"] == pytest.approx(sum(row["loss"] for row in rows) / 4, rel=1e-4)
    assert metrics["train.grad_norm_max"] == pytest.approx(max(row["grad_norm"] for row in rows), rel=1e-4)
    assert lines[-1] == "next        python -m stages.validate"
    left = {path.name for path in Path(".state/runs").glob("*/*")}
    assert left == {"inputs.json", "lock", "progress.json"}  # checkpoints and snapshots are gone


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def test_two_runs_in_different_folders_are_bit_identical(encoded: Workspace, reference: Path) -> None:
    encoded.run("train", *LONG, "--set", "runtime.log_every_n_steps=3")
    assert outputs(encoded) == {
        path.relative_to(root).as_posix(): path.read_bytes()
        for root in (reference / "data/adapter", reference / "reports/train")
        for path in root.rglob("*")
        if path.is_file()
    } | {"run.json": b""}
    assert not any(str(encoded.path).encode() in blob for blob in outputs(encoded).values())


def test_another_seed_gives_another_adapter(encoded: Workspace, reference: Path) -> None:
    encoded.run("train", *LONG, "--set", "train.seed=1")
    assert (Path("data/adapter") / FINAL).read_bytes() != (reference / "data/adapter" / FINAL).read_bytes()


def test_the_base_on_disk_is_unchanged(encoded: Workspace) -> None:
    before = encoded.tree("data/base")
    encoded.run("train")
    assert len(before) > 8 and encoded.tree("data/base") == before


@pytest.mark.parametrize("gamma", [None, 0.5])
def test_first_loss_equals_an_independent_computation(encoded: Workspace, gamma: float | None) -> None:
    """At step 1 the model equals the base: v of Salimans & Ho 2022, weighted as in Hang et al. 2023."""
    weighting = [] if gamma is None else ["--set", "train.loss_weighting=min_snr", "--set", f"train.snr_gamma={gamma}"]
    encoded.run("train", "--set", "train.num_steps=2", *weighting)
    scheduler = sd.load_scheduler(params.load(Path("params.yaml")).section(ModelParams))
    batch = batches(LatentCache(Path("data/latents"))).batch(0, 0)
    losses = []
    for index, t in enumerate(batch.timesteps.tolist()):
        signal = scheduler.alphas_cumprod[t].double()
        loss = squared_errors(batch, index).mean()
        ratio = signal / (1 - signal)
        losses.append(float(loss * (1 if gamma is None else min(float(ratio), gamma) / (ratio + 1))))
    assert history()[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_training_in_bfloat16(encoded: Workspace) -> None:
    encoded.run("prepare")
    encoded.run("cache_latents", "--set", "model.dtype=bfloat16")
    encoded.run("train", "--set", "model.dtype=bfloat16")
    assert {tensor.dtype for tensor in weights().values()} == {torch.float32}
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in history())


# The step


def test_accumulated_steps_equal_one_large_batch(encoded: Workspace) -> None:
    # Adam makes a step of full size from a gradient of rounding errors
    argv = ("--set", "train.optimizer_args={eps: 1e-4}")
    found = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        sizes = (f"train.batch_size={batch_size}", f"train.gradient_accumulation_steps={accumulation}")
        encoded.run("train", *argv, *(word for size in sizes for word in ("--set", size)))
        found.append((history(), weights()))
    (expected_history, expected), *others = found
    for other_history, other in others:
        for row, expected_row in zip(other_history, expected_history, strict=True):
            assert row == pytest.approx(expected_row, rel=1e-4)
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, expected[name], atol=2e-6, rtol=1e-3)


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the 2-norm over all gradients in the optimizer, one per step."""
    found: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad.double().flatten() for group in self.param_groups for p in group["params"]]
        found.append(float(torch.cat(gradients).norm()))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return found


def test_gradients_are_clipped(encoded: Workspace, norms: list[float]) -> None:
    encoded.run("train", "--set", "train.max_grad_norm=0.01")
    recorded = [row["grad_norm"] for row in history()]
    assert len(recorded) == 4 and all(norm > 0.05 for norm in recorded)
    assert norms[1:] == pytest.approx([0.01] * 4, rel=1e-3)  # the first is of the trial step


def test_gradients_below_the_limit_are_not_clipped(encoded: Workspace, norms: list[float]) -> None:
    encoded.run("train", "--set", "train.max_grad_norm=100")
    assert norms[1:] == pytest.approx([row["grad_norm"] for row in history()], rel=1e-4)


def test_cached_loss_equals_uncached_loss(encoded: Workspace, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole training runs with every image and caption encoded again from the files."""
    model = params.load(Path("params.yaml")).section(ModelParams)
    vae = sd.load_vae(model, torch.device("cpu"))
    text = sd.load_text(model, torch.device("cpu"))
    manifest = Manifest.load(Path("data/prepared"))
    by_name = {item.file_name: item for item in manifest.items}
    cache = LatentCache(Path("data/latents"))
    by_key = {row.views[0]: by_name[row.file_name] for row in cache.items}
    encodings = []

    def latents(self: LatentCache, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        item = by_key[key]
        (view,) = manifest.augmentation.views(item, 1)
        image = load_view((Path("data/raw") / item.file_name).read_bytes(), item, view, manifest.preprocessing)
        pixel_values = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        mean, std = (tensor[0].clone() for tensor in sd.encode_images(vae, pixel_values))
        encodings.append(key)
        return mean, std

    def stored_prompt(self: LatentCache, caption: str, view: str | None = None) -> dict[str, torch.Tensor]:
        return {name: tensor[0].clone() for name, tensor in sd.encode_prompts(text, [caption]).items()}

    for key in list(by_key)[:3]:
        for cached, direct in zip(cache.latents(key), latents(cache, key), strict=True):
            torch.testing.assert_close(cached, direct, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(LatentCache, "latents", latents)
    monkeypatch.setattr(LatentCache, "stored_prompt", stored_prompt)
    encoded.run("train", *LONG)
    assert len(encodings) >= 3 + 12
    with (reference / "reports/train/loss.csv").open() as file:
        expected = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    for row, expected_row in zip(history(), expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-3)


def test_min_snr_lowers_every_loss_of_v(encoded: Workspace) -> None:
    encoded.run("train")
    plain = history()
    encoded.run("train", "--set", "train.loss_weighting=min_snr", "--set", "train.snr_gamma=5.0")
    assert history()[0]["loss"] < plain[0]["loss"]  # min(SNR, gamma) / (SNR + 1) is below 1
    assert all(math.isfinite(row["loss"]) for row in history())


# The adapter's options


def test_the_plan_counts_targets_and_memory(encoded: Workspace) -> None:
    lines = encoded.run("train", "--set", "lora.rank_pattern={attn2.to_k: 4}")
    base = sum(t.numel() for t in load_tensors(Path("data/base/unet/diffusion_pytorch_model.safetensors")).values())
    num = sum(tensor.numel() for tensor in weights().values())
    assert (
        f"adapter     rank 2 and 4, 32 layers, {num:,} parameters ({100 * num / base:.2f} % of the denoiser's {base:,})"
        in lines
    )
    assert "targets     8 to_k, 8 to_out.0, 8 to_q, 8 to_v" in lines
    (memory,) = (line for line in lines if line.startswith("memory"))
    assert f" {16 * num / 1e6:.1f} MB for adapter" in memory and f"fine-tuning: {16 * base / 1e6:.1f} MB)" in memory


def test_magnitudes_do_not_decay() -> None:
    trainable = {
        "a.lora_A.default.weight": torch.nn.Parameter(torch.ones(2)),
        "a.lora_magnitude_vector.default.weight": torch.nn.Parameter(torch.ones(2)),
    }
    groups = make_optimizer(train_params("weight_decay=0.5"), trainable, {}, torch.device("cpu")).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.5, 1), (0.0, 1)]
    assert groups[1]["params"][0] is trainable["a.lora_magnitude_vector.default.weight"]


# Refused


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ("train.batch_size=7", ["batch-too-large", "--set train.batch_size: got 7", "6 training images"]),
        ("train.lr_warmup_steps=4", ["warmup-too-long", "--set train.lr_warmup_steps: got 4", "num_steps (4)"]),
        ("train.learning_rate=0", ["wrong-value", "--set train.learning_rate: got 0"]),
        ("lora.rank=33", ["rank-too-high", "--set lora.rank: got 33", "'to_q'", "32"]),
        ("model.dtype=float16", ["needs-gpu", "--set model.dtype: float16", "GPU", "bfloat16 or float32"]),
        ("model.pretrained=data/none", ["base-missing", "--set model.pretrained: 'data/none'"]),
    ],
)
def test_settings_that_cannot_be_trained(encoded: Workspace, change: str, values: list[str]) -> None:
    problem, (code, *texts) = refusal(encoded, "--set", "lora.target_modules=[to_q]", "--set", change), values
    assert code == problem.code and all(text in problem for text in texts), problem


def test_missing_latents_are_refused(workspace: Workspace) -> None:
    problem = refusal(workspace)
    assert problem.startswith("data/latents/manifest.json: ") and "python -m stages.cache_latents" in problem


def test_latents_of_another_base_are_refused(encoded: Workspace) -> None:
    shutil.copytree("data/base", "data/other")
    path = Path("data/other/vae/config.json")
    path.write_text(path.read_text().replace("0.5", "0.25"))
    problem = refusal(encoded, "--set", "model.pretrained=data/other")
    assert problem.startswith("data/latents: ") and "another vae" in problem and "dvc repro" in problem


def test_damaged_latents_are_refused(encoded: Workspace) -> None:
    shard = sorted(Path("data/latents/images").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    problem = refusal(encoded)
    assert problem.startswith(f"{shard}: ") and "python -m stages.cache_latents" in problem


def test_a_refusal_is_one_line_and_exit_code_2(encoded: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    line = outcome(encoded, "train", capsys, "--set", "train.batch_size=7")
    assert_line(line, "batch-too-large", "error: --set train.batch_size: got 7")
