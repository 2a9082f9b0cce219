"""What an image says of itself, in the metadata of its file."""

from redux_pipelines.batching import weights_of
from redux_pipelines.types import MAX_POOLING, GenerationRequest, ModelInfo, Quality
from redux_server import __version__


def provenance(
    info: ModelInfo, request: GenerationRequest, *, seed: int, quality: Quality
) -> dict[str, str]:
    """For ``image_files.encode``. Not the prompt: whoever has the image can read them.

    Of the controls, those that were used.
    """
    chunks = {
        "Software": f"FLUX Redux Server {__version__}",
        "Model": f"{info.name} ({info.backend}, {info.dtype})",
        "Seed": str(seed),
        "Steps": str(request.num_inference_steps),
        "Guidance": str(request.guidance_scale),
        "Quality": quality,
    }
    weights = weights_of(request)
    if weights != (1.0,):
        chunks["Picture-Weights"] = ", ".join(f"{weight:g}" for weight in weights)
    if request.redux_pooling < MAX_POOLING:
        chunks["Pooling"] = str(request.redux_pooling)
    if request.fit != "squash":
        chunks["Fit"] = request.fit
    if request.mask is not None:
        chunks["Mask"] = "yes"
    return chunks
