from __future__ import annotations

import errno
import os
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_dag.core.console import UserError
from lora_dag.pictures import containers
from lora_dag.pictures.containers import PictureFiles, index_tar, kind_of
from tests.helpers.sources import embedded, png, write_files, write_parquet, write_tar


def refusal(files: PictureFiles, name: str) -> str:
    with pytest.raises(UserError) as caught:
        files.read(name)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.TAR", "tar"), ("a.tar.gz", "compressed"), ("a.tgz", "compressed"), ("p.yml", "pin"), ("a.png", None)],
)
def test_kinds(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_loose_pictures(tmp_path: Path) -> None:
    write_files(tmp_path, "sub/a.png")
    (tmp_path / "sub/a.png").write_bytes(b"bytes")
    assert PictureFiles(str(tmp_path)).read("sub/a.png") == b"bytes"


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
        ("../00.tar::a.png", "'../00.tar::a.png' leaves dataset.source; "),
        ("gone.tar::a.png", "'gone.tar' is no file any more; "),
        ("00.tar::gone.png", "'00.tar::gone.png' is no file any more; "),
        ("gone.parquet::0", "'gone.parquet' is no file any more; "),
        ("00.parquet::2", "'00.parquet::2' is no file any more; "),
        ("00.parquet::-1", "'00.parquet::-1' is no file any more; "),
        ("00.parquet::x", "'00.parquet::x' is no file any more; "),
        ("00.parquet::1", "'00.parquet::1' holds no picture; embed its bytes or remove the row"),
    ],
)
def test_names_that_cannot_be_read(tmp_path: Path, name: str, message: str) -> None:
    folder = write_files(tmp_path / "raw", "ok.png")
    (tmp_path / "x.png").write_bytes(b"secret")
    os.mkfifo(folder / "fifo.png")
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    write_tar(folder / "00.tar", {"a.png": png()})
    write_tar(tmp_path / "00.tar", {"a.png": png()})
    write_parquet(folder / "00.parquet", {"image": [*embedded(1), {"bytes": None, "path": "x.png"}]})
    assert refusal(PictureFiles(str(folder)), name).startswith(message)


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
                PictureFiles(str(tmp_path)).read("a.png")
        assert function == "os.open" or caught.value.filename == str(tmp_path / "a.png")


def test_huge_files_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(600 * 2**20)
    files = PictureFiles(str(tmp_path))
    assert refusal(files, "a.png") == (
        "'a.png' has 629,145,600 bytes; at most 536,870,912 are read, more than any picture of allowed size has"
    )
    info = tarfile.TarInfo("b.png")
    info.size = 600 * 2**20
    with (tmp_path / "00.tar").open("wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + info.size + 1024)
    assert refusal(files, "00.tar::b.png").startswith("'00.tar::b.png' has 629,145,600 bytes; ")
    write_parquet(tmp_path / "00.parquet", {"image": embedded(2)})
    monkeypatch.setattr(containers, "MAX_GROUP_BYTES", 100)
    assert "has a row group with" in refusal(files, "00.parquet::0")


# Tar


def test_members_are_where_the_index_says(tmp_path: Path) -> None:
    long = "long/" * 40 + "ä.png"
    path = write_tar(tmp_path / "00.tar", {"./a.png": b"one", long: b"two" * 1000, "empty.png": b""})
    index = index_tar(path, "00.tar")
    assert list(index.members) == ["a.png", long, "empty.png"]
    files = PictureFiles(str(path))
    assert [files.read(f"00.tar::{name}") for name in index.members] == [b"one", b"two" * 1000, b""]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tar(tmp_path: Path, mode: str) -> None:
    path = write_tar(tmp_path / "00.tar", {"a.png": png()}, mode)
    with pytest.raises(UserError, match="'00.tar' is compressed; members are read in place, so unpack it once: "):
        index_tar(path, "00.tar")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda blob: b"", "is no .tar file, or a damaged one (empty file)"),
        (lambda blob: b"<html>" * 200, "is no .tar file, or a damaged one ("),
        (lambda blob: blob[:1000], "is no .tar file, or a damaged one (unexpected end of data)"),
        (lambda blob: blob[: 1024 + 100], "is damaged or cut off after 1 members"),  # in the second header
        (lambda blob: blob[: 2 * 1024], "is damaged or cut off after 2 members"),  # before the end mark
        (lambda blob: blob[:1024] + b"x" * 512 + blob[1536:], "is damaged or cut off after 1 members"),
    ],
    ids=["empty", "html", "data", "header", "end", "garbage"],
)
def test_damaged_tar(tmp_path: Path, spoil: object, message: str) -> None:
    path = write_tar(tmp_path / "00.tar", {"a.png": b"x" * 512, "b.png": b"x" * 512})
    path.write_bytes(spoil(path.read_bytes()))  # type: ignore[operator]
    assert message in refusal(PictureFiles(str(tmp_path)), "00.tar::a.png")


