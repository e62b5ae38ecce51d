"""Copy the demo's data into ``.dvc/store``, the DVC remote that comes with a clone.

In: dvc.lock, the .dvc files with ``remote: bundled``, DVC's cache after ``dvc repro``.
Out: ``data/demo.dvc``, ``.dvc/store``
``data/demo.dvc`` names the outputs of the committed run once more, in this remote, so that ``dvc pull`` finds them in a
fresh clone; dvc.yaml names no remote, so that the outputs of other runs go to a remote of your own and never here.
Run: ``python -m base.bundle``, then ``git add --all .dvc/store data/demo.dvc``
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lora_dag.core.console import Problem, UserError, bare_parser, log, run
from lora_dag.core.params import read_yaml
from lora_dag.pipeline.sharing import STORE

DEMO = Path("data/demo.dvc")
PINNED = {"remote": "bundled", "push": False}
"""All outputs in the store: `dvc push` writes nothing there."""


def main() -> None:
    bare_parser(__doc__).parse_args()
    made = [demo_output(out) for stage in read_yaml(Path("dvc.lock"))["stages"].values() for out in cached(stage)]
    inputs = [out for path in sorted(Path("data").glob("*.dvc")) if path != DEMO for out in pinned(path)]
    fill(Path(STORE), cache_folder(), [out["md5"] for out in [*inputs, *made]])
    with DEMO.open("w", encoding="utf-8") as file:
        YAML().dump({"outs": made}, file)
    dvc("checkout", "--quiet", str(DEMO))
    for out in [*inputs, *made]:
        log.info("%-14s %6.2f MB", out["path"], out["size"] / 1e6)
    log.info("next           git add --all %s %s", STORE, DEMO)


def cached(stage: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return the outputs that DVC keeps: the ones in data/. Git has the others."""
    return (out for out in stage["outs"] if out["path"].startswith("data/"))


def pinned(pointer: Path) -> Iterator[dict[str, Any]]:
    """Return the outputs of a .dvc file that belong to the demo."""
    return (out for out in read_yaml(pointer)["outs"] if PINNED.items() <= out.items())


def demo_output(out: dict[str, Any]) -> dict[str, Any]:
    """Return an output of dvc.lock as data/demo.dvc lists it: ``data/adapter`` becomes ``demo/adapter``."""
    kept = {key: out[key] for key in ("md5", "size", "nfiles", "hash")}
    return kept | {"path": f"demo/{out['path'].removeprefix('data/')}"} | PINNED


def fill(store: Path, cache: Path, digests: Iterable[str]) -> None:
    """Make the store hold exactly the objects of these outputs.

    Raises:
        UserError: neither the store nor DVC's cache has some; nothing is changed.
    """
    sources: dict[Path, Path | None] = {}
    todo = list(digests)
    while todo:
        target = Path("files/md5", (digest := todo.pop())[:2], digest[2:])
        found = next((path for path in (store / target, cache / target) if path.is_file()), None)
        sources[store / target] = found
        if found and digest.endswith(".dir"):
            todo += [entry["md5"] for entry in json.loads(found.read_bytes())]
    if missing := [path.name for path, source in sources.items() if source is None]:
        text = f"DVC's cache lacks {len(missing)} objects, such as {missing[0]}. Run `dvc repro` first."
        raise UserError(Problem("cache-incomplete", text))
    there = {path for path in store.rglob("*") if path.is_file()}
    for path in there - sources.keys():
        path.unlink()
    for path in sources.keys() - there:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(sources[path]), path)
    megabytes = sum(path.stat().st_size for path in sources) / 1e6
    added, deleted = len(sources.keys() - there), len(there - sources.keys())
    log.info("%s: %.1f MB, %d objects, %d of them new; %d deleted", store, megabytes, len(sources), added, deleted)


def cache_folder() -> Path:
    """Return the folder of DVC's cache, as its configuration sets it."""
    return Path(dvc("cache", "dir").strip())


def dvc(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", "dvc", *words], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    run(main)
