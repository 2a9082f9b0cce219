"""What several routes need of a request: the services, the caller's task, a body of JSON.

And the errors that several of them raise. Knows no single path.
"""

import json
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redux_server.api.services import Services
from redux_server.errors import BadRequest, NotFound, TooLarge, Unavailable, no_json
from redux_server.tasks.task import TASK_ID, Task

MAX_IDS = 1000
"""Of what one request may delete."""
MAX_JSON_BYTES = 64 * 2**10
"""Of a body that has no pictures in it: what the event loop parses in a moment."""


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
    """A small body, decoded; ``example`` is shown to whoever sends none.

    Raises:
        BadRequest: it is not JSON.
        TooLarge: it has more than ``MAX_JSON_BYTES``.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise TooLarge(
                f"The request is larger than the {MAX_JSON_BYTES >> 10} KiB allowed here."
            )
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise no_json(example) from None


class DeleteRequest(BaseModel):
    """What to delete."""

    model_config = ConfigDict(strict=True, extra="ignore")

    ids: list[str] = Field(max_length=MAX_IDS, description="Unknown ones are not counted")


async def ids_to_delete(request: Request, kind: str) -> list[str]:
    """The ids in a body that names what is to be deleted; ``kind`` is a word for what.

    Raises:
        BadRequest: it is another body.
        TooLarge: it has more than ``MAX_JSON_BYTES``.
    """
    try:
        return DeleteRequest.model_validate(await read_json(request, '{"ids": ["45b3..."]}')).ids
    except ValidationError:
        raise BadRequest(
            f'The body must be {{"ids": [...]}} with at most {MAX_IDS} {kind} ids, each a text.'
        ) from None
