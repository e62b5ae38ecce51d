"""Snakemake's records of finished jobs: settings, code and inputs of each file in runs/.

Reads .snakemake/metadata of Snakemake 9 (pinned in requirements.lock), by which Snakemake decides about reruns.
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

from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import from_json, write_text

METADATA = Path(".snakemake/metadata")


@dataclass(frozen=True)
class Record:
    """The job that wrote a file."""

    path: str
    rule: str
    code: str
    """Digest of the stage's code by ``code.digest``."""
    results: int | None
    """RESULTS of the stage; None for a run from before RESULTS was introduced."""
    sections: dict[str, Any]
    """Section or dotted key -> values of the run."""
    options: list[str]
    """Command line arguments: ``--set`` and folders."""
    inputs: dict[str, str | None]
    """Path -> sha256; None for a file above 1 MB, which Snakemake does not hash."""
    started: float
    """Seconds since 1970."""

    def folder(self, name: str) -> str:
        """Return the folder of an option such as ``--train-reports``."""
        return self.options[self.options.index(f"--{name.replace('_', '-')}") + 1]

    @property
    def family(self) -> str:
        """Family of the model; empty for a stage without one."""
        return self.sections.get("model.family") or self.sections.get("model", {}).get("family", "")

    @property
    def overrides(self) -> list[str]:
        """Overrides such as ``lora.rank=16``."""
        return [value for word, value in zip(self.options, self.options[1:], strict=False) if word == "--set"]


def read_record(path: str) -> Record | None:
    """Return the record of the job that wrote ``path``; None if no job finished.

    Raises:
        UserError: the record is of another version of Snakemake.
    """
    if not METADATA.is_dir() or not (place := record_path(path)).is_file() or not Path(path).is_file():
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
        text = f"{place}: not in the format of Snakemake 9 ({type(error).__name__}: {error})."
        raise UserError(Problem("record-damaged", f"{text} Delete {path} and run `snakemake` again.")) from None


def recorded_paths() -> Iterator[str]:
    """Yield every path that has a record, whether the file exists or not."""
    for place in sorted(METADATA.rglob("*")):
        if place.is_file():
            parts = place.relative_to(METADATA).parts
            with contextlib.suppress(ValueError):  # a file that Snakemake did not write
                yield urlsafe_b64decode("".join(part.removeprefix("@") for part in parts)).decode()


def accept_code(record: Record, code: str, results: int) -> None:
    """Replace the code digest and RESULTS of a record. Snakemake then sees this code as unchanged."""
    place = record_path(record.path)
    found = from_json(place.read_bytes())
    kept = [text for text in found["params"] if text not in (repr(record.code), repr(record.results))]
    write_text(place, json.dumps(found | {"params": sorted([*kept, repr(code), repr(results)])}))


def record_path(path: str) -> Path:
    """Return the path of a file's record: base64, split at the disk's limit of a file name."""
    length = os.pathconf(METADATA, "PC_NAME_MAX") - 1  # beside an @
    encoded = urlsafe_b64encode(path.encode()).decode()
    *parents, name = (encoded[i : i + length] for i in range(0, len(encoded), length))
    return METADATA.joinpath(*(f"@{part}" for part in parents), name)
