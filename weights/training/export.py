"""Writes the trained parts as two checkpoints in diffusers' layout, weights in bfloat16.

    python -m training.export --work DIR

The folders are those of FLUX.1-dev and FLUX.1-Redux-dev. Knows no training.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from training import vocabulary
from training.flow import make_scheduler
from training.model import MiniModel
from training.progress import load_checkpoint
from training.settings import FULL, SMOKE, ModelSizes, Sizes
from training.workplace import DEFAULT_ROOT, Workplace

MOST_BYTES = 40_000_000
_CARD = Path(__file__).parent / "card.md"


class ExportError(RuntimeError):
    """There is nothing to export, or it became too large."""


def export(place: Workplace, sizes: Sizes) -> int:
    """Write ``place.base`` and ``place.redux`` anew; returns their size in bytes.

    Takes the averaged weights of the joint model's checkpoint. Raises ``ExportError``.
    """
    state = load_checkpoint(place.model / "model.pt")
    if state is None:
        raise ExportError(f"{place.model} has no model.pt: run training.train_model first")
    clip, t5 = vocabulary.load(place.model)
    channels = sizes.autoencoder.latent_channels
    model = MiniModel(sizes.model, channels, len(clip), len(t5))
    model.load_state_dict(state["average"]["weights"])
    for folder in (place.base, place.redux):
        shutil.rmtree(folder, ignore_errors=True)
    _write_base(place, model, clip, t5)
    _write_redux(place, model)
    size = sum(f.stat().st_size for f in place.base.parent.rglob("*") if f.is_file())
    if size > MOST_BYTES:
        raise ExportError(f"{size} bytes were written, at most {MOST_BYTES} are allowed")
    return size


def _write_base(place: Workplace, model: MiniModel, clip: Any, t5: Any) -> None:
    vae = AutoencoderKL.from_pretrained(place.vae)
    parts: dict[str, Any] = {
        "transformer": model.transformer.bfloat16(),
        "vae": vae.to(torch.bfloat16),
        "scheduler": make_scheduler(),
        "text_encoder": model.text_encoder.bfloat16(),
        "tokenizer": clip,
        "text_encoder_2": model.text_encoder_2.bfloat16(),
        "tokenizer_2": t5,
    }
    for name, part in parts.items():
        part.save_pretrained(place.base / name)
    _forget_origin(place.base / "vae" / "config.json")
    classes = {name: [_library(part), type(part).__name__] for name, part in parts.items()}
    _write_index(place.base, "FluxPipeline", classes)
    shutil.copy(_CARD, place.base / "README.md")


def _write_redux(place: Workplace, model: MiniModel) -> None:
    model.image_encoder.bfloat16().save_pretrained(place.redux / "image_encoder")
    model.image_embedder.bfloat16().save_pretrained(place.redux / "image_embedder")
    folder = place.redux / "feature_extractor"
    _write_json(folder / "preprocessor_config.json", _preprocessing(model.sizes))
    classes = {
        "image_encoder": ["transformers", "SiglipVisionModel"],
        "image_embedder": ["flux", "ReduxImageEncoder"],
        "feature_extractor": ["transformers", "SiglipImageProcessor"],
    }
    _write_index(place.redux, "FluxPriorReduxPipeline", classes)


def _preprocessing(sizes: ModelSizes) -> dict[str, Any]:
    """As in FLUX.1-Redux-dev but for the size: squashed by bicubic resampling to -1…1."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": sizes.encoder_side, "width": sizes.encoder_side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _forget_origin(config: Path) -> None:
    """Drop the path on this machine that diffusers notes in what it saves again."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    _write_json(config, values)


def _library(part: Any) -> str:
    return "transformers" if type(part).__module__.startswith("transformers") else "diffusers"


def _write_index(folder: Path, pipeline: str, classes: dict[str, list[str]]) -> None:
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    _write_json(folder / "model_index.json", {**index, **classes})


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=DEFAULT_ROOT)
    parser.add_argument("--smoke", action="store_true", help="the toy sizes of the tests")
    options = parser.parse_args()
    size = export(Workplace(options.work), SMOKE if options.smoke else FULL)
    print(f"{size / 1e6:.1f} MB in {Workplace(options.work).base.parent}")


if __name__ == "__main__":
    main()
