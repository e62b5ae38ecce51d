"""Memory and CPU time of one epoch of train with the text cache of a large dataset, and its bytes on the disk.

The base is the stand-in of ``stand_in.py`` with a UNet that takes tokens of the given width. Latents and embeddings are
random; each caption belongs to one image. ``train`` is the real stage and runs one epoch in a process of its own.
Run: ``python -m benchmarks.text_cache``; ``--tokens 512 --width 4096`` is FLUX.1, ``--tokens 77 --width 2048`` SDXL
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import readme
from benchmarks.stand_in import make_base

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH = 16


@dataclass(frozen=True)
class Result:
    captions: int
    disk: int
    """Bytes of data/latents/text."""
    anonymous: int
    """Peak of RssAnon in bytes."""
    resident: int
    """Peak of the resident memory in bytes, with files in it."""
    seconds: float
    """CPU seconds of the whole process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=77)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--captions", type=int, nargs="+", default=[2_000, 10_000])
    parser.add_argument("--steps", type=int, help="number of steps; default: one epoch")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    results = []
    for count in args.captions:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as name:
            results.append(measure(Path(name), count, (args.tokens, args.width), args.steps))
    text = table(results)
    print(text)
    if args.write:
        readme.write(f"text_cache {args.tokens} {args.width}", text)


def measure(folder: Path, count: int, shape: tuple[int, int], steps: int | None) -> Result:
    """Make a project with ``count`` images and captions, and train one epoch."""
    shutil.copy(REPOSITORY / "params.yaml", folder)
    make_base(folder / "data/base", text_width=shape[1], attention=True)
    write_cache(folder, count, shape)
    disk = sum(path.stat().st_size for path in (folder / "data/latents/text").iterdir())
    settings = {
        "model.dtype": "bfloat16",
        "train.batch_size": BATCH,
        "train.num_steps": steps or -(-count // BATCH),
        "train.lr_warmup_steps": 0,
        "train.checkpoint_every_n_steps": 10**6,
        "train.snapshot_every_n_steps": 10**6,
        "lora.target_modules": "[to_k, to_v]",
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return Result(count, disk, *watched([sys.executable, "-m", "stages.train", *words], folder, environment))


def write_cache(folder: Path, count: int, shape: tuple[int, int]) -> None:
    """Write data/latents with random bfloat16 embeddings; all captions have the same one, to write it quickly."""
    import torch

    from lora_dag.artifacts import latent_cache, packing
    from lora_dag.artifacts.latent_cache import CachedItem
    from lora_dag.bases import component_files
    from lora_dag.core.params import ModelParams
    from lora_dag.families import sd

    embeds = packing.pack({"prompt_embeds": torch.randn(shape).bfloat16().float()}, "bfloat16")
    latents = {"mean": torch.randn(4, 8, 8), "std": torch.full((4, 8, 8), 0.1)}
    items = [
        CachedItem(f"{index:05}.jpg", "train", str(index), (str(index),), str(index), (f"v{index}",))
        for index in range(count)
    ]
    captions = {caption: f"c{caption}" for caption in ("", *(item.caption for item in items))}
    model = ModelParams(
        family="sd", pretrained=str(folder / "data/base"), variant=None, dtype="bfloat16", quantization=None
    )
    base = component_files.digests(model, sd.COMPONENTS)

    def load(kind: str, key: str) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in (embeds if kind == "text" else latents).items()}

    latent_cache.write(folder / "data/latents", items, captions, base, ["prompt_embeds"], load, (), packing.PACKED)


def watched(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, int, float]:
    """Run a command; return its peaks of anonymous and of resident memory, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peaks = {"RssAnon": 0, "VmHWM": 0}
    watching = threading.Thread(target=watch, args=(process, peaks))
    watching.start()
    said, _ = process.communicate()
    watching.join()
    if process.returncode:
        raise SystemExit(said)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return peaks["RssAnon"], peaks["VmHWM"], seconds


def watch(process: subprocess.Popen[str], peaks: dict[str, int]) -> None:
    """Note the peaks of a process until it ends. Source: proc_pid_status(5)."""
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except OSError:  # it has ended
            return
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], 1024 * int(value.split()[0]))
        time.sleep(0.1)


def table(results: list[Result]) -> str:
    lines = [
        f"{readme.command('benchmarks.text_cache', sys.argv[1:])} on {readme.machine()}, "
        f"{readme.versions('torch', 'safetensors')}:",
        "",
        "| captions | text in data/latents | peak resident memory | of it anonymous | CPU seconds of the epoch |",
        "|---:|---:|---:|---:|---:|",
        *(
            f"| {r.captions:,} | {r.disk / 1e9:.2f} GB | {r.resident / 1e9:.2f} GB | {r.anonymous / 1e9:.2f} GB | "
            f"{r.seconds:.0f} |"
            for r in results
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
