"""PyPI lfx-wavespeed: Langflow's components, each built and run as a flow does."""

import json
from importlib.metadata import version

import wavespeed
from attempting import answer_all


def cases(job):
    wavespeed.config.api.base_url = job["url"]
    import lfx_wavespeed._base

    lfx_wavespeed._base.WAVESPEED_BASE_URL = job["url"]
    from lfx_wavespeed.components.wavespeed import (
        WaveSpeedImageGenerationComponent,
        WaveSpeedRunModelComponent,
    )

    def run(key=job["key"], **changes):
        component = WaveSpeedRunModelComponent(
            api_key=key,
            model_name=job["model"],
            model_input=json.dumps({**job["body"], **changes}),
            poll_interval=0.1,
        )
        return component.run_model().data["urls"]

    def models():
        return WaveSpeedImageGenerationComponent(api_key=job["key"]).get_models()

    return {
        "version": lambda: version("lfx-wavespeed"),
        "run": run,
        "models": models,
        "bad key": lambda: run("frs_not-a-key"),
        "bad parameter": lambda: run(num_images=5),
        "dead URL": lambda: run(image=job["dead"]),
    }


answer_all(cases)
