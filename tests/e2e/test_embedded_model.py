"""What someone sees who types ``make demo`` or ``make serve`` and nothing else."""

import io
import sys
from pathlib import Path
from subprocess import run

import httpx
import numpy as np
from PIL import Image

from e2e.live import LiveServer, data_uri, download, wait_until
from redux_weights.embedded import find_mini


def a_held_out_icon() -> Image.Image:
    """The fourth of the pictures the model is measured with: none it was trained on."""
    with Image.open(find_mini().base.parent / "report" / "inputs.webp") as sheet:
        return sheet.convert("RGB").crop((3 * 128, 0, 4 * 128, 128))


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def colours(image: Image.Image) -> np.ndarray:
    """What is where, coarsely."""
    return np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX), float).ravel()


def likeness(one: Image.Image, two: Image.Image) -> float:
    return float(np.corrcoef(colours(one), colours(two))[0, 1])


def test_the_demo_without_any_option_varies_the_bundled_icon(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "redux_server", "demo", "--out", str(out), "--device", "cpu"]
    done = run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert "'mini' is small and was trained on icons" in done.stderr
    given = opened(out / "input.png")
    made = [opened(path) for path in sorted(out.glob("variation-*.png"))]
    assert len(made) == 2
    assert all(image.size == (512, 512) for image in made)
    assert all(likeness(image, given) > 0.85 for image in made)
    assert made[0].tobytes() != made[1].tobytes()


def metrics_of(server: LiveServer) -> str:
    return httpx.get(f"{server.base_url}/metrics", timeout=10).text


def test_a_server_with_its_defaults_varies_an_icon_and_counts_its_caches(tmp_path: Path) -> None:
    icon, buffer = a_held_out_icon(), io.BytesIO()
    icon.save(buffer, "PNG")
    with LiveServer(tmp_path / "data", "--device", "cpu", model="mini") as server:
        assert "trained on icons" in server.log
        request = {"image": data_uri(buffer.getvalue()), "size": "512*512"}
        first = download(server.run({**request, "seed": 1})["outputs"][0])
        other = download(server.run({**request, "seed": 2})["outputs"][0])
        counted = 'flux_redux_cache_hits_total{cache="pictures"} 1.0'
        wait_until(lambda: counted in metrics_of(server), 10)  # told twice a second
        metrics = metrics_of(server)
    assert likeness(first, icon) > 0.85
    assert first.tobytes() != other.tobytes()
    assert "mini (engine, float32)" in first.info["Model"]
    assert 'flux_redux_cache_misses_total{cache="pictures"}' in metrics
