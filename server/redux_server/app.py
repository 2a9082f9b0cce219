"""The FastAPI app: routes, errors, probes and middleware put together. Holds no logic."""

import platform
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version as package_version

import structlog
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from redux_server import __version__, housekeeping, metrics, openapi, routes
from redux_server.auth import AuthMiddleware
from redux_server.errors import ApiError, error_response
from redux_server.inline_image import MAX_BYTES
from redux_server.middleware import BodyLimit, RequestContext
from redux_server.presence import WorkerState
from redux_server.services import Services

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
        redoc_url=None,
        swagger_ui_parameters={"persistAuthorization": True},
    )
    app.state.services = services
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign]
    app.include_router(routes.router)
    app.include_router(_probes())
    app.add_middleware(BodyLimit, limit=BODY_LIMIT)
    app.add_middleware(AuthMiddleware, recognise=services.keys.recognise)
    app.add_middleware(RequestContext)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    await services.engine.start()
    sweeper = housekeeping.start(services)
    try:
        yield
    finally:
        sweeper.cancel()
        await services.engine.stop()
        services.accept.close()
        services.find.close()


def _probes() -> APIRouter:
    router = APIRouter(tags=["service"])

    @router.head("/livez", include_in_schema=False)
    @router.get("/livez", summary="Is the process alive?")
    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="Is the process alive?")
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", summary="Will a task be worked on now?")
    def readyz(parts: routes.Parts) -> Response:
        workers = parts.presence.all()
        ready = any(worker.state is WorkerState.READY for worker in workers)
        listing = [{"device": w.device, "state": w.state, "detail": w.detail} for w in workers]
        body = {"status": "ready" if ready else "not ready", "workers": listing}
        return JSONResponse(body, status_code=200 if ready else 503)

    @router.get("/version", summary="What is running?")
    async def version(parts: routes.Parts) -> dict[str, str]:
        return {
            "version": __version__,
            "model": parts.settings.base or parts.settings.model,
            "python": platform.python_version(),
            "torch": package_version("torch"),
            "diffusers": package_version("diffusers"),
        }

    @router.get("/metrics", summary="Prometheus metrics")
    def prometheus(parts: routes.Parts) -> Response:
        text = metrics.exposition(lambda: housekeeping.gauges(parts))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


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


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    _log.error("unexpected error", path=request.url.path, exc_info=error)
    return error_response(
        500, "Unexpected error; the server's log has the details.", "internal_error"
    )
