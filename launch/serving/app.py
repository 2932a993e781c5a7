"""The ASGI application: the API, its reference, the page, and the guard in front of them."""

from __future__ import annotations

import os
from collections.abc import Collection
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp

from launch.serving.api import api
from launch.serving.drawing import sentence_of
from launch.serving.guard import Guard
from launch.serving.password import Password
from launch.serving.reference import reference_page
from launch.serving.studio import Studio

_DESCRIPTION = "Draws images of any size with a Transition Model."


def application(studio: Studio, *, hosts: Collection[str], password: Password | None) -> ASGIApp:
    """The whole server. hosts: names by which clients may call it, besides addresses and those of this machine."""
    app = FastAPI(title="tim", version=version("tim"), description=_DESCRIPTION, docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.include_router(api(studio))

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi(), base=str(request.base_url)))

    @app.api_route("/api/{path:path}", include_in_schema=False, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    def unknown(path: str) -> None:
        raise HTTPException(404, "no such address: see /docs")

    _mount_page(app, studio)
    return Guard(app, hosts=hosts, password=password, max_body=studio.limits.max_body)


def _mount_page(app: FastAPI, studio: Studio) -> None:
    """Mount the page of gradio, which sends nothing anywhere."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from launch.serving.page.layout import mount

    mount(app, studio)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is not JSON, or does not fit the schema."""
    assert isinstance(error, RequestValidationError)
    mistakes: Any = error.errors()
    first = mistakes[0]
    if first["type"] == "json_invalid":
        return JSONResponse({"error": "the body is not JSON"}, status_code=400)
    if len(first["loc"]) == 1:
        return JSONResponse({"error": "the body is not an object of JSON: send one, as application/json"}, status_code=422)
    of_key = [each for each in mistakes if each["loc"][:2] == first["loc"][:2]]
    deepest = max(of_key, key=lambda each: len(each["loc"]))  # in a list, its item
    return JSONResponse({"error": sentence_of(deepest)}, status_code=422)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return JSONResponse({"error": str(error.detail)}, status_code=error.status_code, headers=error.headers)
