from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.train.checkpoints import Checkpoints
from tests.helpers.errors import assert_line


def state(step: int) -> dict[str, Any]:
    return {
        "adapter": {"a": torch.full((3,), float(step))},
        "history": [(0.5, 1e-3, float("nan"))] * step,
        "silent": ["b"],
        "scaler": None,
    }


@pytest.fixture
def saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Checkpoints:
    caplog.set_level(logging.WARNING, logger="lora-dag")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (2, 4, 6):
        checkpoints.save(step, state(step))
    return checkpoints


def loaded_step(checkpoints: Checkpoints) -> int | None:
    found = checkpoints.load(1000)
    if found is None:
        return None
    assert torch.equal(found["adapter"]["a"], torch.full((3,), float(found["step"])))
    assert len(found["history"]) == found["step"] and found["silent"] == ["b"] and found["scaler"] is None
    return found["step"]


def test_newest_checkpoint_is_loaded_and_the_previous_one_kept(
    saved: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    assert loaded_step(saved) == 6
    names = sorted(path.name for path in saved.folder.iterdir())
    assert names == ["step-000004.pt", "step-000004.sha256", "step-000006.pt", "step-000006.sha256"]
    assert not caplog.records


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").load(1000) is None


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    saved: Checkpoints, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    newest = saved.folder / "step-000006.pt"
    blob = bytearray(newest.read_bytes())
    blob[len(blob) // 2] ^= 0xFF
    newest.write_bytes({"flipped": blob, "truncated": blob[:-100], "empty": b""}[damage])
    assert loaded_step(saved) == 4
    (record,) = caplog.records
    assert_line(record.getMessage(), "checkpoint-damaged", str(newest))


def test_no_checkpoint_is_loaded_if_all_are_damaged(saved: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    for path in saved.paths(1000):
        path.write_bytes(b"x")
    assert saved.load(1000) is None
    newer, oldest = [record.getMessage() for record in caplog.records]
    assert_line(newer, "checkpoint-damaged", "The checkpoint before it is used.")
    assert_line(oldest, "checkpoint-damaged", "step 0.")


def test_a_kill_while_writing_leaves_the_previous_checkpoint(
    saved: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGKILL leaves an incomplete temporary file whose name is not a checkpoint's."""
    (saved.folder / ".step-000008.pt.ab12").write_bytes((saved.folder / "step-000006.pt").read_bytes()[:50])
    assert loaded_step(saved) == 6
    assert not caplog.records


def test_a_kill_between_file_and_checksum_leaves_the_previous_checkpoint(saved: Checkpoints) -> None:
    (saved.folder / "step-000006.sha256").unlink()
    assert loaded_step(saved) == 4
    saved.save(6, state(6))
    assert loaded_step(saved) == 6


def test_an_error_while_writing_leaves_no_file(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, blob: bytes) -> int:
        with path.open("wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    before = sorted(saved.folder.iterdir())
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        saved.save(8, state(8))
    assert sorted(saved.folder.iterdir()) == before
    assert loaded_step(saved) == 6


class Code:
    """Object whose code runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def test_pickled_code_is_never_run(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    saved.save(8, {"x": Code()})
    with pytest.raises(pickle.UnpicklingError):
        saved.load(1000)
    assert "code ran" not in capsys.readouterr().out
