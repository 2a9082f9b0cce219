"""Which requests may be denoised together, and which image of a batch belongs to which of them.

Imports no torch: shared by every pipeline, real or fake, and by callers that sort requests.
"""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from redux_pipelines.contract.types import EmptyPrompt, Fit, GenerationRequest, Quality
from redux_pipelines.errors import RequestError

_UNSEEN = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})  # Unicode's categories


class BatchKey(NamedTuple):
    """What requests of one batch have in common; all else may differ from one to the next.

    Sizes and steps make the schedule and the number of image tokens. The tier says when the step
    cache may reuse. A prompt that is encoded is 512 different tokens, none is one folded token: a
    batch holds one kind or the other, so that one layout of keys serves it and no row is padded.
    For the same reason all have as many pictures, which count as much, pooled alike.
    """

    width: int
    height: int
    num_inference_steps: int
    quality: Quality | None
    has_text: bool
    weights: tuple[float, ...]
    redux_pooling: int


class PictureControls(Protocol):
    """What a request says of how its pictures and prompt count, whatever stands for a picture."""

    @property
    def prompt(self) -> str:  # noqa: D102
        ...

    @property
    def empty_prompt(self) -> EmptyPrompt:  # noqa: D102
        ...

    @property
    def images(self) -> Sequence[object]:  # noqa: D102
        ...

    @property
    def image_weights(self) -> Sequence[float]:  # noqa: D102
        ...

    @property
    def redux_strength(self) -> float:  # noqa: D102
        ...

    @property
    def fit(self) -> Fit:  # noqa: D102
        ...

    @property
    def mask(self) -> object | None:  # noqa: D102
        ...


def is_blank(text: str) -> bool:
    """Whether nothing of ``text`` can be seen: blanks, line breaks, marks without a width."""
    return all(unicodedata.category(each) in _UNSEEN for each in text)


def has_text(request: PictureControls) -> bool:
    """Whether the prompt is encoded, instead of standing for zero embeddings."""
    return not is_blank(request.prompt) or request.empty_prompt == "encode"


def weights_of(request: PictureControls) -> tuple[float, ...]:
    """How much each picture counts, strength and all; what counts 0 is left out."""
    own = request.image_weights or (1.0,) * (1 + len(request.images))
    return tuple(request.redux_strength * weight for weight in own)


def is_solitary(request: PictureControls) -> bool:
    """Whether its pictures decide how many tokens they are: it shares a batch with nobody."""
    return request.mask is not None or request.fit == "letterbox"


def batch_key(request: GenerationRequest) -> BatchKey:
    """Requests of equal keys may be denoised together. A ``quality`` of None equals only None."""
    return BatchKey(
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        quality=request.quality,
        has_text=has_text(request),
        weights=weights_of(request),
        redux_pooling=request.redux_pooling,
    )


def check_together(requests: Sequence[GenerationRequest]) -> None:
    """Raise ``RequestError`` unless there are requests and all have one key, or there is one."""
    if not requests:
        raise RequestError("a batch of no requests was given: it must hold at least one")
    for index, request in enumerate(requests):
        if len(requests) > 1 and is_solitary(request):
            raise RequestError(
                f"request {index} cannot be denoised together with others: what a mask, or fit "
                "'letterbox', leaves of a picture is as many tokens as it happens to be"
            )
    first = batch_key(requests[0])
    for index, request in enumerate(requests):
        for name, one, other in zip(BatchKey._fields, first, batch_key(request), strict=True):
            if one != other:
                raise RequestError(
                    f"requests 0 and {index} cannot be denoised together: {name} is {one!r} and "
                    f"{other!r}, and must be the same within a batch"
                )
