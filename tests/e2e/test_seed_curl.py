"""The documented curl commands, through the real curl, changed only in host, key and image."""

import json
import re
import shutil
import subprocess
from typing import Any

import pytest

from e2e.live import LiveServer, download, wait_until
from e2e.seed_curl import IMAGE, RESULT, SUBMIT

HOST = "https://api.wavespeed.ai"

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")


def test_documented_commands_make_the_documented_image(tiny: LiveServer, site: str) -> None:
    submit = SUBMIT.replace(HOST, tiny.base_url).replace(IMAGE, f"{site}/photo.jpg")
    submitted = shell(submit, WAVESPEED_API_KEY=tiny.key)
    assert submitted["status"] == "created"
    assert submitted["outputs"] == []
    query = RESULT.replace(HOST, tiny.base_url)
    ended = result(query, WAVESPEED_API_KEY=tiny.key, requestId=submitted["id"])
    assert ended["status"] == "completed", ended
    assert ended["model"] == "wavespeed-ai/flux-pro-redux"
    assert ended["has_nsfw_contents"] == [False]
    assert ended["error"] == ""
    assert ended["timings"]["inference"] > 0
    assert ended["created_at"] == submitted["created_at"]
    (url,) = ended["outputs"]
    image = download(url)
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (1024, 1024))
    assert (image.info["Seed"], image.info["Steps"], image.info["Guidance"]) == ("0", "28", "3.5")


def test_command_printed_at_the_first_start_works_as_printed(tiny: LiveServer) -> None:
    (printed,) = re.findall(r"^  try +(curl .*)$", tiny.log_with("Ctrl-C"), re.MULTILINE)
    made = shell(printed)
    assert made["status"] == "completed", made
    assert download(made["outputs"][0]).size == (512, 512)


def test_first_lines_say_that_an_untrained_model_makes_noise(tiny: LiveServer) -> None:
    assert "The model 'tiny' was never trained" in tiny.log


def test_url_of_the_answer_is_the_one_to_ask_next(tiny: LiveServer, site: str) -> None:
    body = json.dumps({"image": f"{site}/teal.png", "size": "512*512", "num_inference_steps": 1})
    auth = f'--header "Authorization: Bearer {tiny.key}"'
    url = f"{tiny.base_url}/api/v2/wavespeed-ai/flux-pro-redux"
    submitted = shell(f"curl {auth} --data-raw '{body}' {url}")
    assert submitted["urls"]["get"].startswith(tiny.base_url)
    assert result(f"curl {auth} {submitted['urls']['get']}")["status"] == "completed"


def shell(command: str, **variables: str) -> dict[str, Any]:
    """``data`` of what a shell command prints."""
    done = subprocess.run(
        ["bash", "-c", command],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "NO_PROXY": "*", **variables},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert (body["code"], body["message"]) == (200, "success"), body
    data: dict[str, Any] = body["data"]
    return data


def result(command: str, **variables: str) -> dict[str, Any]:
    """The same once the task has ended."""
    answers: list[dict[str, Any]] = []

    def has_ended() -> bool:
        answers.append(shell(command, **variables))
        return answers[-1]["status"] in ("completed", "failed")

    wait_until(has_ended, 60, every_s=0.3, what=lambda: f"still {answers[-1]}")
    return answers[-1]
