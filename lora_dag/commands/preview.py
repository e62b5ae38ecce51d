"""Pictures of a training while it runs: section ``validate``'s prompts under every new snapshot, from fixed seeds.

In: the state directory's runs/*/snapshots, data/adapter once the run has ended, the base.
Out: previews/<run>/step-000050.png in the state directory; step 0 is the base. No stage reads them.
Run: ``lora-dag preview`` beside the training; it ends with it. Another process, which only reads: the run's
bytes are what they are without it. On one GPU it takes memory for the pipeline; ``--set runtime.device=cpu`` does not.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts.adapter import FINAL, Adapter, snapshot_name
from lora_dag.bases import layout, resolve
from lora_dag.core.console import UserError, add_settings, log
from lora_dag.core.files import read_json, sha256_file, state_dir, understood, write_json
from lora_dag.core.locks import last_holder
from lora_dag.core.params import Config, ModelParams, RuntimeParams, load
from lora_dag.core.tensors import load_tensors
from lora_dag.families.long_texts import warn_of_long_prompts
from lora_dag.families.protocol import load_family
from stages.prepare.params import DatasetParams
from stages.validate.params import ValidateParams, prompt_problems

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lora_dag.diffusion.sampling import Sampling

POLL_SECONDS = 2.0
COLUMNS = 4
CELL = 128, 512
"""Least and largest side of a picture on the sheet, in pixels."""
SETTINGS = "settings.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ["adapter"])
    text = "first digits of the run (default: the newest)"
    parser.add_argument("--run", dest="digits", default="", metavar="DIGITS", help=text)
    parser.add_argument("--once", action="store_true", help="draw what is there, and end")


def main(args: argparse.Namespace) -> None:
    config = load(args.params, args.overrides)
    model, settings = config.section(ModelParams), config.section(ValidateParams)
    family = load_family(model.family)
    if found := prompt_problems(settings, family):
        raise UserError(*found)
    training = Training(find_run(args.digits), args.adapter)
    base = resolve.resolve(model, family).model
    layout.require_same_base(training.inputs["base"], layout.digests(base, family.COMPONENTS), training.folder)
    log.info("run         %s", training.folder)
    watch(
        training,
        Painter(config.replaced(base.model_copy(update={"dtype": training.inputs["dtype"]})), training),
        args.once,
    )


def watch(training: Training, painter: Painter, once: bool) -> None:
    """Draw what is new until the training has ended."""
    while True:
        last = once or not training.is_alive()  # asked first: what it wrote before its end is found below
        for step, file in {0: None, **training.snapshots()}.items():
            painter.draw(step, file)
        if last:
            log.info("previews    %s", painter.folder)
            return
        time.sleep(POLL_SECONDS)


# The run


@dataclass(frozen=True)
class Training:
    """A run as its files tell; nothing of it is written."""

    folder: Path
    """Of the run in the state directory."""
    adapter: Path
    """data/adapter, which has the snapshots after the end."""

    @cached_property
    def inputs(self) -> dict[str, Any]:
        path = self.folder / "inputs.json"
        with understood(path, "stages.train"):
            inputs = read_json(path)
            [inputs[name].items() for name in ("base", "train", "lora")]
            [config.items() for config in inputs["lora"].values()]
            [inputs[name] for name in ("cache", "dtype")]
            return inputs

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """Component -> arguments of peft.LoraConfig, "" for the denoiser; dropout is training's alone."""
        configs = self.inputs["lora"]
        return {
            name: {key: 0.0 if key == "lora_dropout" else config[key] for key in config}
            for name, config in configs.items()
        }

    def is_alive(self) -> bool:
        """Whether the process that last held the run's lock is there; taken for granted of another host's."""
        process, host = last_holder(self.folder)
        if host != platform.node():
            return True
        with suppress(OSError, ValueError):
            os.kill(int(process), 0)
            return True
        return False

    def snapshots(self) -> dict[int, Path]:
        """By step; the last is the adapter itself."""
        known = self.folder.glob("snapshots/step-*.safetensors")
        found = {int(path.stem.removeprefix("step-")): path for path in known}
        with suppress(UserError):  # data/adapter is not there, or another version's
            adapter = Adapter.load(self.adapter)
            if self.made(adapter):
                found |= {step: self.adapter / snapshot_name(step) for step in adapter.snapshots}
                found[adapter.num_steps] = self.adapter / FINAL
        return dict(sorted(found.items()))

    def tensors(self, file: Path) -> dict[str, torch.Tensor]:
        """Of a snapshot, or of the adapter.

        Raises:
            FileNotFoundError: the run ended meanwhile; data/adapter has it.
            UserError: the file is damaged.
        """
        from safetensors import SafetensorError

        damaged = UserError(f"{file}: damaged; run `python -m stages.train` again")
        if file.is_relative_to(self.adapter):
            digest = Adapter.load(self.adapter).files[file.relative_to(self.adapter).as_posix()]
            if sha256_file(file) != digest:
                raise damaged
        try:
            return load_tensors(file)
        except SafetensorError:
            raise damaged from None

    def made(self, adapter: Adapter) -> bool:
        """Whether the adapter is this run's: the same settings, latents and base."""
        same = {"": adapter.lora_config, **adapter.text_lora} == self.configs and adapter.base.items() <= self.inputs[
            "base"
        ].items()
        of_train, latents = adapter.made_from.get("train", {}), adapter.made_from.get("latents")
        return same and self.inputs["train"].items() <= of_train.items() and latents == self.inputs["cache"]


