"""The FastAPI app: routes, middleware, and the answer to each kind of error, put together.

Starting the app starts what the process does beside answering; stopping it ends that in order.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from redux_server import __version__
from redux_server.api import housekeeping, openapi
from redux_server.api.auth import AuthMiddleware
from redux_server.api.decompression import Decompression
from redux_server.api.middleware import (
    BodyLimit,
    Cors,
    RequestContext,
    headers_of_a_crash,
    loggable,
)
from redux_server.api.routes import (
    account,
    cancel,
    files,
    lists,
    models,
    playground,
    predictions,
    service,
    stream,
    uploads,
)
from redux_server.api.services import Services
from redux_server.api.target_uri import TargetUri, TrustedProxies
from redux_server.database.connection import DATABASE_AWAY, WrongTables
from redux_server.errors import ApiError, error_response, no_database, wrong_tables
from redux_server.pictures.inline import MAX_BYTES

BODY_LIMIT = MAX_BYTES * 4 // 3 + 2**20
_log = structlog.get_logger("redux_server.api.app")


def build_app(services: Services) -> FastAPI:
    """The whole API over ``services``; starting the app starts their dispatch."""
    app = FastAPIOffline(
        title="FLUX Redux Server",
        version=__version__,
        summary="Image variations with FLUX.1 Redux, over the API of the hosted flux-pro-redux.",
        description="Runs FLUX.1 [dev] with FLUX.1 Redux [dev], whose licence is non-commercial.",
        lifespan=_lifespan,
        docs_url=None,  # ours has a policy for scripts
        redoc_url=None,
        static_url=service.STATIC,
        redirect_slashes=False,  # the place to go to would be made of the caller's Host header
    )
    app.state.services = services
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign]
    app.include_router(predictions.router)  # first: polls are most of the traffic
    for module in (files, cancel, lists, stream, models, account, uploads):
        app.include_router(module.router)
    app.include_router(models.catalogue)
    app.include_router(predictions.catch_all)
    if services.settings.playground == "on":
        app.include_router(playground.playground(services.settings.public_url))
    app.include_router(service.probes())
    app.include_router(service.router)
    own_limit = partial(uploads.body_limit, max_upload_bytes=services.uploads.max_bytes)
    app.add_middleware(Decompression, limit_of=lambda path: own_limit(path) or BODY_LIMIT)
    app.add_middleware(BodyLimit, limit=BODY_LIMIT, own_limit=own_limit)
    app.add_middleware(
        AuthMiddleware, recognise=services.keys.recognise, remembers=services.keys.remembers
    )
    # Outside of what refuses, so that a page can read refusals; preflights come without a key.
    app.add_middleware(Cors, origins=services.settings.cors_origins)
    app.add_middleware(RequestContext)
    proxies = TrustedProxies(services.settings.trusted_proxy_entries)
    app.add_middleware(TargetUri, proxies=proxies)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    for kind in DATABASE_AWAY:
        app.add_exception_handler(kind, _database_away)
    app.add_exception_handler(WrongTables, _wrong_tables)
    app.add_exception_handler(Exception, _unexpected)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    await services.dispatch.start()
    sweeper = housekeeping.start(services)
    services.webhooks.sender.start()
    try:
        yield
    finally:
        services.poller.close()
        sweeper.cancel()
        await services.dispatch.stop()
        await asyncio.to_thread(services.webhooks.sender.stop)
        services.accept.close()
        services.find.close()
        services.reservations.close()
        services.storage_threads.close()


async def _api_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error_response(error.status, error.message, error.name, error.headers)


async def _database_away(request: Request, _error: Exception) -> JSONResponse:
    return await _api_error(request, no_database())


async def _wrong_tables(request: Request, error: Exception) -> JSONResponse:
    _log.error("the database cannot be used", reason=str(error))
    return await _api_error(request, wrong_tables())


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status, headers = error.status_code, error.headers
    if status == 405 and request.scope.get("endpoint") is predictions.unknown_model:
        status, headers = 404, None  # only the catch-all would take this path, by another method
    messages = {
        404: f"No path {request.url.path[:100]!r} here; /docs lists the paths.",
        405: f"{request.method} is not possible on {request.url.path[:100]!r}; see /docs.",
    }
    message = messages.get(status, str(error.detail))
    return error_response(status, message, "http_error", headers)


async def _client_left(_request: Request, _error: Exception) -> JSONResponse:
    # Nobody reads this; without it each broken upload would leave a traceback in the log.
    return error_response(400, "The request's body ended early.", "incomplete_body")


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    _log.error("unexpected error", path=loggable(request.url.path), exc_info=error)
    origins = request.app.state.services.settings.cors_origins
    headers = headers_of_a_crash(request.url.path, request.headers.get("origin"), origins)
    text = "Unexpected error; the server's log has the details."
    return error_response(500, text, "internal_error", headers)
