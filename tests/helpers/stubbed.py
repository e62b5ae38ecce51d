"""A checkout where every stage takes a moment, so that tests ask DVC itself what it would run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.helpers.checkout import Checkout
from tests.helpers.planted import outputs, read

ALL = {"prepare", "cache_latents", "train", "validate", "export", "report"}

# Writes the digest of all that a stage reads to each of its outputs; stages: name -> what it reads, what it writes.
STUB = """#!{python}
import hashlib, sys
from pathlib import Path
deps, outs = {stages!r}[sys.argv[2].partition(".")[2]]
digest = hashlib.sha256(Path("params.yaml").read_bytes())
for path in map(Path, deps):
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        digest.update(file.read_bytes() if file.is_file() else b"")
for path in map(Path, outs):
    path = path if path.suffix else path / "stub.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(digest.hexdigest())
"""


class Stubbed(Checkout):
    """Where ``python`` is the stub."""

    @property
    def environment(self) -> dict[str, str]:
        own = super().environment
        return own | {"PATH": f"{self.path.parent / 'bin'}{os.pathsep}{own['PATH']}"}


def make_stubbed(folder: Path, base: Path) -> Stubbed:
    """After a first run of everything, committed."""
    made = Stubbed(folder / "checkout", base)
    stages = {
        name: ([path for path in stage["deps"] if path.startswith(("data/", "reports/"))], list(outputs(stage)))
        for name, stage in read(made.path / "dvc.yaml")["stages"].items()
    }
    stages["prepare"][0].append("data/raw")  # ${dataset.source}
    program = made.path.parent / "bin/python"
    program.parent.mkdir()
    program.write_text(STUB.format(python=sys.executable, stages=stages))
    program.chmod(0o755)
    assert made.repro() == ALL
    made.commit("reproduced")
    return made
