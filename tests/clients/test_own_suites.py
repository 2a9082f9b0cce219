"""The clients' own tests, from checkouts in CLIENT_SOURCES: what they are run with here is right.

Most of them answer themselves, so they say nothing of this server. A failure in the other tests of
such a client is then this server's, or its driver's.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clients.environments import Environment, environment, packages_of
from clients.roster import (
    JAVASCRIPT_CHECKOUT,
    LLAMA_INDEX_CHECKOUT,
    N8N_NODE,
    PHP,
    PYTHON_CHECKOUT,
)
from clients.sandbox import DRIVERS, Sandbox, installed
from clients.trial import Client, Trial

pytestmark = pytest.mark.clients
Begin = Callable[[Client, str], Trial]


def run(user: Trial, made: Environment, *command: str, **variables: str) -> str:
    """Run a command in a copy of the checkout, with the packages of ``made``; what it printed."""
    copy = user.home / "own"
    shutil.copytree(user.source, copy, ignore=shutil.ignore_patterns(".git", "node_modules"))
    if made.modules.is_dir():
        (copy / "node_modules").symlink_to(made.modules)
    script = 'cd own && exec "$@"'
    sandbox = Sandbox(made, user.home, variables)
    done = sandbox.run("sh", "-c", script, "own", *command, timeout_s=300)
    assert sandbox.left_loopback == []
    return done.stdout + done.stderr


def passed(pattern: str, printed: str) -> int:
    """How many tests passed, by the runner's closing line."""
    found = re.search(pattern, printed)
    assert found, printed[-2000:]
    return int(found[1])


@pytest.mark.parametrize("client", [N8N_NODE, JAVASCRIPT_CHECKOUT], ids=lambda each: each.checkout)
def test_jest(trial: Begin, client: Client) -> None:
    user = trial(client, "own tests")
    made = packages_of(user.source)
    jest = str(made.modules / "jest/bin/jest.js")
    printed = run(user, made, "node", jest, "--ci", "--coverage=false")
    assert passed(r"Tests: .*?(\d+) passed", printed) > 10


@pytest.mark.parametrize(
    "client", [PYTHON_CHECKOUT, LLAMA_INDEX_CHECKOUT], ids=lambda each: each.checkout
)
def test_pytest(trial: Begin, client: Client) -> None:
    user = trial(client, "own tests")
    made = environment(client.pins)
    command = (made.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    tools = str(Path(environment("own-suites").python).parents[1] / "lib")
    (packages,) = Path(tools).glob("python*/site-packages")
    places = f"{Sandbox(made, user.home).environment['PYTHONPATH']}:src:{packages}"
    printed = run(user, made, *command, PYTHONPATH=places)
    assert passed(r"(\d+) passed", printed) > 10


def test_phpunit(trial: Begin) -> None:
    user = trial(PHP, "own tests")
    boot = str(DRIVERS / "php_autoload.php")
    command = (installed("phpunit"), "--no-configuration", "--bootstrap", boot, "tests")
    printed = run(user, environment(""), *command, PHP_SOURCE=str(user.home / "own"))
    assert passed(r"OK \((\d+) tests", printed) > 10
