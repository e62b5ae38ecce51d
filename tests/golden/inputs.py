"""What a pinned run reads: made by its name alone, so that a change of one stage moves no value of another.

Latents, embeddings and adapters are noise that goes by a name, not what cache_latents or train would have made. Their
shapes are the family's. Images are BMP and TIFF files, whose bytes no compression decides.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_dag.adapters import bias, init_from_pin
from lora_dag.adapters.adapter_set import AdapterSet, text_configs
from lora_dag.adapters.lora import make_config
from lora_dag.adapters.params import LoraParams
from lora_dag.artifacts import latent_cache
from lora_dag.artifacts.adapter import FINAL, Adapter, bias_metadata, snapshot_name
from lora_dag.artifacts.latent_cache import CachedItem
from lora_dag.artifacts.manifest import Augmentation, Item, Manifest
from lora_dag.bases import component_files
from lora_dag.bases.resolve import resolve
from lora_dag.core import params
from lora_dag.core.files import sha256_file
from lora_dag.core.params import ModelParams
from lora_dag.core.tensors import save_tensors
from lora_dag.families.protocol import Family, load_family
from lora_dag.images.decode import preprocessing
from stages.validate import feature_files
from tests.helpers import families, image_text, reports, single_files
from tests.helpers.caches import half_mask
from tests.helpers.workspace import TINY, make_image, write_params, write_rows

CPU = torch.device("cpu")
CAPTIONS = ("red apple", "blue boat", "thing, round, small", "green circle, ink icon")
SHAPES = {"plain": [(8, 8)] * 8, "mixed": [(4, 12)] * 4 + [(12, 4)] * 4 + [(8, 8)] * 4}
"""Height and width of each item's latents."""


