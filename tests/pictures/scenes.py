"""What the files show, as numbers, and how numbers become what a viewer sees.

All of it in floating point by the definitions, so that nothing here shares code with a decoder.
"""

import numpy as np

from pictures.case import Array

WIDTH, HEIGHT = 37, 26
"""Odd, and no multiple of any block, so that edges count."""


def noise(
    channels: int, bits: int, *, width: int = WIDTH, height: int = HEIGHT, seed: int = 1
) -> Array:
    """(height, width, channels) of whole numbers below 2^bits: each differs from its neighbours."""
    rng = np.random.default_rng([seed, channels, bits])
    return rng.integers(0, 2**bits, (height, width, channels), dtype=np.int64)


def smooth(width: int = 64, height: int = 48) -> Array:
    """(height, width, 3) of uint8 that encoders with loss keep well; no turn leaves it as it is."""
    x = np.linspace(0, 1, width)[None, :]
    y = np.linspace(0, 1, height)[:, None]
    red = 40 + 170 * x + 0 * y
    green = 220 - 150 * y + 0 * x
    blue = 70 + 90 * x * y + 60 * np.sin(3 * x) * (1 - y)
    return np.stack([red, green, blue], -1).round().astype(np.uint8)


def grey_smooth(width: int = 64, height: int = 48) -> Array:
    """The same with one channel, (height, width, 1)."""
    return smooth(width, height)[..., :1] // 2 + smooth(width, height)[..., 1:2] // 2


def smooth_alpha(width: int = 64, height: int = 48) -> Array:
    """(height, width) of uint8: from clear at the left to solid at the right."""
    return np.linspace(0, 255, width).round().astype(np.uint8)[None, :].repeat(height, 0)


def eight(samples: Array, bits: int) -> Array:
    """Samples of ``bits`` on the scale to 255, as floats."""
    return samples * (255.0 / (2**bits - 1))


def whole(levels: Array) -> Array:
    """Floats to uint8, rounded."""
    return np.floor(np.clip(levels, 0, 255) + 0.5).astype(np.uint8)


def rgb(levels: Array) -> Array:
    """(h, w, 1 or 3) of levels to (h, w, 3) of uint8."""
    return whole(np.broadcast_to(levels, (*levels.shape[:2], 3)))


def on_white(levels: Array, alpha: Array) -> Array:
    """Levels with ``alpha`` from 0 to 1, shape (h, w), on white."""
    share = alpha[..., None]
    return rgb(levels * share + 255 * (1 - share))


def upright(stored: Array, orientation: int) -> Array:
    """How EXIF 2.32, 4.6.4 A, has stored rows shown."""
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }[orientation](stored)
    return np.ascontiguousarray(turned)


def palette(colours: int, seed: int = 7) -> Array:
    """(colours, 3) of uint8."""
    return np.random.default_rng([seed, colours]).integers(0, 256, (colours, 3)).astype(np.uint8)
