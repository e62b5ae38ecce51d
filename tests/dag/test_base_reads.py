"""How often DVC reads a base model, after another base is set and after an edit in place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.checkout import ran
from tests.helpers.stubbed import ALL, Stubbed, make_stubbed

OF_THE_BASE = ALL - {"prepare"}
# Writes the names of the weight files that DVC opens.
WATCH = """
import os, sys
def watch(event, args):
    if event == "open" and str(args[0]).endswith(".safetensors") and "dvc" in sys.orig_argv:
        with os.fdopen(os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
            file.write(f"{{args[0]}}\\n")
sys.addaudithook(watch)
"""


class Watched(Stubbed):
    """A checkout that notes the weight files that DVC opens."""

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"PYTHONPATH": str(self.path.parent / "watch")}

    @property
    def opened(self) -> Path:
        return self.path.parent / "opened"

    def num_reads(self) -> int:
        """Return the number of weight files that were opened since the last call."""
        lines = self.opened.read_text().splitlines() if self.opened.exists() else []
        self.opened.unlink(missing_ok=True)
        return len(lines)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Watched:
    """A checkout with a second base, data/second, that no stage has read."""
    made = make_stubbed(tmp_path_factory.mktemp("reads"), tiny_base)
    made.__class__ = Watched
    assert isinstance(made, Watched)
    hook = made.path.parent / "watch/sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(WATCH.format(log=str(made.opened)))
    shutil.copytree(made.path / "data/base", made.path / "data/second")
    (made.path / "data/second/README.md").write_text("another base")
    made.dvc("add", "--quiet", "data/second")
    assert made.num_reads() > 0  # so the hook works
    made.commit("a second base")
    return made


@pytest.mark.slow
def test_another_base_is_not_read_by_dvc_and_neither_is_the_way_back(watched: Watched) -> None:
    assert ran(watched.dvc("exp", "run", "-S", "model.pretrained=data/second")) == OF_THE_BASE
    assert watched.num_reads() == 0
    watched.dvc("exp", "run", "-S", "model.pretrained=data/base")
    assert watched.num_reads() == 0
    watched.dvc("exp", "run", "--temp", "-S", "model.pretrained=data/second", "-S", "train.seed=7")
    assert watched.num_reads() == 0
    watched.dvc("exp", "run", "--queue", "-S", "model.pretrained=data/second", "-S", "train.seed=8")
    watched.dvc("exp", "run", "--run-all")
    assert watched.num_reads() == 0
    watched.git("checkout", "--quiet", ".")


def test_an_edit_in_place_runs_the_stages_again(watched: Watched) -> None:
    """The edit keeps the size. The outputs of the stubs do not change with the base, so the report is up to date."""
    (path,) = (watched.path / "data/base/unet").glob("*.safetensors")
    watched.dvc("checkout", "--quiet")
    before = path.read_bytes()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([before[-1] ^ 1]))
    assert path.stat().st_size == len(before)
    assert ran(watched.dvc("repro")) == OF_THE_BASE - {"report"}
    watched.git("checkout", "--quiet", ".")
    watched.dvc("checkout", "--quiet")
    assert path.read_bytes() == before and ran(watched.dvc("repro")) == set()