@contextlib.contextmanager
def workspace(folder: Path, settings: dict[str, str], bases: dict[str, Path]) -> Iterator[list[str]]:
    """The folder with params.yaml and the base of the run's family, as the current directory; yields the overrides."""
    overrides = [f"{key}={value}" for key, value in settings.items() if "." in key]
    base = bases[settings.get("model.family", "sd")]
    write_params(folder / "params.yaml", TINY)
    (folder / "data").mkdir()
    if settings.get("base") == "zero-snr":
        shutil.copytree(base, folder / "data/base")
        config = folder / "data/base/scheduler/scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rescale_betas_zero_snr": True}))
    elif settings.get("base") == "one file":
        single_files.lay_out(folder / "data/base", base, single_files.checkpoint(base))
    else:
        (folder / "data/base").symlink_to(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LORA_STATE_DIR", str(folder / "state"))
        yield overrides


def make(stage: str, settings: dict[str, str], overrides: list[str]) -> None:
    """All that the stage reads, in the current directory; adds the overrides that name files by their digest."""
    if stage == "prepare":
        write_images(settings.get("images", "plain"))
    elif stage == "cache_latents":
        write_images("plain")
        write_manifest(settings)
    elif stage == "report":
        reports.write_reports(Path("reports"), overfit=settings.get("reports") == "overfit")
    else:
        config = params.load(Path("params.yaml"), overrides)
        asked = config.section(ModelParams)
        family = load_family(asked.family)
        model = resolve(asked, family).model
        if stage != "export":
            shapes = SHAPES[settings.get("latents", "plain")]
            write_latents(family, model, shapes, encoded=config.section(LoraParams).train_text_encoder)
        if stage != "train" or settings.get("start") == "adapter":
            write_adapter(family, model, config.section(LoraParams))
        if settings.get("start") == "adapter":
            overrides.append(pinned_start())
        if settings.get("features") == "clip":
            overrides.append(pinned_features())


def pinned_start() -> str:
    """The adapter as ``lora.init_from``, below data/start."""
    folder = Path("data/adapter").rename("data/start")
    return f"lora.init_from={{path: {folder / FINAL}, sha256: {init_from_pin.digest(folder / FINAL)}}}"


def pinned_features() -> str:
    folder = image_text.save("clip", Path("data/clip"))
    return f"validate.feature_model={{path: {folder}, sha256: {feature_files.digest(folder)}}}"


# Images


def write_images(kind: str) -> None:
    """data/raw: eight images of several shapes, one with transparent pixels, two nearly equal."""
    folder = Path("data/raw")
    if kind == "subsets":
        for name, numbers in (("a", (0, 1, 2, 3)), ("b", (4, 5))):
            write_folder(folder / name, {f"{number:02}.bmp": make_image(number) for number in numbers})
        return
    images = {f"{number:02}.bmp": make_image(number) for number in range(5)}
    images |= {"05.bmp": make_image(5, 96, 48), "06.bmp": make_image(6, 48, 80), "08.bmp": make_image(3, 49, 48)}
    clear = make_image(7).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    write_folder(folder, images | {"07.tiff": clear})


def write_folder(folder: Path, images: dict[str, Image.Image]) -> None:
    folder.mkdir(parents=True)
    for name, image in images.items():
        image.save(folder / name)
    captions = [CAPTIONS[index % len(CAPTIONS)] for index in range(len(images))]
    rows = [{"file_name": name, "text": text} for name, text in zip(images, captions, strict=True)]
    write_rows(folder, rows)


def write_manifest(settings: dict[str, str]) -> None:
    """data/prepared of four of the images."""
    views = settings.get("views", "")
    sizes = {"05.bmp": (48, 32), "06.bmp": (32, 40)} if views == "buckets" else {}
    items = []
    for index, name in enumerate(("00.bmp", "05.bmp", "06.bmp", "07.tiff")):
        path = Path("data/raw") / name
        with Image.open(path) as image:
            width, height = image.size
        caption = CAPTIONS[index]
        items.append(
            Item(
                file_name=name,
                sha256=sha256_file(path),
                caption=caption,
                captions=(caption, f"a drawing of {caption}"),
                split="heldout" if name == "00.bmp" else "train",
                source_width=width,
                source_height=height,
                width=sizes.get(name, (32, 32))[0],
                height=sizes.get(name, (32, 32))[1],
                mask="alpha" if views == "masks" and name == "07.tiff" else None,
                transparent=name == "07.tiff",
            )
        )
    random = views == "random crops, flips"
    Manifest(
        items,
        preprocessing("#102030", settings.get("filter", "lanczos")),
        Augmentation("random" if random else "center", random, 0),
        0.25,
        "data/raw",
    ).save(Path("data/prepared"))


# Latents and adapters


def noise(name: str, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """Standard normal, and a function of the name alone."""
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_latents(family: Family, model: ModelParams, shapes: list[tuple[int, int]], encoded: bool) -> None:
    """data/latents with an item for each shape: the first of each four is held out, others have masks or repeats.

    Args:
        encoded: with the text encoder's own embeddings, which training it compares with.
    """
    channels = json.loads((Path(model.pretrained) / "vae/config.json").read_text())["latent_channels"]
    text_encoder = family.load_text(model, CPU)
    prompts = family.encode_prompts(text_encoder, ["red apple"])
    views = family.view_conditioning((48, 48), (0, 8), (32, 32))
    items, captions = [], {"": "c"}
    for index, _ in enumerate(shapes):
        text = f"thing {index}"
        captions |= {text: f"c{index}", f"{text}, other": f"c{index}o"}
        items.append(
            CachedItem(
                file_name=f"{index:02}.png",
                split="heldout" if index % 4 == 0 else "train",
                caption=text,
                captions=(text, f"{text}, other"),
                content=f"content {index}",
                views=(f"{index}a", f"{index}b"),
                masks=(f"{index}ma", f"{index}mb") if len(shapes) > 8 and index % 2 else (),
                repeats=2 if len(shapes) > 8 and index == 2 else 1,
                loss_weight=0.5 if len(shapes) > 8 and index == 3 else 1.0,
                regularization=len(shapes) > 8 and index == 9,
            )
        )

    def load(kind: str, key: str) -> dict[str, torch.Tensor]:
        if kind == "text" and encoded:
            (caption,) = (caption for caption, its_key in captions.items() if its_key == key)
            return {name: tensor[0] for name, tensor in family.encode_prompts(text_encoder, [caption]).items()}
        if kind == "text":
            return {name: 0.5 * noise(f"{key} {name}", tensor[0].shape) for name, tensor in prompts.items()}
        shape = shapes[int(key.rstrip("abm"))]
        if kind == "masks":
            return {"mask": half_mask(shape, "ab".index(key[-1]))}
        by_view = {name: tensor.clone() for name, tensor in views.items()}
        return {"mean": noise(key, (channels, *shape)), "std": torch.full((channels, *shape), 0.1)} | by_view

    base = component_files.digests(model, family.COMPONENTS)
    latent_cache.write(Path("data/latents"), items, captions, base, sorted(prompts), load, sorted(views))


def write_adapter(family: Family, model: ModelParams, settings: LoraParams) -> None:
    """data/adapter as if trained for four steps, with half of it as the snapshot of step 2."""
    denoiser = family.load_denoiser(model, CPU)
    text = family.load_trainable_text(model, CPU) if settings.train_text_encoder else None
    encoders = {} if text is None else family.text_encoders(text)
    adapted = AdapterSet(denoiser, make_config(settings, denoiser), text_configs(settings, family, encoders), encoders)
    for name, parameter in adapted.trainable.items():
        own = 0.1 * noise(name, parameter.shape)
        parameter.data = parameter.data + own if "magnitude" in name else own
    biases, config = list(bias.deltas(denoiser)), adapted.configs[""]
    metadata = {"format": "pt"} | bias_metadata(config["bias"], biases)
    folder, files = Path("data/adapter"), {}
    tensors = adapted.state_dict()
    halves = {name: tensor if "magnitude" in name else tensor / 2 for name, tensor in tensors.items()}
    for name, state in ((snapshot_name(2), halves), (FINAL, tensors)):
        save_tensors(folder / name, state, metadata)
        files[name] = sha256_file(folder / name)
    made_from: dict[str, Any] = {"caption": "red apple", "num_images": 6, "packages": {}}
    configs = {name: found for name, found in adapted.configs.items() if name}
    base = component_files.digests(model, family.COMPONENTS)
    Adapter(config, base, 4, [2], files, biases, made_from, configs).save(folder)


def save_bases(folder: Path, names: set[str]) -> dict[str, Path]:
    """Family -> its tiny random base."""
    return {name: families.save(name, folder / name) for name in sorted(names)}
