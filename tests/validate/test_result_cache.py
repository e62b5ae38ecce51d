"""What the base answered is kept by all that decides it, and gives the same reports."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_dag.artifacts.adapter import Adapter
from lora_dag.core import params
from lora_dag.core.params import ModelParams
from lora_dag.families import sd
from stages.validate import result_cache
from stages.validate.heldout_loss import make_eval_set
from stages.validate.params import ValidateParams
from stages.validate.result_cache import ResultCache
from stages.validate.score_snapshots import SnapshotScorer
from tests.conftest import Workspace
from tests.helpers.caches import write_mixed_cache
from tests.helpers.validated import reports, write_adapter


def counted(result: Any) -> tuple[list[int], Any]:
    calls: list[int] = []

    def make() -> Any:
        calls.append(1)
        return result

    return calls, make


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / ".state"))


def test_what_is_kept_is_exact_and_goes_by_everything() -> None:
    losses = [0.1, 1 / 3, 1e-30]
    picture = Image.frombytes("RGB", (3, 2), bytes(range(18)))
    calls, make = counted(losses)
    for conditions, asked in (({"base": "a"}, "x"), ({"base": "a"}, "y"), ({"base": "b"}, "x"), ({"base": "a"}, "x")):
        assert ResultCache(conditions).losses(asked, make) == losses
    assert len(calls) == 3
    calls, make = counted([picture])
    for _ in range(2):
        (found,) = ResultCache({}).pictures("x", make)
        assert (found.mode, found.size, found.tobytes()) == ("RGB", (3, 2), picture.tobytes())
    assert len(calls) == 1


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None])
def test_a_damaged_entry_is_made_again(damage: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    kept = ResultCache({})
    kept.losses("x", lambda: [0.5, 0.25])
    (path,) = (result_cache.root() / "losses").iterdir()
    blob = path.read_bytes()
    path.write_bytes(blob[:-1] + b"\1" if damage is None else damage)
    assert kept.losses("x", lambda: [0.5, 0.25]) == [0.5, 0.25]
    assert f"{path} is damaged and is made again" in caplog.text
    assert path.read_bytes() == blob


def test_the_last_used_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ResultCache({})
    kept.losses("a", lambda: [0.0])
    (entry,) = (result_cache.root() / "losses").iterdir()
    monkeypatch.setattr(result_cache, "MAX_BYTES", 2 * entry.stat().st_size)
    for age, asked in ((30, "a"), (20, "b")):
        kept.losses(asked, lambda: [0.0])
        for path in (result_cache.root() / "losses").iterdir():
            os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    kept.losses("a", lambda: [0.0])  # used again
    kept.losses("c", lambda: [0.0])
    kept.end()
    calls, make = counted([0.0])
    for asked in ("a", "c"):
        kept.losses(asked, make)
    assert not calls
    kept.losses("b", make)
    assert calls


def test_losses_go_by_every_tensor_that_the_table_is_about_and_no_other(workspace: Workspace) -> None:
    config, cache = params.load(Path("params.yaml")), write_mixed_cache()
    eval_set = make_eval_set(
        config.section(ValidateParams), config.section(ModelParams), sd, cache, torch.device("cpu")
    )
    before, (asked, *_) = eval_set.digest(), (row.picture for row in eval_set.rows if row.picture.mask)
    caption = cache.manifest["captions"][asked.caption]
    about = [f"{asked.view}.mean", f"{asked.mask}.mask", f"{caption}.prompt_embeds"]
    for name in (*about, "9a.mean", "9b.mean", f"{asked.view}.std"):
        kept, cache.tensors[name] = cache.tensors[name], cache.tensors[name] + 1e-6
        assert (eval_set.digest() != before) == (name in about), name
        cache.tensors[name] = kept
    assert eval_set.digest() == before


def reused(lines: list[str]) -> tuple[int, int]:
    """Tables of losses, rows of pictures."""
    found = re.search(r"^reused +(\d+) tables? of losses, (\d+) rows?", "\n".join(lines), re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def test_what_was_answered_and_drawn_is_not_asked_again(cached: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, one snapshot and the end: losses of each, drift of two; two seeds, of the snapshot one; drift prompts."""
    base, both = (2, 3), (5, 6)
    write_adapter(0.3)
    assert reused(cached.run("validate")) == (0, 0)
    write_adapter(0.2, rank=3)
    assert reused(cached.run("validate")) == base
    warm = reports(cached)
    assert reused(cached.run("validate")) == both and reports(cached) == warm
    monkeypatch.setenv("LORA_STATE_DIR", "cold")
    assert reused(cached.run("validate")) == (0, 0) and reports(cached) == warm
    assert reused(cached.run("validate", "--set", "validate.prompts=[a cup]")) == (5, 1)
    assert reused(cached.run("validate", "--set", "validate.num_timesteps=3")) == (0, 6)
    assert reused(cached.run("validate", "--set", "validate.scales=[0.5, 1.0]")) == both
    assert reused(cached.run("validate", "--set", "validate.scales=[0.5, 1.0]")) == (5, 7)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"adapter.safetensors": "0"}},
        {"lora_config": {"lora_alpha": 7}},
        {"text_lora": {"text_encoder": {"r": 2}}},
        {"biases": ["conv_in"]},
    ],
)
def test_an_adapter_s_part_goes_by_its_weights_and_its_settings(change: dict[str, Any]) -> None:
    known = Adapter({"r": 2, "lora_alpha": 2}, {}, 4, [], {"adapter.safetensors": "1"})
    scorer = SnapshotScorer(None, None, None, None, None, ResultCache({"base": "a"}), None)  # type: ignore[arg-type]
    keys = [
        scorer.of(adapter, "adapter.safetensors", scale).result_cache.conditions
        for adapter, scale in ((known, 1.0), (known, 0.5), (replace(known, **change), 1.0))
    ]
    assert all(a != b for a, b in itertools.combinations([scorer.result_cache.conditions, *keys], 2))
