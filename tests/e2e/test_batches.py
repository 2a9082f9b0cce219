"""A live server that denoises tasks of several clients together."""

import re
from collections.abc import Iterator

import numpy as np
import pytest

from e2e.live import LiveServer, a_picture, data_uri, download, plain_client, wait_until

FAST = {"size": "512*512", "num_inference_steps": 2, "enable_safety_checker": False}


@pytest.fixture(scope="module")
def batching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The real pipeline over random weights; a task waits for three others."""
    data_dir = tmp_path_factory.mktemp("batching") / "data"
    flags = ("--max-batch-size", "4", "--batch-timeout", "10000", "--fetch-allow", "127.0.0.1:*")
    with LiveServer(data_dir, *flags, model="tiny") as server:
        yield server


def metric(server: LiveServer, name: str) -> float:
    with plain_client() as client:
        text = client.get(f"{server.base_url}/metrics").text
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_tasks_of_a_batch_get_their_own_images_and_errors(
    batching: LiveServer, tiny: LiveServer, site: str
) -> None:
    bodies = [
        {**FAST, "image": f"{site}/teal.png", "seed": 1},
        {**FAST, "image": data_uri(a_picture(colour="red")), "seed": 2, "guidance_scale": 9.0},
        {**FAST, "image": f"{site}/missing.png", "seed": 3},
        {**FAST, "image": f"{site}/photo.jpg", "seed": 4},
    ]
    tasks = [batching.submit(body)["id"] for body in bodies]
    ended = [batching.wait(task, timeout_s=120) for task in tasks]
    assert [task["status"] for task in ended] == ["completed", "completed", "failed", "completed"]
    assert ended[2]["code"] == 1402
    # A worker tells of what it has counted twice a second.
    wait_until(lambda: metric(batching, "flux_redux_batch_size_count") == 1, 10)
    assert metric(batching, "flux_redux_batch_size_sum") == 3
    for body, together in zip(bodies, ended, strict=True):
        if together["status"] == "completed":
            alone = tiny.run(body, timeout_s=120)
            one, other = (
                np.asarray(download(task["outputs"][0])).astype(int) for task in (together, alone)
            )
            assert np.abs(one - other).max() <= 1
            assert one.std() > 10