def find_run(digits: str) -> Path:
    """The run whose training was started last, of those whose name begins so.

    Raises:
        UserError: there is none.
    """
    runs = state_dir() / "runs"
    known = {path.parent.name: path.stat().st_mtime for path in runs.glob("*/inputs.json")}
    fitting = [name for name in known if name.startswith(digits)]
    if not fitting:
        there = (
            f"those there are {', '.join(sorted(known))}" if known else "start `dvc repro` or `python -m stages.train`"
        )
        raise UserError(f"{runs}: no training{f' {digits}' if digits else ''}; {there}")
    return runs / max(fitting, key=known.__getitem__)


# Drawing


class Painter:
    """The base's pipeline with the run's layers in it, loaded at the first picture."""

    def __init__(self, config: Config, training: Training) -> None:
        self.model, self.runtime = config.section(ModelParams), config.section(RuntimeParams)
        self.sampling = make_sampling(config.section(ValidateParams), config.section(DatasetParams).resolution)
        self.training = training
        self.family = load_family(self.model.family)
        warn_of_long_prompts(self.sampling.prompts, self.family, self.model)
        self.folder = state_dir() / "previews" / training.folder.name
        asked = asdict(self.sampling)
        if not (self.folder / SETTINGS).exists() or read_json(self.folder / SETTINGS) != asked:
            shutil.rmtree(self.folder, ignore_errors=True)  # pictures of other prompts or seeds
            write_json(self.folder / SETTINGS, asked)

    def draw(self, step: int, file: Path | None) -> None:
        """Once per step; None for the base."""
        from lora_dag.diffusion.sampling import draw
        from lora_dag.pages.sheets import save_png

        path = self.folder / f"step-{step:06d}.png"
        if path.exists():
            return
        pipeline, layers = self.loaded
        if file is not None:
            try:
                layers.load_state_dict(self.training.tensors(file))
            except FileNotFoundError:
                return
        with layers.disabled() if file is None else nullcontext():
            pictures = draw(pipeline, self.sampling, self.model)
        save_png(path, grid(pictures, self.sampling.prompts, step))
        log.info("%-11s %s", f"step {step}" if step else "base", path)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        from lora_dag.adapters import adapted
        from lora_dag.core import device

        where = device.setup(self.runtime, self.model)
        device.log_device(where, self.model)
        pipeline = self.family.load_pipeline(self.model, where)
        configs = self.training.configs
        lora_config = configs.pop("")
        return pipeline, adapted.in_pipeline(
            pipeline, self.family.DENOISER, Adapter(lora_config, {}, 0, [], {}, text_lora=configs)
        )


def make_sampling(settings: ValidateParams, resolution: int) -> Sampling:
    """As validate draws, in squares of ``dataset.resolution``."""
    from lora_dag.diffusion.sampling import Sampling

    names = ("prompts", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "batch_size")
    return Sampling(**{name: getattr(settings, name) for name in names}, height=resolution, width=resolution)


def grid(pictures: list[Image.Image], prompts: list[str], step: int) -> Image.Image:
    from lora_dag.pages.sheets import sheet

    cell = min(CELL[1], max(CELL[0], *pictures[0].size))
    starts = range(0, len(pictures), COLUMNS)
    rows, captions = [pictures[i : i + COLUMNS] for i in starts], [prompts[i : i + COLUMNS] for i in starts]
    return sheet(rows, None, None, cell, title=f"step {step}" if step else "base", captions=captions)
