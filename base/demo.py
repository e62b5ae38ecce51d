"""Make the two demo datasets of the rendered icons: folders of images with captions and the license.

In: ``base/build/icons`` (``python -m base.render``).  Out: ``data/raw`` (ink style), ``data/raw-noto``.
Run: ``python -m base.demo`` (seconds)
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from base.icons import caption, concepts, load_icon
from base.render import ICON_SETS

PIXELS = 128
NUM_IMAGES = 300
# Concepts of the prompts that reports show: left out, so that their images are generalization and not recall.
LEFT_OUT = {"red-apple", "sailboat", "owl", "pizza", "alarm-clock", "dog-face", "snowman", "rocket"}
# Of apache.org/licenses/LICENSE-2.0.txt.
APACHE_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


@dataclass(frozen=True)
class Demo:
    """One dataset: the images of the chosen concepts in one style."""

    folder: Path
    style: str
    colors: int
    """Palette size that the images are stored with; 0 stores gray levels."""


DEMOS = (Demo(Path("data/raw"), "ink", 0), Demo(Path("data/raw-noto"), "noto", 128))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    slugs = chosen()
    for demo in DEMOS:
        build(demo, slugs)
        size = sum(path.stat().st_size for path in demo.folder.iterdir())
        print(f"{demo.folder}: {len(slugs)} images of the {demo.style} style, {size / 1e6:.1f} MB")


def chosen() -> list[str]:
    """Return the demo's concepts, sorted: the ones with the lowest hash of their name, so that nobody selected them."""
    candidates = [slug for slug in concepts() if slug not in LEFT_OUT]
    by_hash = sorted(candidates, key=lambda slug: hashlib.sha256(slug.encode()).hexdigest())
    return sorted(by_hash[:NUM_IMAGES])


def build(demo: Demo, slugs: list[str]) -> None:
    """Write one dataset. Files that were in the folder are removed."""
    if demo.folder.exists():
        shutil.rmtree(demo.folder)
    demo.folder.mkdir(parents=True)
    rows = []
    for slug in slugs:
        name = f"{slug}.png"
        stored(load_icon(demo.style, slug, PIXELS), demo.colors).save(demo.folder / name, optimize=True)
        rows.append(json.dumps({"file_name": name, "text": caption(slug, demo.style)}))
    (demo.folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (demo.folder / "LICENSE").write_text(license(demo.style), encoding="utf-8")


def stored(image: Image.Image, colors: int) -> Image.Image:
    return image.quantize(colors, dither=Image.Dither.NONE) if colors else image.convert("L")


def license(style: str) -> str:
    """Return the source of the images and the full text of their license."""
    source = next(icon_set for icon_set in ICON_SETS if icon_set.style == style)
    origin = f"Rendered from {source.package} {source.version} (npm)"
    if source.license == "MIT":
        return f"Fluent Emoji high contrast. {origin}.\n\n{MIT.format(author=source.author)}"
    return (
        f"Noto Emoji, Copyright {source.author} {origin}, resized and reduced to a palette.\n"
        f"Licensed under the Apache License, Version 2.0, whose text follows; it is also at\n"
        f"https://www.apache.org/licenses/LICENSE-2.0\n\n{apache()}"
    )


def apache() -> str:
    """Return the Apache license from an installed package that contains the original file.

    Raises:
        ValueError: the package ships another text.
    """
    packages = Path(str(importlib.metadata.distribution("datasets").locate_file("")))
    text = next(packages.glob("datasets-*.dist-info/licenses/LICENSE")).read_bytes()
    if hashlib.sha256(text).hexdigest() != APACHE_SHA256:
        raise ValueError("datasets' LICENSE is not the Apache Foundation's text; take it from apache.org instead")
    return text.decode()


MIT = """MIT License

Copyright (c) {author}

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


if __name__ == "__main__":
    main()
