"""Draws the prompts of section ``validate`` with every new snapshot of a running training, from fixed seeds.

In: the state directory's runs/*/snapshots, data/adapter after the training, the base model.
Out: previews/<run>/step-000050.png in the state directory; step 0 is the base model. No stage reads them.
Run: ``lora-dag preview`` beside the training; it ends with the training and does not change its results. On a GPU it
needs memory for the pipeline; ``--set runtime.device=cpu`` avoids that.
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
from lora_dag.bases import component_files, resolve
from lora_dag.core.console import Problem, UserError, add_settings, log
from lora_dag.core.files import artifact_errors, read_json, sha256_file, state_dir, write_json
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
CELL_SIDES = 128, 512
"""Minimum and maximum side of an image on the sheet, in pixels."""
SETTINGS = "settings.json"
MAX_LISTED = 10
"""Runs listed in a message."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ["adapter"])
    text = "first digits of the run's name (default: the newest run)"
    parser.add_argument("--run", dest="digits", default="", metavar="DIGITS", help=text)
    parser.add_argument("--once", action="store_true", help="draw the present snapshots, and end")


def main(args: argparse.Namespace) -> None:
    config = load(args.params, args.overrides)
    model, settings = config.section(ModelParams), config.section(ValidateParams)
    family = load_family(model.family)
    if problems := prompt_problems(settings, family):
        raise UserError(*problems)
    training = TrainingRun(find_run(args.digits), args.adapter)
    base = resolve.resolve(model, family).model
    component_files.require_same_base(
        training.inputs["base"], component_files.digests(base, family.COMPONENTS), training.folder
    )
    log.info("run         %s", training.folder)
    draw_until_ended(
        training,
        PreviewWriter(config.replaced(base.model_copy(update=training.model)), training),
        args.once,
    )


def draw_until_ended(training: TrainingRun, writer: PreviewWriter, once: bool) -> None:
    """Draw every new snapshot until the training has ended."""
    while True:
        last = once or not training.is_alive()  # before the listing, which then has all snapshots
        for step, file in {0: None, **training.snapshots()}.items():
            writer.draw(step, file)
        if last:
            log.info("previews    %s", writer.folder)
            return
        time.sleep(POLL_SECONDS)


# The training


@dataclass(frozen=True)
class TrainingRun:
    """A training, read from its files; nothing is written."""

    folder: Path
    """Folder of the run in the state directory."""
    adapter: Path
    """data/adapter, which has the snapshots after the training."""

    @cached_property
    def inputs(self) -> dict[str, Any]:
        path = self.folder / "inputs.json"
        with artifact_errors(path, "stages.train"):
            inputs = read_json(path)
            [inputs[name].items() for name in ("base", "train", "lora")]
            [config.items() for config in inputs["lora"].values()]
            [inputs[name] for name in ("cache", "dtype")]
            return inputs

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """Component -> arguments of peft.LoraConfig without dropout; "" is the denoiser."""
        configs = self.inputs["lora"]
        return {
            name: {key: 0.0 if key == "lora_dropout" else config[key] for key in config}
            for name, config in configs.items()
        }

    @property
    def model(self) -> dict[str, Any]:
        """Settings of section ``model`` that the training used."""
        return {"dtype": self.inputs["dtype"], "quantization": self.inputs.get("quantization")}

    def is_alive(self) -> bool:
        """Return whether the process that last held the run's lock runs; on another host, True is assumed."""
        process, host = last_holder(self.folder)
        if host != platform.node():
            return True
        with suppress(OSError, ValueError):
            os.kill(int(process), 0)
            return True
        return False

    def snapshots(self) -> dict[int, Path]:
        """Return step -> file, sorted; the last one is the adapter."""
        paths = self.folder.glob("snapshots/step-*.safetensors")
        files = {int(path.stem.removeprefix("step-")): path for path in paths}
        with suppress(UserError):  # data/adapter is missing, or of another version
            adapter = Adapter.load(self.adapter)
            if self.has_made(adapter):
                files |= {step: self.adapter / snapshot_name(step) for step in adapter.snapshots}
                files[adapter.num_steps] = self.adapter / FINAL
        return dict(sorted(files.items()))

    def tensors(self, file: Path) -> dict[str, torch.Tensor]:
        """Return the tensors of a snapshot or of the adapter.

        Raises:
            FileNotFoundError: the training ended meanwhile and moved the snapshot to data/adapter.
            UserError: the file is damaged.
        """
        from safetensors import SafetensorError

        problem = Problem("snapshot-damaged", f"{file}: damaged. Run `python -m stages.train` again.")
        if file.is_relative_to(self.adapter):
            digest = Adapter.load(self.adapter).files[file.relative_to(self.adapter).as_posix()]
            if sha256_file(file) != digest:
                raise UserError(problem)
        try:
            return load_tensors(file)
        except SafetensorError:
            raise UserError(problem) from None

    def has_made(self, adapter: Adapter) -> bool:
        """Return whether the adapter is the result of this training: same settings, latents and base model."""
        same = {"": adapter.lora_config, **adapter.text_lora} == self.configs and adapter.base.items() <= self.inputs[
            "base"
        ].items()
        of_train, latents = adapter.made_from.get("train", {}), adapter.made_from.get("latents")
        return same and self.inputs["train"].items() <= of_train.items() and latents == self.inputs["cache"]


