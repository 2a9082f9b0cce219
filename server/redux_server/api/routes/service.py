"""The server about itself: whether it lives and is ready, its version, metrics and documentation.

None of it needs an API key.
"""

import asyncio
import platform
from importlib.metadata import version as package_version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from redux_server import __version__, metrics
from redux_server.api import housekeeping, openapi
from redux_server.api.dependencies import ServicesDep
from redux_server.api.fleet import Fleet
from redux_server.api.middleware import policy
from redux_server.api.services import Services
from redux_server.database.connection import DATABASE_AWAY, WrongTables

STATIC = "/static-offline-docs"
DATABASE_PATIENCE_S = 4.0
_PARAMETERS: dict[str, Any] = {"persistAuthorization": True}
router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Swagger UI from files of our own; its one inline script is allowed by its digest."""
    root = request.scope.get("root_path", "")
    page = get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title=f"{request.app.title} - Swagger UI",
        swagger_js_url=f"{root}{STATIC}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{STATIC}/swagger-ui.css",
        swagger_favicon_url=f"{root}{STATIC}/favicon.png",
        swagger_ui_parameters=_PARAMETERS,
    )
    page.headers["Content-Security-Policy"] = policy(bytes(page.body))
    return page


def probes() -> APIRouter:
    """Routes for load balancers and monitors.

    Nested, so that they need no docstrings: FastAPI would put those into the OpenAPI document.
    """
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
    async def readyz(services: ServicesDep) -> Response:
        try:
            found = asyncio.to_thread(_workers_and_waiting, services)
            fleet, bound = await asyncio.wait_for(found, DATABASE_PATIENCE_S)
        except (TimeoutError, WrongTables, *DATABASE_AWAY) as error:
            is_there = isinstance(error, WrongTables)
            reason = str(error) if is_there else "the database does not answer"
            away = {"status": "not ready", "reason": reason, "workers": []}
            return JSONResponse(away, status_code=503)
        return _readiness(services, fleet, bound)

    @router.get("/version", summary="What is running?")
    async def version(services: ServicesDep) -> dict[str, str]:
        fleet = await services.fleet.now()
        return {
            "version": __version__,
            "model": ", ".join(fleet.models),
            "python": platform.python_version(),
            "torch": package_version("torch"),
            "diffusers": package_version("diffusers"),
        }

    @router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
    async def prometheus(services: ServicesDep) -> Response:
        gauges: metrics.Gauges = {}
        try:
            found = asyncio.to_thread(housekeeping.gauges, services)
            gauges = await asyncio.wait_for(found, DATABASE_PATIENCE_S)
        except (TimeoutError, WrongTables, *DATABASE_AWAY):
            pass  # what was counted is known all the same
        gauges |= housekeeping.own_gauges(services, is_database_up=bool(gauges))
        text = await asyncio.to_thread(metrics.exposition, gauges, services.worker_reports)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _workers_and_waiting(services: Services) -> tuple[Fleet, dict[str, int]]:
    return Fleet(tuple(services.presence.all())), services.store.bound()


def _readiness(services: Services, fleet: Fleet, bound: dict[str, int]) -> JSONResponse:
    ready = bool(fleet.ready) and not services.draining.is_on
    listing = [
        {
            "device": each.device,
            "state": each.state,
            "detail": each.detail,
            "model": each.model,
            "fingerprint": each.fingerprint,
        }
        for each in fleet.workers
    ]
    body: dict[str, Any] = {"status": "ready" if ready else "not ready", "workers": listing}
    if services.draining.is_on:
        body["reason"] = "the server is stopping"
    # Still ready: polls, downloads and what was accepted go on.
    if (complaint := services.disk.complaint()) is not None:
        body["refuses_tasks"] = complaint
    if fleet.ready and (unserved := fleet.unserved(bound)):
        body["unserved_tasks"] = [
            {"accepted_for": each, "tasks": count} for each, count in sorted(unserved.items())
        ]
    return JSONResponse(body, status_code=200 if ready else 503)
