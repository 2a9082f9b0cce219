"""Command lines: the official npm @wavespeed/cli, and PyPI wavespeedai-skills of a third party."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from clients.roster import CLI, SKILLS
from clients.trial import MODEL, Trial, open_picture

pytestmark = pytest.mark.clients

MISSING = r"404|[Nn]o task"


def cli(
    trial: Trial, *arguments: str, must: bool = True, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run ``wavespeed``, which is told of the server by its configuration file alone."""
    folder = trial.home / ".config/wavespeed-nodejs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"baseUrl": trial.live.base_url}))
    sandbox = trial.sandbox(**{"WAVESPEED_API_KEY": trial.key, **variables})
    done = sandbox.run("wavespeed", *arguments, must=must)
    assert sandbox.left_loopback == []
    return done


def cli_json(trial: Trial, *arguments: str) -> Any:
    """What it prints for programs."""
    return json.loads(cli(trial, *arguments, "--json").stdout)


def test_cli_is_the_version_that_is_spoken_of(trial: Callable[..., Trial]) -> None:
    assert cli(trial(CLI, "version"), "--version").stdout.strip() == CLI.version


def test_cli_runs_a_model_and_downloads_the_picture(trial: Callable[..., Trial]) -> None:
    user = trial(CLI, "run")
    done = cli_json(user, "run", MODEL, *user.inputs(), "--download", "out.png")
    user.check_picture(done["outputs"][0])
    user.check_picture(str(user.home / done["saved"][0]))


def test_cli_runs_in_sync_mode(trial: Callable[..., Trial]) -> None:
    user = trial(CLI, "sync")
    done = cli_json(user, "run", MODEL, *user.inputs(), "--sync")
    user.check_picture(done["outputs"][0])


def test_cli_uploads_a_file(trial: Callable[..., Trial]) -> None:
    user = trial(CLI, "upload")
    url = cli_json(user, "upload", "icon.png")["url"]
    assert open_picture(url).tobytes() == open_picture(str(user.picture)).tobytes()
    done = cli_json(user, "run", MODEL, *user.inputs(image=url))
    user.check_picture(done["outputs"][0])


@pytest.mark.parametrize("case", ["bad key", "bad parameter", "dead URL"])
def test_cli_tells_what_is_wrong(trial: Callable[..., Trial], case: str) -> None:
    user = trial(CLI, case)
    changes: dict[str, Any] = {
        "bad key": {},
        "bad parameter": {"num_images": 5},
        "dead URL": {"image": user.job()["dead"]},
    }[case]
    variables = {"WAVESPEED_API_KEY": "frs_not-a-key"} if case == "bad key" else {}
    arguments = ("run", MODEL, *user.inputs(**changes), "--json")
    done = cli(user, *arguments, must=False, **variables)
    assert done.returncode == 1
    user.check_refusal(case, json.loads(done.stdout)["error"])


def test_cli_shows_the_models_and_what_ours_takes(trial: Callable[..., Trial]) -> None:
    user = trial(CLI, "models, schema")
    listed = cli_json(user, "models", "redux", "--no-cache")
    assert MODEL in [model["model_id"] for model in listed]
    schema = cli_json(user, "schema", MODEL, "--refresh")
    assert schema["required"] == ["image"]
    assert "num_inference_steps" in schema["properties"]
    assert "num_inference_steps" in cli(user, "run", MODEL, "--help").stdout


def test_cli_asks_for_balance_and_price(trial: Callable[..., Trial]) -> None:
    user = trial(CLI, "balance, price")
    assert cli_json(user, "balance")["balance"] >= 0
    price = cli_json(user, "price", MODEL, *user.inputs())
    assert price["model_id"] == MODEL
    assert price["unit_price"] >= 0


def test_cli_lists_shows_and_deletes_what_was_run(trial: Callable[..., Trial]) -> None:
    user = trial(CLI, "history, show, delete")
    task = user.run_plain()
    listed = cli_json(user, "history", "--limit", "100")["items"]
    assert task in [item["id"] for item in listed]
    assert cli_json(user, "history", "--status", "completed", "--limit", "1")["items"]
    shown = cli_json(user, "show", task)
    assert shown["status"] == "completed"
    user.check_picture(shown["outputs"][0])
    cli(user, "delete", task, "--yes", "--json")
    gone = cli(user, "show", task, "--json", must=False)
    user.check_text(MISSING, json.loads(gone.stdout)["error"])


# --- PyPI wavespeedai-skills ----------------------------------------------------------------------


def skills(
    trial: Trial, *arguments: str, must: bool = True, **variables: str
) -> "subprocess.CompletedProcess[str]":
    given = {
        "WAVESPEED_API_KEY": trial.key,
        "WAVESPEED_API_BASE": f"{trial.live.base_url}/api/v3",
    }
    sandbox = trial.sandbox(**{**given, **variables})
    done = sandbox.run("wavespeed-cli", *arguments, must=must)
    assert sandbox.left_loopback == []
    return done


def submit(trial: Trial, **changes: Any) -> str:
    wanted = json.dumps({**trial.body, **changes})
    task: str = json.loads(skills(trial, "submit", MODEL, wanted).stdout)["data"]["id"]
    return task


def test_skills_submit_a_task_and_wait_for_its_picture(trial: Callable[..., Trial]) -> None:
    user = trial(SKILLS, "run")
    done = skills(user, "result", submit(user), "--wait", "--poll-interval", "0.1")
    user.check_picture(json.loads(done.stdout)["data"]["outputs"][0])


@pytest.mark.parametrize("case", ["bad key", "bad parameter"])
def test_skills_tell_what_is_wrong(trial: Callable[..., Trial], case: str) -> None:
    user = trial(SKILLS, case)
    wanted = user.body if case == "bad key" else {**user.body, "num_images": 5}
    variables = {"WAVESPEED_API_KEY": "frs_not-a-key"} if case == "bad key" else {}
    arguments = ("submit", MODEL, json.dumps(wanted))
    done = skills(user, *arguments, must=False, **variables)
    assert done.returncode == 1
    user.check_refusal(case, done.stderr)


def test_skills_show_why_a_task_failed(trial: Callable[..., Trial]) -> None:
    user = trial(SKILLS, "dead URL")
    task = submit(user, image=user.job()["dead"])
    done = skills(user, "result", task, "--wait", "--poll-interval", "0.1", must=False)
    assert done.returncode == 1
    user.check_refusal("dead URL", json.loads(done.stdout)["data"]["error"])


def test_skills_list_models_and_the_balance(trial: Callable[..., Trial]) -> None:
    user = trial(SKILLS, "models, balance")
    models = json.loads(skills(user, "models", "--filter", "redux").stdout)["data"]
    assert MODEL in [model["model_id"] for model in models]
    assert json.loads(skills(user, "balance").stdout)["data"]["balance"] >= 0


def test_skills_cancel_a_task(trial: Callable[..., Trial]) -> None:
    user = trial(SKILLS, "cancel")
    task = submit(user, num_images=4, num_inference_steps=50)
    skills(user, "cancel", task)
    gone = skills(user, "result", task, must=False)
    assert gone.returncode == 1
    user.check_text(MISSING, gone.stderr)
