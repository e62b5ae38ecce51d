from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lora_dag.core.console import UserError
from lora_dag.pictures.read import reader
from tests.helpers.sources import png, write_files


def refusal(folder: Path, name: str) -> str:
    with pytest.raises(UserError) as caught:
        reader(str(folder))(name)
    (problem,) = caught.value.problems
    return problem


def test_a_file_below_the_source(tmp_path: Path) -> None:
    write_files(tmp_path, "sub/a.png")
    (tmp_path / "sub/a.png").write_bytes(b"bytes")
    assert reader(str(tmp_path))("sub/a.png") == b"bytes"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.png", "'gone.png' is no file any more; restore it, or run `python -m stages.prepare` again"),
        ("ok.png/x.png", "'ok.png/x.png' is no file any more; "),
        ("fifo.png", "'fifo.png' is not a regular file; replace it by one"),
        ("folder.png", "'folder.png' is not a regular file; replace it by one"),
        ("loop.png", "'loop.png' cannot be opened ("),
        ("../x.png", "'../x.png' leaves dataset.source; "),
        ("/etc/passwd", "'/etc/passwd' leaves dataset.source; "),
    ],
)
def test_names_that_cannot_be_read(tmp_path: Path, name: str, message: str) -> None:
    folder = write_files(tmp_path / "raw", "ok.png")
    (tmp_path / "x.png").write_bytes(b"secret")
    os.mkfifo(folder / "fifo.png")
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    assert refusal(folder, name).startswith(message)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_drive_that_fails_is_told_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Not as a picture that is none, whether the file cannot be opened or not be read."""
    (tmp_path / "a.png").write_bytes(png())

    def fail(*args: object, **options: object) -> None:
        raise OSError(number, "the drive fails")

    for function in ("os.open", "builtins.open"):
        with monkeypatch.context() as patch:
            patch.setattr(function, fail)
            with pytest.raises(OSError, match="the drive fails") as caught:
                reader(str(tmp_path))("a.png")
        assert function == "os.open" or caught.value.filename == str(tmp_path / "a.png")


def test_huge_files_are_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(600 * 2**20)
    assert refusal(tmp_path, "a.png") == (
        "'a.png' has 629,145,600 bytes; at most 536,870,912 are read, more than any picture of allowed size has"
    )
