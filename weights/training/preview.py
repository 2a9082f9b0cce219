"""Fits the linear map by which previews are made of the mini model's latents.

    python -m training.preview

The map is stored beside the autoencoder, with how it was fitted. It is the least-squares solution
of latents × factors + bias = colours, over pictures drawn by formulas from a fixed seed, so that
anyone gets the same numbers offline: latents as they are denoised, and the mean colour of what the
decoder makes of each. Told beside it: the share of the colours' variance that it explains, on
drawings of the model's report that were not fitted.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from redux_weights.embedded import find_mini
from training import autoencoder

FILE = "preview.json"
PICTURES = 384
SEED = 0
SIDE = 128
_REPORT = Path(__file__).parents[1] / "mini" / "report" / "inputs.webp"


def drawings(rng: Generator, count: int) -> Tensor:
    """Shapes of random colours on a ground of another, and soft noise: ``(count, 3, 128, 128)``."""
    pictures = [_drawing(rng) if i % 3 else _noise(rng) for i in range(count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _drawing(rng: Generator) -> NDArray[np.uint8]:
    picture = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    picture[:] = 255 if rng.random() < 0.5 else rng.integers(0, 256, 3)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE * 2 - 1
    for _ in range(rng.integers(1, 6)):
        dx, dy, angle = (*rng.uniform(-0.6, 0.6, 2), rng.uniform(0, np.pi))
        u = (x - dx) * np.cos(angle) + (y - dy) * np.sin(angle)
        v = (y - dy) * np.cos(angle) - (x - dx) * np.sin(angle)
        width, height = rng.uniform(0.1, 0.8, 2)
        power = rng.choice([2, 8])  # an ellipse, or nearly a rectangle
        inside = np.abs(u / width) ** power + np.abs(v / height) ** power < 1
        picture[inside] = rng.integers(0, 256, 3)
    return picture


def _noise(rng: Generator) -> NDArray[np.uint8]:
    cells = int(rng.integers(2, 9))
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def report_drawings() -> Tensor:
    """The drawings that the model's report begins with: ``(N, 3, 128, 128)``."""
    with Image.open(_REPORT) as sheet:
        rgb = torch.from_numpy(np.asarray(sheet.convert("RGB"))).permute(2, 0, 1)
    cells = rgb.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE).flatten(1, 2)
    return cells.transpose(0, 1).float() / 127.5 - 1


@torch.no_grad()
def pairs(core: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled latents ``(N, C)`` of all latent pixels, and the colours ``(N, 3)`` they decode to."""
    config = core.config
    latents, colours = [], []
    for part in torch.split(pictures, 32):
        encoded = core.encode(part).latent_dist.mode()
        decoded = core.decode(encoded).sample.clamp(-1, 1)
        factor = decoded.shape[-1] // encoded.shape[-1]
        means = torch.nn.functional.avg_pool2d(decoded, factor)
        scaled = (encoded - config.shift_factor) * config.scaling_factor
        latents.append(scaled.permute(0, 2, 3, 1).flatten(0, 2))
        colours.append(means.permute(0, 2, 3, 1).flatten(0, 2))
    return torch.cat(latents), torch.cat(colours)


def fit(latents: Tensor, colours: Tensor) -> Tensor:
    """Factors and, last, the bias: ``(C + 1, 3)``."""
    ones = torch.ones(len(latents), 1, dtype=torch.float64)
    given = torch.cat([latents.double(), ones], 1)
    solution: Tensor = torch.linalg.lstsq(given, colours.double()).solution
    return solution


def explained(solution: Tensor, latents: Tensor, colours: Tensor) -> float:
    """The share of the variance of ``colours`` that the map explains: 1 for all of it."""
    told = latents.double() @ solution[:-1] + solution[-1]
    return float(1 - (told - colours).var() / colours.double().var())


def write(vae: Path) -> float:
    """Fit the map of the autoencoder in the folder ``vae``, and store it there.

    Returns the share of the variance that it explains on the report's drawings.
    """
    core = autoencoder.shrink(AutoencoderKL.from_pretrained(vae).float())
    solution = fit(*pairs(core, drawings(np.random.default_rng(SEED), PICTURES)))
    share = explained(solution, *pairs(core, report_drawings()))
    rows = [[round(value, 4) for value in row] for row in solution.tolist()]
    text = {
        "factors": rows[:-1],
        "bias": rows[-1],
        "fitted": f"by training.preview (make fit-preview): least squares over {PICTURES} pictures "
        f"drawn by formulas, seed {SEED}; explains {share:.1%} of the colours' variance on the "
        "held-out drawings of report/inputs.webp",
    }
    (vae / FILE).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    return share


def main() -> None:
    """Fit it for the embedded model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vae", type=Path, default=find_mini().base / "vae")
    vae = parser.parse_args().vae
    print(f"{vae / FILE}: explains {write(vae):.1%} of the colours' variance")


if __name__ == "__main__":
    main()
