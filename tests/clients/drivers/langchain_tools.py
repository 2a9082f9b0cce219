"""PyPI langchain-wavespeed: its tools, as an agent invokes them."""

from importlib.metadata import version

import wavespeed
from attempting import answer_all


def cases(job):
    wavespeed.config.api.base_url = job["url"]
    from langchain_wavespeed import WaveSpeedImageGeneration, WaveSpeedRunModel

    tool = WaveSpeedRunModel(api_key=job["key"], poll_interval=0.1)
    stranger = WaveSpeedRunModel(api_key="frs_not-a-key")
    pictureless = WaveSpeedImageGeneration(api_key=job["key"], model=job["model"])

    def run(tool=tool, **changes):
        wanted = {"model": job["model"], "input": {**job["body"], **changes}}
        return tool.invoke(wanted).split("\n")

    def own_client():
        client = wavespeed.Client(api_key=job["key"], base_url=job["url"])
        return run(WaveSpeedRunModel(client=client, poll_interval=0.1))

    return {
        "version": lambda: version("langchain-wavespeed"),
        "run": run,
        "own client": own_client,
        "upload": lambda: run(image=wavespeed.Client(job["key"]).upload(job["file"])),
        "bad key": lambda: run(stranger),
        "bad parameter": lambda: run(num_images=5),
        "dead URL": lambda: run(image=job["dead"]),
        "no picture": lambda: pictureless.invoke({"prompt": "a fox"}),
    }


answer_all(cases)
