"""The memory plan: which part of a model lives where on a card, and what then fits.

``plan`` adds up bytes, part by part and stage by stage, and takes the fastest of three modes:

* ``resident``: everything on the GPU;
* ``evict``: the modulation layers in pinned host memory, needed for a new schedule, guidance or
  prompt only; the text encoders on the GPU if there is room, else brought there for a prompt;
* ``offload``: of the blocks only as many on the GPU as have room, the others stream through two
  buffers; text and image encoders are brought there when needed.

Text encoders are absent until the first prompt in every mode. CUDA graphs get what is left: no
mode, and no size that is allowed, is given up for them. Imports no torch; executes nothing
(``loading.components`` and ``memory.offload`` do). Knows no GPU but its budget (``memory.cards``).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

from redux_pipelines.contract.types import (
    MAX_PICTURES,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
    CudaGraphs,
)
from redux_pipelines.errors import MemoryPlanError
from redux_pipelines.memory import activations
from redux_pipelines.memory.activations import Demand
from redux_pipelines.memory.cards import UNSEEN_BYTES, Card
from redux_pipelines.memory.model_sizes import EncoderSize, ModelSizes

MEMORY_MODES = ("auto", "resident", "evict", "offload")
"""What ``--memory`` takes; from ``resident`` on the fastest first."""
CACHE_BYTES = (64 + 64 + 256 + 64) * 2**20
"""Prompts, pictures, modulations and rotations, all full; the limits are theirs."""
BUFFERS = 2
"""Of streamed blocks: one is computed with, the next is on its way."""
HOST_SHARE = 1.04
"""Of weights in host memory what they take there: slabs have room left at their ends, of FLUX.1's
weights at most that much (``memory.host``)."""
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
AUTO_GRAPHS = 8
"""CUDA graphs at most where nobody says how many: four sizes with and without a prompt, say."""
GRAPHED_SIDE = {"bf16": 768, "fp8": 1024}
"""Up to which size then. A graph saves what the host takes to launch a step, and only where the GPU
would wait for it. A step of 1024² takes an H100 120 ms in bfloat16 by our targets, far more than
its launches: a graph gains less than 1 %. At 512² it gains 5 to 15 % in fp8. In fp8 1024² takes
80 ms, about as long as 768² in bfloat16. All of this is computed, none was measured."""
_DEFAULT_PIXELS = 1024**2
_LARGEST = Demand(MAX_SIDE, MAX_SIDE)


class Placement(StrEnum):
    """Where a part of the model lives."""

    GPU = "gpu"
    ON_DEMAND = "on demand"  # in host memory; on the GPU while it is used
    STREAMED = "streamed"  # in host memory; layer by layer through buffers on the GPU


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model: its bytes, where they live, and what passes when it is used."""

    name: str
    size_bytes: int
    placement: Placement
    passing_bytes: int = 0

    @property
    def resident_bytes(self) -> int:
        """On the GPU all the time."""
        return self.size_bytes if self.placement is Placement.GPU else 0


