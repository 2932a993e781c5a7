"""The ASGI application: the API, its reference, the page, and the guard in front of them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp

from launch.serving.api import api
from launch.serving.http.bodies import BodyLimits
from launch.serving.http.clients import Clients
from launch.serving.http.guard import Guard
from launch.serving.http.page_routes import PageRoutes
from launch.serving.http.password import Password
from launch.serving.reference import reference_page
from launch.serving.requests import schema_of_body, sentence_of
from launch.serving.studio import Studio

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
_DESCRIPTION = "Draws images of any size with a Transition Model."


def application(studio: Studio, *, hosts: Collection[str], password: Password | None, proxies: Collection[str] = ()) -> ASGIApp:
    """The whole server. hosts: names by which clients may call it, besides addresses and those of this machine; proxies: addresses whose
    headers X-Forwarded-* count."""
    limits = BodyLimits(max_bytes=studio.limits.max_body, max_values=studio.limits.max_values)
    return Clients(Guard(PageRoutes(unguarded(studio)), hosts=hosts, password=password, limits=limits), proxies=proxies)


def unguarded(studio: Studio) -> FastAPI:
    """The API, its reference, and the page with all addresses that gradio has."""
    app = FastAPI(title="tim", version=version("tim"), description=_DESCRIPTION, docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.include_router(api(studio))
    _describe_body(app, studio)

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi(), base=str(request.base_url)))

    @app.api_route("/api/{path:path}", include_in_schema=False, methods=_METHODS)
    def unknown(request: Request, path: str) -> None:
        if allowed := _methods_of(f"/api/{path}", schema=app.openapi()):
            raise HTTPException(405, f"{request.method}: this address takes {allowed}", headers={"Allow": allowed})
        raise HTTPException(404, "no such address: see /docs")

    _mount_page(app, studio)
    return app


def _methods_of(path: str, *, schema: Mapping[str, Any]) -> str:
    """The methods that an address takes, as in the header Allow; empty for an unknown one."""
    patterns = {template: re.sub(r"\\\{.*?\\\}", "[^/]+", re.escape(template)) for template in schema["paths"]}
    found = [template for template, pattern in patterns.items() if re.fullmatch(pattern, path)]
    return ", ".join(method.upper() for template in found for method in schema["paths"][template])


def _describe_body(app: FastAPI, studio: Studio) -> None:
    """Add the body of POST /api/draw, with the limits of this server, to the schema. The API reads it itself: see there."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        schema["components"]["schemas"].setdefault("DrawRequest", schema_of_body(studio.limits))
        return schema

    app.openapi = openapi


def _mount_page(app: FastAPI, studio: Studio) -> None:
    """Mount the page of gradio, which sends nothing anywhere."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from launch.serving.page.layout import mount

    mount(app, studio)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """A parameter of a path or query that does not fit."""
    assert isinstance(error, RequestValidationError)
    located = [{**each, "loc": each["loc"][1:]} for each in error.errors()]  # after "query" or "path"
    return JSONResponse({"error": sentence_of(located)}, status_code=422)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return JSONResponse({"error": str(error.detail)}, status_code=error.status_code, headers=error.headers)
