"""Runs one case: what the server makes of the file, beside what is expected of it."""

import numpy as np

from pictures.case import Array, Case, Made, Skip, Within
from pictures.second import shown_by
from redux_server.pictures.decode import DecodeError, decode_image

RIGHT, REFUSED, ALLOWED = "right", "refused rightly", "refused, as may be"
AGREES = "agrees"


def outcome(case: Case, made: Made) -> str:
    """One of the words above. Raises ``AssertionError`` for the wrong pixels or a wrong refusal."""
    try:
        image = decode_image(made.data)
    except DecodeError as error:
        if made.expected is None:
            assert error.reason in made.refused, f"refused as {error.reason!r}, {error}"
            return REFUSED
        assert error.reason in case.may_refuse, f"refused as {error.reason!r}, {error}"
        return ALLOWED
    assert made.expected is not None, f"shown, not refused as {' or '.join(made.refused)}"
    assert image.mode == "RGB"
    shown = np.asarray(image)
    if made.reduced:
        _compare_reduced(shown, made)
    else:
        compare(shown, made.expected, made.within)
    return RIGHT


def second_word(made: Made) -> str:
    """Asks the second decoder, if one is named: "agrees", "" or what this machine lacks."""
    if not made.second or made.expected is None:
        return ""
    try:
        shown = shown_by(made.second, made.data)
    except Skip as missing:
        return str(missing)
    compare(shown, made.expected, made.second_within or made.within)
    return AGREES


def compare(shown: Array, expected: Array, within: Within) -> None:
    """Raises ``AssertionError`` with how far they differ, and where."""
    assert shown.shape == expected.shape, f"the size is {shown.shape}, not {expected.shape}"
    difference = np.abs(shown.astype(int) - expected)
    at = np.unravel_index(difference.argmax(), difference.shape)[:2]
    assert difference.max() <= within.most and difference.mean() <= within.mean, (
        f"off by up to {difference.max()} levels ({difference.mean():.2f} on average, "
        f"{(difference.max(-1) > within.most).mean():.0%} of the pixels by more than "
        f"{within.most}); at row {at[0]}, column {at[1]} it is {shown[at]}, not {expected[at]}"
    )


def _compare_reduced(shown: Array, made: Made) -> None:
    """Squares of one colour, whatever the size: their middles are compared."""
    assert made.expected is not None
    rows, columns = made.expected.shape[:2]
    ratio = shown.shape[1] / shown.shape[0] / (columns / rows)
    assert abs(ratio - 1) < 0.01, f"the sides are {shown.shape[1]} × {shown.shape[0]}"
    ys = (np.arange(rows) * 2 + 1) * shown.shape[0] // (2 * rows)
    xs = (np.arange(columns) * 2 + 1) * shown.shape[1] // (2 * columns)
    compare(shown[ys][:, xs], made.expected, made.within)
