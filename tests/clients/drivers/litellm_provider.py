"""LiteLLM's WaveSpeed provider of pictures, from a branch's checkout, inside LiteLLM from PyPI.

No release has the provider, so litellm.image_generation() does not know its name: its handler is
called as that function would call it, and what it raises becomes what that function would raise.
"""

from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

import litellm.llms
from attempting import answer_all
from litellm.types.utils import ImageResponse


def cases(job):
    litellm.llms.__path__.append(str(Path(job["source"]) / "litellm/llms"))
    from litellm.llms.wavespeed.image_generation.handler import (
        wavespeed_image_generation as handler,
    )

    size = job["body"]["size"].replace("*", "x")
    body = {name: value for name, value in job["body"].items() if name != "size"}

    def run(key=job["key"], **changes):
        mapped = handler.config.map_openai_params({"size": size}, {}, job["model"], False)
        wanted = {**body, **mapped, **changes}
        sent = {name: value for name, value in wanted.items() if value is not None}
        try:
            response = handler.image_generation(
                model=job["model"],
                prompt="",
                model_response=ImageResponse(),
                optional_params=sent,
                litellm_params={"api_key": key, "api_base": job["url"]},
                logging_obj=MagicMock(),
                timeout=60.0,
            )
        except Exception as error:
            told = {"model": job["model"], "custom_llm_provider": "wavespeed"}
            raise litellm.exception_type(original_exception=error, **told) from error
        return [each.url for each in response.data]

    return {
        "version": lambda: version("litellm"),
        "run": run,
        "no picture": lambda: run(image=None),
        "bad key": lambda: run(key="frs_not-a-key"),
        "bad parameter": lambda: run(num_images=5),
        "dead URL": lambda: run(image=job["dead"]),
    }


answer_all(cases)
