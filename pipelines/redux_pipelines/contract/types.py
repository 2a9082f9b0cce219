"""The contract between a caller and a pipeline: a request in, progress and a result out.

Also how a model is loaded and compiled, as plain values. Imports no torch, so that a server can
speak of requests without loading a model.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol, get_args

from redux_pipelines.errors import ReduxError

if TYPE_CHECKING:  # the command line reads our constants, and need not wait for Pillow
    from PIL import Image


Quality = Literal["exact", "balanced", "fast"]
"""What may be approximated: nothing; what is hardly seen; more (``denoising.quality``)."""
Fit = Literal["squash", "letterbox", "center"]
"""How a picture of another shape becomes the encoder's square (``conditioning.image``)."""
EmptyPrompt = Literal["zeros", "encode"]
"""What an empty prompt is: zero embeddings, or what the text encoders make of it."""
OutputFormat = Literal["png", "jpeg", "webp"]
"""Kinds of files that images are written as (``images.files``)."""
QUALITIES: Final[tuple[Quality, ...]] = get_args(Quality)
FITS: Final[tuple[Fit, ...]] = get_args(Fit)
EMPTY_PROMPTS: Final[tuple[EmptyPrompt, ...]] = get_args(EmptyPrompt)
OUTPUT_FORMATS: Final[tuple[OutputFormat, ...]] = get_args(OutputFormat)
LEAST_SIDE = 256
MIN_SIDE = 512
"""Of what memory is planned for; smaller images take less."""
MAX_SIDE = 1536
MAX_STEPS = 50
MAX_IMAGES = 4
MIN_GUIDANCE = 1.0
MAX_GUIDANCE = 20.0
MAX_PICTURES = 4
MAX_WEIGHT = 10.0
MAX_POOLING = 27
"""Redux tokens along a side of FLUX.1-Redux's grid: pooling to as many, or to more, is none."""
CompileMode = Literal["off", "blocks", "full"]
"""What torch.compile compiles of the transformer: nothing, its kinds of blocks, or a whole step."""
PARALLEL = (1, 2, 4)
"""How many devices may compute an image together."""
CudaGraphs = int | Literal["auto"]
"""Shapes whose steps are kept as CUDA graphs; ``auto``: where they gain something and have room."""
Sizes = tuple[tuple[int, int], ...]
"""Widths and heights in pixels."""


@dataclass(frozen=True, slots=True)
class PreprocessedPicture:
    """A picture as a pipeline's encoder sees it, by that pipeline's ``preprocess``.

    ``pixels`` are RGB, of the encoder's size. ``coverage`` has a grey level per token, row by row:
    how much of it is picture, and white in the mask; None where all of it is. ``is_narrow`` where
    not even a white mask would leave a token of it, for the bars of its letterbox.
    """

    pixels: "Image.Image"
    coverage: "Image.Image | None" = None
    is_narrow: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request for variations of ``image``, and of ``images`` at the same time.

    Sizes are pixels of the output. ``seed`` is that of the first image; image *i* uses
    ``seed + i``. ``empty_prompt`` says what ``prompt == ""`` means: ``"zeros"`` feeds zero
    embeddings (the Redux model card's way), ``"encode"`` encodes the empty string (BFL's way).
    ``quality`` None is the pipeline's default.

    ``image_weights`` has a number per picture, that of ``image`` first; none is 1 for each. Of
    each picture's grid of tokens ``redux_pooling`` a side are left. Where ``mask``, stretched over
    ``image``, is black, that does not count. Of pictures that are preprocessed, ``fit`` and
    ``mask`` were applied already.
    """

    image: "Image.Image | PreprocessedPicture"
    prompt: str = ""
    width: int = 1024
    height: int = 1024
    seed: int = 0
    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    num_images: int = 1
    empty_prompt: EmptyPrompt = "zeros"
    quality: Quality | None = None
    images: "tuple[Image.Image | PreprocessedPicture, ...]" = ()
    image_weights: tuple[float, ...] = ()
    redux_strength: float = 1.0
    redux_pooling: int = MAX_POOLING
    fit: Fit = "squash"
    mask: "Image.Image | None" = None

    @property
    def pictures(self) -> "tuple[Image.Image | PreprocessedPicture, ...]":
        """All that is varied."""
        return (self.image, *self.images)


@dataclass(frozen=True, slots=True)
class Preview:
    """How image ``index`` of a request will about look: small, RGB, judged by nobody."""

    image: "Image.Image"
    index: int


@dataclass(frozen=True, slots=True)
class Progress:
    """``step`` of ``total_steps`` denoising steps are done, over all images of the request.

    ``preview`` makes one of the image that is being made, where the model can. It is to be called
    before the next event, by the thread that drives the pipeline, which waits for the device then.
    """

    step: int
    total_steps: int
    preview: Callable[[], Preview] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Result:
    """The finished images (RGB, exactly the size asked for), one seed each.

    ``timings`` holds seconds per stage: ``encode_s``, ``denoise_s``, ``decode_s``. ``quality`` is
    the tier that was used. Of the denoising steps of all images, ``computed_steps`` ran the whole
    transformer; ``reused_steps`` ran a part of it and reused the rest from a step before.
    """

    images: "tuple[Image.Image, ...]"
    seeds: tuple[int, ...]
    timings: Mapping[str, float] = field(default_factory=dict)
    quality: Quality = "exact"
    computed_steps: int = 0
    reused_steps: int = 0


BatchEvent = tuple[int, Progress | Result | ReduxError]
"""What happened to which request of a batch, by its index in it."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was loaded, for logs, ``/readyz`` and provenance.

    ``compiled`` is what runs now: ``off`` too where compiling was asked for and failed.
    ``parallel`` devices compute an image together, of which ``device`` is the first. ``weights``
    tells checkpoints apart (``redux_weights.identity``); empty for a model without any.
    """

    name: str
    backend: str
    device: str
    dtype: str
    size_multiple: int
    attention: str = ""
    compiled: CompileMode = "off"
    parallel: int = 1
    weights: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What ``load_pipeline`` takes beside the model: plain values with the words of the settings.

    What each one may be is checked by whoever uses it.
    ``backend`` is what runs the transformer: ``engine``, or ``diffusers``, the reference that it is
    tested against. ``device`` auto: cuda where there is one. ``dtype`` auto: bfloat16 on cuda, else
    float32. ``transformer_dtype`` auto: as the checkpoint is, where the device can; same: as
    ``dtype``; fp8: large layers in e4m3, quantised while they load if need be (approximate).
    ``attention`` auto: the engine's first that passes its self-test; or the names of those that may
    be taken, in order, separated by commas (``attention.choice.NAMES``). ``max_batch_size`` images
    are denoised together. ``quality`` is the tier of requests that name none: ``exact``,
    ``balanced`` or ``fast``; the last two reuse steps' work, need the engine, and were tuned on
    ``mini`` only. ``memory`` is where weights live: ``auto`` (the fastest of the others that fits
    the GPU), ``resident``, ``evict`` or ``offload``, see ``memory.plan``. ``cuda_graphs``: the
    shapes that the plan is to have room for, as CUDA graphs; ``Pipeline.compile`` makes them.
    ``parallel`` devices compute each image together (``PARALLEL``): ``device`` and those that
    follow it, or a list separated by commas; on a CPU so many processes.
    """

    backend: str = "engine"
    device: str = "auto"
    dtype: str = "auto"
    transformer_dtype: str = "auto"
    attention: str = "auto"
    quality: str = "exact"
    max_batch_size: int = 1
    memory: str = "auto"
    cuda_graphs: CudaGraphs = 0
    parallel: int = 1