def find_run(digits: str) -> Path:
    """Return the folder of the training that was started last, of those whose name begins with ``digits``.

    Raises:
        UserError: there is none.
    """
    runs = state_dir() / "runs"
    started = {path.parent.name: path.stat().st_mtime for path in runs.glob("*/inputs.json")}
    matching = [name for name in started if name.startswith(digits)]
    if not matching and started:
        names = ", ".join(sorted(started)[:MAX_LISTED])
        more = f" and {len(started) - MAX_LISTED} more" if len(started) > MAX_LISTED else ""
        text = f"{runs}: no training whose name begins with {digits}. Choose one of {names}{more}."
        raise UserError(Problem("no-training", text))
    if not matching:
        text = f"{runs}: no training was started here. Run `dvc repro` or `python -m stages.train`."
        raise UserError(Problem("no-training", text))
    return runs / max(matching, key=started.__getitem__)


# Drawing


class PreviewWriter:
    """Drawer of previews: the base model's pipeline with the training's adapter, loaded at the first image."""

    def __init__(self, config: Config, training: TrainingRun) -> None:
        self.model, self.runtime = config.section(ModelParams), config.section(RuntimeParams)
        self.sampling = make_sampling(config.section(ValidateParams), config.section(DatasetParams).resolution)
        self.training = training
        self.family = load_family(self.model.family)
        warn_of_long_prompts(self.sampling.prompts, self.family, self.model)
        self.folder = state_dir() / "previews" / training.folder.name
        sampling = asdict(self.sampling)
        if not (self.folder / SETTINGS).exists() or read_json(self.folder / SETTINGS) != sampling:
            shutil.rmtree(self.folder, ignore_errors=True)  # images of other prompts or seeds
            write_json(self.folder / SETTINGS, sampling)

    def draw(self, step: int, file: Path | None) -> None:
        """Draw the sheet of a step, unless it exists.

        Args:
            file: the snapshot; None for the base model.
        """
        from lora_dag.diffusion.sampling import draw
        from lora_dag.pages.sheets import save_png

        path = self.folder / f"step-{step:06d}.png"
        if path.exists():
            return
        pipeline, layers = self.pipeline_and_layers
        if file is not None:
            try:
                layers.load_state_dict(self.training.tensors(file))
            except FileNotFoundError:
                return
        with layers.disabled() if file is None else nullcontext():
            images = draw(pipeline, self.sampling, self.model)
        save_png(path, grid(images, self.sampling.prompts, step))
        log.info("%-11s %s", f"step {step}" if step else "base", path)

    @cached_property
    def pipeline_and_layers(self) -> tuple[Any, Any]:
        from lora_dag.adapters import adapter_set
        from lora_dag.core import device

        torch_device = device.setup(self.runtime, self.model)
        device.log_device(torch_device, self.model)
        pipeline = self.family.load_pipeline(self.model, torch_device)
        configs = self.training.configs
        lora_config = configs.pop("")
        return pipeline, adapter_set.inject_into_pipeline(
            pipeline, self.family.DENOISER, Adapter(lora_config, {}, 0, [], {}, text_lora=configs)
        )


def make_sampling(settings: ValidateParams, resolution: int) -> Sampling:
    """Return validate's sampling settings, for squares of ``dataset.resolution`` pixels."""
    from lora_dag.diffusion.sampling import Sampling

    names = ("prompts", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "batch_size")
    return Sampling(**{name: getattr(settings, name) for name in names}, height=resolution, width=resolution)


def grid(images: list[Image.Image], prompts: list[str], step: int) -> Image.Image:
    from lora_dag.pages.sheets import sheet

    cell = min(CELL_SIDES[1], max(CELL_SIDES[0], *images[0].size))
    starts = range(0, len(images), COLUMNS)
    rows, captions = [images[i : i + COLUMNS] for i in starts], [prompts[i : i + COLUMNS] for i in starts]
    return sheet(rows, None, None, cell, title=f"step {step}" if step else "base", captions=captions)
