"""Write tables into benchmarks/README.md, each with the command that made it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

README = Path(__file__).resolve().with_name("README.md")


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GiB of memory"


def versions(*packages: str) -> str:
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


def command(module: str, words: list[str]) -> str:
    """Return the command line of this process, without the folders of this machine."""
    return f"`{' '.join(['python -m', module, *(Path(word).name for word in words if word != '--write')])}`"


def write(block: str, text: str) -> None:
    """Put ``text`` between the two markers of a block."""
    start, end = f"<!-- {block} -->", f"<!-- /{block} -->"
    before, found, rest = README.read_text(encoding="utf-8").partition(start)
    if not found:
        raise SystemExit(f"{README}: no {start}; write it where the table is to stand")
    README.write_text(f"{before}{start}\n{text}{end}{rest.partition(end)[2]}", encoding="utf-8")
