"""Measure how prepare, cache_latents and DVC scale with the number of images, and the cost of one changed image.

Run: ``python -m benchmarks.cache_scale [--num-images 10000] [--write]``; works in a temporary folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from benchmarks import readme
from benchmarks.stand_in import make_base, make_image, make_images

REPOSITORY = Path(__file__).resolve().parents[1]
COPIED = ("lora_dag", "stages", "dvc.yaml", "params.yaml", ".gitignore", ".dvcignore")
NUM_REPEATS = 5  # of what takes seconds; the median is shown


@dataclass(frozen=True)
class Result:
    what: str
    seconds: float
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=10_000)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        project = Project(Path(name) / "project")
        project.create(args.num_images)
        results = measure(project)
    text = table(args.num_images, results)
    print(text)
    if args.write:
        readme.write("cache_scale", text)


class Project:
    """A git and DVC repository with the real stages, the stand-in base and synthetic images."""

    def __init__(self, path: Path) -> None:
        self.path = path
        dropped = ("DVC_", "LORA_", "GIT_", "PYTHONPATH")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{self.environment['PATH']}"

    def create(self, num_images: int) -> None:
        self.path.mkdir()
        for name in COPIED:
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            copy(REPOSITORY / name, self.path / name)
        make_images(self.path / "data/raw", num_images)
        make_base(self.path / "data/base")
        yaml = YAML()
        params = yaml.load((self.path / "params.yaml").read_text(encoding="utf-8"))
        params["model"]["dtype"] = "float32"
        params["dataset"]["resolution"] = 64
        with (self.path / "params.yaml").open("w", encoding="utf-8") as file:
            yaml.dump(params, file)
        self.run("git", "init", "--quiet")
        self.dvc("init", "--quiet")
        self.dvc("config", "core.analytics", "false")
        self.dvc("remote", "add", "--quiet", "project", ".")
        self.dvc("add", "--quiet", "data/raw", "data/base")

    def run(self, *words: str) -> tuple[float, str]:
        """Run a command; return its wall seconds and its output."""
        start = time.monotonic()
        done = subprocess.run(words, cwd=self.path, env=self.environment, capture_output=True, text=True)
        seconds = time.monotonic() - start
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
        return seconds, done.stdout + done.stderr

    def dvc(self, *words: str) -> tuple[float, str]:
        return self.run(sys.executable, "-m", "dvc", *words)

    def shards(self) -> dict[str, str]:
        """Return name -> digest of every shard of data/latents."""
        folder = self.path / "data/latents"
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*.safetensors"))
        }


def measure(project: Project) -> list[Result]:
    startup = statistics.median(project.dvc("version")[0] for _ in range(NUM_REPEATS))
    results = [Result("`dvc version`: DVC's own start-up", startup)]

    results.append(Result("cold: `dvc repro prepare`", project.dvc("repro", "prepare")[0]))
    seconds, said = project.dvc("repro", "cache_latents")
    results.append(Result("cold: `dvc repro cache_latents`", seconds, counts(said)))

    seconds = statistics.median(project.dvc("repro", "cache_latents")[0] for _ in range(NUM_REPEATS))
    results.append(
        Result("nothing changed: `dvc repro cache_latents`", seconds, f"start-up + {seconds - startup:.1f} s")
    )
    seconds, said = project.run(sys.executable, "-m", "lora_dag", "status")
    results.append(Result("`lora-dag status`, every byte verified", seconds, said.strip().splitlines()[-1]))

    before = project.shards()
    make_image(project.path / "data/raw", index=7, seed=1_000_000)
    results.append(Result("one image changed: `dvc repro prepare`", project.dvc("repro", "prepare")[0]))
    seconds, said = project.dvc("repro", "cache_latents")
    after = project.shards()
    num_rewritten = sum(after.get(name) != digest for name, digest in before.items()) + len(
        after.keys() - before.keys()
    )
    note = f"{counts(said)}; {num_rewritten} of {len(after)} shards differ"
    results.append(Result("one image changed: `dvc repro cache_latents`", seconds, note))

    shutil.rmtree(project.path / "data/latents")
    seconds, said = project.run(sys.executable, "-m", "stages.cache_latents")
    same = "same bytes" if project.shards() == after else "OTHER BYTES"
    results.append(Result("data/latents deleted: `python -m stages.cache_latents`", seconds, f"{counts(said)}; {same}"))
    return results


def counts(said: str) -> str:
    found = re.findall(r"encoded \d+, reused \d+", said)
    return f"captions {found[-2]}; images {found[-1]}"


def table(num_images: int, results: list[Result]) -> str:
    lines = [
        f"`python -m benchmarks.cache_scale --num-images {num_images}` on {readme.machine()}, "
        f"{readme.versions('dvc', 'torch', 'diffusers', 'pillow')}:",
        "",
        f"| {num_images:,} images | wall seconds | |",
        "|---|---:|---|",
        *(f"| {result.what} | {result.seconds:.1f} | {result.note} |" for result in results),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
