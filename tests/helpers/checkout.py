"""A small checkout of this repository in a folder of its own: git, DVC, a tiny base and eight images."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.helpers.workspace import REPOSITORY, TINY, make_image, write_params, write_rows

CODE = (
    "lora_dag",
    "stages",
    "dvc.yaml",
    "Snakefile",
    "rules",
    "profiles",
    ".gitattributes",
    ".gitignore",
    ".dvcignore",
)

RESULTS = 1
"""Number RESULTS of each stage in a checkout, whatever the current code has."""


class Checkout:
    """Runs DVC and Snakemake there, and says which stages ran."""

    def __init__(self, path: Path, base: Path, top: Path | None = None) -> None:
        """``top``: of the git repository, where the checkout is a folder in it."""
        self.path = path
        path.mkdir(parents=True)
        for name in CODE:
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, path / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, path / name)
        for file in path.glob("stages/*/__init__.py"):
            file.write_text(re.sub(r"RESULTS = \d+", f"RESULTS = {RESULTS}", file.read_text(encoding="utf-8")))
        write_params(path / "params.yaml", TINY)
        shutil.copytree(base, path / "data/base")
        (path / "data/raw").mkdir()
        for index in range(8):
            make_image(index).save(path / f"data/raw/{index:02}.png")
        write_rows(path / "data/raw", [{"file_name": f"{i:02}.png", "text": f"thing {i}"} for i in range(8)])
        (path / "data/other").mkdir()  # six of the eight and two more, with captions beside them
        for index in range(2, 10):
            make_image(index).save(path / f"data/other/new-{index}.png")
            (path / f"data/other/new-{index}.txt").write_text(f"thing {index}\n")
        self.git("init", "--quiet", "--initial-branch=main", str(top or path))
        self.dvc("init", "--quiet", *(["--subdir"] if top else []))
        self.dvc("config", "core.analytics", "false")
        self.dvc("remote", "add", "--quiet", "project", ".")
        self.dvc("add", "--quiet", "data/raw", "data/other", "data/base")
        self.commit("start")

    @property
    def environment(self) -> dict[str, str]:
        """This interpreter first on PATH, and nothing of the surrounding run."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "LORA_", "PYTHONPATH", "GIT_"))}
        identity = {
            f"GIT_{role}_{what}": value
            for role in ("AUTHOR", "COMMITTER")
            for what, value in (("NAME", "t"), ("EMAIL", "t@t"))
        }
        return (
            kept
            | identity
            | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1"}
        )

    def run(self, *words: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            words, cwd=self.path, env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0 or not check, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done

    def git(self, *words: str) -> str:
        return self.run("git", *words).stdout

    def dvc(self, *words: str) -> str:
        done = self.run(sys.executable, "-m", "dvc", *words)
        return done.stdout + done.stderr

    def python(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, *words, check=check)

    def snakemake(self, *words: str) -> str:
        done = self.run(sys.executable, "-m", "snakemake", "--cores", "1", *words)
        return done.stdout + done.stderr

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)

    def repro(self, **changes: Any) -> set[str]:
        """Change ``section__key=value`` in params.yaml, run ``dvc repro``; the stages that really ran."""
        self.set(**changes)
        return ran(self.dvc("repro"))

    def set(self, **changes: Any) -> None:
        yaml = YAML()
        path = self.path / "params.yaml"
        tree = yaml.load(path.read_text())
        for key, value in changes.items():
            section, _, name = key.partition("__")
            tree[section][name] = value
        with path.open("w") as file:
            yaml.dump(tree, file)

    def adapter(self, folder: str = "data/adapter") -> str:
        return hashlib.sha256((self.path / folder / "adapter.safetensors").read_bytes()).hexdigest()

    def adapter_of(self, experiment: str) -> str:
        """The same of the adapter that a DVC experiment has committed, out of DVC's cache."""
        (ref,) = self.git("for-each-ref", "--format=%(refname)", f"refs/exps/**/{experiment}").split()
        lock = YAML(typ="safe").load(self.git("show", f"{ref}:dvc.lock"))
        folder = next(out["md5"] for out in lock["stages"]["train"]["outs"] if out["path"] == "data/adapter")
        entries = json.loads(self.cached(folder))
        (digest,) = (entry["md5"] for entry in entries if entry["relpath"] == "adapter.safetensors")
        return hashlib.sha256(self.cached(digest)).hexdigest()

    def cached(self, digest: str) -> bytes:
        return (self.path / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).read_bytes()


def ran(output: str) -> set[str]:
    """Stages that DVC ran, not those that it skipped or restored from its run cache."""
    return set(re.findall(r"Running stage '(\w+)'", output))


@pytest.fixture(scope="session")
def tiny_checkout(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Checkout:
    """Untouched by the tests: for what reads files and plans only."""
    return Checkout(tmp_path_factory.mktemp("plan") / "checkout", tiny_base)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Checkout:
    """After a first ``dvc repro``, committed. Tests that change it put it back."""
    checkout = Checkout(tmp_path_factory.mktemp("repro") / "checkout", tiny_base)
    assert checkout.repro() == {"prepare", "cache_latents", "train", "validate", "export", "report"}
    checkout.commit("reproduced")
    return checkout
