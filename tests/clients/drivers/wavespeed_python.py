"""PyPI wavespeed from 1.0 on: the official SDK."""

import wavespeed
from attempting import answer_all
from wavespeed import Client


def cases(job):
    model, body = job["model"], job["body"]
    client = Client(api_key=job["key"], base_url=job["url"])
    stranger = Client(api_key="frs_not-a-key", base_url=job["url"])

    def run(**changes):
        return client.run(model, {**body, **changes}, poll_interval=0.1)["outputs"]

    def module():
        wavespeed.config.api.base_url = job["url"]
        wavespeed.config.api.api_key = job["key"]
        return wavespeed.run(model, body, poll_interval=0.1)["outputs"]

    return {
        "version": lambda: wavespeed.__version__,
        "run": run,
        "module": module,
        "upload": lambda: run(image=client.upload(job["file"])),
        "sync": lambda: client.run(model, body, enable_sync_mode=True)["outputs"],
        "bad key": lambda: stranger.run(model, body),
        "bad parameter": lambda: run(num_images=5),
        "dead URL": lambda: run(image=job["dead"]),
    }


answer_all(cases)
