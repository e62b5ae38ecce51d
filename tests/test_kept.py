"""What the base answered is kept by all that decides it, and gives the same reports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stages.core import params
from stages.core.params import ModelParams
from stages.families import sd
from stages.validate import kept as kept_module
from stages.validate.exam import make_exam
from stages.validate.kept import Kept
from stages.validate.params import ValidateParams
from tests.caches import write_mixed_cache
from tests.conftest import Workspace
from tests.test_validate import cached, reports, write_adapter  # noqa: F401  (a fixture)


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
        assert Kept(conditions).losses("losses", asked, make) == losses
    assert len(calls) == 3
    calls, make = counted([picture])
    for _ in range(2):
        (found,) = Kept({}).pictures("pictures", "x", make)
        assert (found.mode, found.size, found.tobytes()) == ("RGB", (3, 2), picture.tobytes())
    assert len(calls) == 1


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None])
def test_a_damaged_entry_is_made_again(damage: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept({})
    kept.losses("losses", "x", lambda: [0.5, 0.25])
    (path,) = (kept_module.root() / "losses").iterdir()
    blob = path.read_bytes()
    path.write_bytes(blob[:-1] + b"\1" if damage is None else damage)
    assert kept.losses("losses", "x", lambda: [0.5, 0.25]) == [0.5, 0.25]
    assert f"{path} is damaged and is made again" in caplog.text
    assert path.read_bytes() == blob


def test_the_last_used_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "MAX_KEPT", 2)
    kept = Kept({})
    for age, asked in ((30, "a"), (20, "b")):
        kept.losses("losses", asked, lambda: [0.0])
        for path in (kept_module.root() / "losses").iterdir():
            os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    kept.losses("losses", "a", lambda: [0.0])  # used again
    kept.losses("losses", "c", lambda: [0.0])
    calls, make = counted([0.0])
    for asked in ("a", "c"):
        kept.losses("losses", asked, make)
    assert not calls
    kept.losses("losses", "b", make)
    assert calls


def test_losses_go_by_every_tensor_that_the_table_is_about_and_no_other(workspace: Workspace) -> None:
    config, cache = params.load(Path("params.yaml")), write_mixed_cache()
    exam = make_exam(config.section(ValidateParams), config.section(ModelParams), sd, cache, torch.device("cpu"))
    before, (asked, *_) = exam.digest(), (row.picture for row in exam.rows if row.picture.mask)
    caption = cache.manifest["captions"][asked.caption]
    about = [f"{asked.view}.mean", f"{asked.mask}.mask", f"{caption}.prompt_embeds"]
    for name in (*about, "9a.mean", "9b.mean", f"{asked.view}.std"):
        kept, cache.tensors[name] = cache.tensors[name], cache.tensors[name] + 1e-6
        assert (exam.digest() != before) == (name in about), name
        cache.tensors[name] = kept
    assert exam.digest() == before


def test_another_rank_asks_the_base_nothing_and_another_prompt_only_draws(
    cached: Workspace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_adapter(0.3)
    cached.run("validate")
    write_adapter(0.2, rank=3)
    lines = cached.run("validate")
    reused = [line for line in lines if line.startswith("reused")]
    everything = "losses of the base, 2 pictures, 2 pictures, 2 pictures, losses of the base on its own pictures"
    assert [line.split(": ")[1] for line in reused] == [everything]
    warm = reports(cached)
    monkeypatch.setenv("LORA_STATE_DIR", "cold")
    assert not any(line.startswith("reused") for line in cached.run("validate"))
    assert reports(cached) == warm
    (line,) = (line for line in cached.run("validate", "--set", "validate.prompts=[a cup]") if line[:6] == "reused")
    assert line.split(": ")[1] == "losses of the base, 2 pictures, losses of the base on its own pictures"
    (line,) = (line for line in cached.run("validate", "--set", "validate.num_timesteps=3") if line[:6] == "reused")
    assert line.split(": ")[1] == "2 pictures, 2 pictures, 2 pictures"
