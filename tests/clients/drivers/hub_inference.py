"""PyPI huggingface_hub: InferenceClient with wavespeed as its provider."""

from importlib.metadata import version
from pathlib import Path

from attempting import answer_all
from huggingface_hub import InferenceClient
from huggingface_hub.hf_api import InferenceProviderMapping
from huggingface_hub.inference._providers import PROVIDERS
from huggingface_hub.inference._providers._common import HARDCODED_MODEL_INFERENCE_MAPPING

MODEL = "black-forest-labs/FLUX.1-Redux-dev"


def cases(job):
    if job["url"]:
        PROVIDERS["wavespeed"]["image-to-image"].base_url = job["url"]
    HARDCODED_MODEL_INFERENCE_MAPPING["wavespeed"][MODEL] = InferenceProviderMapping(
        provider="wavespeed", hf_model_id=MODEL, providerId=job["model"], status="live",
        task="image-to-image",
    )  # fmt: skip
    client = InferenceClient(provider="wavespeed", api_key=job["key"])
    stranger = InferenceClient(provider="wavespeed", api_key="frs_not-a-key")
    asked = {name: value for name, value in job["body"].items() if name != "image"}

    def run(name, client=client, image=job["body"]["image"], **changes):
        picture = client.image_to_image(image, model=MODEL, **{**asked, **changes})
        place = Path.cwd() / f"{name}.png"
        picture.save(place)
        return [str(place)]

    return {
        "version": lambda: version("huggingface_hub"),
        "run": lambda: run("run"),
        "local file": lambda: run("file", image=job["file"]),
        "bytes": lambda: run("bytes", image=Path(job["file"]).read_bytes()),
        "bad key": lambda: run("none", stranger),
        "bad parameter": lambda: run("none", num_images=5),
        "dead URL": lambda: run("none", image=job["dead"]),
    }


answer_all(cases)