@dataclass(frozen=True, slots=True)
class CompilePlan:
    """How to make a transformer faster before the first request.

    ``mode``: what torch.compile compiles. ``sizes``: widths and heights to try it with; compiled
    code is tried with the smallest of all, too. ``cuda_graphs``: shapes to keep as CUDA graphs, of
    those that the memory plan has room for; ``auto`` makes none without such a plan, and is silent
    about it. ``cache_dir``: where compiled code is kept between starts, None for nowhere.
    ``version``: ours, whose code it is.
    """

    mode: CompileMode
    sizes: Sizes = ((1024, 1024),)
    cuda_graphs: CudaGraphs = 0
    cache_dir: Path | None = None
    version: str = ""


@dataclass(frozen=True, slots=True)
class CompileReport:
    """What became of a ``CompilePlan``.

    ``mode`` and ``cuda_graphs`` are what runs now; ``failures`` says why it is less than was
    planned. ``seconds`` by stage; ``graphs`` were compiled or found, ``reused`` of them found.
    """

    mode: CompileMode
    cuda_graphs: int
    failures: tuple[str, ...]
    seconds: Mapping[str, float]
    graphs: int = 0
    reused: int = 0


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A cache's counts since the start, and what it holds now."""

    hits: int
    misses: int
    entries: int
    size_bytes: int
    max_bytes: int


class Pipeline(Protocol):
    """Anything that turns a request into images.

    ``generate`` is a generator: closing it between two steps abandons the work and frees its
    memory. It raises ``redux_pipelines.errors.RequestError`` for a caller's mistake.
    """

    @property
    def info(self) -> ModelInfo:
        """What was loaded."""
        ...

    def cache_stats(self) -> Mapping[str, CacheStats]:
        """How its caches fare, by name. May be called from any thread."""
        ...

    def compile(self, plan: CompilePlan) -> CompileReport:
        """Carry out ``plan``; what fails or gives other numbers is left as it was.

        To be called before the first request, by the thread that generates.
        """
        ...

    def preprocess(self, request: GenerationRequest) -> GenerationRequest:
        """A request for the same images, bit for bit, with as much as possible done already.

        May be called from any thread, so that the one that generates need not do it: for large
        pictures that is a tenth of a second. Raises ``RequestError`` as ``generate`` does, and
        ``ImageError`` for a picture that cannot be decoded.
        """
        ...

    def generate(self, request: GenerationRequest) -> Generator[Progress | Result, None, None]:
        """Yield a ``Progress`` per denoising step, then one ``Result``."""
        ...

    def generate_batch(
        self, requests: Sequence[GenerationRequest]
    ) -> Generator[BatchEvent, None, None]:
        """Serve several requests of one ``contract.batching.batch_key`` together; a generator, too.

        After each denoising step yields a ``Progress`` for every request that has images in it;
        for each request, as soon as its images are done, a ``Result``, or the error that spoiled
        these alone. What is raised instead ends all that have had neither yet: tried in smaller
        batches, the others may well succeed. Raises ``RequestError`` for the first request that
        cannot be served, and for requests that cannot be served together.
        """
        ...


class SafetyChecker(Protocol):
    """Judges finished images."""

    def check(self, images: "tuple[Image.Image, ...]") -> tuple[bool, ...]:
        """True for each image that must not be shown."""
        ...
