"""What the model is told in words about its target: nothing, a style, or a style and a name."""

from collections.abc import Iterator, Sequence

from numpy.random import Generator

STYLE_WORDS = {
    "noto": ("noto", "cartoon", "cartoon style", "noto emoji"),
    "flat": ("flat", "flat icon", "flat design", "flat style"),
    "3d": ("3d", "3d render", "3d icon", "glossy 3d"),
    "photo": ("photo", "photograph", "realistic photo"),
    "texture": ("texture", "pattern", "abstract pattern"),
}
_FORMS = ("{style}, {name}", "{name}, {style}", "{style} {name}", "{style} of {name}", "{name}")


def caption(rng: Generator, style: str, name: str, chances: tuple[float, float]) -> str:
    """A random caption: empty or the style alone with the given ``chances``, else with the name."""
    draw = rng.random()
    if draw < chances[0]:
        return ""
    style_word = str(rng.choice(STYLE_WORDS[style]))
    words = style_word
    if name and draw >= sum(chances):
        words = str(rng.choice(_FORMS)).format(style=style_word, name=name)
    return words.capitalize() if rng.random() < 0.2 else words


def all_captions(names: Sequence[str]) -> Iterator[str]:
    """Every wording at least once, for learning a vocabulary: names are not repeated often."""
    for words in STYLE_WORDS.values():
        for word in words:
            for form in _FORMS[:4]:
                yield form.format(style=word, name="a")
    for name in names:
        yield name
        yield name.capitalize()
