"""End to end on the tiny random base: equal bytes, exact resume, and a stage that proves what it says of itself."""

from __future__ import annotations

import csv
import importlib
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler

from stages.artifacts.adapter import FINAL, Adapter, snapshot_name
from stages.artifacts.latent_cache import LatentCache
from stages.artifacts.manifest import Manifest
from stages.core import closure, lora, objectives, params
from stages.core.console import UserError
from stages.core.files import last_holder, load_tensors, read_json
from stages.core.params import ModelParams
from stages.core.pictures import load_view
from stages.core.selfcheck import Watch
from stages.families import sd
from stages.train.batches import Batches
from stages.train.noising import make_timesteps
from stages.train.optimizers import make_optimizer
from stages.train.trainer import Trainer
from tests.caches import write_mixed_cache
from tests.conftest import REPOSITORY, TINY, Workspace, picture, write_params, write_rows
from tests.settings import train_params
from tests.trainings import broken_off

LONG = ("--set", "train.num_steps=6", "--set", "lora.dropout=0.25", "--set", "train.prompt_dropout=0.5")
"""Six steps with everything random in them."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder where prepare, cache_latents and ``train LONG`` ran without a disturbance."""
    folder = tmp_path_factory.mktemp("reference")
    write_params(folder / "params.yaml", TINY)
    (folder / "data/raw").mkdir(parents=True)
    for index in range(8):
        picture(index).save(folder / f"data/raw/{index:02}.png")
    write_rows(folder / "data/raw", [{"file_name": f"{i:02}.png", "text": f"thing {i}"} for i in range(8)])
    (folder / "data/base").symlink_to(tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LORA_STATE_DIR", str(folder / ".state"))
        for stage, argv in (("prepare", ()), ("cache_latents", ()), ("train", LONG)):
            patch.setattr(sys, "argv", [stage, *argv])
            importlib.import_module(f"stages.{stage}.__main__").main()
    return folder


@pytest.fixture
def encoded(workspace: Workspace, reference: Path) -> Workspace:
    """The workspace with data/prepared and data/latents."""
    for name in ("prepared", "latents"):
        shutil.copytree(reference / "data" / name, workspace.path / "data" / name)
    return workspace


@pytest.fixture(autouse=True)
def other_precision_may_follow() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def interrupt(workspace: Workspace) -> Callable[..., None]:
    """``interrupt(3, *argv)`` runs train and breaks off in place of step 3."""

    def train(at: int, *argv: str) -> None:
        with broken_off(at):
            workspace.run("train", *argv)

    return train


def history() -> list[dict[str, float]]:
    with Path("reports/train/loss.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def outputs(workspace: Workspace) -> dict[str, bytes]:
    """What DVC hashes or git versions; run.json holds time and speed."""
    return workspace.tree("data/adapter") | workspace.tree("reports/train") | {"run.json": b""}


def weights() -> dict[str, torch.Tensor]:
    return load_tensors(Path("data/adapter") / FINAL)


def refusal(workspace: Workspace, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        workspace.run("train", *argv)
    assert not Path("data/adapter").exists() and not Path("reports/train").exists()
    (problem,) = caught.value.problems
    return problem


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
    assert metrics["train.num_pictures"] == 6 and metrics["train.images_seen"] == 8
    assert metrics["train.num_trainable_parameters"] == sum(tensor.numel() for tensor in final.values())
    assert metrics["train.loss_final"] == pytest.approx(sum(row["loss"] for row in rows) / 4, rel=1e-4)
    assert metrics["train.grad_norm_max"] == pytest.approx(max(row["grad_norm"] for row in rows), rel=1e-4)
    assert lines[-1] == "next        python -m stages.validate"
    left = {path.name for path in Path(".state/runs").glob("*/*")}
    assert left == {"inputs.json", "lock"}  # checkpoints and snapshots are gone


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def test_two_runs_give_the_same_bytes_wherever_they_are(encoded: Workspace, reference: Path) -> None:
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


def test_base_on_disk_is_untouched(encoded: Workspace) -> None:
    before = encoded.tree("data/base")
    encoded.run("train")
    assert len(before) > 8 and encoded.tree("data/base") == before


@pytest.mark.parametrize("gamma", [None, 0.5])
def test_first_loss_equals_an_independent_computation(encoded: Workspace, gamma: float | None) -> None:
    """Step 1 sees the base alone: v of Salimans & Ho 2022, weighted as in Hang et al. 2023."""
    weighting = [] if gamma is None else ["--set", "train.loss_weighting=min_snr", "--set", f"train.snr_gamma={gamma}"]
    encoded.run("train", "--set", "train.num_steps=2", *weighting)
    model = params.load(Path("params.yaml")).section(ModelParams)
    denoiser, scheduler = sd.load_denoiser(model, torch.device("cpu")), sd.load_scheduler(model)
    batch = batches(LatentCache(Path("data/latents"))).batch(0, 0)
    losses = []
    for index, t in enumerate(batch.timesteps.tolist()):
        signal = scheduler.alphas_cumprod[t].double()
        latents, noise = batch.latents[index].double(), batch.noise[index].double()
        noisy_latents = (signal.sqrt() * latents + (1 - signal).sqrt() * noise).float()[None]
        prompt = {name: tensor[index : index + 1] for name, tensor in batch.prompt.items()}
        with torch.no_grad():
            model_pred = sd.predict(denoiser, noisy_latents, torch.tensor([t]), prompt)[0].double()
        loss = (model_pred - (signal.sqrt() * noise - (1 - signal).sqrt() * latents)).square().mean()
        ratio = signal / (1 - signal)
        losses.append(float(loss * (1 if gamma is None else min(float(ratio), gamma) / (ratio + 1))))
    assert history()[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def batches(cache: LatentCache, accumulation: int = 1) -> Batches:
    """The tiny parameters' batches."""
    settings = train_params("batch_size=2", f"gradient_accumulation_steps={accumulation}")
    timesteps = make_timesteps(settings, DDPMScheduler(1000))
    return Batches(cache, cache.split("train"), settings, timesteps, torch.device("cpu"))


def test_training_in_bfloat16(encoded: Workspace) -> None:
    encoded.run("prepare")
    encoded.run("cache_latents", "--set", "model.dtype=bfloat16")
    encoded.run("train", "--set", "model.dtype=bfloat16")
    assert {tensor.dtype for tensor in weights().values()} == {torch.float32}
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in history())


# Resume


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_resumed_run_gives_the_bytes_of_an_undisturbed_one(
    encoded: Workspace, reference: Path, interrupt: Callable[..., None], at: int, every: int
) -> None:
    argv = (*LONG, "--set", f"train.checkpoint_every_n_steps={every}")
    interrupt(at, *argv)
    assert not Path("data/adapter").exists()
    lines = encoded.run("train", *argv)
    done = at - at % every
    assert [line for line in lines if "resumed" in line] == ([f"resumed from step {done}"] if done else [])
    for name, blob in encoded.tree("data/adapter").items():
        assert blob == (reference / "data/adapter" / name).read_bytes(), name
    for name in ("loss.csv", "metrics.json"):
        assert Path("reports/train", name).read_bytes() == (reference / "reports/train" / name).read_bytes()


def test_interrupted_twice_and_with_the_newest_checkpoint_damaged(
    encoded: Workspace, reference: Path, interrupt: Callable[..., None]
) -> None:
    argv = (*LONG, "--set", "train.checkpoint_every_n_steps=1")
    interrupt(2, *argv)
    interrupt(5, *argv)
    (newest,) = Path(".state/runs").glob("*/checkpoints/step-000005.pt")
    newest.write_bytes(newest.read_bytes()[:1000])
    lines = encoded.run("train", *argv)
    assert "resumed from step 4" in lines and any("is damaged or unfinished" in line for line in lines)
    assert (Path("data/adapter") / FINAL).read_bytes() == (reference / "data/adapter" / FINAL).read_bytes()


@pytest.mark.usefixtures("encoded")
def test_only_the_very_same_run_is_resumed(interrupt: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    def resumed(*argv: str) -> bool:
        interrupt(3, *LONG, *argv)
        return "resumed from step 2" in caplog.messages

    assert not resumed()
    for change in ("lora.rank=3", "lora.alpha=4", "train.learning_rate=2e-3", "train.seed=1", "train.num_steps=7"):
        assert not resumed("--set", change), change
    for change in ("runtime.log_every_n_steps=2", "train.checkpoint_every_n_steps=5", "export.seed=9"):
        assert resumed("--set", change), change


def test_other_latents_or_code_are_no_resume(
    encoded: Workspace, interrupt: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closure, "code_digest", lambda *_: "other")
        interrupt(3)
        assert "resumed from step 2" not in caplog.messages
    picture(50).save("data/raw/00.png")
    encoded.run("prepare")
    encoded.run("cache_latents")
    interrupt(3)
    assert "resumed from step 2" not in caplog.messages


HOLD = "import sys; from pathlib import Path; from stages.core.files import lock\nwith lock(Path(sys.argv[1])): input()"


def test_a_second_process_on_the_same_run_is_refused(encoded: Workspace, interrupt: Callable[..., None]) -> None:
    interrupt(3)
    (folder,) = Path(".state/runs").resolve().iterdir()
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE) as holder:
        while last_holder(folder)[0] != str(holder.pid):
            assert holder.poll() is None
        problem = refusal(encoded)
        assert holder.stdin
        holder.stdin.write(b"\n")
        holder.stdin.close()
    assert problem == (
        f"{folder}: process {holder.pid} is at work on this run; wait for it, or stop it: kill {holder.pid}"
    )
    assert "resumed from step 2" in encoded.run("train")


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
    """2-norm over all adapter gradients as the optimizer meets them, one per step."""
    found: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad.double().flatten() for group in self.param_groups for p in group["params"]]
        found.append(float(torch.cat(gradients).norm()))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return found


def test_clipping_clips(encoded: Workspace, norms: list[float]) -> None:
    encoded.run("train", "--set", "train.max_grad_norm=0.01")
    recorded = [row["grad_norm"] for row in history()]
    assert len(recorded) == 4 and all(norm > 0.05 for norm in recorded)
    assert norms[1:] == pytest.approx([0.01] * 4, rel=1e-3)  # the first is of the trial step


def test_gradients_below_the_limit_are_left_alone(encoded: Workspace, norms: list[float]) -> None:
    encoded.run("train", "--set", "train.max_grad_norm=100")
    assert norms[1:] == pytest.approx([row["grad_norm"] for row in history()], rel=1e-4)


def test_clipping_that_does_not_clip_is_noticed(encoded: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "accelerate.Accelerator.clip_grad_norm_",
        lambda self, p, norm: torch.nn.utils.get_total_norm([parameter.grad for parameter in p]),
    )
    with pytest.raises(RuntimeError, match=r"gradient norm is 0\.\d+ after clipping to 0.01"):
        encoded.run("train", "--set", "train.max_grad_norm=0.01")


def test_cached_loss_equals_uncached_loss(encoded: Workspace, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole training with every picture and caption encoded anew, straight from the files."""
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

    def prompt(self: LatentCache, caption: str, view: str | None = None) -> dict[str, torch.Tensor]:
        return {name: tensor[0].clone() for name, tensor in sd.encode_prompts(text, [caption]).items()}

    for key in list(by_key)[:3]:
        for cached, direct in zip(cache.latents(key), latents(cache, key), strict=True):
            torch.testing.assert_close(cached, direct, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(LatentCache, "latents", latents)
    monkeypatch.setattr(LatentCache, "prompt", prompt)
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


# Several shapes, masks, captions, repeats and weights


@pytest.fixture
def mixed(workspace: Workspace) -> Workspace:
    """The workspace with latents of three shapes."""
    write_mixed_cache()
    return workspace


def test_mixed_pictures_are_trained_and_told_about(mixed: Workspace) -> None:
    lines = mixed.run("train")
    assert "pictures    6 for training, 7 per epoch" in lines
    assert "buckets     latents of 12 x 4 (2), 8 x 8 (2), 4 x 12 (2)" in lines
    metrics = read_json(Path("reports/train/metrics.json"))
    assert metrics["train.num_pictures"] == 6 and metrics["train.epochs"] == pytest.approx(4 * 2 / 7, rel=1e-4)
    assert all(tensor.isfinite().all() and tensor.any() for tensor in weights().values())


def test_buckets_smaller_than_a_batch_are_named_once(mixed: Workspace) -> None:
    lines = mixed.run("train", "--set", "train.batch_size=3")
    assert [line for line in lines if "warning" in line] == [
        f"warning: bucket {size}: 2 pictures for batches of 3; some come up twice in a batch"
        for size in ("12 x 4", "8 x 8", "4 x 12")
    ]


@pytest.mark.parametrize("at", [1, 4])
def test_a_mixed_run_resumes_to_the_same_bytes(mixed: Workspace, interrupt: Callable[..., None], at: int) -> None:
    argv = (*LONG, "--set", "train.gradient_accumulation_steps=2", "--set", "train.checkpoint_every_n_steps=1")
    mixed.run("train", *argv)
    expected = outputs(mixed)
    shutil.rmtree("data/adapter")
    interrupt(at, *argv)
    assert f"resumed from step {at}" in mixed.run("train", *argv)
    assert outputs(mixed) == expected


def test_first_loss_of_mixed_pictures_equals_an_independent_computation(mixed: Workspace) -> None:
    """Masked, weighted, and each micro-batch in its own shape."""
    mixed.run("train", "--set", "train.num_steps=2", "--set", "train.gradient_accumulation_steps=3")
    model = params.load(Path("params.yaml")).section(ModelParams)
    denoiser, scheduler = sd.load_denoiser(model, torch.device("cpu")), sd.load_scheduler(model)
    source = batches(LatentCache(Path("data/latents")), accumulation=3)
    losses, shapes, factors = [], set(), set()
    for micro in range(3):
        batch = source.batch(0, micro)
        assert batch.masks is not None
        for index, t in enumerate(batch.timesteps.tolist()):
            signal = scheduler.alphas_cumprod[t].double()
            latents, noise = batch.latents[index].double(), batch.noise[index].double()
            noisy_latents = (signal.sqrt() * latents + (1 - signal).sqrt() * noise).float()[None]
            prompt = {name: tensor[index : index + 1] for name, tensor in batch.prompt.items()}
            with torch.no_grad():
                model_pred = sd.predict(denoiser, noisy_latents, torch.tensor([t]), prompt)[0].double()
            errors = (model_pred - (signal.sqrt() * noise - (1 - signal).sqrt() * latents)).square()
            mask = batch.masks[index].double().expand_as(errors)
            losses.append(float((errors * mask).sum() / mask.sum() * batch.weights[index]))
            shapes.add(tuple(latents.shape))
            factors.add((float(batch.weights[index]), bool(mask.eq(1).all())))
    assert len(shapes) > 1 and len(factors) > 1
    assert history()[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_what_the_target_is_under_black_does_not_matter(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """All masks are black in the upper half: two kinds of garbage there give one adapter, to the bit."""
    original = objectives.target

    def trained(garbage: float, **every: Any) -> dict[str, torch.Tensor]:
        def target(*args: Any) -> torch.Tensor:
            found = original(*args).clone()
            found[:, :, : found.shape[2] // 2] += garbage
            return found

        write_mixed_cache(**every)
        monkeypatch.setattr(objectives, "target", target)
        workspace.run("train")
        return weights()

    plain, loud, louder = (trained(garbage, masked=True) for garbage in (0.0, 7.0, -1e4))
    assert all(torch.equal(plain[name], loud[name]) and torch.equal(plain[name], louder[name]) for name in plain)
    seen, seen_loud = (trained(garbage, masked=False) for garbage in (0.0, 7.0))
    assert any(not torch.equal(seen[name], seen_loud[name]) for name in seen)


def test_a_weight_scales_the_loss(workspace: Workspace) -> None:
    losses = []
    for loss_weight in (1.0, 0.25):
        write_mixed_cache(loss_weight=loss_weight)
        workspace.run("train")
        losses.append(history()[0]["loss"])
    assert losses[1] == pytest.approx(0.25 * losses[0], rel=1e-4)


@pytest.mark.parametrize("change", [{"repeats": 3}, {"loss_weight": 0.9}, {"captions": ("caption 0",)}], ids=str)
def test_another_weight_repetition_or_choice_of_captions_is_another_run(
    workspace: Workspace, interrupt: Callable[..., None], caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    write_mixed_cache()
    interrupt(3)
    interrupt(3)
    assert "resumed from step 2" in caplog.messages
    caplog.clear()
    write_mixed_cache(**change)
    interrupt(3)
    assert "resumed from step 2" not in caplog.messages


def test_repeats_count_towards_a_full_batch(mixed: Workspace) -> None:
    assert refusal(mixed, "--set", "train.batch_size=8") == (
        "params.yaml train.batch_size: 8 is more than the 6 training pictures and their repeats (7)"
    )
    mixed.run("train", "--set", "train.batch_size=7", "--set", "train.num_steps=2")


# What training notices


@pytest.fixture
def broken_targets(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """``broken_targets({2})`` makes the loss of the second step NaN."""

    def make(steps: set[int]) -> None:
        original, count = objectives.target, iter(range(1, 1000))

        def target(*args: Any) -> torch.Tensor:
            return original(*args) * (math.nan if next(count) in steps else 1)

        monkeypatch.setattr(objectives, "target", target)

    return make


def test_three_losses_in_a_row_that_are_no_numbers_stop(
    encoded: Workspace, broken_targets: Callable[[set[int]], None], caplog: pytest.LogCaptureFixture
) -> None:
    broken_targets({3, 4, 5})
    assert refusal(encoded, *LONG) == (
        "train: no finite loss and gradient in 3 steps in a row (last: step 4); "
        "lower train.learning_rate, or set model.dtype to float32"
    )
    warned = [line for line in caplog.messages if line.startswith("warning: step")]
    assert warned == [f"warning: step {step}: loss nan, gradient norm nan; no update" for step in (2, 3, 4)]


def test_a_single_loss_that_is_no_number_changes_nothing(
    encoded: Workspace, broken_targets: Callable[[set[int]], None]
) -> None:
    broken_targets({3, 4, 6})
    lines = encoded.run("train", *LONG)
    assert sum(line.startswith("warning: step") for line in lines) == 3
    assert [math.isnan(row["loss"]) for row in history()] == [False, False, True, True, False, True]
    assert all(tensor.isfinite().all() for tensor in weights().values())


def test_a_strength_beyond_float32_is_one_line(encoded: Workspace) -> None:
    with pytest.raises(UserError, match="params.yaml lora.alpha: so large that"):
        encoded.run("train", "--set", "lora.alpha=1e300")
    assert not Path("data/adapter").exists()


def test_an_adapter_that_changes_step_zero_is_noticed(encoded: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    original = lora.keyed_init

    def nonzero(denoiser: torch.nn.Module, *args: Any) -> None:
        original(denoiser, *args)
        next(p for name, p in denoiser.named_parameters() if "lora_B" in name).data[0, 0] = 0.1

    monkeypatch.setattr(lora, "keyed_init", nonzero)
    with pytest.raises(RuntimeError, match="the fresh adapter changes the base's output by"):
        encoded.run("train")
    assert not Path("data/adapter").exists()


def test_a_changed_base_is_noticed(encoded: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.step

    def step(self: Trainer, number: int) -> None:
        original(self, number)
        next(p for p in self.denoiser.parameters() if not p.requires_grad).data.view(-1)[0] += 1e-3

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(RuntimeError, match="training changed the frozen base"):
        encoded.run("train")
    assert not Path("data/adapter").exists()


def test_a_layer_without_gradient_is_noticed(encoded: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Watch.gradients

    def gradients(self: Watch) -> None:
        next(iter(self.trainable.values())).grad = None
        original(self)

    monkeypatch.setattr(Watch, "gradients", gradients)
    with pytest.raises(RuntimeError, match=r"no gradient ever reached \['down_blocks.0.*to_q.lora_A"):
        encoded.run("train")


def test_an_adapter_without_any_gradient_is_no_layer_that_nothing_reads() -> None:
    names = [f"{layer}.lora_{which}.default.weight" for layer in ("a.to_q", "b.to_q") for which in "AB"]
    watch = Watch({name: torch.nn.Parameter(torch.zeros(1)) for name in names}, 1.0)
    for _ in range(4):
        watch.gradients()
    with pytest.raises(UserError, match="no gradient was left for any layer; look at train.learning_rate"):
        watch.end()


def test_weights_that_are_not_finite_are_not_delivered(encoded: Workspace) -> None:
    with pytest.raises(UserError, match="train: the run ended in "):
        encoded.run("train", "--set", "train.learning_rate=1e6", "--set", "train.weight_decay=1e6")
    assert not Path("data/adapter").exists()


# The adapter's options


@pytest.mark.parametrize("target_modules", ["attention", "all-linear+conv"])
@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
def test_every_kind_of_adapter_trains_and_resumes_to_the_same_bytes(
    encoded: Workspace, interrupt: Callable[..., None], variant: str, target_modules: str
) -> None:
    changes = (f"lora.{variant}=true", f"lora.target_modules={target_modules}", "lora.rank_pattern={to_k: 3}")
    argv = tuple(word for change in changes for word in ("--set", change))
    interrupt(3, *argv)
    assert "resumed from step 2" in encoded.run("train", *argv)
    resumed = outputs(encoded)
    encoded.run("train", *argv)
    assert outputs(encoded) == resumed
    assert all(tensor.isfinite().all() and tensor.any() for tensor in weights().values())
    assert {len(tensor) for name, tensor in weights().items() if "to_k.lora_A" in name} == {3}


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
    assert f" {16 * num / 1e6:.1f} MB for adapter" in memory and f"fine-tuning {16 * base / 1e6:.1f} MB;" in memory


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
    ("change", "message"),
    [
        ("train.batch_size=7", "params.yaml train.batch_size: 7 is more than the 6 training pictures"),
        ("train.lr_warmup_steps=4", "params.yaml train: lr_warmup_steps (4) must be below num_steps (4)"),
        ("train.learning_rate=0", "params.yaml train.learning_rate: got 0; input should be greater than 0"),
        ("lora.rank=33", "params.yaml lora.rank: 33 is above 32, the size of a 'to_q' layer"),
        ("model.dtype=float16", "params.yaml model.dtype: float16 needs a GPU; use bfloat16 or float32 on a CPU"),
        (
            "model.pretrained=data/none",
            "params.yaml model.pretrained: 'data/none' is no folder; `dvc pull data/base` brings the embedded base",
        ),
    ],
)
def test_settings_that_cannot_be_trained(encoded: Workspace, change: str, message: str) -> None:
    assert refusal(encoded, "--set", "lora.target_modules=[to_q]", "--set", change) == message


def test_latents_first(workspace: Workspace) -> None:
    assert refusal(workspace) == "data/latents/manifest.json: no such file; run `python -m stages.cache_latents` first"


def test_latents_of_another_base_are_refused(encoded: Workspace) -> None:
    shutil.copytree("data/base", "data/other")
    path = Path("data/other/vae/config.json")
    path.write_text(path.read_text().replace("0.5", "0.25"))
    assert refusal(encoded, "--set", "model.pretrained=data/other") == (
        "data/latents: made with another vae than model.pretrained holds now; run `dvc repro`"
    )


def test_damaged_latents_are_refused(encoded: Workspace) -> None:
    shard = sorted(Path("data/latents/images").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert refusal(encoded) == f"{shard}: missing or damaged; run `python -m stages.cache_latents` again"


def test_a_refusal_is_one_line_and_exit_code_2(encoded: Workspace) -> None:
    done = encoded.process("train", "--set", "train.batch_size=7")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: params.yaml train.batch_size: 7 is more than")
    assert "Traceback" not in done.stderr
