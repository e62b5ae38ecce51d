"""Batches through an encoder: neighbors, reading ahead, short memory, dtypes."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.core.files import read_json
from lora_dag.core.params import ModelParams
from lora_dag.families import sd
from stages.cache_latents.encoding import (
    Encoder,
    FutureCache,
    OutOfMemory,
    VerifiedBatchShapes,
    encode_batch,
    make_batches,
    read_ahead,
    require_independent,
)
from tests.helpers.errors import assert_line, refused
from tests.helpers.workspace import Workspace, make_image

CPU = torch.device("cpu")
LATENTS = Path("data/latents")


def model_params(base: Path, dtype: str = "float32") -> ModelParams:
    return ModelParams(family="sd", pretrained=str(base), variant=None, dtype=dtype, quantization=None)


def make_encoder(encode: Any, model: ModelParams) -> Encoder[torch.Tensor]:
    return Encoder("latents", lambda key: torch.zeros(1), encode, torch.zeros_like, lambda key: (1,), model, CPU, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_entry_depends_neither_on_place_nor_on_neighbors(tiny_base: Path, dtype: str) -> None:
    model = model_params(tiny_base, dtype)
    vae = sd.load_vae(model, CPU)
    encoder = make_encoder(lambda values: {"mean": sd.encode_images(vae, torch.stack(values))[0]}, model)
    x, *others = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = encode_batch(encoder, [x, *others])[0]["mean"]
    for place in range(4):
        values = [torch.zeros(3, 32, 32)] * 4
        values[place] = x
        assert torch.equal(encode_batch(encoder, values)[place]["mean"], expected)


def test_a_device_where_neighbors_matter_is_refused() -> None:
    encoder = make_encoder(None, model_params(Path("base")))
    with refused("batch-dependent", "params.yaml cache.batch_size: got 4", "cache.batch_size: 1."):
        require_independent({"mean": torch.ones(2)}, {"mean": torch.ones(2) + 1e-6}, encoder)


def test_the_next_batch_is_read_while_one_is_encoded_and_no_more() -> None:
    started: list[str] = []
    second = threading.Event()

    def read(key: str) -> str:
        started.append(key)
        if key == "b1":
            second.set()
        return key.upper()

    with ThreadPoolExecutor(2) as pool:
        batches = read_ahead(pool, read, [["a0", "a1"], ["b0", "b1"], ["c0"]])
        assert next(batches) == (["a0", "a1"], ["A0", "A1"])
        assert second.wait(10), "the second batch is not read while the first one is at the encoder"
        assert "c0" not in started
        assert list(batches) == [(["b0", "b1"], ["B0", "B1"]), (["c0"], ["C0"])]


def test_batches_follow_the_order_of_reading_and_the_largest_goes_first() -> None:
    sizes = {"a": 1, "b": 2, "c": 1, "d": 3, "e": 2, "f": 1, "g": 3, "h": 3}
    found = make_batches(list(sizes), lambda key: (sizes[key], 10), 2)
    assert found == [["d", "g"], ["a", "c"], ["b", "e"], ["f"], ["h"]]
    assert make_batches([], lambda key: (), 2) == []


def test_independence_is_proven_once_for_a_shape_and_a_setting(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode_images = sd.encode_images
    monkeypatch.setattr(sd, "encode_images", lambda vae, x: sizes.append(len(x)) or encode_images(vae, x))

    def encoded(*argv: str) -> list[int]:
        """Return the list that collects the size of each batch of the VAE."""
        sizes.clear()
        workspace.run("cache_latents", *argv)
        return sizes

    workspace.run("prepare")
    assert encoded() == [4, 4, 4]  # the second one is the proof
    make_image(50).save("data/raw/05.png")
    workspace.run("prepare")
    assert encoded() == [4]
    assert encoded("--set", "cache.batch_size=8") == [8, 8]
    Path(".state/store/proven.json").write_text("{damaged")
    shutil.rmtree(".state/store/latents")
    assert encoded() == [4, 4, 4]


def test_a_proof_holds_under_its_own_conditions_alone(tmp_path: Path) -> None:
    path = tmp_path / "proven.json"
    VerifiedBatchShapes(path, ["latents", {"torch": "1.0"}]).add((64, 64))
    assert (64, 64) in VerifiedBatchShapes(path, ["latents", {"torch": "1.0"}])
    assert (64, 48) not in VerifiedBatchShapes(path, ["latents", {"torch": "1.0"}])
    assert (64, 64) not in VerifiedBatchShapes(path, ["latents", {"torch": "1.1"}])


# Short memory


class ShortMemory:
    """Stand-in for an encoder that fits into memory only with small batches, or in tiles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
        self.fits, self.error = 4, error
        self.needs_tiles = False
        self.sizes: list[int] = []
        encode_images = sd.encode_images

        def encode(vae: Any, pixel_values: torch.Tensor) -> Any:
            self.sizes.append(len(pixel_values))
            if len(pixel_values) > self.fits or (self.needs_tiles and not vae.use_tiling):
                raise self.error
            return encode_images(vae, pixel_values)

        monkeypatch.setattr(sd, "encode_images", encode)


CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")
CPU_ERROR = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.")


@pytest.fixture(params=[CUDA_ERROR, CPU_ERROR], ids=["cuda", "cpu"])
def short(request: pytest.FixtureRequest, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> ShortMemory:
    workspace.run("prepare")
    return ShortMemory(monkeypatch, request.param)


def test_batches_are_halved_until_they_fit(workspace: Workspace, short: ShortMemory) -> None:
    short.fits = 1
    lines = workspace.run("cache_latents")
    for size, smaller in ((4, 2), (2, 1)):
        values = (f"cache.batch_size: {size} ", "latents", f"Set cache.batch_size: {smaller} ")
        assert_line("\n".join(lines), "encoder-fallback", *values)
    assert lines[-3] == "images      encoded 8, reused 0"
    assert short.sizes[:3] == [4, 2, 1] and set(short.sizes[3:]) == {1}
    views = [item.views for item in LatentCache(LATENTS).items]
    workspace.run("cache_latents", "--set", "cache.batch_size=1")
    assert [item.views for item in LatentCache(LATENTS).items] == views  # keys of that very size


def test_entries_of_a_fallback_are_reused_but_do_not_set_the_next_start(
    workspace: Workspace, short: ShortMemory
) -> None:
    short.fits = 2
    workspace.run("cache_latents")
    short.sizes.clear()
    make_image(50).save("data/raw/05.png")
    workspace.run("prepare")
    lines = workspace.run("cache_latents")
    assert lines[-3] == "images      encoded 1, reused 7"
    assert short.sizes == [4, 2]
    assert_line("\n".join(lines), "encoder-fallback", "cache.batch_size: 4 ", "Set cache.batch_size: 2 ")
    tree = workspace.tree("data/latents")
    Path(".state/store/last.json").unlink()
    workspace.run("cache_latents")
    assert workspace.tree("data/latents") == tree
    short.fits = 4  # where memory is back, it is used, and the bytes are those of a machine that never lacked any
    assert workspace.run("cache_latents")[-3] == "images      encoded 8, reused 0"
    tree = workspace.tree("data/latents")
    shutil.rmtree(".state")
    workspace.run("cache_latents")
    assert workspace.tree("data/latents") == tree


def test_metrics_record_the_used_settings(workspace: Workspace, short: ShortMemory) -> None:
    def used() -> tuple[Any, ...]:
        facts = read_json(Path("reports/latents/metrics.json"))
        return tuple(facts[name] for name in ("latents.batch_size", "latents.tiling", "captions.batch_size"))

    workspace.run("cache_latents")
    assert used() == (4, False, 4)
    short.fits = 2
    shutil.rmtree(".state/store/latents")
    workspace.run("cache_latents")
    assert used() == (2, False, 4)
    short.needs_tiles = True
    shutil.rmtree(".state/store/latents")
    workspace.run("cache_latents")
    assert used() == (1, True, 4)


def test_status_warns_of_short_memory(workspace: Workspace, short: ShortMemory) -> None:
    short.fits = 2
    workspace.run("cache_latents")
    counts, warning, work = workspace.run("status")
    assert (counts, work) == ("8 images: 8 valid, 0 not valid", "a run would encode nothing")
    assert_line(warning, "encoder-fallback", "cache.batch_size: 4 ", "latents", "Set cache.batch_size: 2 ")
    lines = workspace.run("status", "--set", "cache.batch_size=2")
    assert not any("memory" in line for line in lines)


def test_a_damaged_entry_that_does_not_fit_any_more_is_deleted(workspace: Workspace, short: ShortMemory) -> None:
    workspace.run("cache_latents")
    entry = sorted(Path(".state/store/latents").rglob("*.safetensors"))[0]
    entry.write_bytes(entry.read_bytes()[:-1] + b"\x07")
    short.fits = 2
    with refused("out-of-memory", "store/latents: 1 damaged entry"):
        workspace.run("cache_latents")
    assert not entry.exists()
    assert workspace.run("cache_latents")[-3] == "images      encoded 8, reused 0"
    assert set(short.sizes[-4:]) == {2}


def test_tiles_are_tried_after_single_images(workspace: Workspace, short: ShortMemory) -> None:
    short.needs_tiles = True
    lines = workspace.run("cache_latents")
    assert_line("\n".join(lines), "encoder-fallback", "cache.batch_size: 1 and cache.tiling: true")
    assert short.sizes[:4] == [4, 2, 1, 1]
    assert lines[-3] == "images      encoded 8, reused 0"


def test_one_image_in_tiles_that_does_not_fit_is_an_error(workspace: Workspace, short: ShortMemory) -> None:
    short.fits = 0
    with refused("out-of-memory", "params.yaml cache.batch_size: ", "one image in tiles"):
        workspace.run("cache_latents")
    assert not LATENTS.exists()


def test_another_error_is_not_taken_for_short_memory(tiny_base: Path) -> None:
    def encode(values: list[torch.Tensor]) -> Any:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        encode_batch(make_encoder(encode, model_params(tiny_base)), [torch.zeros(1)])
    with pytest.raises(OutOfMemory):
        encode_batch(make_encoder(lambda values: torch.empty(2**60), model_params(tiny_base)), [torch.zeros(1)])


# Tiles and dtypes


def test_tiling_encodes_large_images_in_tiles(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL

    tiled = AutoencoderKL._tiled_encode
    shapes = []

    def spy(self: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return tiled(self, x)

    monkeypatch.setattr(AutoencoderKL, "_tiled_encode", spy)
    argv = ("--set", "dataset.resolution=48")
    workspace.run("prepare", *argv)
    workspace.run("cache_latents", *argv)
    assert shapes == []
    whole = LatentCache(LATENTS)
    workspace.run("cache_latents", *argv, "--set", "cache.tiling=true")
    assert shapes[0] == (4, 3, 48, 48)
    tiles = LatentCache(LATENTS)
    for before, after in zip(whole.items, tiles.items, strict=True):
        assert before.views != after.views and before.content == after.content
        first, second = whole.latents(before.views[0])[0], tiles.latents(after.views[0])[0]
        assert first.shape == second.shape == (4, 12, 12) and not torch.equal(first, second)


@pytest.mark.parametrize(
    ("force_upcast", "dtype", "expected"),
    [
        (True, "float16", "float32"),
        (True, "bfloat16", "bfloat16"),
        (True, "float32", "float32"),
        (False, "float16", "float16"),
        (None, "float16", "float16"),
    ],
)
def test_a_vae_that_float16_overflows_is_float32(
    tiny_base: Path, tmp_path: Path, force_upcast: bool | None, dtype: str, expected: str
) -> None:
    shutil.copytree(tiny_base / "vae", tmp_path / "vae")
    path = tmp_path / "vae/config.json"
    config = json.loads(path.read_text())
    del config["force_upcast"]
    path.write_text(json.dumps(config | ({} if force_upcast is None else {"force_upcast": force_upcast})))
    assert sd.vae_dtype(model_params(tmp_path, dtype)) == expected


def test_it_runs_outside_of_autocast(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU rejects float16, so the test uses bfloat16: keys and bits equal those of float32."""
    workspace.run("prepare")
    workspace.run("cache_latents")
    expected = LatentCache(LATENTS)
    monkeypatch.setattr(sd, "vae_dtype", lambda model: "float32")
    lines = workspace.run("cache_latents", "--set", "model.dtype=bfloat16")
    assert lines[-3] == "images      encoded 0, reused 8"
    shutil.rmtree(".state/store/latents")
    lines = workspace.run("cache_latents", "--set", "model.dtype=bfloat16")
    assert lines[-3] == "images      encoded 8, reused 0"
    again = LatentCache(LATENTS)
    for before, after in zip(expected.items, again.items, strict=True):
        assert before.views == after.views
        assert torch.equal(expected.latents(before.views[0])[0], again.latents(after.views[0])[0])
    assert not torch.equal(expected.prompt("")["prompt_embeds"], again.prompt("")["prompt_embeds"])


def test_recent_results_are_made_once_also_by_threads_at_once() -> None:
    made: list[int] = []

    def make(key: int) -> int:
        made.append(key)
        time.sleep(0.02)
        return -key

    cache = FutureCache(make, 2)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(cache, [1, 1, 1, 2, 2, 1])) == [-1, -1, -1, -2, -2, -1]
    assert sorted(made) == [1, 2]
    assert [cache(3), cache(2), cache(1)] == [-3, -2, -1]
    assert sorted(made) == [1, 1, 2, 3]


def test_a_failed_result_raises_in_every_thread() -> None:
    def fail(key: int) -> int:
        raise ValueError(key)

    cache = FutureCache(fail, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match="7"):
            cache(7)
