from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lora_dag.core.console import Problem, UserError
from lora_dag.images.read import image_reader
from tests.helpers.errors import assert_is
from tests.helpers.sources import png, write_files


def refusal(folder: Path, name: str) -> Problem:
    with pytest.raises(UserError) as caught:
        image_reader(str(folder))(name)
    (problem,) = caught.value.problems
    return problem


def test_a_file_below_the_source(tmp_path: Path) -> None:
    write_files(tmp_path, "sub/a.png")
    (tmp_path / "sub/a.png").write_bytes(b"bytes")
    assert image_reader(str(tmp_path))("sub/a.png") == b"bytes"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("gone.png", "file-missing"),
        ("ok.png/x.png", "file-missing"),
        ("fifo.png", "file-not-regular"),
        ("folder.png", "file-not-regular"),
        ("loop.png", "file-not-regular"),
        ("../x.png", "file-outside-source"),
        ("/etc/passwd", "file-outside-source"),
    ],
)
def test_names_that_cannot_be_read(tmp_path: Path, name: str, code: str) -> None:
    folder = write_files(tmp_path / "raw", "ok.png")
    (tmp_path / "x.png").write_bytes(b"secret")
    os.mkfifo(folder / "fifo.png")
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    assert_is(refusal(folder, name), code, f"'{name}'")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_io_errors_have_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Errors of opening and of reading are OSError, not a problem with the image."""
    (tmp_path / "a.png").write_bytes(png())

    def fail(*args: object, **options: object) -> None:
        raise OSError(number, "the drive fails")

    for function in ("os.open", "builtins.open"):
        with monkeypatch.context() as patch:
            patch.setattr(function, fail)
            with pytest.raises(OSError, match="the drive fails") as caught:
                image_reader(str(tmp_path))("a.png")
        assert function == "os.open" or caught.value.filename == str(tmp_path / "a.png")


def test_huge_files_are_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(600 * 2**20)
    assert_is(refusal(tmp_path, "a.png"), "file-too-large", "'a.png'", "629,145,600", "536,870,912")
