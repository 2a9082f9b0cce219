"""What the images show: defects by name, likeness, diversity, and how equal two targets' are.

Likeness is the cosine between features of an image encoder: it says that two pictures show the same
things, not which of them is the better one. Knows no HTTP; torch is behind ``Encoder``.
"""

import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from redux_server.bench.target import Target
from redux_server.bench.task_client import COMPLETED, Sample
from redux_server.bench.workload import Request, Workload

BLACK_LEVEL = 8
"""A picture without any brighter value than this of 255 is black."""

ONE_COLOUR_SPREAD = 2.0
SAME_DIFFERENCE = 1.0
"""Two pictures that differ by less than this of 255, on average, are the same."""

MARGIN = 0.3
"""So much more an image must look like another input than like its own to be called another's."""

MAX_PIXELS = 4096 * 4096
MAX_PAIRS = 64
SHEET_ROWS = 12
_THUMB = 24
_FORMATS = ("PNG", "JPEG", "WEBP")

Floats = NDArray[np.float64]


class Encoder(Protocol):
    """What tells whether two pictures show the same: ``redux_pipelines.loading.vision`` has one."""

    @property
    def name(self) -> str:
        """Whose weights it has."""
        ...

    def embed(self, picture: Image.Image) -> Any:
        """Features ``(D,)`` of length 1."""
        ...


@dataclass(slots=True)
class Seen:
    """What is kept of one output. ``thumb`` is ``(24, 24, 3)``, 0…255."""

    sample: Sample
    request: Request
    place: int
    digest: bytes
    thumb: Floats
    level: int
    spread: float
    features: Floats | None

    @property
    def is_flagged(self) -> bool:
        """Whether the target says that its safety checker withheld it."""
        return self.place < len(self.sample.flagged) and self.sample.flagged[self.place]

    @property
    def is_black(self) -> bool:
        """Whether nothing can be seen."""
        return self.level <= BLACK_LEVEL

    @property
    def shows_something(self) -> bool:
        """Whether it can be compared with others."""
        return not self.is_flagged and not self.is_black


@dataclass(slots=True)
class Quality:
    """Figures by target, figures between targets, and defects in words."""

    encoder: str = ""
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    between: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """As reports have it, without the findings."""
        return {"encoder": self.encoder, "targets": self.targets, "between": self.between}


