"""`lora-dag preset`: the settings of presets/ in params.yaml."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lora_dag.commands import preset
from lora_dag.commands.forecast import Forecast
from lora_dag.core import params
from lora_dag.core.params import ModelParams
from lora_dag.families.protocol import load_family
from tests import memory_table
from tests.helpers.errors import refused
from tests.helpers.workspace import REPOSITORY, Workspace
from tests.true_sizes import TRUE_SIZES, save_configs

NAMES = sorted(path.stem for path in preset.FOLDER.glob("*.yaml"))
RESERVED = 0.1
"""Share of a GPU's memory for CUDA itself, kernels' own memory and gaps between tensors."""


def test_a_preset_changes_its_settings_alone(workspace: Workspace) -> None:
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text, encoding="utf-8")
    before = params.read_yaml(Path("params.yaml"))
    workspace.run("preset", "flux1-24gb", "--set", "model.pretrained=data/flux")
    after = params.read_yaml(Path("params.yaml"))
    wanted = preset.settings("flux1-24gb") | {"model.pretrained": "data/flux"}
    for section, values in after.items():
        for name, value in values.items():
            assert value == wanted.get(f"{section}.{name}", before[section][name])
    assert re.findall("#.*", Path("params.yaml").read_text(encoding="utf-8")) == re.findall("#.*", text)


def test_refused_without_a_change(workspace: Workspace) -> None:
    text = Path("params.yaml").read_bytes()
    with refused("preset-missing", "presets/flux1-24g.yaml", "flux1-24gb"):
        workspace.run("preset", "flux1-24g")
    with refused("unknown-setting", "lora.rnk", "lora.rank"):
        workspace.run("preset", "flux1-24gb", "--set", "lora.rnk=4")
    assert Path("params.yaml").read_bytes() == text


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_valid(name: str) -> None:
    config(name, Path("data/base"))


@pytest.mark.parametrize("name", TRUE_SIZES)
def test_true_sizes_have_the_published_numbers_of_parameters(name: str) -> None:
    with torch.device("meta"):
        parts = TRUE_SIZES[name].parts()
    denoiser = parts.get("unet") or parts["transformer"]
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == TRUE_SIZES[name].num_parameters


@pytest.mark.slow
def test_the_table_of_the_models_page_is_current() -> None:
    page = memory_table.PAGE.read_text(encoding="utf-8")
    assert all(f"{row}\n" in page for row in memory_table.rows(["sd15", "sdxl"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_presets_fit(name: str, tmp_path: Path) -> None:
    model, _, memory = name.rpartition("-")
    size = TRUE_SIZES[model]
    save_configs(size, tmp_path)
    own = config(name, tmp_path)
    family = load_family(own.section(ModelParams).family)
    forecast = Forecast(own, family, (size.resolution, size.resolution), 512, torch.device("cpu"))
    available = int(memory.removesuffix("gb")) * 2**30 * (1 - RESERVED)
    assert forecast.train().peak <= available
    assert forecast.cache_latents() <= available
    assert forecast.validate() <= available


def config(name: str, base: Path) -> params.Config:
    tree = params.read_yaml(REPOSITORY / "params.yaml")
    for key, value in (preset.settings(name) | {"model.pretrained": str(base)}).items():
        section, _, setting = key.partition(".")
        tree[section][setting] = value
    return params.check(tree, params.Origin(Path("params.yaml")))
