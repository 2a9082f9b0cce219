"""The FastAPI app: routes, errors, probes and middleware put together. Holds no logic."""

import asyncio
import platform
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version as package_version
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from redux_server import (
    __version__,
    account_routes,
    cancel_routes,
    docs_page,
    housekeeping,
    list_routes,
    metrics,
    model_routes,
    openapi,
    routes,
    stream_routes,
    upload_routes,
)
from redux_server.auth import AuthMiddleware
from redux_server.cors import Cors, headers_of_a_crash
from redux_server.database import DATABASE_AWAY
from redux_server.errors import ApiError, error_response
from redux_server.inline_image import MAX_BYTES
from redux_server.middleware import BodyLimit, RequestContext, loggable
from redux_server.presence import WorkerState, WorkerStatus
from redux_server.services import Services

DATABASE_PATIENCE_S = 4.0
BODY_LIMIT = MAX_BYTES * 4 // 3 + 2**20
_log = structlog.get_logger("redux_server.app")


def build_app(services: Services) -> FastAPI:
    """The whole API over ``services``; starting the app starts their engine."""
    app = FastAPIOffline(
        title="FLUX Redux Server",
        version=__version__,
        summary="Image variations with FLUX.1 Redux, over the API of the hosted flux-pro-redux.",
        description="Runs FLUX.1 [dev] with FLUX.1 Redux [dev], whose licence is non-commercial.",
        lifespan=_lifespan,
        docs_url=None,  # ours has a policy for scripts
        redoc_url=None,
        static_url=docs_page.STATIC,
        redirect_slashes=False,  # the place to go to would be made of the caller's Host header
    )
    app.state.services = services
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign]
    app.include_router(routes.router)  # first: polls are most of the traffic
    for module in (
        cancel_routes,
        list_routes,
        stream_routes,
        model_routes,
        account_routes,
        upload_routes,
    ):
        app.include_router(module.router)
    app.include_router(routes.catch_all)
    app.include_router(_probes())
    app.include_router(docs_page.router)
    app.add_middleware(
        BodyLimit,
        limit=BODY_LIMIT,
        own_limit=lambda path: upload_routes.body_limit(path, services.uploads.max_bytes),
    )
    app.add_middleware(
        AuthMiddleware, recognise=services.keys.recognise, remembers=services.keys.remembers
    )
    # Outside of what refuses, so that a page can read refusals; preflights come without a key.
    app.add_middleware(Cors, origins=services.settings.cors_origins)
    app.add_middleware(RequestContext)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _unexpected)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    await services.engine.start()
    sweeper = housekeeping.start(services)
    services.webhooks.dispatcher.start()
    try:
        yield
    finally:
        services.streams.close()
        sweeper.cancel()
        services.sync_mode.close()
        await services.engine.stop()
        await asyncio.to_thread(services.webhooks.dispatcher.stop)
        services.accept.close()
        services.find.close()
        services.places.close()


def _probes() -> APIRouter:
    router = APIRouter(tags=["service"])

    @router.head("/livez", include_in_schema=False)
    @router.get("/livez", summary="Is the process alive?")
    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="Is the process alive?")
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @router.head("/readyz", include_in_schema=False)
    @router.get(
        "/readyz",
        summary="Will a task be worked on now?",
        responses={
            200: {"model": openapi.Readiness, "description": "A worker is ready"},
            503: {"model": openapi.Readiness, "description": "None is (yet); each says why"},
        },
    )
    async def readyz(parts: routes.Parts) -> Response:
        try:
            found = asyncio.to_thread(parts.presence.all)
            workers = await asyncio.wait_for(found, DATABASE_PATIENCE_S)
        except (TimeoutError, *DATABASE_AWAY):
            reason = "the database does not answer"
            away = {"status": "not ready", "reason": reason, "workers": []}
            return JSONResponse(away, status_code=503)
        return _readiness(parts, workers)

    @router.get("/version", summary="What is running?")
    async def version(parts: routes.Parts) -> dict[str, str]:
        return {
            "version": __version__,
            "model": parts.settings.base or parts.settings.model,
            "python": platform.python_version(),
            "torch": package_version("torch"),
            "diffusers": package_version("diffusers"),
        }

    @router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
    async def prometheus(parts: routes.Parts) -> Response:
        gauges: metrics.Gauges = {}
        try:
            found = asyncio.to_thread(housekeeping.gauges, parts)
            gauges = await asyncio.wait_for(found, DATABASE_PATIENCE_S)
        except (TimeoutError, *DATABASE_AWAY):
            pass  # what was counted is known all the same
        gauges |= housekeeping.own_gauges(parts, is_database_up=bool(gauges))
        text = await asyncio.to_thread(metrics.exposition, gauges)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _readiness(parts: Services, workers: Sequence[WorkerStatus]) -> JSONResponse:
    has_worker = any(worker.state is WorkerState.READY for worker in workers)
    ready = has_worker and not parts.draining.is_on
    listing = [{"device": w.device, "state": w.state, "detail": w.detail} for w in workers]
    body: dict[str, Any] = {"status": "ready" if ready else "not ready", "workers": listing}
    if parts.draining.is_on:
        body["reason"] = "the server is stopping"
    # Still ready: polls, downloads and what was accepted go on.
    if (complaint := parts.disk.complaint()) is not None:
        body["refuses_tasks"] = complaint
    return JSONResponse(body, status_code=200 if ready else 503)


async def _api_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error_response(error.status, error.message, error.name, error.headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status, headers = error.status_code, error.headers
    if status == 405 and request.scope.get("endpoint") is routes.unknown_model:
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
