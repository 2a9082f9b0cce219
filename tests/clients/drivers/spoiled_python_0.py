"""PyPI wavespeed 0.0.5, at each address: one task, and what its user gets."""

from functools import partial

from attempting import answer_all
from wavespeed import WaveSpeed


def run(job, url):
    client = WaveSpeed(api_key=job["key"], base_url=url + "/api/v2/")
    prediction = client.run(job["model"], job["body"])
    if prediction.status != "completed":
        raise RuntimeError(prediction.error)
    return prediction.outputs


answer_all(lambda job: {name: partial(run, job, url) for name, url in job["urls"].items()})
