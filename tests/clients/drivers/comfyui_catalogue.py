"""The catalogue that ComfyUI's dynamic nodes read, at a fixed host, from a checkout of them."""

from attempting import answer_all
from comfyui_checkout import make_importable


def cases(job):
    make_importable(job["source"])
    from py.wavespeed_api_utils import WaveSpeedAPIUtils

    catalogue = WaveSpeedAPIUtils(job["key"])

    def parameters():
        schema = catalogue.get_model_detail(job["model"])["input_schema"]
        return [each["name"] for each in catalogue.parse_model_parameters(schema)]

    return {
        "categories": lambda: {
            each["value"]: each["count"] for each in catalogue.get_model_categories()
        },
        "models": lambda: [
            each["value"] for each in catalogue.get_models_by_category("image-to-image")
        ],
        "parameters": parameters,
    }


answer_all(cases)
