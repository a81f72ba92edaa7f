"""`/docs`: the OpenAPI document for people, drawn by Swagger UI, whose files a package brings: nothing comes from elsewhere."""

import asyncio
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from .console import HEADERS, STATIC, TYPES

PAGE, SCRIPT = "/docs", "/docs/docs.js"
SWAGGER = ("/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css")
DOCS = (PAGE, SCRIPT, *SWAGGER)
OPEN_DOCS = frozenset({*DOCS, "/openapi.json"})
"""What needs no token: it is the same of every service, and tells nothing of this one."""
POLICY = HEADERS["content-security-policy"] + "; img-src 'self' data:"
"""Swagger UI's style sheet holds its pictures."""
A_DAY = {"cache-control": "max-age=86400"}


def docs_routes() -> APIRouter:
    """The page and what it loads."""
    router = APIRouter(include_in_schema=False)

    async def page(request: Request) -> Response:
        path = request.scope["path"]
        file = STATIC / ("docs.html" if path == PAGE else "docs.js")
        return Response(file.read_bytes(), headers=HEADERS | {"content-security-policy": POLICY}, media_type=TYPES[file.suffix])

    async def swagger(request: Request) -> Response:
        file = files("fastapi_swagger").joinpath("resources", request.scope["path"].rpartition("/")[2])
        text = await asyncio.to_thread(file.read_bytes)
        return Response(text, headers=HEADERS | A_DAY, media_type=TYPES[f".{file.name.rpartition('.')[2]}"])

    for path in DOCS:
        router.add_api_route(path, swagger if path in SWAGGER else page, methods=["GET"])
    return router
