"""What a memory plan says: parts and their places, stages and their peaks, for people and for code.

Imports no torch. Knows no arithmetic of models: ``memory`` makes plans.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from redux_pipelines.activations import Demand
from redux_pipelines.cards import Card
from redux_pipelines.types import MAX_SIDE

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_LARGEST = Demand(MAX_SIDE, MAX_SIDE)


class Place(StrEnum):
    """Where a part of the model lives."""

    GPU = "gpu"
    ON_DEMAND = "on demand"  # in host memory; on the GPU while it is used
    STREAMED = "streamed"  # in host memory; layer by layer through buffers on the GPU


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model: its bytes, where they live, and what passes when it is used."""

    name: str
    size_bytes: int
    place: Place
    passing_bytes: int = 0

    @property
    def resident_bytes(self) -> int:
        """On the GPU all the time."""
        return self.size_bytes if self.place is Place.GPU else 0


@dataclass(frozen=True, slots=True)
class Options:
    """What a plan is made for. ``demand`` is the largest request; ``is_fp8``: fp8 matrices."""

    dtype: str = "bfloat16"
    is_fp8: bool = False
    demand: Demand = _LARGEST

    @property
    def element_bytes(self) -> int:
        """Of ``dtype``."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def dtype_name(self) -> str:
        """For people."""
        return f"{self.dtype} with fp8" if self.is_fp8 else self.dtype


@dataclass(frozen=True, slots=True)
class Plan:
    """What lives where, and what each stage then takes at its peak, in bytes.

    ``streamed_blocks`` are the indices of blocks that stream, doubles first. A picture of up to
    ``tile_above_pixels`` can be decoded in one piece, a larger one in strips. ``largest_sides``: of
    the largest square images that fit, 0 for none, by how many pictures they vary, one to
    ``MAX_PICTURES``, and by how many are denoised at once, one to the batch asked for;
    ``largest_batch``: of 1024², of one picture. Both are for requests with a prompt.
    """

    mode: str
    card: Card
    options: Options
    parts: tuple[Part, ...]
    stages: dict[str, int]
    streamed_blocks: tuple[int, ...] = ()
    tile_above_pixels: int = MAX_SIDE**2
    largest_sides: tuple[tuple[int, ...], ...] = field(default=(), compare=False)
    largest_batch: int = field(default=0, compare=False)

    @property
    def largest_side(self) -> int:
        """Of the largest square image of one picture that fits with the batch asked for; or 0."""
        return self.largest_sides[0][-1] if self.largest_sides else 0

    @property
    def resident_bytes(self) -> int:
        """Weights, buffers and full caches that are on the GPU all the time."""
        return sum(part.resident_bytes for part in self.parts)

    @property
    def host_bytes(self) -> int:
        """Weights in (mostly pinned) host memory."""
        return sum(part.size_bytes for part in self.parts if part.place is not Place.GPU)

    @property
    def peak_bytes(self) -> int:
        """Of the hungriest stage, residents included."""
        return max(self.stages.values())

    @property
    def headroom_bytes(self) -> int:
        """What the hungriest stage leaves of the card's budget; negative if it does not fit."""
        return self.card.budget_bytes - self.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the largest request that was asked for does."""
        return self.headroom_bytes >= 0

    @property
    def shortage(self) -> str:
        """What is wrong with a plan that does not fit."""
        limit = f"{self.largest_side}x{self.largest_side}" if self.largest_side else "nothing"
        demand = self.options.demand
        return (
            f"{demand.batch} image(s) of {demand.width}x{demand.height} would take "
            f"{gb(self.peak_bytes)} with --memory {self.mode}, {gb(-self.headroom_bytes)} more "
            f"than {self.card.name} has; what fits is {limit}"
        )

    def refusal(
        self, width: int, height: int, images: int = 1, *, pictures: int = 1, multiple: int = 1
    ) -> str | None:
        """Why ``images`` of that size at once have no room, and what to do; None where they have.

        They vary ``pictures``, with as many tokens as the model has for each. Pixels count,
        whatever their shape; sides are rendered in multiples of ``multiple``.
        """
        sides = (0, *self.largest_sides[pictures - 1])
        side = sides[min(images, len(sides) - 1)]
        rendered = [-(-each // multiple) * multiple for each in (width, height)]
        if rendered[0] * rendered[1] <= side**2:
            return None
        if side:
            limit = f"up to {side}x{side} pixels, or as many of another shape: ask for that, or"
        else:
            limit = "none of any size:"
        several = f" from {pictures} pictures" if pictures > 1 else ""
        fewer = "take fewer pictures or a smaller redux_pooling, or " if pictures > 1 else ""
        return (
            f"{images} image(s) at once of {width}x{height}{several} need more memory than "
            f"{self.card.name} has. Its memory plan ({self.mode}) has room for {limit} "
            f"{fewer}{self._remedy(images)}"
        )

    def _remedy(self, images: int) -> str:
        """What whoever runs the model could do for larger pictures."""
        remedies = ["a larger card"]
        if not self.options.is_fp8:
            remedies.insert(0, "--transformer-dtype fp8")
        if images > 1:
            remedies.insert(0, "a lower --max-batch-size")
        if self.mode != "offload":
            remedies.insert(0, "--memory offload (with --backend engine)")
        return "run the model with " + " or ".join(remedies)

    def place(self, name: str) -> Place | None:
        """Where the part called ``name`` lives; None if the model has none."""
        return next((part.place for part in self.parts if part.name == name), None)

    @property
    def summary(self) -> str:
        """One line."""
        hungriest = max(self.stages, key=lambda name: self.stages[name])
        streamed = f", {len(self.streamed_blocks)} blocks streamed" if self.streamed_blocks else ""
        return (
            f"{self.mode}{streamed}: {gb(self.resident_bytes)} on the GPU, peak "
            f"{gb(self.peak_bytes)} ({hungriest}) of {gb(self.card.budget_bytes)} on "
            f"{self.card.name}, {gb(self.host_bytes)} in host memory, up to "
            f"{self.largest_side}x{self.largest_side}"
        )

    def describe(self) -> str:
        """The whole plan, a line for each part and stage. GB are 10^9 bytes."""
        lines = [f"{self.options.dtype_name}, {self.summary}"]
        lines += [f"  {p.name}: {gb(p.size_bytes)}, {p.place.value}" for p in self.parts]
        lines += [f"  peak of {name}: {gb(size)}" for name, size in self.stages.items()]
        return "\n".join(lines)


def gb(size_bytes: int) -> str:
    """A size as people read it; GB are 10^9 bytes."""
    return f"{size_bytes / 1e9:.1f} GB"
