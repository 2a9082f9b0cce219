"""Flags of ``generate`` and ``submit`` for the parameters in ``redux_server.extensions``."""

import argparse

from redux_pipelines.types import (
    EMPTY_PROMPTS,
    FITS,
    MAX_PICTURES,
    MAX_POOLING,
    MAX_WEIGHT,
    OUTPUT_FORMATS,
)


def add_extension_flags(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a flag for each; one that is not given is no part of the request."""
    group = parser.add_argument_group("what of the pictures counts, and how much")
    _add_pictures(group)
    weight = f"0 to {MAX_WEIGHT:g}"
    group.add_argument(
        "--image-weights",
        type=numbers,
        default=argparse.SUPPRESS,
        metavar="W,W",
        help=f"one number a picture, IMAGE's first, {weight} (default: 1 for each)",
    )
    group.add_argument(
        "--redux-strength",
        type=float,
        default=argparse.SUPPRESS,
        metavar="S",
        help=f"how much the pictures count, {weight} (default: 1)",
    )
    group.add_argument(
        "--redux-pooling",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help=f"tokens a side, 1 to {MAX_POOLING}; fewer keep less of the layout "
        f"(default: {MAX_POOLING})",
    )
    for name, words, help_ in (
        ("fit", FITS, "how pictures become squares (default: squash)"),
        ("empty-prompt", EMPTY_PROMPTS, "what no prompt is (default: zeros)"),
        ("output-format", OUTPUT_FORMATS, "kind of file of the images (default: png)"),
    ):
        group.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            metavar="{" + ",".join(words) + "}",
            help=help_,
        )


def _add_pictures(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help=f"up to {MAX_PICTURES - 1} more pictures to vary at the same time",
    )
    group.add_argument(
        "--mask", default="", metavar="IMAGE", help="what of IMAGE counts is white in this one"
    )


def numbers(text: str) -> list[float]:
    """``"1,0.5"`` as numbers; argparse names this function where it is none."""
    return [float(number) for number in text.split(",")]