@dataclass(frozen=True, slots=True)
class Options:
    """What a plan is made for. ``demand`` is the largest request; ``is_fp8``: fp8 matrices.

    ``cuda_graphs``: shapes to have room for, ``auto``: as many as are worth it.
    """

    dtype: str = "bfloat16"
    is_fp8: bool = False
    demand: Demand = _LARGEST
    cuda_graphs: CudaGraphs = 0

    @property
    def element_bytes(self) -> int:
        """Of ``dtype``."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def dtype_name(self) -> str:
        """For people."""
        return f"{self.dtype} with fp8" if self.is_fp8 else self.dtype


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """CUDA graphs that there is room for: of so many shapes, of at most so many rows each.

    Rows are those of text and image, of all images of a batch together.
    """

    shapes: int
    rows: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What lives where, and what each stage then takes at its peak, in bytes.

    ``streamed_blocks`` are the indices of blocks that stream, doubles first. A picture of up to
    ``tile_above_pixels`` can be decoded in one piece, a larger one in strips. ``largest_sides``: of
    the largest square images that fit, 0 for none, by how many pictures they vary, one to
    ``MAX_PICTURES``, and by how many are denoised at once, one to the batch asked for;
    ``largest_batch``: of 1024², of one picture. Both are for requests with a prompt. ``graphs``:
    None where none were asked for, of 0 shapes where there is no room for any.
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
    graphs: GraphLimits | None = None

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
        """Of the (page-locked) host memory that weights take, at most."""
        weights = (p.size_bytes for p in self.parts if p.placement is not Placement.GPU)
        return int(HOST_SHARE * sum(weights))

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

    def placement_of(self, name: str) -> Placement | None:
        """Where the part called ``name`` lives; None if the model has none."""
        return next((part.placement for part in self.parts if part.name == name), None)

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
        lines += [f"  {p.name}: {gb(p.size_bytes)}, {p.placement.value}" for p in self.parts]
        lines += [f"  peak of {name}: {gb(size)}" for name, size in self.stages.items()]
        return "\n".join(lines)


def gb(size_bytes: int) -> str:
    """A size as people read it; GB are 10^9 bytes."""
    return f"{size_bytes / 1e9:.1f} GB"


def largest_demand(sizes: ModelSizes, batch: int = 1) -> Demand:
    """What the largest request takes: a prompt, one picture, the longest sides."""
    return Demand(
        width=MAX_SIDE,
        height=MAX_SIDE,
        batch=batch,
        text_rows=1 if sizes.t5 is None else sizes.t5.tokens,
        redux_rows=sizes.siglip.tokens,
    )


def plan(model: ModelSizes, card: Card, options: Options, memory: str = "auto") -> Plan:
    """The fastest plan that fits ``card``, or that of the mode given by ``memory``.

    Where nothing fits the largest request, the plan is that for the largest size that does fit.
    A mode asked for by name is taken even if it does not fit (``Plan.fits``). Raises
    ``MemoryPlanError`` if ``auto`` finds none, ``ValueError`` for a mode that does not exist.
    """
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory={memory!r} is not one of {', '.join(MEMORY_MODES)}")
    modes = MEMORY_MODES[1:] if memory == "auto" else (memory,)
    found = None
    for found in (each for mode in modes for each in _candidates(model, card, options, mode)):
        if found.fits:
            return _with_graphs(model, _with_limits(model, found))
    assert found is not None
    limited = _with_graphs(model, _with_limits(model, found))
    if memory == "auto" and not limited.largest_side:
        raise MemoryPlanError(_refusal(model, limited))
    return limited


def _refusal(model: ModelSizes, found: Plan) -> str:
    demand = replace(found.options.demand, width=MIN_SIDE, height=MIN_SIDE)
    least = max(_stages(model, found, demand).values())
    smaller = "" if found.options.is_fp8 else "weights in fp8, "
    return (
        f"{found.card.name} has {gb(found.card.budget_bytes)} to use, but with every block "
        f"streamed from host memory {MIN_SIDE}x{MIN_SIDE} pixels in {found.options.dtype_name} "
        f"still take {gb(least)}, {gb(found.resident_bytes)} of it all the time: free memory on "
        f"the card, or use {smaller}a lower --max-batch-size, a larger card or --device cpu"
    )


def _candidates(model: ModelSizes, card: Card, options: Options, mode: str) -> Iterator[Plan]:
    """Plans of one mode, the fastest first."""
    if mode == "resident":
        yield _build(model, card, options, mode)
    elif mode == "evict":
        yield _build(model, card, options, mode)
        yield _build(model, card, options, mode, text=Placement.STREAMED)
    else:
        count = len(model.transformer.blocks)
        for streamed in (*range(min(4, count), count, 2), count):
            yield _build(
                model,
                card,
                options,
                mode,
                text=Placement.STREAMED,
                streamed=spread(streamed, count),
            )


def spread(chosen: int, count: int) -> tuple[int, ...]:
    """``chosen`` of ``count`` indices, as evenly as can be: copies then hide behind the rest."""
    return tuple(i for i in range(count) if (i + 1) * chosen // count > i * chosen // count)


def _build(
    model: ModelSizes,
    card: Card,
    options: Options,
    mode: str,
    *,
    text: Placement = Placement.GPU,
    streamed: tuple[int, ...] = (),
) -> Plan:
    parts = (*_blocks(model, options, streamed), *_others(model, options, mode, text))
    return _with_stages(model, Plan(mode, card, options, parts, {}, streamed))


def _with_stages(model: ModelSizes, bare: Plan) -> Plan:
    options = bare.options
    stages = _stages(model, bare, options.demand)
    room = bare.card.budget_bytes - bare.resident_bytes
    per_pixel = activations.decode_bytes(model, MIN_SIDE**2, options.element_bytes) / MIN_SIDE**2
    tile_above = min(max(int(room / per_pixel), 0), MAX_SIDE**2)
    return replace(bare, stages=stages, tile_above_pixels=tile_above)


def _blocks(model: ModelSizes, options: Options, streamed: tuple[int, ...]) -> Iterator[Part]:
    element, is_fp8 = options.element_bytes, options.is_fp8
    sizes = [block.size_bytes(element, is_fp8=is_fp8) for block in model.transformer.blocks]
    passing = [sizes[index] for index in streamed]
    yield Part("blocks", sum(sizes) - sum(passing), Placement.GPU)
    if passing:
        yield Part("streamed blocks", sum(passing), Placement.STREAMED)
        yield Part("block buffers", BUFFERS * max(passing), Placement.GPU)


def _others(model: ModelSizes, options: Options, mode: str, text: Placement) -> Iterator[Part]:
    element = options.element_bytes
    modulation = Placement.GPU if mode == "resident" else Placement.STREAMED
    vision = Placement.ON_DEMAND if mode == "offload" else Placement.GPU
    yield Part("modulation", model.transformer.modulation * element, modulation)
    yield Part("embedders", model.transformer.embedders * element, Placement.GPU)
    if model.t5 is not None:
        yield _text_part("T5", model.t5, text, element)
    if model.clip is not None:
        yield _text_part("CLIP", model.clip, text, element)
    for name, count in (("SigLIP", model.siglip.parameters), ("Redux", model.redux)):
        size = count * element
        yield Part(name, size, vision, size if vision is Placement.ON_DEMAND else 0)
    yield Part("VAE", model.vae * element, Placement.GPU)
    yield Part("caches", CACHE_BYTES, Placement.GPU)


def _text_part(name: str, encoder: EncoderSize, placement: Placement, element_bytes: int) -> Part:
    """When streamed, all but its layers comes to the GPU, and two buffers for these."""
    if placement is Placement.GPU:
        return Part(name, encoder.parameters * element_bytes, placement)
    layers = min(BUFFERS, encoder.layers) * encoder.layer
    rest = encoder.parameters - encoder.layers * encoder.layer
    passing = (max(rest, 0) + layers) * element_bytes
    where = Placement.STREAMED if encoder.layers else Placement.ON_DEMAND
    return Part(name, encoder.parameters * element_bytes, where, passing)


def _stages(model: ModelSizes, of: Plan, demand: Demand) -> dict[str, int]:
    """Peak of each stage at ``demand``."""
    element, is_fp8 = of.options.element_bytes, of.options.is_fp8
    passing = {part.name: part.passing_bytes for part in of.parts}
    text_width = model.transformer.text_width
    rows = activations.rows_of(demand, model.size_multiple)
    working = {
        "picture": passing["SigLIP"]
        + passing["Redux"]
        + activations.vision_bytes(model.siglip, text_width, element),
        "modulation": activations.modulation_bytes(model.transformer, MAX_STEPS, element),
        "denoise": activations.denoise_bytes(model.transformer, rows, element, is_fp8=is_fp8),
        "decode": activations.strip_decode_bytes(model, demand.pixels, element),
    }
    if model.t5 is not None:
        text = activations.text_bytes(model.t5, element)
        working["text"] = max(passing["T5"] + text, passing.get("CLIP", 0))
    return {name: of.resident_bytes + size for name, size in working.items()}


def _with_limits(model: ModelSizes, found: Plan) -> Plan:
    """``found`` with the largest square images and the largest batch of 1024² that fit."""
    demand = found.options.demand

    def fits(**change: int) -> bool:
        stages = _stages(model, found, replace(demand, **change))
        return max(stages.values()) <= found.card.budget_bytes

    sides = range(MAX_SIDE, MIN_SIDE - 1, -64)
    batches = range(64, 0, -1)

    def largest(batch: int, redux_rows: int) -> int:
        change = {"batch": batch, "redux_rows": redux_rows}
        return next((side for side in sides if fits(width=side, height=side, **change)), 0)

    return replace(
        found,
        largest_sides=tuple(
            tuple(largest(n, pictures * demand.redux_rows) for n in range(1, demand.batch + 1))
            for pictures in range(1, MAX_PICTURES + 1)
        ),
        largest_batch=next((n for n in batches if fits(width=1024, height=1024, batch=n)), 0),
    )


def _with_graphs(model: ModelSizes, found: Plan) -> Plan:
    """``found`` with as many of the CUDA graphs asked for as leave all its limits as they are.

    And the default size decoded as it was, and ``UNSEEN_BYTES`` left: what graphs really take was
    not measured. Blocks that are streamed cannot be captured.
    """
    if not found.options.cuda_graphs:
        return found
    wanted = _graphs_wanted(model, found.options)
    shapes = 0 if found.streamed_blocks else wanted.shapes
    whole = min(found.tile_above_pixels, _DEFAULT_PIXELS)
    while shapes:
        graphed = _graphed(model, found, replace(wanted, shapes=shapes))
        is_free = graphed.headroom_bytes >= UNSEEN_BYTES and graphed.tile_above_pixels >= whole
        if is_free and graphed.largest_sides == found.largest_sides:
            return graphed
        shapes //= 2
    return replace(found, graphs=replace(wanted, shapes=0))


def _graphs_wanted(model: ModelSizes, options: Options) -> GraphLimits:
    """A number is one of any shapes; ``auto`` knows where they gain something."""
    demand, shapes = options.demand, options.cuda_graphs
    if shapes == "auto":
        side, shapes = GRAPHED_SIDE["fp8" if options.is_fp8 else "bf16"], AUTO_GRAPHS
        demand = replace(demand, width=side, height=side, batch=1)
    rows = activations.rows_of(demand, model.size_multiple)
    return GraphLimits(shapes, rows.batch * rows.total)


def _graphed(model: ModelSizes, found: Plan, limits: GraphLimits) -> Plan:
    size, options = model.transformer, found.options
    element, rows = options.element_bytes, limits.rows
    shared = activations.graph_pool_bytes(size, rows, element, is_fp8=options.is_fp8)
    own = activations.graph_bytes(size, rows, options.demand.batch, element)
    part = Part("CUDA graphs", shared + limits.shapes * own, Placement.GPU)
    graphed = replace(found, parts=(*found.parts, part), graphs=limits)
    return _with_limits(model, _with_stages(model, graphed))
