"""Make a folder with a random base, synthetic images and params.yaml, and the command lines that train there."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.bases import Base
from benchmarks.players import REPOSITORY, Failed, Variant, environment, tail
from benchmarks.stand_in import make_images

LEARNING_RATE = 1e-4
NEVER = 1_000_000  # checkpoints: neither side writes any while it is measured
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Workplace:
    folder: Path
    base: Base
    num_images: int

    def create(self, weights: str, dtype: str) -> None:
        """Write images of 1.5 times the resolution, the base with weights stored as ``weights``, and params.yaml.

        Args:
            dtype: what our stages run in.
        """
        import torch

        make_images(self.folder / "data/raw", self.num_images, side=self.base.resolution * 3 // 2)
        self.base.build(self.folder / "data/base", getattr(torch, weights))
        changes: dict[str, dict[str, Any]] = {
            "model": {"family": self.base.family, "dtype": dtype},
            "dataset": {"resolution": self.base.resolution, "heldout_fraction": max(0.02, 3 / self.num_images)},
            "lora": {"rank": self.base.rank, "alpha": self.base.rank},
            "train": {
                "learning_rate": LEARNING_RATE,
                "lr_scheduler": "constant",
                "lr_warmup_steps": 0,
                "prompt_dropout": 0.0,
                "checkpoint_every_n_steps": NEVER,
                "snapshot_every_n_steps": NEVER,
            },
        }
        yaml = YAML()
        params = yaml.load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
        for section, values in changes.items():
            params[section].update(values)
        with (self.folder / "params.yaml").open("w", encoding="utf-8") as file:
            yaml.dump(params, file)

    def ours(
        self, name: str, num_steps: int, batch_size: int, *settings: str, options: tuple[str, ...] = ()
    ) -> Variant:
        """Return our command line. ``settings`` are overrides such as ``model.dtype=bfloat16``."""
        asked = (f"train.num_steps={num_steps}", f"train.batch_size={batch_size}", *settings)
        outputs = ("--adapter", f"out/{name}/adapter", "--train-reports", f"out/{name}/reports")
        return Variant(name, ("stages.train", *(f"--set={setting}" for setting in asked), *outputs), options)

    def script(
        self,
        name: str,
        path: Path,
        num_steps: int,
        batch_size: int,
        dtype: str,
        options: tuple[str, ...] = (),
        python: str = sys.executable,
    ) -> Variant:
        """Return the command line of a diffusers text_to_image LoRA script on the same base, images, resolution, rank
        and rate.
        """
        arguments = {
            "pretrained_model_name_or_path": "data/base",
            "train_data_dir": "data/raw",
            "cache_dir": f"out/{name}/datasets",
            "resolution": self.base.resolution,
            "train_batch_size": batch_size,
            "max_train_steps": num_steps,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "rank": self.base.rank,
            "mixed_precision": MIXED_PRECISION[dtype],
            "seed": 0,
            "checkpointing_steps": NEVER,
            "output_dir": f"out/{name}",
        }
        words = [f"--{key}={value}" for key, value in arguments.items()]
        return Variant(name, (str(path.resolve()), "--center_crop", *words), options, python)

    def cpu_seconds(self, *command: str) -> float:
        """Run a whole process and return its CPU seconds.

        Raises:
            Failed: with the end of what it said.
        """
        log = self.folder / "process.log"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with log.open("w") as file:
            done = subprocess.run(command, cwd=self.folder, env=environment(self.folder), stdout=file, stderr=file)
        if done.returncode:
            raise Failed(f"{' '.join(command)}\n{tail(log)}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
