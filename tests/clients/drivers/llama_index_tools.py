"""PyPI llama-index-tools-wavespeed: its tool spec, which tells errors instead of raising them."""

from importlib.metadata import version

import wavespeed
from attempting import answer_all


def cases(job):
    wavespeed.config.api.base_url = job["url"]
    from llama_index.tools.wavespeed import WaveSpeedToolSpec

    spec = WaveSpeedToolSpec(api_key=job["key"], image_model=job["model"], poll_interval=0.1)
    stranger = WaveSpeedToolSpec(api_key="frs_not-a-key")
    tools = {tool.metadata.name: tool for tool in spec.to_tool_list()}

    def told(text):
        if text.startswith("Error"):
            raise RuntimeError(text)
        return text.split("\n")

    def run(spec=spec, **changes):
        return told(spec.run_model(job["model"], {**job["body"], **changes}))

    def tool():
        wanted = {"model": job["model"], "input": job["body"]}
        return told(str(tools["run_model"](**wanted)))

    return {
        "version": lambda: version("llama-index-tools-wavespeed"),
        "run": run,
        "tool": tool,
        "get prediction": lambda: told(spec.get_prediction(run()[0].split("/")[6])),
        "bad key": lambda: run(stranger),
        "bad parameter": lambda: run(num_images=5),
        "dead URL": lambda: run(image=job["dead"]),
        "no picture": lambda: told(spec.generate_image("a fox")),
    }


answer_all(cases)
