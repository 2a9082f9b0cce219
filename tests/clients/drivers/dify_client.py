"""The client of Dify's WaveSpeed plugin, from a checkout of it: no option says where it goes."""

import sys
from pathlib import Path

from attempting import answer_all


def cases(job):
    sys.path.insert(0, str(Path(job["source"]) / "utils"))
    from client import WaveSpeedClient

    client = WaveSpeedClient(job["key"])

    def run(**changes):
        task = client.submit(job["model"], {**job["body"], **changes})
        return client.output_urls(client.wait(task))

    return {
        "run": run,
        "balance": client.check_credentials,
        "bad key": lambda: WaveSpeedClient("frs_not-a-key").check_credentials(),
        "bad parameter": lambda: run(num_images=5),
        "dead URL": lambda: run(image=job["dead"]),
    }


answer_all(cases)
