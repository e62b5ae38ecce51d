"""``lora-dag status``: images that are not valid, and what a run would encode."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lora_dag.artifacts.manifest import Manifest
from lora_dag.commands.status import MAX_LINES, log_images
from lora_dag.core.files import read_json
from lora_dag.families import sd
from tests.helpers.images import see_through
from tests.helpers.workspace import Workspace, make_image, read_rows, write_rows


def words(changes: tuple[str, ...]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def status(workspace: Workspace, *changes: str) -> list[str]:
    return workspace.run("status", *words(changes))


def prepared_status(workspace: Workspace, *changes: str) -> list[str]:
    workspace.run("prepare", *words(changes))
    return status(workspace, *changes)


@pytest.fixture
def cached(workspace: Workspace) -> Workspace:
    workspace.run("prepare")
    workspace.run("cache_latents")
    return workspace


def caption(index: int, text: str) -> None:
    rows = read_rows(Path("data/raw"))
    rows[index]["text"] = text
    write_rows(Path("data/raw"), rows)


EDITS = "data/raw changed since prepare ran."
NOTHING = ["8 images: 8 valid, 0 not valid", "a run would encode nothing"]


def test_all_is_valid(cached: Workspace) -> None:
    assert status(cached) == NOTHING


def written() -> dict[Path, tuple[int, int]]:
    """Return time and size of each file, except the kept digests of base models, which any reader may add."""
    files = [path for path in Path().rglob("*") if path.is_file() and path.parent.name != "digests"]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def test_status_writes_and_encodes_nothing(cached: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd, "load_vae", None)
    monkeypatch.setattr(sd, "load_text", None)
    make_image(50).save("data/raw/05.png")
    before = written()
    status(cached, "cache.batch_size=3")
    assert written() == before


def test_status_writes_nothing_before_the_first_run(workspace: Workspace) -> None:
    workspace.run("prepare")
    before = written()
    lines = status(workspace)
    assert written() == before
    assert lines[0] == "00.png: new" and "8 images: 0 valid, 8 not valid" in lines
    assert lines[-1] == "a run would encode 8 views and 9 captions"


def test_an_edited_image_before_prepare_runs_again(cached: Workspace) -> None:
    make_image(50).save("data/raw/05.png")
    os.remove("data/raw/06.png")
    lines = status(cached)
    assert lines[0] == "05.png: pixels changed"
    assert lines[1].startswith("06.png: unreadable (") and "06.png" in lines[1][20:]
    assert lines[2] == "8 images: 6 valid, 2 not valid"
    assert "`python -m stages.prepare`" in lines[3] and "`dvc repro`" in lines[3]
    assert lines[4] == "a run would encode 1 view and 0 captions"
    assert lines[5].startswith(EDITS) and len(lines) == 6


def log_of(reasons: dict[str, list[str]], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level("INFO"):
        log_images(reasons)
    return [record.getMessage() for record in caplog.records]


def test_many_images_with_one_reason_share_a_line(caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{index:03}.png" for index in range(300)]
    assert log_of({name: ["new"] for name in names}, caplog) == [
        "300 images, the first is 000.png: new",
        "300 images: 0 valid, 300 not valid",
    ]
    mixed = {name: ["new"] if name > "010.png" else [] for name in names} | {
        "x.png": ["pixels changed", "batch_size 4 -> 3"]
    }
    assert log_of(mixed, caplog) == [
        "x.png: pixels changed, batch_size 4 -> 3",
        "289 images, the first is 011.png: new",
        "301 images: 11 valid, 290 not valid",
    ]


def test_lines_have_a_limit_where_every_image_has_its_own_reason(caplog: pytest.LogCaptureFixture) -> None:
    lines = log_of({f"{index:03}.png": [f"size changed ({index}x8 -> 8x8)"] for index in range(300)}, caplog)
    assert len(lines) == MAX_LINES + 2
    assert lines[0] == "000.png: size changed (0x8 -> 8x8)"
    assert lines[-2:] == ["270 images more: not listed", "300 images: 0 valid, 300 not valid"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (("dataset.resolution=40",), "size changed (32x32 -> 40x40)"),
        (("dataset.image_interpolation_mode=bicubic",), "preprocessing changed (filter)"),
        (("model.dtype=bfloat16",), "dtype float32 -> bfloat16"),
        (("cache.batch_size=3",), "batch_size 4 -> 3"),
        (("cache.tiling=true",), "tiling false -> true"),
    ],
)
def test_settings_are_named(cached: Workspace, changes: tuple[str, ...], expected: str) -> None:
    lines = prepared_status(cached, *changes)
    assert [line for line in lines if ".png: " in line] == [f"{index:02}.png: {expected}" for index in range(8)]
    assert "8 images: 0 valid, 8 not valid" in lines


def test_another_background_concerns_transparent_images_only(cached: Workspace) -> None:
    see_through(make_image(3)).save("data/raw/03.png")
    cached.run("prepare")
    cached.run("cache_latents")
    lines = prepared_status(cached, 'dataset.background="#000000"')
    assert lines[:2] == ["03.png: preprocessing changed (background)", "8 images: 7 valid, 1 not valid"]
    lines = prepared_status(cached, 'dataset.background="#000000"', "dataset.image_interpolation_mode=bicubic")
    assert "02.png: preprocessing changed (filter)" in lines
    assert "03.png: preprocessing changed (background, filter)" in lines


def test_images_and_captions(cached: Workspace) -> None:
    make_image(50).save("data/raw/05.png")
    make_image(51, 64, 40).save("data/raw/new.png")
    write_rows(Path("data/raw"), [*read_rows(Path("data/raw")), {"file_name": "new.png", "text": "new"}])
    caption(2, "green circle")
    lines = prepared_status(cached)
    assert lines == [
        "02.png: caption changed",
        "05.png: pixels changed",
        "new.png: new",
        "9 images: 6 valid, 3 not valid",
        "a run would encode 2 views and 2 captions",
    ]


def test_an_edited_caption_shows_after_prepare(cached: Workspace) -> None:
    caption(2, "green circle")
    *lines, last = status(cached)
    assert lines == NOTHING and last.startswith(EDITS)
    cached.run("prepare")
    assert status(cached)[-1] == "a run would encode 0 views and 1 caption"


@pytest.mark.parametrize(
    ("changes", "before", "now"),
    [
        (("dataset.source=data/other",), "dataset.source data/raw", "data/other"),
        (("dataset.resolution=40",), "dataset.resolution 32", "40"),
        (("dataset.aspect_buckets=true", "dataset.resolution=48"), "dataset.resolution 32", "48"),
        (("dataset.seed=7", "dataset.crop=random"), "dataset.crop center, dataset.seed 0", "random, 7"),
        (('dataset.background="#000000"',), "preprocessing background #ffffff", "#000000"),
        (("dataset.image_interpolation_mode=bicubic",), "preprocessing filter lanczos", "bicubic"),
        (("dataset.mask=alpha", "dataset.unmasked_weight=0.5"), "dataset.unmasked_weight 0.0", "0.5"),
    ],
)
def test_outdated_prepared_comes_first(cached: Workspace, changes: tuple[str, ...], before: str, now: str) -> None:
    shutil.copytree("data/raw", "data/other")
    first, *lines = [line for line in status(cached, *changes) if not line.startswith("warning: ")]
    assert first.startswith(f"data/prepared was made with {before}, but the settings now have {now}.")
    assert lines == NOTHING
    lines = prepared_status(cached, *changes)
    assert not any("was made with" in line for line in lines)


def test_buckets_of_another_resolution_are_seen(workspace: Workspace) -> None:
    for index in range(8):
        make_image(index, 96, 64).save(f"data/raw/{index:02}.png")
    changes = ("dataset.aspect_buckets=true", "dataset.bucket_step=8")
    assert "made with" not in prepared_status(workspace, *changes)[0]
    first = status(workspace, *changes, "dataset.resolution=48")[0]
    assert "dataset.resolution 40x24, but the settings now have 48." in first
    assert "dataset.resolution 40x24, but the settings now have 32." in status(workspace)[0]


def test_a_removed_flip_is_accepted(cached: Workspace) -> None:
    cached.run("prepare", "--set", "dataset.flip=true")
    lines = status(cached)
    assert lines[0].startswith("data/prepared was made with dataset.flip true, but the settings now have false.")
    assert lines[1:] == NOTHING


def test_a_known_caption_is_not_encoded_again(cached: Workspace) -> None:
    caption(2, "thing 3")
    assert prepared_status(cached) == NOTHING


def test_crop_and_variants(cached: Workspace) -> None:
    make_image(9, width=80, height=48).save("data/raw/00.png")
    cached.run("prepare")
    cached.run("cache_latents")
    assert "00.png: crop changed" in prepared_status(cached, "dataset.crop=random")
    split = {item.file_name: item.split for item in Manifest.load(Path("data/prepared")).items}
    lines = prepared_status(cached, "dataset.flip=true", "cache.num_variants=2")
    expected = [f"{name}: variants 1 -> 2" for name in sorted(split) if split[name] == "train"]
    assert [line for line in lines if ".png" in line] == expected


@pytest.mark.parametrize(
    ("component", "file", "expected"),
    [("vae", "diffusion_pytorch_model", "another VAE"), ("text_encoder", "model", "another text encoder")],
)
def test_another_base(cached: Workspace, component: str, file: str, expected: str) -> None:
    shutil.copytree("data/base", "data/other")
    config = Path("data/other") / component / "config.json"
    config.write_text(config.read_text() + "\n")
    lines = status(cached, "model.pretrained=data/other")
    assert lines[0] == f"00.png: {expected}"
    assert ("empty caption: another text encoder" in lines) == (component == "text_encoder")


def test_missing_and_damaged_entries(cached: Workspace) -> None:
    entries = {item["views"][0]: item["file_name"] for item in read_json(Path("data/latents/manifest.json"))["items"]}
    first, second = sorted(Path(".state/store/latents").rglob("*.safetensors"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1] + b"\x07")
    lines = status(cached)
    assert set(lines[:2]) == {
        f"{entries[first.stem]}: entry missing from the store",
        f"{entries[second.stem]}: entry damaged",
    }
    assert lines[2] == "8 images: 6 valid, 2 not valid"


def test_masks(workspace: Workspace) -> None:
    changes = ("dataset.mask=masks",)
    Path("data/raw/masks").mkdir()
    for index in range(8):
        Image.new("L", (48, 48), 200).save(f"data/raw/masks/{index:02}.png")
    workspace.run("prepare", *words(changes))
    workspace.run("cache_latents", *words(changes))
    Image.new("L", (48, 48), 100).save("data/raw/masks/03.png")
    assert status(workspace, *changes)[0] == "03.png: mask changed"
    assert prepared_status(workspace, *changes)[:2] == ["03.png: mask changed", "8 images: 7 valid, 1 not valid"]
    lines = prepared_status(workspace, *changes, "dataset.unmasked_weight=0.5")
    assert lines[0] == "00.png: unmasked_weight 0.0 -> 0.5"
    assert lines[-1] == "a run would encode nothing"


def test_a_deleted_data_latents_needs_no_encoding(cached: Workspace) -> None:
    shutil.rmtree("data/latents")
    counts, missing, nothing = status(cached)
    assert [counts, nothing] == NOTHING and missing.startswith("data/latents is missing")


def test_last_run_of_another_version_is_ignored(cached: Workspace) -> None:
    path = Path(".state/store/last.json")
    notes = read_json(path)
    notes["used"]["latents"] |= {"compiled": True}  # one field more
    path.write_text(json.dumps(notes | {"other": 1}))
    assert status(cached) == NOTHING
    assert status(cached, "cache.batch_size=3")[0] == "00.png: batch_size 4 -> 3"
    for change in ("used", "items"):
        path.write_text(json.dumps(notes | {change: {"latents": {"another": "shape"}}}))
        assert status(cached) == NOTHING
        assert status(cached, "cache.batch_size=3")[0] == "00.png: new"
    path.write_text('{"other": 1}')
    assert status(cached, "cache.batch_size=3")[0] == "00.png: new"


def test_last_run_with_the_older_name_of_images_is_read(cached: Workspace) -> None:
    path = Path(".state/store/last.json")
    notes = read_json(path)
    for inputs in notes["items"].values():
        inputs["picture"] = inputs.pop("image")
    path.write_text(json.dumps(notes))
    assert status(cached, "cache.batch_size=3")[0] == "00.png: batch_size 4 -> 3"


def test_the_exit_code_is_zero_with_invalid_images(cached: Workspace) -> None:
    make_image(50).save("data/raw/05.png")
    done = cached.process("status")
    assert done.returncode == 0 and "05.png: pixels changed" in done.stdout


def test_the_exit_code_is_two_without_data_prepared(workspace: Workspace) -> None:
    assert workspace.process("status").returncode == 2
