"""The client and the request of ComfyUI's WaveSpeed nodes, from a checkout, without ComfyUI."""

import PIL.Image
from attempting import answer_all
from comfyui_checkout import make_importable


def cases(job):
    make_importable(job["source"])
    from py.wavespeed_api.client import WaveSpeedClient
    from py.wavespeed_api.requests.flux_pro_redux import FluxProRedux

    WaveSpeedClient.BASE_URL = job["url"]
    client = WaveSpeedClient(job["key"])
    width, height = map(int, job["body"]["size"].split("*"))
    asked = {name: value for name, value in job["body"].items() if name != "size"}

    def run(client=client, **changes):
        request = FluxProRedux(**{**asked, "width": width, "height": height, **changes})
        return client.send_request(request, polling_interval=0.1)["outputs"]

    return {
        "run": run,
        "upload": lambda: run(image=client.upload_file(PIL.Image.open(job["file"]))),
        "bad key": lambda: run(WaveSpeedClient("frs_not-a-key")),
        "bad parameter": lambda: run(num_images=5),
        "dead URL": lambda: run(image=job["dead"]),
    }


answer_all(cases)
