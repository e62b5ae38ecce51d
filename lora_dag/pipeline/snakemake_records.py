"""What Snakemake keeps of a finished job: settings, code and inputs that a file below runs/ was made with.

Reads .snakemake/metadata of Snakemake 9 (requirements.lock pins it): what its own reruns are decided by.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dag.core.console import UserError
from lora_dag.core.files import from_json, write_text

METADATA = Path(".snakemake/metadata")


@dataclass(frozen=True)
class Record:
    """The job that wrote a file."""

    path: str
    rule: str
    code: str
    """Digest of the stage's code, as ``code.digest`` gives it."""
    results: int | None
    """The number of the results that it gives; None of a run from before there were numbers."""
    sections: dict[str, Any]
    """Section, or dotted key -> values that it ran with."""
    options: list[str]
    """Words of its command line: ``--set`` and folders."""
    inputs: dict[str, str | None]
    """Path -> sha256; None for a file that Snakemake takes for too large, 1 MB."""
    started: float
    """Seconds since 1970."""

    def folder(self, name: str) -> str:
        """Of an option such as ``--train-reports``."""
        return self.options[self.options.index(f"--{name.replace('_', '-')}") + 1]

    @property
    def family(self) -> str:
        """Of the model; empty for a stage that reads none."""
        return self.sections.get("model.family") or self.sections.get("model", {}).get("family", "")

    @property
    def overrides(self) -> list[str]:
        """``lora.rank=16``"""
        return [value for word, value in zip(self.options, self.options[1:], strict=False) if word == "--set"]


def read_record(path: str) -> Record | None:
    """Of the job that wrote ``path``; None where no job finished it.

    Raises:
        UserError: what stands there is of another version of Snakemake.
    """
    if not METADATA.is_dir() or not (place := place_of(path)).is_file() or not Path(path).is_file():
        return None
    try:
        found = from_json(place.read_bytes())
        if found["incomplete"]:
            return None
        values = [ast.literal_eval(text) for text in found["params"]]
        digests = [value for value in values if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)]
        checksums = {name: digest.removeprefix("sha256:") for name, digest in found["input_checksums"].items()}
        return Record(
            path=path,
            rule=found["rule"],
            code=digests[0],
            results=next((value for value in values if isinstance(value, int)), None),
            sections=next(value for value in values if isinstance(value, dict)),
            options=shlex.split(next(value for value in values if isinstance(value, str) and value not in digests)),
            inputs={name: checksums.get(name) for name in found["input"]},
            started=found["starttime"],
        )
    except (ValueError, KeyError, TypeError, IndexError, SyntaxError, StopIteration, AttributeError) as error:
        raise UserError(
            f"{place}: not as Snakemake 9 writes it ({type(error).__name__}: {error}); "
            f"delete {path} and run snakemake again"
        ) from None


def recorded_paths() -> Iterator[str]:
    """Every file that has a record, be it there or not."""
    for place in sorted(METADATA.rglob("*")):
        if place.is_file():
            parts = place.relative_to(METADATA).parts
            with contextlib.suppress(ValueError):  # a file that Snakemake did not write
                yield urlsafe_b64decode("".join(part.removeprefix("@") for part in parts)).decode()


def accept_code(record: Record, code: str, results: int) -> None:
    """Give a record the digest of other code and the number of its results: its job has nothing else changed by it.

    Snakemake then finds this code unchanged, and every other reason to run the job as before.
    """
    place = place_of(record.path)
    found = from_json(place.read_bytes())
    kept = [text for text in found["params"] if text not in (repr(record.code), repr(record.results))]
    write_text(place, json.dumps(found | {"params": sorted([*kept, repr(code), repr(results)])}))


def place_of(path: str) -> Path:
    """Of its record: the path in base64, cut where a file's name must end on this disk."""
    length = os.pathconf(METADATA, "PC_NAME_MAX") - 1  # beside an @
    encoded = urlsafe_b64encode(path.encode()).decode()
    *parents, name = (encoded[i : i + length] for i in range(0, len(encoded), length))
    return METADATA.joinpath(*(f"@{part}" for part in parents), name)
