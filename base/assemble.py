"""The trained parts -> ``data/base``: a float16 pipeline in the diffusers layout, with the licenses.

In: ``base/build``.  Out: ``data/base``, and ``base/samples.png`` for the model card.
Run: ``python -m base.assemble [--out data/base]``
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from base.icons import concepts, load_icon
from base.render import BUILD
from lora_dag.core.files import read_json, write_json
from lora_dag.pages.sheets import save_png, sheet

HERE = Path(__file__).parent
# fmt: off
PROMPTS = [
    "red-apple", "cat-face", "sailboat", "house", "soccer-ball", "grinning-face", "red-heart", "automobile",
    "owl", "pizza", "alarm-clock", "rose", "blue-heart", "green-apple", "dog-face", "hot-beverage",
    "airplane", "banana", "umbrella", "snowman", "guitar", "rocket", "butterfly", "key",
    "elephant", "strawberry", "sunflower", "fish", "light-bulb", "penguin", "bicycle", "christmas-tree",
]
# fmt: on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/base"))
    args = parser.parse_args()
    torch.set_num_threads(2)

    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(BUILD / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(BUILD / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(BUILD / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(BUILD / "unet"),
        scheduler=DDIMScheduler.from_pretrained(BUILD / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(args.out, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(args.out)
    for path in args.out.rglob("*.safetensors"):
        path.chmod(0o644)
    declare_float32(args.out / "text_encoder/config.json")
    for license in sorted((HERE / "licenses").iterdir()):
        shutil.copy(license, args.out / license.name)
    draw_samples(args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB, {len(concepts())} concepts")


def declare_float32(config: Path) -> None:
    """Write float32 into a config, so that both libraries load the same dtype without arguments.

    transformers loads in the dtype of the config, and diffusers in float32.
    """
    write_json(config, read_json(config) | {"dtype": "float32"})


def draw_samples(folder: Path) -> None:
    """Draw 32 common things with the saved pipeline, as a user loads it. The seeds are 0 to 31; none was chosen."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    names = [slug.replace("-", " ") for slug in PROMPTS]
    generators = [torch.Generator().manual_seed(index) for index in range(len(names))]
    drawn = pipeline(names, num_inference_steps=30, guidance_scale=3.0, generator=generators).images
    real = [load_icon("flat", slug) for slug in PROMPTS]
    rows, labels = [], []
    for start in range(0, len(names), 8):
        rows += [drawn[start : start + 8], real[start : start + 8]]
        labels += [f"drawn\n{names[start]} ... {names[start + 7]}", "real"]
    save_png(HERE / "samples.png", sheet(rows, labels, [""] * 8, cell=96))


if __name__ == "__main__":
    main()
