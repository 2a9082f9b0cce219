"""Makes the mini model from nothing: fetch, autoencoder, joint training, export, evaluation.

    python -m training.train --work DIR --autoencoder-minutes 60 --minutes 150

Every stage is skipped when its result is there, and goes on where it was stopped. ``--smoke`` does
it all in toy sizes on synthetic pictures. Knows only the order of things.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from redux_weights.embedded import Checkpoint
from training import (
    autoencoder,
    cli,
    export,
    fetch,
    synthetic,
    train_autoencoder,
    train_model,
    train_upsampler,
)
from training.dataset import load_icons
from training.evaluate import Extent, evaluate
from training.settings import FULL, SMOKE
from training.workplace import Workplace


def get_data(place: Workplace, *, is_synthetic: bool) -> None:
    """Fetch the real pictures or draw synthetic ones."""
    if not is_synthetic:
        fetch.fetch(place)
    elif not (place.data / "icons.json").is_file():
        synthetic.write_icons(place.data)
        synthetic.write_photos(place.photos)


def take_autoencoder(place: Workplace, finished: Path) -> None:
    """Use the ``finished`` f32 autoencoder, in diffusers' layout, instead of training one."""
    vae = AutoencoderKL.from_pretrained(finished).float()
    vae.save_pretrained(place.vae)
    autoencoder.shrink(vae).save_pretrained(place.core)


def main() -> None:
    """Command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("--autoencoder", type=Path, help="use this finished one, train none")
    parser.add_argument("--autoencoder-minutes", type=float, default=60.0)
    parser.add_argument("--upsampler-minutes", type=float, default=10.0)
    parser.add_argument("--minutes", type=float, default=150.0, help="of joint training")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    place, sizes = Workplace(options.work), SMOKE if options.smoke else FULL
    get_data(place, is_synthetic=options.smoke)
    if options.autoencoder:
        take_autoencoder(place, options.autoencoder)
    elif not (place.vae / "config.json").is_file():
        clock = cli.make_clock(options.autoencoder_minutes)
        train_autoencoder.train(place, sizes, clock)
    if not (options.smoke or options.autoencoder):
        train_upsampler.train(place, cli.make_clock(options.upsampler_minutes))
    train_model.train(place, sizes, cli.make_clock(options.minutes))
    size = export.export(place, sizes)
    print(f"{size / 1e6:.1f} MB in {place.base.parent}")
    extent = Extent(4, 2, 2, 2, 2, steps=2) if options.smoke else Extent()
    made = Checkpoint(place.base, place.redux)
    icons = load_icons(place.data, sizes.held_out)
    report = evaluate(made, icons, place.photos, place.report, extent=extent)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
