"""The result cache: keys depend on everything that determines a result, and reports do not depend on hits."""

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
from tests.helpers.caches import write_mixed_cache
from tests.helpers.errors import assert_line
from tests.helpers.validated import reports, write_adapter
from tests.helpers.workspace import Workspace


def counted(result: Any) -> tuple[list[int], Any]:
    calls: list[int] = []

    def make() -> Any:
        calls.append(1)
        return result

    return calls, make


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / ".state"))


def test_cached_results_are_exact_and_keyed_by_conditions_and_request() -> None:
    losses = [0.1, 1 / 3, 1e-30]
    image = Image.frombytes("RGB", (3, 2), bytes(range(18)))
    calls, make = counted(losses)
    for conditions, request in (({"base": "a"}, "x"), ({"base": "a"}, "y"), ({"base": "b"}, "x"), ({"base": "a"}, "x")):
        assert ResultCache(conditions).losses(request, make) == losses
    assert len(calls) == 3
    calls, make = counted([image])
    for _ in range(2):
        (found,) = ResultCache({}).images("x", make)
        assert (found.mode, found.size, found.tobytes()) == ("RGB", (3, 2), image.tobytes())
    assert len(calls) == 1


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None])
def test_damaged_entry_is_computed_again(damage: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    cache = ResultCache({})
    cache.losses("x", lambda: [0.5, 0.25])
    (path,) = (result_cache.cache_root() / "losses").iterdir()
    blob = path.read_bytes()
    path.write_bytes(blob[:-1] + b"\1" if damage is None else damage)
    assert cache.losses("x", lambda: [0.5, 0.25]) == [0.5, 0.25]
    assert_line(caplog.text, "cached-result-damaged", str(path))
    assert path.read_bytes() == blob


def test_least_recently_used_entries_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ResultCache({})
    cache.losses("a", lambda: [0.0])
    (entry,) = (result_cache.cache_root() / "losses").iterdir()
    monkeypatch.setattr(result_cache, "MAX_BYTES", 2 * entry.stat().st_size)
    for age, request in ((30, "a"), (20, "b")):
        cache.losses(request, lambda: [0.0])
        for path in (result_cache.cache_root() / "losses").iterdir():
            os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    cache.losses("a", lambda: [0.0])  # used again
    cache.losses("c", lambda: [0.0])
    cache.log_and_trim()
    calls, make = counted([0.0])
    for request in ("a", "c"):
        cache.losses(request, make)
    assert not calls
    cache.losses("b", make)
    assert calls


def test_digest_depends_on_the_tensors_of_the_rows_only(workspace: Workspace) -> None:
    config, cache = params.load(Path("params.yaml")), write_mixed_cache()
    eval_set = make_eval_set(
        config.section(ValidateParams), config.section(ModelParams), sd, cache, torch.device("cpu")
    )
    before, (asked, *_) = eval_set.digest(), (row.image for row in eval_set.rows if row.image.mask)
    caption = cache.manifest["captions"][asked.caption]
    about = [f"{asked.view}.mean", f"{asked.mask}.mask", f"{caption}.prompt_embeds"]
    for name in (*about, "9a.mean", "9b.mean", f"{asked.view}.std"):
        kept, cache.tensors = cache.tensors, dict(cache.tensors) | {name: cache.tensors[name] + 1e-6}
        assert (eval_set.digest() != before) == (name in about), name
        cache.tensors = kept
    assert eval_set.digest() == before


def reused(lines: list[str]) -> tuple[int, int]:
    """Return the number of reused loss tables and sample rows from the log."""
    found = re.search(r"^reused +(\d+) tables? of losses, (\d+) rows?", "\n".join(lines), re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def test_losses_and_samples_are_not_computed_twice(cached: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, a snapshot and the final adapter have 3 loss tables, drift 2; samples have 2 seeds (snapshot 1)."""
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
def test_cache_key_depends_on_weights_and_settings_of_the_adapter(change: dict[str, Any]) -> None:
    known = Adapter({"r": 2, "lora_alpha": 2}, {}, 4, [], {"adapter.safetensors": "1"})
    scorer = SnapshotScorer(None, None, None, None, None, ResultCache({"base": "a"}), None)  # type: ignore[arg-type]
    keys = [
        scorer.for_adapter(adapter, "adapter.safetensors", scale).result_cache.conditions
        for adapter, scale in ((known, 1.0), (known, 0.5), (replace(known, **change), 1.0))
    ]
    assert all(a != b for a, b in itertools.combinations([scorer.result_cache.conditions, *keys], 2))
