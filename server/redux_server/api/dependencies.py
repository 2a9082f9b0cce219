"""NEW MODULE redux_server.api.dependencies."""

from typing import Annotated, Any

from fastapi import Depends, Request

from redux_server.api.services import Services
from redux_server.errors import BadRequest, NotFound
from redux_server.tasks.task import TASK_ID, Task


# A plain function here would cost every request a trip through a thread pool.
async def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(services_of)]


async def find_mine(task_id: str, request: Request, services: Services) -> Task:
    """The task of that id, if it is the caller's.

    Raises:
        NotFound: it is not, or there is none.
    """
    task = await services.find(task_id) if TASK_ID.fullmatch(task_id) else None
    # Another key's task looks like one that never was: ids must not be confirmed by guessing.
    if task is None or task.key_id != request.state.key_id:
        raise no_task(task_id)
    return task


def no_task(task_id: str) -> NotFound:
    """What to raise for an id that is unknown, or another key's."""
    return NotFound(f"No task {task_id[:64]!r} for this key; results are kept for a limited time.")


async def read_json(request: Request, example: str) -> Any:
    """The body, decoded; ``example`` is shown to whoever sends none."""
    try:
        return await request.json()
    except (ValueError, RecursionError):
        raise BadRequest(
            f"The body is not valid JSON; send an object such as {example} "
            "with Content-Type: application/json."
        ) from None
