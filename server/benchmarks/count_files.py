"""Count the product's files that one submit and one whole request run through.

Starts a server of its own on loopback with a profile function in every process, which notes the
files of the functions that are called. The submit is what the API process runs between a POST and
its answer; the whole request is that and all else, in every process, until the image is downloaded.
"""

import argparse
import base64
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
_OURS = re.compile(r"redux_(server|pipelines|kernels|weights)/.+")
FOLDERS = ("server", "pipelines", "kernels", "weights")
PATIENCE_S = 120.0

# Runs in every process that is started, before anything else. `phase` names what happens now; at
# each change what was seen is written down and forgotten.
RECORDER = """
import os, sys, threading, time
_FOLDER = os.environ["TRACE_FOLDER"]
_seen = {}
def _note(frame, event, _argument):
    if event == "call":
        _seen[frame.f_code.co_filename] = True
def _watch():
    sys.setprofile(None)
    phase = ""
    while True:
        now = open(os.path.join(_FOLDER, "phase")).read()
        if now != phase:
            names, _ = sorted(_seen.copy()), _seen.clear()
            with open(os.path.join(_FOLDER, f"{phase}.{os.getpid()}"), "w") as file:
                file.write("\\n".join(names))
            phase = now
        time.sleep(0.02)
threading.Thread(target=_watch, daemon=True).start()
threading.setprofile(_note)
sys.setprofile(_note)
"""


def main() -> None:
    """Print both counts, and with ``--list`` the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="name the files too")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to count in")
    parser.add_argument("--model", default="mini", help="the server's --model (default: mini)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = trace(given.root.resolve(), Path(folder), given.model)
    for name, files in counts.items():
        print(f"{name}: {len(files)} files")
        if given.list:
            print("".join(f"  {file}\n" for file in sorted(files)), end="")


def trace(root: Path, folder: Path, model: str) -> dict[str, set[str]]:
    """Serve, send one request, and give the files by what they were needed for."""
    (folder / "phase").write_text("start")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(RECORDER)
    paths = [str(folder / "site"), *(str(root / name) for name in FOLDERS)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRACE_FOLDER": str(folder)}
    command = [sys.executable, "-m", "redux_server", "serve", "--port", "0", "--model", model]
    command += ["--data-dir", str(folder / "data")]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            return _request(folder, server)
        finally:
            server.send_signal(signal.SIGTERM)


def _request(folder: Path, server: "subprocess.Popen[str]") -> dict[str, set[str]]:
    url, key = _greeting(server)
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) as client:
        _until(lambda: _is_ready(client))
        _phase(folder, "submit")
        body = {"image": _picture(), "size": "512*512", "seed": 0, "num_inference_steps": 4}
        task = client.post("/api/v3/wavespeed-ai/flux-pro-redux", json=body).json()["data"]
        _phase(folder, "rest")
        poll = f"/api/v3/predictions/{task['id']}/result"
        _until(lambda: client.get(poll).json()["data"]["status"] == "completed")
        client.get(client.get(poll).json()["data"]["outputs"][0]).raise_for_status()
        _phase(folder, "end")
    api = _files(folder, f"submit.{server.pid}")
    return {"one submit": api, "a whole request": _files(folder, "submit.*", "rest.*")}


def _greeting(server: "subprocess.Popen[str]") -> tuple[str, str]:
    url = ""
    assert server.stdout is not None
    for line in server.stdout:
        if " on http://" in line:
            url = line.split(" on ")[1].split()[0]
        if line.strip().startswith("frs_"):
            return url, line.strip()
    raise SystemExit("the server ended without a greeting")


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.ConnectError:  # it greets before it listens
        return False


def _until(is_true: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + PATIENCE_S
    while not is_true():
        if time.monotonic() > ends_at:
            raise SystemExit("the server took too long")
        time.sleep(0.5)


def _phase(folder: Path, name: str) -> None:
    (folder / "phase").write_text(name)
    time.sleep(0.2)  # every process has seen it


def _picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _files(folder: Path, *patterns: str) -> set[str]:
    found = {
        name
        for pattern in patterns
        for file in folder.glob(pattern)
        for name in file.read_text().splitlines()
    }
    return {match[0] for name in found if (match := _OURS.search(name))}


if __name__ == "__main__":
    main()
