"""Render icon packages of the npm registry: one PNG per icon and style, 256 px on white.

In: the pinned packages below (``npm pack``).  Out: ``base/build/icons/<style>/<slug>.png``.
Run: ``python -m base.render``
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

BUILD = Path("base/build")
RENDER_PIXELS = 256


@dataclass(frozen=True)
class IconSet:
    """One style: an npm package of SVG bodies, pinned by version and sha512."""

    style: str
    package: str
    version: str
    integrity: str
    license: str
    author: str


ICON_SETS = (
    IconSet(
        "flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Microsoft Corporation",
    ),
    IconSet(
        "ink",
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "MIT",
        "Microsoft Corporation",
    ),
    IconSet(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Google Inc.",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="processes that render (default: 2)")
    args = parser.parse_args()
    for icon_set in ICON_SETS:
        archive = download(icon_set, BUILD / "npm")
        bodies, categories = read_bodies(archive)
        (BUILD / "icons" / icon_set.style).mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(args.workers) as pool:
            jobs = [
                pool.submit(render, svg, BUILD / "icons" / icon_set.style / f"{slug}.png")
                for slug, svg in bodies.items()
            ]
            for job in jobs:
                job.result()
        (BUILD / "icons" / f"{icon_set.style}.json").write_text(json.dumps(categories, indent=1, sort_keys=True))
        print(f"{icon_set.style}: {len(bodies)} icons from {icon_set.package}@{icon_set.version} ({icon_set.license})")


def download(icon_set: IconSet, folder: Path) -> Path:
    """Return the package's archive, fetched by ``npm pack`` once and checked against its sha512.

    Raises:
        ValueError: the archive is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = icon_set.package.removeprefix("@").replace("/", "-")
    archive = folder / f"{name}-{icon_set.version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", f"{icon_set.package}@{icon_set.version}"], cwd=folder, check=True)
    digest = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != icon_set.integrity:
        raise ValueError(f"{archive}: {digest}, expected {icon_set.integrity}; delete the file and run again")
    return archive


def read_bodies(archive: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return {slug: svg} for the icons with a code point of their own, and {category: slugs}.

    Only some packages have categories.
    Skin-tone and gender variants are left out: they are sequences of several code points.
    """
    with tarfile.open(archive) as tar:
        icons, chars, metadata = (
            json.load(tar.extractfile(f"package/{name}.json"))  # type: ignore[arg-type]
            for name in ("icons", "chars", "metadata")
        )
    slugs = {slug for code, slug in chars.items() if "-" not in code.removesuffix("-fe0f")}
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}">{body}</svg>'
    bodies = {
        slug: svg.format(w=icon.get("width", icons["width"]), h=icon.get("height", icons["height"]), body=icon["body"])
        for slug, icon in sorted(icons["icons"].items())
        if slug in slugs
    }
    categories = {name: [s for s in members if s in bodies] for name, members in metadata.get("categories", {}).items()}
    return bodies, categories


def render(svg: str, path: Path) -> None:
    """Render one SVG to a square PNG of RENDER_PIXELS on white. A margin keeps the icon away from the edge."""
    import resvg_py

    if path.exists():
        return
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_PIXELS, background="#ffffff", skip_system_fonts=True)
    Image.open(io.BytesIO(bytes(png))).convert("RGB").resize(
        (RENDER_PIXELS, RENDER_PIXELS), Image.Resampling.LANCZOS
    ).save(path)


if __name__ == "__main__":
    main()
