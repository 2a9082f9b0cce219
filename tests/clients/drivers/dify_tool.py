"""The image tool of Dify's WaveSpeed plugin, from a checkout, called as Dify calls it.

It has no parameter for a picture. Dify's SDK gives it its runtime; no Dify is asked.
"""

import sys

from attempting import answer_all


def cases(job):
    sys.path.insert(0, job["source"])
    from dify_plugin.entities.tool import ToolRuntime
    from tools.generate_image import GenerateImageTool

    def draw(key, **parameters):
        runtime = ToolRuntime(credentials={"wavespeed_api_key": key}, user_id=None, session_id=None)
        tool = GenerateImageTool(runtime=runtime, session=None)
        wanted = {"prompt": "a fox", "model": job["model"], **parameters}
        return [str(message.type) for message in tool.invoke(wanted)]

    return {
        "no picture": lambda: draw(job["key"], size=job["body"]["size"], seed=job["body"]["seed"]),
        "bad key": lambda: draw("frs_not-a-key"),
    }


answer_all(cases)
