"""Processes that follow ours: they do as told, end with us, and are missed when they end alone."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from redux_pipelines.errors import DeviceError
from redux_pipelines.parallel import followers as followers_module
from redux_pipelines.parallel.followers import Followers

STUB = """
import os, signal, sys, time
from multiprocessing.connection import Connection
from redux_pipelines.parallel.followers import EXIT_SAID, Failed, Logged, Ready
commands, answers = (Connection(int(each)) for each in sys.argv[1:3])
setup = commands.recv()
"""
OBEDIENT = """
answers.send(Ready())
while True:
    try:
        told = commands.recv()
    except EOFError:
        sys.exit()
    answers.send(Logged("told", 30, f"{setup} {told}"))
"""


def command(body):
    return (sys.executable, "-P", "-c", STUB + body)


def started(body, *names):
    return Followers(command(body), {name: f"setup of {name}" for name in names or ("rank 1",)})


def wait_until(is_so, timeout_s=60.0):
    ends_at = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < ends_at
        time.sleep(0.02)


def status(pid):
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return {}
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def is_running(pid):
    return status(pid).get("State", "Z")[0] != "Z"


def ignores_interrupts(pid):
    return int(status(pid)["SigIgn"], 16) >> (signal.SIGINT - 1) & 1 == 1


def test_each_is_told_everything_and_may_log(caplog):
    with caplog.at_level(logging.WARNING, "told"):
        both = started(OBEDIENT, "rank 1", "rank 2")
        both.wait_until_ready(20)
        both.send("step")
        wait_until(lambda: len(caplog.messages) == 2)
    assert sorted(caplog.messages) == [
        f"{name}: setup of {name} step" for name in ("rank 1", "rank 2")
    ]
    both.close()
    assert not any(map(is_running, both.pids))


def test_one_that_does_not_end_by_itself_is_killed(monkeypatch):
    monkeypatch.setattr(followers_module, "_END_S", 0.2)
    one = started("answers.send(Ready())\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(99)")
    one.wait_until_ready(20)
    one.close()
    assert not is_running(one.pids[0])


def test_they_end_with_whoever_lets_go_of_them():
    one = started(OBEDIENT)
    pid = one.pids[0]
    one.wait_until_ready(20)
    del one
    assert not is_running(pid)


def test_what_they_print_is_no_output_of_ours(capfd):
    one = started("print('compiled', flush=True)" + OBEDIENT)
    one.wait_until_ready(20)
    one.close()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "compiled\n")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("answers.send(Failed('no weights', True)); os._exit(EXIT_SAID)", "rank 1 failed: no w"),
        ("os._exit(7)", "rank 1 ended with code 7"),
        ("os.kill(os.getpid(), 9)", "rank 1 was killed by signal 9"),
    ],
)
def test_one_that_fails_is_a_device_error_for_good(body, reason):
    one = started(body)
    with pytest.raises(DeviceError, match=reason):
        one.wait_until_ready(20)
    for use in (one.check, lambda: one.send("step")):
        with pytest.raises(DeviceError, match=reason):
            use()
    assert not is_running(one.pids[0])


def test_the_cause_is_told_and_not_what_came_of_it():
    body = """
if setup == "setup of rank 1":
    answers.send(Failed("connection reset", False))
    os._exit(EXIT_SAID)
time.sleep(0.3)
os._exit(9)
"""
    both = started(body, "rank 1", "rank 2")
    with pytest.raises(DeviceError, match="rank 2 ended with code 9"):
        both.wait_until_ready(20)


def test_one_that_never_gets_ready_is_a_device_error():
    one = started("time.sleep(99)")
    with pytest.raises(DeviceError, match="not all ranks have loaded within 0 s"):
        one.wait_until_ready(0.1)
    assert not is_running(one.pids[0])


def test_a_failure_is_noticed_without_being_asked_for():
    calls = []
    one = started(OBEDIENT)
    one.on_failure(lambda: calls.append("aborted"))
    one.wait_until_ready(20)
    os.kill(one.pids[0], signal.SIGKILL)
    wait_until(lambda: calls == ["aborted"])
    one.close()


def test_a_root_that_is_killed_leaves_nothing_behind(tmp_path):
    """With the true follower, in the middle of its load."""
    folder = tmp_path / "ranks"
    folder.mkdir()
    follower = (
        "import time; from redux_pipelines.loading import follower as f; "
        "f._follow = lambda *_: time.sleep(99); f.main()"
    )
    root = f"""
import sys, time
from pathlib import Path
from redux_pipelines.contract.types import LoadOptions
from redux_pipelines.loading.follower import Setup
from redux_pipelines.parallel.followers import Followers
setup = Setup(Path(), Path(), LoadOptions(), Path({str(folder)!r}), 1.0)
both = Followers((sys.executable, "-c", {follower!r}), {{"rank 1": setup, "rank 2": setup}})
print(*both.pids, flush=True)
time.sleep(99)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", root],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    assert process.stdout is not None
    pids = [int(each) for each in process.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_running, pids))
    for pid in pids:  # meant for the root alone
        wait_until(lambda pid=pid: ignores_interrupts(pid))
        os.kill(pid, signal.SIGINT)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(is_running(pid) for pid in pids))
    wait_until(lambda: not folder.exists())
