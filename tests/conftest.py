"""What tests of several folders share: databases, pictures, and a compiler without memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

# What takes a quarter of a minute or more, longest first: whoever began one of these last would
# work on it alone while the other processes have nothing left. Those that wait stand among those
# that compute.
_LONGEST = (
    "weights/test_mini.py",
    "e2e/test_cluster.py",
    "server/dispatch/test_celery_worker.py",
    "e2e/test_chaos.py",
    "pipelines/compilation/test_compiled.py",
    "playground/test_page.py",
    "server/tasks/test_store_model.py",
    "pipelines/denoising/test_warm_up.py",
    "e2e/test_embedded_model.py",
    "pipelines/gpu_report/test_whole_run.py",
    "kernels/test_interpreted.py",
    "server/worker/test_poison.py",
    "weights/test_approximations.py",
    "codegen/test_codegen.py",
    "weights/test_training_smoke.py",
    "pipelines/test_pipeline.py",
    "weights/test_mini_controls.py",
    "kernels/test_offline_compile.py",
    "pipelines/attention/test_choice.py",
    "pipelines/denoising/test_parallel.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(_LONGEST)}
    assert all(path.is_file() for path in places), "_LONGEST names a file that is not there"
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL database with our tables; every test finds there what the last one left."""
    from e2e.services import new_postgres_database
    from redux_server.database.connection import connect
    from redux_server.database.migration import upgrade_database

    with new_postgres_database(is_fast=True) as url:
        engine = connect(url)
        upgrade_database(engine)
        engine.dispose()
        yield url


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile as in a new process: nothing compiled, nothing counted."""
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """The base URL of a site that holds pictures."""
    from e2e.picture_site import picture_site

    with picture_site() as url:
        yield url
