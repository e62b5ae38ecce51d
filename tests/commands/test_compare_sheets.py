"""Pictures of a comparison: the joined sheet and its labels; and the list of what changed in the dataset."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lora_dag.artifacts.lineage import load as load_lineage
from lora_dag.pages.sheets import cut
from tests.helpers.compared import COLOURS, Repository, change_lineage, commit, write_pictures, write_revision


def test_dataset_changes_are_listed(repository: Repository) -> None:
    write_pictures({"a": "apple", "b": "boat"})
    commit("Two pictures")
    write_pictures({"b": "blue boat", "c": "cat"})
    page = repository.run()
    assert "## Dataset\n\nFrom HEAD to workspace: 1 added, 1 removed, 1 recaptioned.\n\n**1 added**" in page
    assert "- `b.png`: `boat` → `blue boat`" in page


def test_sheet_shows_both_bases_where_they_were_drawn_in_another_size(repository: Repository) -> None:
    change_lineage(sheet={"cell": 64, "picture": [32, 32]})
    repository.run()
    with Image.open("compare/HEAD..workspace/samples.png") as picture:
        rows = cut(picture.convert("RGB"), 2, 4, 64)
    assert "#" + bytes(rows[0][2].getpixel((32, 32))).hex() == COLOURS["base"]


def test_pictures_at_another_strength_are_labelled_with_it(repository: Repository) -> None:
    settings = load_lineage(Path("reports/validate/lineage.json"))["validate"]
    change_lineage(validate=settings | {"scales": [0.5, 0.8]})  # the sheet's last column, which was 1.0
    repository.run()
    page = Path("compare/HEAD..workspace/compare.html").read_text()
    assert "<figcaption><span>HEAD</span><span>workspace x 0.8</span></figcaption>" in page
    with Image.open("compare/HEAD..workspace/samples.png") as picture:
        cell = cut(picture.convert("RGB"), 2, 3, 64)[0][2]
    assert "#" + bytes(cell.getpixel((32, 32))).hex() == COLOURS[8]


def test_sheet_shows_the_base_once_and_each_adapter(repository: Repository) -> None:
    repository.run("main", "clear-newt")
    with Image.open("compare/main..clear-newt/samples.png") as picture:
        rows = cut(picture.convert("RGB"), 2, 3, 64)
    seen = [["#" + bytes(cell.getpixel((32, 32))).hex() for cell in row] for row in rows]
    assert seen == [[COLOURS["base"], COLOURS[8], COLOURS[16]]] * 2


def test_sheet_takes_the_prompts_that_both_have(repository: Repository) -> None:
    write_revision(rank=16, gain=0.2, prompts=["green tree", "blue boat"])
    repository.run()
    with Image.open("compare/HEAD..workspace/samples.png") as picture:
        assert picture.height < 150


def test_sheets_without_a_common_prompt(repository: Repository) -> None:
    write_revision(rank=16, gain=0.2, prompts=["green tree"])
    assert "The sheets share no prompt." in repository.run()
    assert not list(Path("compare").glob("*/samples.png"))
