"""ComfyUI's node for flux-pro-redux, at each address: one task, and what its user gets.

The node is called as ComfyUI calls it. It fetches its pictures itself; they are not made tensors.
"""

from functools import partial

from attempting import answer_all
from comfyui_checkout import make_importable


def cases(job):
    make_importable(job["source"])
    from py import flux_pro_redux as module
    from py.wavespeed_api.client import WaveSpeedClient
    from py.wavespeed_api.utils import fetch_image

    class PatientForSeconds(WaveSpeedClient):
        """The node's client, which would wait for half an hour."""

        def __init__(self, api_key):
            super().__init__(api_key)
            self.once_timeout = min(self.once_timeout, 2)

    fetched = []

    def fetch(urls):
        for url in urls:
            assert fetch_image(url)
            fetched.append(url)

    module.WaveSpeedClient = PatientForSeconds
    module.imageurl2tensor = fetch

    def run(url):
        WaveSpeedClient.BASE_URL = url
        fetched.clear()
        module.FluxProReduxNode().execute(
            client={"api_key": job["key"]}, prompt="", image_url=job["body"]["image"]
        )
        return list(fetched)

    return {name: partial(run, url) for name, url in job["urls"].items()}


answer_all(cases)
