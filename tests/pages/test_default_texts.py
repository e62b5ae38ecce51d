"""A dataset's own words on its card; a demo's never reach other people's images."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_dag.artifacts import lineage
from lora_dag.core.params import read_yaml
from lora_dag.pages import default_texts
from stages.export.params import ExportParams
from stages.train.identity import example_caption
from tests.helpers.workspace import REPOSITORY, Workspace

COMMITTED = read_yaml(REPOSITORY / "params.yaml")
DEMO = COMMITTED["export"]["datasets"]["data/raw"]
OWN = "a fox in snow"


def test_the_committed_settings_hold_no_word_of_the_demo_but_beside_its_path() -> None:
    assert [COMMITTED["export"][key] for key in ("name", "prompt")] == [None, None]
    assert COMMITTED["report"]["title"] is None
    assert set(COMMITTED["export"]["datasets"]) == {COMMITTED["dataset"]["source"]}


@pytest.mark.parametrize(
    ("source", "caption", "name", "title", "prompt"),
    [
        ("data/raw", "sun, ink icon", "ink-icons", "Ink icons", "red apple, ink icon"),
        ("data/raw", OWN, "raw", "Raw", OWN),  # other images in the demo's place
        ("data/foxes", OWN, "foxes", "Foxes", OWN),
        ("data/my_red-foxes", OWN, "my_red-foxes", "My red foxes", OWN),
        ("data/foxes-1.5", OWN, "foxes-1.5", "Foxes 1.5", OWN),
        ("data/été 1", OWN, "ete-1", "Été 1", OWN),
        ("data/лисы", OWN, "adapter", "Лисы", OWN),
        ("/srv/foxes", OWN, "foxes", "Foxes", OWN),
        (".", OWN, "adapter", "Adapter", OWN),
    ],
)
def test_words_are_those_of_the_dataset(source: str, caption: str, name: str, title: str, prompt: str) -> None:
    export = COMMITTED["export"]
    assert default_texts.adapter_name(export, source, caption) == name
    assert default_texts.page_title(None, export, source, caption) == title
    assert default_texts.example_prompt(export, source, caption) == prompt
    resolved = ExportParams.model_validate(export).with_words(source, caption)
    assert ExportParams.model_validate(resolved.model_dump()) == resolved  # the name is one that a file may have


def test_what_is_set_stands() -> None:
    export = COMMITTED["export"] | {"name": "x", "prompt": "y"}
    assert (
        default_texts.adapter_name(export, "data/raw", "") == "x"
        and default_texts.example_prompt(export, "data/raw", "") == "y"
    )
    assert default_texts.page_title("z", export, "data/raw", "") == "z"
    assert default_texts.adapter_name(COMMITTED["export"] | {"datasets": None}, "data/raw", "sun, ink icon") == "raw"


def item(content: str, caption: str, split: str = "train", regularization: bool = False) -> Any:
    return SimpleNamespace(content=content, caption=caption, split=split, regularization=regularization)


@pytest.mark.parametrize(
    ("items", "caption"),
    [
        ([item("1", "a dog"), item("2", "a dog", "heldout"), item("3", "a cat")], "a dog"),  # shared
        ([item("1", "one"), item("3", "three", "heldout"), item("2", "two", "heldout")], "two"),  # held out
        ([item("2", "two"), item("1", "one")], "one"),
        ([item("1", "own"), *[item(str(n), "a dog", regularization=True) for n in (2, 3)]], "own"),
    ],
)
def test_the_example_is_a_caption_of_the_dataset_whatever_the_order(items: list[Any], caption: str) -> None:
    assert example_caption(items) == example_caption(items[::-1]) == caption


@pytest.mark.parametrize(
    ("prompts", "captions", "strange"),
    [
        (["red apple, ink icon"], ["a photo of sks dog"], True),
        (["red apple", "a dog at night"], ["a photo of sks dog"], False),
        (["Ein FUCHS"], ["ein Fuchs"], False),
        (["the owl of a hill"], ["a fox of the wood"], False),  # "the"
        (["owl of a"], ["fox of a"], True),
        (["雪の中の狐"], ["狐"], False),
        (["cafe\u0301 noir"], ["le caf\u00e9"], False),
        (["red apple"], [""], False),
    ],
)
def test_prompts_that_have_nothing_to_do_with_the_captions(
    prompts: list[str], captions: list[str], strange: bool
) -> None:
    assert bool(default_texts.unrelated_prompts(prompts, captions)) == strange


def test_no_word_of_the_demo_reaches_the_card_of_other_images(workspace: Workspace) -> None:
    """By the settings as committed, though the images lie where the demo's do."""
    datasets = json.dumps(COMMITTED["export"]["datasets"])
    changes = ("export.name=null", "export.prompt=null", "report.title=null", f"export.datasets={datasets}")
    prompts = ("validate.prompts=[owl, ink icon]",)
    argv = [word for change in (*changes, *prompts) for word in ("--set", change)]
    (warning,) = [line for line in workspace.run("check", *argv) if "[prompts-unrelated]" in line]
    assert "--set validate.prompts: " in warning and "'owl' and 'thing 0'" in warning
    for stage in ("prepare", "cache_latents", "train", "validate", "export"):
        workspace.run(stage, *argv)
    assert any("[prompts-unrelated]" in line for line in workspace.run("report", *argv))
    assert Path("data/export/comfyui/raw.safetensors").is_file()
    made = lineage.load(Path("reports/export/lineage.json"))
    assert made["export"]["prompt"].startswith("thing ") and made["export"]["name"] == "raw"
    card = Path("reports/model_card.md").read_text(encoding="utf-8")
    assert f'instance_prompt: "{made["export"]["prompt"]}"' in card and "\n# Raw\n" in card
    assert not any(text in card for text in DEMO.values())
