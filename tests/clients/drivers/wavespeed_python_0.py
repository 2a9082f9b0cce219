"""PyPI wavespeed 0.0.5, once called client-python: the version 2 paths, validated by pydantic."""

import asyncio
from importlib.metadata import version

from attempting import answer_all
from wavespeed import WaveSpeed


def cases(job):
    model, body = job["model"], job["body"]
    place = {"base_url": job["url"] + "/api/v2/"} if job["url"] else {}
    client = WaveSpeed(api_key=job["key"], **place)
    stranger = WaveSpeed(api_key="frs_not-a-key", **place)

    def outputs(prediction):
        if prediction.status != "completed":
            raise RuntimeError(prediction.error)
        return prediction.outputs

    def run(**changes):
        return outputs(client.run(model, {**body, **changes}))

    def later():
        task = client.create(model, body)
        while (found := client.get_prediction(task.id)).status in ("created", "processing"):
            pass
        return outputs(found)

    return {
        "version": lambda: version("wavespeed"),
        "run": run,
        "async": lambda: outputs(asyncio.run(client.async_run(model, body))),
        "later": later,
        "bad key": lambda: stranger.run(model, body),
        "bad parameter": lambda: run(num_images=5),
        "dead URL": lambda: run(image=job["dead"]),
    }


answer_all(cases)