def header(name: bytes, kind: bytes, size: int) -> bytes:
    """Of a .tar, with any size: tarfile writes no lies."""
    blob = bytearray(tarfile.TarInfo(name.decode()).tobuf(tarfile.GNU_FORMAT))
    blob[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % 256**11).to_bytes(11, "big")
    blob[148:157] = b" " * 8 + kind
    blob[148:156] = b"%06o\0 " % sum(blob)
    return bytes(blob)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (header(b"z.png", b"0", -512), "a member of negative size"),
        (header(b"z.png", b"0", -1024), "a member of negative size"),
        (header(b"z.png", b"S", -512), "a member of negative size"),
        (header(b"long", b"L", -512), "a header of -512 bytes"),
        (header(b"long", b"L", 2**62), "a header of 4,611,686,018,427,387,904 bytes"),
        (header(b"pax", b"x", 2**45), "a header of 35,184,372,088,832 bytes"),
        (header(b"z.png", b"0", 2**62), "unexpected end of data"),
        ((header(b"long", b"L", 5) + b"abcd".ljust(512, b"\0")) * 3000, "headers of headers without end"),
    ],
)
def test_tar_with_sizes_that_cannot_be(tmp_path: Path, first: bytes, message: str) -> None:
    path = write_tar(tmp_path / "00.tar", {"a.png": b"x" * 512})
    path.write_bytes(first + path.read_bytes())
    problem = refusal(PictureFiles(str(tmp_path)), "00.tar::a.png")
    assert f"({message}); restore it" in problem and "\n" not in problem


def test_tars_joined_by_cat(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00.tar", {"a.png": b"x" * 512})
    blob = path.read_bytes()
    path.write_bytes(blob + bytes(20 * 512))
    assert PictureFiles(str(tmp_path)).read("00.tar::a.png") == b"x" * 512  # padded, as tar -b does
    path.write_bytes(blob + blob)
    assert refusal(PictureFiles(str(tmp_path)), "00.tar::a.png") == (
        "'00.tar' goes on behind its end mark, after 1 members, as .tar files do that were joined by cat; unpack it"
        " with tar --ignore-zeros and pack it anew"
    )


def test_tar_that_shrinks_after_it_was_indexed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00.tar", {"a.png": b"x" * 512, "b.png": b"y" * 512})
    files = PictureFiles(str(tmp_path))
    files.read("00.tar::a.png")
    os.truncate(path, 1800)
    assert refusal(files, "00.tar::b.png") == "'00.tar::b.png' is cut off; restore the .tar file"


# Parquet


@pytest.mark.parametrize("struct", [True, False])
def test_rows_of_several_groups(tmp_path: Path, struct: bool) -> None:
    blobs = [bytes([index]) * (index + 1) for index in range(10)]
    images = [{"bytes": blob, "path": None} for blob in blobs] if struct else blobs
    write_parquet(tmp_path / "a.parquet", {"n": list(range(10)), "image": images}, row_group_size=3)
    files = PictureFiles(str(tmp_path))
    assert [files.read(f"a.parquet::{row}") for row in (9, 0, 3, 2, 8, 5)] == [blobs[row] for row in (9, 0, 3, 2, 8, 5)]


def test_row_groups_stay_in_memory_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    blobs = [random.Random(index).randbytes(1000) for index in range(6)]
    write_parquet(
        tmp_path / "a.parquet", {"image": blobs}, row_group_size=2, use_dictionary=False, write_statistics=False
    )
    read: list[int] = []
    actual = pq.ParquetFile.read_row_group

    def counted(file: pq.ParquetFile, group: int, **options: object) -> object:
        read.append(group)
        return actual(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr(containers, "CACHED_BYTES", 5000)
    files = PictureFiles(str(tmp_path))
    for row in (0, 1, 2, 3, 0, 4, 5, 0, 2):
        assert files.read(f"a.parquet::{row}") == blobs[row]
    assert read == [0, 1, 2, 1]  # two groups fit: 2 displaces 1, which was used before 0


def test_threads_share_the_files(tmp_path: Path) -> None:
    blobs = [random.Random(index).randbytes(2000) for index in range(40)]
    write_parquet(tmp_path / "a.parquet", {"image": blobs}, row_group_size=4)
    write_tar(tmp_path / "b.tar", {f"{index}.png": blob for index, blob in enumerate(blobs)})
    files = PictureFiles(str(tmp_path))
    names = [f"a.parquet::{index}" for index in range(40)] + [f"b.tar::{index}.png" for index in range(40)]
    order = random.Random(0).sample(range(80), 80)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: files.read(names[index]), order))
    assert found == [blobs[index % 40] for index in order]


def test_damaged_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": [random.Random(0).randbytes(5000)]})
    blob = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(blob[: len(blob) // 2])
    assert refusal(PictureFiles(str(tmp_path)), "a.parquet::0").startswith(
        "'a.parquet' is no Parquet file, or a damaged one (Parquet magic bytes not found in footer"
    )
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\xff" * 40 + blob[44:])
    assert refusal(PictureFiles(str(tmp_path)), "a.parquet::0").startswith(
        "'a.parquet' is no Parquet file, or a damaged one ("
    )


def test_a_parquet_bomb(tmp_path: Path) -> None:
    """77 KB can hold 20 million rows."""
    import pyarrow as pa

    write_parquet(tmp_path / "a.parquet", {"image": pa.nulls(1_000_001, pa.binary())})
    assert refusal(PictureFiles(str(tmp_path)), "a.parquet::0") == (
        "'a.parquet' has 1,000,001 rows; at most 1,000,000 are read from one file, so split it"
    )


def test_a_column_twice(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.Table.from_arrays([pa.array([b"x"]), pa.array([b"y"])], ["image", "image"]), tmp_path / "a.parquet"
    )
    assert refusal(PictureFiles(str(tmp_path)), "a.parquet::0") == (
        "'a.parquet' has a column twice: image, image; rename one"
    )
