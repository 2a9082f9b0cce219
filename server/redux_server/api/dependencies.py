"""What several routes need of a request: the services, the caller's task, a body of JSON.

And the errors that several of them raise. Knows no single path.
"""

from typing import Annotated, Any

from fastapi import Depends, Request

from redux_server.api.services import Services
from redux_server.errors import BadRequest, NotFound, Unavailable
from redux_server.tasks.task import TASK_ID, Task


# A plain function here would cost every request a trip through a thread pool.
async def services_of(request: Request) -> Services:
    """The services that ``build_app`` was given."""
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


def no_pictures() -> Unavailable:
    """What to raise where the store of pictures does not answer."""
    return Unavailable(
        "The store of pictures does not answer; try again.", headers={"Retry-After": "5"}
    )


async def read_json(request: Request, example: str) -> Any:
    """The body, decoded; ``example`` is shown to whoever sends none.

    Raises:
        BadRequest: it is not JSON.
    """
    try:
        return await request.json()
    except (ValueError, RecursionError):
        raise BadRequest(
            f"The body is not valid JSON; send an object such as {example} "
            "with Content-Type: application/json."
        ) from None