def read_output(path: Path) -> Image.Image:
    """An output in RGB. Raises ``ValueError`` for what is no picture that can be shown."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}*{image.height} pixels")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or "no picture") from None


class Assessment:
    """Looks at the outputs of all completed samples under a folder, one at a time.

    Samples whose images are of no use are no longer completed afterwards: their outcome is
    ``undecodable`` or ``wrong_size``.
    """

    def __init__(
        self,
        workload: Workload,
        targets: Sequence[Target],
        folder: Path,
        encoder: Encoder | None = None,
    ) -> None:
        self._workload = workload
        self._targets = targets
        self._folder = folder
        self._encoder = encoder
        self._quality = Quality(encoder.name if encoder else "")
        self._seen: dict[str, list[Seen]] = {target.name: [] for target in targets}

    def assess(
        self, samples: Sequence[Sample], show: Callable[[int, int], None] = lambda *_: None
    ) -> Quality:
        """Look at everything; ``show`` is called with how many samples were looked at."""
        for count, sample in enumerate(samples, 1):
            if sample.outcome == COMPLETED:
                self._look(sample)
            show(count, len(samples))
        inputs = _Inputs(self._workload, self._encoder)
        for target in self._targets:
            self._judge(target.name, inputs)
        for one, two in combinations(self._targets, 2):
            self._compare(one, two)
        return self._quality

    def _look(self, sample: Sample) -> None:
        request = self._workload.request(sample.index)
        found = []
        for place, name in enumerate(sample.outputs):
            try:
                image = read_output(self._folder / name)
            except ValueError as error:
                sample.outcome, sample.detail = "undecodable", str(error)[:200]
                return
            if image.size != request.size:
                wanted, got = ("*".join(map(str, each)) for each in (request.size, image.size))
                sample.outcome, sample.detail = "wrong_size", f"{got} instead of {wanted}"
                return
            found.append(self._see(sample, request, place, image))
        self._seen[sample.target] += found

    def _see(self, sample: Sample, request: Request, place: int, image: Image.Image) -> Seen:
        extremes = image.getextrema()
        pixels = image.tobytes()
        return Seen(
            sample,
            request,
            place,
            hashlib.sha256(pixels).digest(),
            _thumb(image),
            max(int(high) for _, high in extremes),  # type: ignore[misc]  # RGB: pairs
            float(np.asarray(image.reduce(4), np.float64).std(axis=(0, 1)).max()),
            None if self._encoder is None else np.asarray(self._encoder.embed(image), np.float64),
        )

    # --- one target -------------------------------------------------------------------------------

    def _judge(self, name: str, inputs: "_Inputs") -> None:
        seen = self._seen[name]
        flagged = sum(each.is_flagged for each in seen)
        likeness = [x for each in seen if (x := inputs.likeness(each)) is not None]
        self._quality.targets[name] = {
            "images": len(seen),
            "safety_checker_fired": flagged,
            "likeness_to_input": _spread_of(likeness),
            "diversity_over_seeds": _diversity(seen),
        }
        say = self._quality.findings.append
        for text in (
            _say_black(seen),
            _say_one_colour(seen),
            _say_same_for_all_seeds(seen, self._workload),
            _say_same_for_all_pictures(seen),
            _say_anothers(seen, inputs, self._workload),
        ):
            if text:
                say(f"{name}: {text}")

    # --- two targets ------------------------------------------------------------------------------

    def _compare(self, one: Target, two: Target) -> None:
        pairs = self._pairs(one.name, two.name)
        told: dict[str, Any] = {"images": len(pairs)}
        alike = [_cosine(a.features, b.features) for a, b in pairs if a.features is not None]
        told["likeness"] = _spread_of([each for each in alike if each is not None])
        if one.weights and one.weights == two.weights:
            signals = [self._signals(a, b) for a, b in pairs[:MAX_PAIRS]]
            told["psnr_db"] = _spread_of([psnr for psnr, _ in signals])
            told["ssim"] = _spread_of([ssim for _, ssim in signals])
            told["equal_pixels"] = sum(a.digest == b.digest for a, b in pairs)
        self._quality.between[f"{two.name}/{one.name}"] = told

    def _pairs(self, one: str, two: str) -> list[tuple[Seen, Seen]]:
        """Images of the same request that both show something."""
        theirs = {(each.request.index, each.place): each for each in self._seen[two]}
        pairs = [
            (each, theirs[key])
            for each in self._seen[one]
            if (key := (each.request.index, each.place)) in theirs
        ]
        return [(a, b) for a, b in pairs if a.shows_something and b.shows_something]

    def _signals(self, one: Seen, two: Seen) -> tuple[float, float]:
        images = [
            np.asarray(read_output(self._folder / each.sample.outputs[each.place]), np.float64)
            for each in (one, two)
        ]
        return psnr(*images), ssim(*images)


class _Inputs:
    """The pictures of a workload as outputs are compared with them."""

    def __init__(self, workload: Workload, encoder: Encoder | None) -> None:
        opened = [picture.open() for picture in workload.pictures]
        self.known = [place for place, image in enumerate(opened) if image is not None]
        images = [image for image in opened if image is not None]
        self._thumbs = [_thumb(image) for image in images]
        self._features = [
            np.asarray(encoder.embed(image), np.float64) for image in images if encoder
        ]
        self._mean = np.mean(self._features, axis=0) if self._features else None

    def likeness(self, seen: Seen) -> float | None:
        """Cosine of the features of an output and of its own input."""
        if seen.request.picture not in self.known or not seen.shows_something or not self._features:
            return None
        return _cosine(seen.features, self._features[self.known.index(seen.request.picture)])

    def nearest(self, seen: Seen) -> int | None:
        """The picture that an output looks like, if that is another than its own, by far."""
        if seen.request.picture not in self.known or len(self.known) < 2:
            return None
        scores = np.array([_correlation(seen.thumb, thumb) for thumb in self._thumbs])
        if self._mean is not None and seen.features is not None:
            # away from what all have in common, or they would all be alike
            centred = seen.features - self._mean
            others = [_cosine(centred, each - self._mean) or 0.0 for each in self._features]
            scores = (scores + np.array(others)) / 2
        best = int(scores.argmax())
        if scores[best] - scores[self.known.index(seen.request.picture)] <= MARGIN:
            return None
        return self.known[best]


# --- defects --------------------------------------------------------------------------------------


def _say_black(seen: Sequence[Seen]) -> str:
    count = sum(each.is_black and not each.is_flagged for each in seen)
    where = next((each for each in seen if each.is_black and not each.is_flagged), None)
    if where is None:
        return ""
    return (
        f"{count} of {len(seen)} images are black, though its safety checker was not said to have "
        f"fired (request {where.request.index})"
    )


def _say_one_colour(seen: Sequence[Seen]) -> str:
    plain = [each for each in seen if each.spread < ONE_COLOUR_SPREAD and each.shows_something]
    if not plain:
        return ""
    return (
        f"{len(plain)} of {len(seen)} images are of one colour (request {plain[0].request.index})"
    )


def _say_same_for_all_seeds(seen: Sequence[Seen], workload: Workload) -> str:
    groups = [group for group in _by_picture(seen).values() if len(group) > 1]
    same = [group for group in groups if all(_is_same(group[0], each) for each in group[1:])]
    if not same:
        return ""
    name = workload.pictures[same[0][0].request.picture].name
    return (
        f"the same picture for all seeds: of {len(same)} of {len(groups)} inputs (such as {name}) "
        f"each seed gave one and the same image"
    )


def _say_same_for_all_pictures(seen: Sequence[Seen]) -> str:
    pictures: dict[bytes, set[int]] = defaultdict(set)
    for each in seen:
        if each.shows_something:
            pictures[each.digest].add(each.request.picture)
    shared = [places for places in pictures.values() if len(places) > 1]
    if not shared:
        return ""
    return (
        f"another's picture: one and the same image came for {max(map(len, shared))} different "
        "input pictures"
    )


def _say_anothers(seen: Sequence[Seen], inputs: _Inputs, workload: Workload) -> str:
    wrong = [
        (each, place)
        for each in seen
        if each.shows_something and (place := inputs.nearest(each)) is not None
    ]
    if not wrong:
        return ""
    each, place = wrong[0]
    own, other = (workload.pictures[i].name for i in (each.request.picture, place))
    return (
        f"another's picture: {len(wrong)} of {len(seen)} images look like another input than their "
        f"own (request {each.request.index} looks like {other}, not like {own})"
    )


# --- figures --------------------------------------------------------------------------------------


def psnr(one: Floats, two: Floats) -> float:
    """Peak signal-to-noise ratio in dB of values 0…255; 100 for equal ones."""
    error = float(((one - two) ** 2).mean())
    return 100.0 if error == 0 else min(100.0, 10 * float(np.log10(255**2 / error)))


def ssim(one: Floats, two: Floats) -> float:
    """Structural similarity of the luminance of ``(H, W, 3)``, 0…255.

    Wang et al., "Image quality assessment" (2004): a Gaussian window of 11 with sigma 1.5,
    K1 = 0.01, K2 = 0.03; only places where the window is whole count.
    """
    weights = np.array([0.299, 0.587, 0.114])
    x, y = one @ weights, two @ weights
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((luminance * structure).mean())


def _blur(plane: Floats) -> Floats:
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    for axis in (0, 1):
        length = plane.shape[axis] - 10
        parts = [np.take(plane, range(i, i + length), axis) * w for i, w in enumerate(window)]
        plane = np.sum(parts, axis=0)
    return plane


def _diversity(seen: Sequence[Seen]) -> dict[str, Any] | None:
    """1 - cosine (without an encoder 1 - correlation) of images of one input with other seeds."""
    apart = []
    for group in _by_picture(seen).values():
        for one, two in list(combinations(group, 2))[:MAX_PAIRS]:
            cosine = _cosine(one.features, two.features)
            apart.append(1 - (_correlation(one.thumb, two.thumb) if cosine is None else cosine))
    return _spread_of(apart)


def _by_picture(seen: Sequence[Seen]) -> Mapping[int, list[Seen]]:
    groups: dict[int, list[Seen]] = defaultdict(list)
    for each in seen:
        if each.shows_something:
            groups[each.request.picture].append(each)
    return groups


def _is_same(one: Seen, two: Seen) -> bool:
    return one.digest == two.digest or float(abs(one.thumb - two.thumb).mean()) < SAME_DIFFERENCE


def _thumb(image: Image.Image) -> Floats:
    small = image.resize((_THUMB, _THUMB), Image.Resampling.BOX)
    return np.asarray(small, np.float64)


def _correlation(one: Floats, two: Floats) -> float:
    return _cosine(one - one.mean(), two - two.mean()) or 0.0


def _cosine(one: Floats | None, two: Floats | None) -> float | None:
    """None where there is nothing to compare."""
    if one is None or two is None:
        return None
    length = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float((one * two).sum()) / length if length else None


def _spread_of(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean and least of some figures; None for none."""
    if not values:
        return None
    return {"mean": round(float(np.mean(values)), 4), "least": round(float(min(values)), 4),
            "count": len(values)}  # fmt: skip


def small_jpeg(image: Image.Image, side: int = 168) -> bytes:
    """A small copy for a contact sheet."""
    copy = image.copy()
    copy.thumbnail((side, side))
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
