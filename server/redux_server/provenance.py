"""What an image says of itself, in the metadata of its PNG."""

from redux_pipelines.types import GenerationRequest, ModelInfo, Quality
from redux_server import __version__


def provenance(
    info: ModelInfo, request: GenerationRequest, *, seed: int, quality: Quality
) -> dict[str, str]:
    """Text chunks for ``encode_png``. Not the prompt: whoever has the image can read them."""
    return {
        "Software": f"FLUX Redux Server {__version__}",
        "Model": f"{info.name} ({info.backend}, {info.dtype})",
        "Seed": str(seed),
        "Steps": str(request.num_inference_steps),
        "Guidance": str(request.guidance_scale),
        "Quality": quality,
    }
